"""Rows and fields that several families share."""

from collections.abc import Sequence
from typing import Any, cast

from moe.config import AttentionConfig, AttentionLike, TransformerConfig
from moe.families.family import Limit, Tensor
from moe.families.fields import Fields
from moe.families.rope import Rope, read_rope, write_rope

NORMS = (
    Tensor('attention_norm/scale', 'input_layernorm.weight', 'd -> d'),
    Tensor('mlp_norm/scale', 'post_attention_layernorm.weight', 'd -> d'),
)
ATTENTION = (
    Tensor('attention/q', 'self_attn.q_proj.weight', '(h k) d -> d h k'),
    Tensor('attention/k', 'self_attn.k_proj.weight', '(h k) d -> d h k'),
    Tensor('attention/v', 'self_attn.v_proj.weight', '(h k) d -> d h k'),
    Tensor('attention/o', 'self_attn.o_proj.weight', 'd (h k) -> h k d'),
    Tensor('attention/q_bias', 'self_attn.q_proj.bias', '(h k) -> h k'),
    Tensor('attention/k_bias', 'self_attn.k_proj.bias', '(h k) -> h k'),
    Tensor('attention/v_bias', 'self_attn.v_proj.bias', '(h k) -> h k'),
    Tensor('attention/o_bias', 'self_attn.o_proj.bias', 'd -> d'),
    Tensor('attention/q_norm/scale', 'self_attn.q_norm.weight', 'k -> k'),
    Tensor('attention/k_norm/scale', 'self_attn.k_norm.weight', 'k -> k'),
)
FULL_QK_NORM = (
    Tensor('attention/q_norm/scale', 'self_attn.q_norm.weight', '(h k) -> h k'),
    Tensor('attention/k_norm/scale', 'self_attn.k_norm.weight', '(h k) -> h k'),
)


def gated_mlp(ours: str, theirs: str) -> tuple[Tensor, ...]:
    """Returns the rows of a gated MLP."""
    return (
        Tensor(f'{ours}/gate_up', f'{theirs}.gate_proj.weight', 'f d -> d 0 f'),
        Tensor(f'{ours}/gate_up', f'{theirs}.up_proj.weight', 'f d -> d 1 f'),
        Tensor(f'{ours}/down', f'{theirs}.down_proj.weight', 'd f -> f d'),
    )


def routed_experts(
    module: str, gate: str = 'gate_proj', up: str = 'up_proj', down: str = 'down_proj'
) -> tuple[Tensor, ...]:
    """Returns the rows of a router, and of experts that are stored one by one."""
    experts = f'{module}.experts.{{e}}'
    return (
        Tensor('moe/router/kernel', f'{module}.gate.weight', 'e d -> d e'),
        Tensor('moe/gate_up', f'{experts}.{gate}.weight', 'f d -> e d 0 f'),
        Tensor('moe/gate_up', f'{experts}.{up}.weight', 'f d -> e d 1 f'),
        Tensor('moe/down', f'{experts}.{down}.weight', 'd f -> e f d'),
    )


MLP = gated_mlp('mlp', 'mlp')

EVEN_WIDTH = Limit(
    'embed_dim',
    'a multiple of attention.num_heads',
    lambda config: config.embed_dim % config.attention_layers[0].num_heads == 0,
)


def read_base(fields: Fields, activation: str = 'silu') -> dict[str, Any]:
    """Reads the fields of `TransformerConfig` that all families have, `mlp_dim` besides."""
    fields.require('hidden_act', activation)
    fields.require('hidden_activation', activation)
    return {
        'vocab_size': fields.get('vocab_size'),
        'num_layers': fields.get('num_hidden_layers'),
        'embed_dim': fields.get('hidden_size'),
        'mlp_dim': fields.get('intermediate_size'),
        'norm_eps': float(fields.get('rms_norm_eps')),
        'tie_embeddings': fields.get('tie_word_embeddings', default=False),
    }


def write_base(config: TransformerConfig, activation: str = 'silu') -> dict[str, Any]:
    """Undoes `read_base`."""
    return {
        'vocab_size': config.vocab_size,
        'num_hidden_layers': config.num_layers,
        'hidden_size': config.embed_dim,
        'intermediate_size': config.mlp_dim,
        'rms_norm_eps': config.norm_eps,
        'tie_word_embeddings': config.tie_embeddings,
        'hidden_act': activation,
        'attention_dropout': 0.0,
    }


def read_attention(
    fields: Fields, *, rope: Rope | None = None, head_dim: int | None = None, **other: Any
) -> AttentionConfig:
    """Reads grouped-query attention to all tokens.

    Args:
        fields: of the config.json.
        rope: base and scaling; None where the config.json has one of the usual spelling.
        head_dim: where the config.json has none; None for width / heads.
        other: fields of `AttentionConfig` that are the family's own.
    """
    heads = fields.get('num_attention_heads')
    theta, scaling = read_rope(fields, 10_000.0) if rope is None else rope
    return AttentionConfig(
        num_heads=heads,
        num_kv_heads=fields.get('num_key_value_heads', default=heads),
        head_dim=fields.get('head_dim', default=head_dim or fields.get('hidden_size') // heads),
        rope_theta=theta,
        rope_scaling=scaling,
        **other,
    )


def write_attention(attention: AttentionConfig) -> dict[str, Any]:
    """Undoes `read_attention`."""
    return {
        'num_attention_heads': attention.num_heads,
        'num_key_value_heads': attention.num_kv_heads,
        'head_dim': attention.head_dim,
        **write_rope(attention.rope_theta, attention.rope_scaling),
    }


def first(kinds: Sequence[Any], sliding: bool) -> Any:
    """Returns the first layer's attention that has a window, or none; else the very first."""
    return next((kind for kind in kinds if (kind.window is not None) == sliding), kinds[0])


def layer_types(config: TransformerConfig) -> list[str]:
    """Says of each layer whether its queries see a window."""
    windows = [kind.window for kind in cast(Sequence[Any], config.attention_layers)]
    return ['full_attention' if window is None else 'sliding_attention' for window in windows]


def pattern(kinds: Sequence[AttentionLike]) -> tuple[AttentionLike, ...] | AttentionLike:
    """Returns the shortest pattern that, over and over, gives the layers their kinds."""
    for period in range(1, len(kinds) + 1):
        if all(kind == kinds[i % period] for i, kind in enumerate(kinds)):
            break
    return kinds[0] if period == 1 else tuple(kinds[:period])
