"""DeepSeek-V3, and so Moonlight and Kimi-K2: latent attention, sigmoid routers with biases."""

from typing import Any

from moe.config import LatentAttentionConfig, MoEConfig, RouterConfig, TransformerConfig
from moe.families.common import MLP, NORMS, gated_mlp, read_base, routed_experts, write_base
from moe.families.family import Family, Limit, Tensor
from moe.families.fields import Fields
from moe.families.rope import read_rope, write_rope

_LATENT = (
    Tensor('attention/q', 'self_attn.q_proj.weight', '(h k) d -> d h k'),
    Tensor('attention/q_down', 'self_attn.q_a_proj.weight', 'r d -> d r'),
    Tensor('attention/q_norm/scale', 'self_attn.q_a_layernorm.weight', 'r -> r'),
    Tensor('attention/q_up', 'self_attn.q_b_proj.weight', '(h k) r -> r h k'),
    Tensor('attention/kv_down', 'self_attn.kv_a_proj_with_mqa.weight', 'r d -> d r'),
    Tensor('attention/kv_norm/scale', 'self_attn.kv_a_layernorm.weight', 'r -> r'),
    Tensor('attention/kv_up', 'self_attn.kv_b_proj.weight', '(h k) r -> r h k'),
    Tensor('attention/o', 'self_attn.o_proj.weight', 'd (h k) -> h k d'),
)


def _read_attention(fields: Fields) -> LatentAttentionConfig:
    fields.require('attention_bias', False)
    fields.require('rope_interleave', True)
    theta, scaling = read_rope(fields, 10_000.0)
    return LatentAttentionConfig(
        num_heads=fields.get('num_attention_heads'),
        kv_rank=fields.get('kv_lora_rank'),
        nope_dim=fields.get('qk_nope_head_dim'),
        rope_dim=fields.get('qk_rope_head_dim'),
        value_dim=fields.get('v_head_dim'),
        query_rank=fields.get('q_lora_rank', default=None),
        rope_theta=theta,
        rope_scaling=scaling,
    )


def _read_router(fields: Fields) -> RouterConfig:
    fields.require('scoring_func', 'sigmoid')
    fields.require('topk_method', 'noaux_tc')
    return RouterConfig(
        num_experts=fields.get('n_routed_experts', 'num_local_experts', 'num_experts'),
        experts_per_token=fields.get('num_experts_per_tok'),
        score='sigmoid',
        normalize='after' if fields.get('norm_topk_prob', default=True) else 'none',
        scale=float(fields.get('routed_scaling_factor')),
        selection_bias=True,
        num_groups=fields.get('n_group', default=1),
        groups_kept=fields.get('topk_group', default=1),
    )


def _read(fields: Fields) -> TransformerConfig:
    fields.require('moe_layer_freq', 1)
    base = read_base(fields)
    dense = fields.get('first_k_dense_replace', default=0)
    moe = None
    if dense < base['num_layers']:
        width = fields.get('moe_intermediate_size')
        moe = MoEConfig(
            _read_router(fields),
            expert_dim=width,
            shared_dim=width * fields.get('n_shared_experts', default=0),
            first_dense_layers=dense,
        )
    return TransformerConfig(**base, attention=_read_attention(fields), moe=moe)


def _write(config: TransformerConfig) -> dict[str, Any]:
    attention: Any = config.attention_layers[0]
    return {
        **write_base(config),
        'num_attention_heads': attention.num_heads,
        'num_key_value_heads': attention.num_heads,
        'kv_lora_rank': attention.kv_rank,
        'q_lora_rank': attention.query_rank,
        'qk_nope_head_dim': attention.nope_dim,
        'qk_rope_head_dim': attention.rope_dim,
        'v_head_dim': attention.value_dim,
        **write_rope(attention.rope_theta, attention.rope_scaling),
        'rope_interleave': True,
        'attention_bias': False,
        'num_nextn_predict_layers': 0,
        **_write_experts(config),
    }


def _write_experts(config: TransformerConfig) -> dict[str, Any]:
    moe = config.moe
    if moe is None:
        return {'first_k_dense_replace': config.num_layers}
    router = moe.router
    return {
        'first_k_dense_replace': config.moe_layers.index(True),
        'moe_layer_freq': 1,
        'moe_intermediate_size': moe.expert_dim,
        'n_routed_experts': router.num_experts,
        'num_local_experts': router.num_experts,
        'n_shared_experts': moe.shared_dim // moe.expert_dim,
        'num_experts_per_tok': router.experts_per_token,
        'n_group': router.num_groups,
        'topk_group': router.groups_kept,
        'norm_topk_prob': router.normalize == 'after',
        'routed_scaling_factor': router.scale,
        'scoring_func': 'sigmoid',
        'topk_method': 'noaux_tc',
    }


DEEPSEEK_V3 = Family(
    model_type='deepseek_v3',
    architecture='DeepseekV3ForCausalLM',
    read=_read,
    write=_write,
    layer=(
        *NORMS,
        *_LATENT,
        *MLP,
        *routed_experts('mlp'),
        Tensor('moe/router/selection_bias', 'mlp.gate.e_score_correction_bias', 'e -> e'),
        *gated_mlp('moe/shared', 'mlp.shared_experts'),
    ),
    attention=LatentAttentionConfig,
    experts=None,
    limits=(
        Limit(
            'moe.shared_dim',
            'a multiple of moe.expert_dim, and not 0',
            lambda config: (
                config.moe is None
                or (
                    config.moe.shared_dim > 0 and config.moe.shared_dim % config.moe.expert_dim == 0
                )
            ),
        ),
        Limit(
            'moe.router.num_experts',
            '2 or more',
            lambda config: config.moe is None or config.moe.router.num_experts >= 2,
        ),
    ),
    aliases=('kimi_k2',),
    # The layers of multi-token prediction stand behind those of the model.
    layers_behind=True,
)
