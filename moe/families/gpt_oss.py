"""GPT-OSS: sinks, biases everywhere, and experts whose gate and up projections are interleaved."""

from typing import Any

from moe.config import MoEConfig, RouterConfig, TransformerConfig
from moe.families.common import (
    ATTENTION,
    NORMS,
    first,
    layer_types,
    pattern,
    read_attention,
    read_base,
    write_attention,
    write_base,
)
from moe.families.family import Family, Tensor
from moe.families.fields import Fields
from moe.families.rope import read_rope
from moe.layers import SWIGLU_LIMIT, SWIGLU_SLOPE

_OWN = {
    'activation': 'clamped_swiglu',
    'norm_scale_float32': True,
}


def _read(fields: Fields) -> TransformerConfig:
    fields.require('swiglu_limit', SWIGLU_LIMIT)
    fields.require('swiglu_alpha', SWIGLU_SLOPE)
    base = read_base(fields)
    bias = fields.get('attention_bias', default=True)
    settings: dict[str, Any] = {
        'rope': read_rope(fields, 150_000.0),
        'head_dim': 64,
        'sinks': True,
        'qkv_bias': bias,
        'output_bias': bias,
    }
    full = read_attention(fields, **settings)
    sliding = read_attention(fields, window=fields.get('sliding_window'), **settings)
    alternating = ['sliding_attention', 'full_attention'] * base['num_layers']
    types = fields.get('layer_types', default=alternating)[: base['num_layers']]
    kinds = [sliding if kind == 'sliding_attention' else full for kind in types]
    router = RouterConfig(
        fields.get('num_local_experts', 'num_experts'),
        fields.get('num_experts_per_tok', 'experts_per_token'),
        bias=True,
    )
    moe = MoEConfig(router, expert_dim=base['mlp_dim'], bias=True)
    return TransformerConfig(**base, **_OWN, attention=pattern(kinds), moe=moe)


def _write(config: TransformerConfig) -> dict[str, Any]:
    moe: Any = config.moe
    full = first(config.attention_layers, sliding=False)
    sliding = first(config.attention_layers, sliding=True)
    return {
        **write_base(config),
        **write_attention(full),
        'intermediate_size': moe.expert_dim,
        'attention_bias': full.output_bias,
        'num_local_experts': moe.router.num_experts,
        'num_experts': moe.router.num_experts,
        'num_experts_per_tok': moe.router.experts_per_token,
        'experts_per_token': moe.router.experts_per_token,
        # Read, and of no layer, where none has a window.
        'sliding_window': sliding.window or 128,
        'layer_types': layer_types(config),
        'swiglu_limit': SWIGLU_LIMIT,
        'swiglu_alpha': SWIGLU_SLOPE,
        'output_router_logits': False,
    }


GPT_OSS = Family(
    model_type='gpt_oss',
    architecture='GptOssForCausalLM',
    read=_read,
    write=_write,
    layer=(
        *NORMS,
        *ATTENTION,
        Tensor('attention/sinks', 'self_attn.sinks', 'h -> h'),
        Tensor('moe/router/kernel', 'mlp.router.weight', 'e d -> d e'),
        Tensor('moe/router/bias', 'mlp.router.bias', 'e -> e'),
        Tensor('moe/gate_up', 'mlp.experts.gate_up_proj', 'e d (f g) -> e d g f'),
        Tensor('moe/gate_up_bias', 'mlp.experts.gate_up_proj_bias', 'e (f g) -> e g f'),
        Tensor('moe/down', 'mlp.experts.down_proj', 'e f d -> e f d'),
        Tensor('moe/down_bias', 'mlp.experts.down_proj_bias', 'e d -> e d'),
    ),
    experts=True,
)
