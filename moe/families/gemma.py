"""Gemma, and Gemma 2 and the text part of 3: norms around every part, soft caps, local layers."""

import dataclasses
import functools
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
from moe.families.family import TOP, Family, Tensor
from moe.families.fields import Fields
from moe.families.rope import Rope, read_rope, rope_parameters, write_rope

_GELU = 'gelu_pytorch_tanh'
_OWN = {
    'activation': 'gelu',
    'norm_unit_offset': True,
    'norm_scale_float32': True,
    'scale_embedding': True,
}
# Of the text in a folder of text and images.
_UNSAID = {
    'vocab_size': 262_208,
    'num_attention_heads': 8,
    'num_key_value_heads': 4,
    'head_dim': 256,
    'rms_norm_eps': 1e-6,
    'query_pre_attn_scalar': 256,
    'sliding_window': 4096,
}
_SLIDING, _FULL = 'sliding_attention', 'full_attention'


def _read_gemma(fields: Fields) -> TransformerConfig:
    """The first files say 'gelu' and mean its approximation by tanh."""
    fields.require('use_bidirectional_attention', False)
    fields.require('hidden_act', _GELU, 'gelu')
    base = read_base(Fields({**fields.values, 'hidden_act': _GELU}, fields.file), _GELU)
    base['tie_embeddings'] = fields.get('tie_word_embeddings', default=True)
    fields.get('head_dim')
    bias = fields.get('attention_bias', default=False)
    attention = read_attention(fields, qkv_bias=bias, output_bias=bias)
    return TransformerConfig(**base, **_OWN, attention=attention)


def _read(
    fields: Fields, full_rope: Rope, local_rope: Rope, usual: list[str], caps: tuple, **other: Any
) -> TransformerConfig:
    fields.require('use_bidirectional_attention', False)
    base = read_base(fields, _GELU)
    base['tie_embeddings'] = fields.get('tie_word_embeddings', default=True)
    head_dim = fields.get('head_dim')
    scalar = fields.get('query_pre_attn_scalar')
    bias = fields.get('attention_bias', default=False)
    make = functools.partial(
        read_attention,
        fields,
        qkv_bias=bias,
        output_bias=bias,
        scale=None if scalar == head_dim else scalar**-0.5,
        soft_cap=_cap(fields, 'attn_logit_softcapping', caps[0]),
        **other,
    )
    sliding = make(rope=local_rope, window=fields.get('sliding_window'))
    full = make(rope=full_rope)
    types = fields.get('layer_types', default=usual * base['num_layers'])[: base['num_layers']]
    kinds = [sliding if kind == _SLIDING else full for kind in types]
    return TransformerConfig(
        **base,
        **_OWN,
        post_norms=True,
        logit_soft_cap=_cap(fields, 'final_logit_softcapping', caps[1]),
        attention=pattern(kinds),
    )


def _cap(fields: Fields, name: str, default: float | None) -> float | None:
    """A cap that is null is none; one that is missing is the family's."""
    return fields.get(name, default=None) if fields.has(name) else default


def _read_gemma2(fields: Fields) -> TransformerConfig:
    rope = read_rope(fields, 10_000.0)
    return _read(fields, rope, rope, [_SLIDING, _FULL], (50.0, 30.0))


def _read_gemma3(fields: Fields) -> TransformerConfig:
    return _read(
        fields,
        read_rope(fields, 1_000_000.0, layer_type=_FULL),
        read_rope(
            fields,
            10_000.0,
            layer_type=_SLIDING,
            theta_key='rope_local_base_freq',
            scaled=False,
        ),
        [_SLIDING] * (fields.get('sliding_window_pattern', default=6) - 1) + [_FULL],
        (None, None),
        qk_norm='head',
    )


def _read_gemma3_of_images(fields: Fields) -> TransformerConfig:
    """The released files leave out what is as in the class."""
    return _read_gemma3(Fields(_UNSAID | fields.get('text_config'), fields.file))


def _write_gemma(config: TransformerConfig) -> dict[str, Any]:
    attention: AttentionConfig = first(config.attention_layers, sliding=False)
    return {
        **write_base(config, _GELU),
        **write_attention(attention),
        'hidden_activation': _GELU,
        'attention_bias': attention.output_bias,
        'use_bidirectional_attention': False,
    }


def _write_gemma2(config: TransformerConfig) -> dict[str, Any]:
    full = first(config.attention_layers, sliding=False)
    scale = full.score_scale
    return {
        **_write_gemma(config),
        'query_pre_attn_scalar': round(scale**-2),
        'attn_logit_softcapping': full.soft_cap,
        'final_logit_softcapping': config.logit_soft_cap,
        # Read, and of no layer, where none has a window.
        'sliding_window': first(config.attention_layers, sliding=True).window or 4096,
        'layer_types': layer_types(config),
    }


def _write_gemma3(config: TransformerConfig) -> dict[str, Any]:
    full: AttentionConfig = first(config.attention_layers, sliding=False)
    local: AttentionConfig = first(config.attention_layers, sliding=True)
    flat = write_rope(full.rope_theta, full.rope_scaling)
    return {
        **_write_gemma2(config),
        **flat,
        'rope_parameters': {
            _FULL: flat['rope_parameters'],
            _SLIDING: rope_parameters(local.rope_theta, local.rope_scaling),
        },
        'rope_local_base_freq': local.rope_theta,
    }


_LAYER = (
    Tensor('attention_norm/scale', 'input_layernorm.weight', 'd -> d'),
    Tensor('attention_post_norm/scale', 'post_attention_layernorm.weight', 'd -> d'),
    Tensor('mlp_norm/scale', 'pre_feedforward_layernorm.weight', 'd -> d'),
    Tensor('mlp_post_norm/scale', 'post_feedforward_layernorm.weight', 'd -> d'),
    *ATTENTION,
    *MLP,
)

GEMMA = Family(
    model_type='gemma',
    architecture='GemmaForCausalLM',
    read=_read_gemma,
    write=_write_gemma,
    layer=(*NORMS, *ATTENTION, *MLP),
    limits=(EVEN_WIDTH,),
)
GEMMA2 = Family(
    model_type='gemma2',
    architecture='Gemma2ForCausalLM',
    read=_read_gemma2,
    write=_write_gemma2,
    layer=_LAYER,
    limits=(EVEN_WIDTH,),
)
GEMMA3 = Family(
    model_type='gemma3_text',
    architecture='Gemma3ForCausalLM',
    read=_read_gemma3,
    write=_write_gemma3,
    layer=_LAYER,
    limits=(EVEN_WIDTH,),
)
_OF_IMAGES = 'language_model.'
# A model of text and images; its images are left out, and the text is written as GEMMA3.
GEMMA3_OF_IMAGES = dataclasses.replace(
    GEMMA3,
    model_type='gemma3',
    architecture='Gemma3ForConditionalGeneration',
    read=_read_gemma3_of_images,
    top=tuple(row._replace(theirs=_OF_IMAGES + row.theirs) for row in TOP),
    layer_prefix=_OF_IMAGES + GEMMA3.layer_prefix,
    left_out=(*GEMMA3.left_out, r'vision_tower\..*', r'multi_modal_projector\..*'),
)
