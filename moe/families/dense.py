"""Llama 3.x, Qwen2 (and 2.5) and Qwen3: dense decoders that differ in biases and norms."""

from typing import Any

from moe.config import AttentionConfig, TransformerConfig
from moe.families.common import (
    ATTENTION,
    EVEN_WIDTH,
    MLP,
    NORMS,
    first,
    layer_types,
    pattern,
    read_attention,
    read_base,
    write_attention,
    write_base,
)
from moe.families.family import Family
from moe.families.fields import Fields
from moe.families.rope import read_rope


def _read_llama(fields: Fields) -> TransformerConfig:
    fields.require('mlp_bias', False)
    fields.require('pretraining_tp', 1)
    bias = fields.get('attention_bias', default=False)
    attention = read_attention(fields, qkv_bias=bias, output_bias=bias)
    return TransformerConfig(**read_base(fields), attention=attention)


def _write_llama(config: TransformerConfig) -> dict[str, Any]:
    attention: Any = config.attention_layers[0]
    return {
        **write_base(config),
        **write_attention(attention),
        'attention_bias': attention.output_bias,
        'mlp_bias': False,
    }


def _read_windowed(fields: Fields, **other: Any) -> TransformerConfig:
    """Qwen's layers from `max_window_layers` on see a window, where that is switched on."""
    base = read_base(fields)
    full = read_attention(fields, rope=read_rope(fields, 10_000.0), **other)
    window = None
    if fields.get('use_sliding_window', default=False):
        window = fields.get('sliding_window', default=None)
    if window is None:
        return TransformerConfig(**base, attention=full)
    sliding = read_attention(fields, window=window, **other)
    start = fields.get('max_window_layers', default=28)
    usual = ['full_attention' if i < start else 'sliding_attention' for i in range(1024)]
    types = fields.get('layer_types', default=usual)[: base['num_layers']]
    kinds = [sliding if kind == 'sliding_attention' else full for kind in types]
    return TransformerConfig(**base, attention=pattern(kinds))


def _write_windowed(config: TransformerConfig) -> dict[str, Any]:
    window = first(config.attention_layers, sliding=True).window
    types = layer_types(config)
    return {
        **write_base(config),
        **write_attention(first(config.attention_layers, sliding=False)),
        'use_sliding_window': window is not None,
        'sliding_window': window,
        # What a reader without `layer_types` goes by; it gives the same where it can.
        'max_window_layers': next(
            (i for i, kind in enumerate(types) if kind != 'full_attention'), len(types)
        ),
        'layer_types': types,
    }


def _read_qwen2(fields: Fields) -> TransformerConfig:
    return _read_windowed(fields, qkv_bias=True)


def _read_qwen3(fields: Fields) -> TransformerConfig:
    bias = fields.get('attention_bias', default=False)
    fields.get('head_dim')
    return _read_windowed(fields, qk_norm='head', qkv_bias=bias, output_bias=bias)


def _write_qwen3(config: TransformerConfig) -> dict[str, Any]:
    attention: AttentionConfig | Any = config.attention_layers[0]
    return {**_write_windowed(config), 'attention_bias': attention.output_bias}


_LAYER = (*NORMS, *ATTENTION, *MLP)

LLAMA = Family(
    model_type='llama',
    architecture='LlamaForCausalLM',
    read=_read_llama,
    write=_write_llama,
    layer=_LAYER,
    limits=(EVEN_WIDTH,),
)
QWEN2 = Family(
    model_type='qwen2',
    architecture='Qwen2ForCausalLM',
    read=_read_qwen2,
    write=_write_windowed,
    layer=_LAYER,
)
QWEN3 = Family(
    model_type='qwen3',
    architecture='Qwen3ForCausalLM',
    read=_read_qwen3,
    write=_write_qwen3,
    layer=_LAYER,
)
