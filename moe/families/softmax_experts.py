"""Mixtral, OLMoE and Qwen3-MoE: grouped-query attention, and experts behind a softmax router."""

import math
from typing import Any

from moe.config import MoEConfig, RouterConfig, TransformerConfig
from moe.families.common import (
    ATTENTION,
    FULL_QK_NORM,
    MLP,
    NORMS,
    read_attention,
    read_base,
    routed_experts,
    write_attention,
    write_base,
)
from moe.families.family import Family, Limit
from moe.families.fields import Fields
from moe.families.rope import read_rope


def _read_router(fields: Fields, **other: Any) -> RouterConfig:
    return RouterConfig(
        fields.get('num_local_experts', 'num_experts'), fields.get('num_experts_per_tok'), **other
    )


def _read_normalize(fields: Fields) -> str:
    return 'after' if fields.get('norm_topk_prob', default=False) else 'none'


def _write_experts(config: TransformerConfig) -> dict[str, Any]:
    moe: Any = config.moe
    return {
        'num_experts': moe.router.num_experts,
        'num_local_experts': moe.router.num_experts,
        'num_experts_per_tok': moe.router.experts_per_token,
        'norm_topk_prob': moe.router.normalize == 'after',
        'output_router_logits': False,
    }


def _read_mixtral(fields: Fields) -> TransformerConfig:
    base = read_base(fields)
    attention = read_attention(
        fields, rope=read_rope(fields), window=fields.get('sliding_window', default=None)
    )
    router = _read_router(fields, jitter=fields.get('router_jitter_noise', default=0.0))
    return TransformerConfig(**base, attention=attention, moe=MoEConfig(router, base['mlp_dim']))


def _write_mixtral(config: TransformerConfig) -> dict[str, Any]:
    moe: Any = config.moe
    attention: Any = config.attention_layers[0]
    return {
        **write_base(config),
        **write_attention(attention),
        **_write_experts(config),
        'intermediate_size': moe.expert_dim,
        'sliding_window': attention.window,
        'router_jitter_noise': moe.router.jitter,
    }


def _read_olmoe(fields: Fields) -> TransformerConfig:
    base = read_base(fields)
    bias = fields.get('attention_bias', default=False)
    attention = read_attention(
        fields,
        qk_norm='full',
        qkv_bias=bias,
        output_bias=bias,
        clip_qkv=fields.get('clip_qkv', default=None),
    )
    moe = MoEConfig(_read_router(fields, normalize=_read_normalize(fields)), base['mlp_dim'])
    return TransformerConfig(**base, attention=attention, moe=moe)


def _heads(attention: Any) -> tuple[int, int]:
    return attention.num_heads, attention.head_dim


def _write_olmoe(config: TransformerConfig) -> dict[str, Any]:
    moe: Any = config.moe
    attention: Any = config.attention_layers[0]
    return {
        **write_base(config),
        **write_attention(attention),
        **_write_experts(config),
        'intermediate_size': moe.expert_dim,
        'attention_bias': attention.output_bias,
        'clip_qkv': attention.clip_qkv,
    }


def _read_qwen3_moe(fields: Fields) -> TransformerConfig:
    base = read_base(fields)
    bias = fields.get('attention_bias', default=False)
    window = None
    if fields.get('use_sliding_window', default=False):
        window = fields.get('sliding_window', default=None)
    fields.get('head_dim')
    attention = read_attention(
        fields, qk_norm='head', qkv_bias=bias, output_bias=bias, window=window
    )
    step = fields.get('decoder_sparse_step', default=1)
    dense = fields.get('mlp_only_layers', default=None) or []
    routed = [i for i in range(base['num_layers']) if (i + 1) % step == 0 and i not in dense]
    moe = MoEConfig(
        _read_router(fields, normalize=_read_normalize(fields)),
        expert_dim=fields.get('moe_intermediate_size'),
        layer_step=1 if dense else step,
        layers=tuple(routed) if dense else None,
    )
    return TransformerConfig(**base, attention=attention, moe=moe if routed else None)


def _write_qwen3_moe(config: TransformerConfig) -> dict[str, Any]:
    moe: Any = config.moe
    attention: Any = config.attention_layers[0]
    step = moe.layer_step
    stepped = all(has == ((i + 1) % step == 0) for i, has in enumerate(config.moe_layers))
    dense = [i for i, has_experts in enumerate(config.moe_layers) if not has_experts]
    return {
        **write_base(config),
        **write_attention(attention),
        **_write_experts(config),
        'moe_intermediate_size': moe.expert_dim,
        'decoder_sparse_step': step if stepped else 1,
        'mlp_only_layers': [] if stepped else dense,
        'attention_bias': attention.output_bias,
        'use_sliding_window': attention.window is not None,
        'sliding_window': attention.window,
    }


_HEADS_FILL_WIDTH = Limit(
    'attention.head_dim',
    'embed_dim / attention.num_heads',
    lambda config: config.embed_dim == math.prod(_heads(config.attention_layers[0])),
)


MIXTRAL = Family(
    model_type='mixtral',
    architecture='MixtralForCausalLM',
    read=_read_mixtral,
    write=_write_mixtral,
    layer=(*NORMS, *ATTENTION, *routed_experts('block_sparse_moe', 'w1', 'w3', 'w2')),
    experts=True,
)
OLMOE = Family(
    model_type='olmoe',
    architecture='OlmoeForCausalLM',
    read=_read_olmoe,
    write=_write_olmoe,
    layer=(*NORMS, *ATTENTION, *FULL_QK_NORM, *routed_experts('mlp')),
    experts=True,
    limits=(_HEADS_FILL_WIDTH,),
)
QWEN3_MOE = Family(
    model_type='qwen3_moe',
    architecture='Qwen3MoeForCausalLM',
    read=_read_qwen3_moe,
    write=_write_qwen3_moe,
    layer=(*NORMS, *ATTENTION, *MLP, *routed_experts('mlp')),
    experts=True,
)
