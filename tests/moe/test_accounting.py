"""Parameters, FLOPs and bytes: by hand, against the model, XLA and published figures."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params

from moe.accounting import bytes_per_token, flops_per_token, parameter_report
from moe.config import (
    AttentionConfig,
    LatentAttentionConfig,
    LinearAttentionConfig,
    MoEConfig,
    RouterConfig,
    TransformerConfig,
)
from moe.errors import InputError
from moe.sharding import abstract_variables
from moe.transformer import Transformer

# V=10, L=2, D=4, F=6, H=2, Hkv=1, Dh=2; of 3 experts with F=5 each token passes 2; shared F=7.
TINY = TransformerConfig(
    vocab_size=10,
    num_layers=2,
    embed_dim=4,
    mlp_dim=6,
    attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=2, qk_norm='head'),
    moe=MoEConfig(
        router=RouterConfig(num_experts=3, experts_per_token=2),
        expert_dim=5,
        shared_dim=7,
        first_dense_layers=1,
    ),
)


def test_parameters_by_hand() -> None:
    report = parameter_report(TINY)
    assert report.by_part == {
        'embedding': 40,
        'head': 40,
        'attention': 2 * (16 + 8 + 8 + 16),
        'norms': 2 * (4 + 4 + 2 + 2) + 4,
        'mlp': 3 * 4 * 6,
        'router': 4 * 3,
        'shared': 3 * 4 * 7,
        'experts': 3 * (3 * 4 * 5),
        'mtp': 0,
    }
    assert report.total == 80 + 96 + 28 + 72 + 12 + 84 + 180
    assert report.active == report.total - 60
    assert report.embedding == 80
    tied = parameter_report(dataclasses.replace(TINY, tie_embeddings=True))
    assert (tied.total, tied.embedding) == (report.total - 40, 40)


def test_flops_by_hand() -> None:
    flops = flops_per_token(TINY, context_length=5)
    assert flops.by_part == {
        'attention': 2 * 96,
        # 2 layers, 3 keys on average, 2 products of 2 heads with 2 channels.
        'attention_scores': 2 * 3 * 2 * (2 * 2 * 2),
        'mlp': 2 * 72,
        'router': 2 * 12,
        'shared': 2 * 84,
        'experts': 2 * 120,
        'head': 2 * 40,
        'mtp': 0,
    }
    assert flops.total == 192 + 96 + 144 + 24 + 168 + 240 + 80
    full = flops_per_token(TINY, context_length=5, causal=False)
    assert full.by_part['attention_scores'] == 2 * 5 * 2 * (2 * 2 * 2)
    tied = dataclasses.replace(TINY, tie_embeddings=True)
    assert flops_per_token(tied, context_length=5) == flops


def test_bytes_by_hand() -> None:
    alone = bytes_per_token(TINY, batch=1, context_length=5)
    # All that is active, but one row of the embedding for its 10.
    assert alone.weights == pytest.approx(4 * (parameter_report(TINY).active - 40 + 4))
    assert alone.cache == 4 * 2 * 2 * 5 * 2
    assert alone.total == alone.weights + alone.cache
    pair = bytes_per_token(TINY, batch=2, context_length=5)
    # Two of three experts twice: each is missed by both with probability 1/9.
    shared = 80 - 40 + 96 + 28 + 72 + 12 + 84
    assert pair.weights == pytest.approx(4 * ((shared + 180 * 8 / 9) / 2 + 4))
    assert pair.cache == alone.cache
    half = bytes_per_token(
        TINY, batch=1, context_length=5, param_dtype='bfloat16', cache_dtype='bfloat16'
    )
    assert half.total == alone.total / 2
    bf16 = dataclasses.replace(TINY, param_dtype='bfloat16', dtype='bfloat16')
    assert bytes_per_token(bf16, batch=1, context_length=5) == half


@pytest.mark.parametrize(
    'changes',
    [
        {},
        {'tie_embeddings': True, 'scan_layers': False},
        {'moe': None, 'attention': AttentionConfig(4, 2, 6, qk_norm='full')},
        {'num_layers': 5, 'moe': dataclasses.replace(TINY.moe, layers=(1, 4), shared_dim=0)},
        {
            'attention': (
                AttentionConfig(4, 2, 6, sinks=True, qkv_bias=True, output_bias=True),
                LatentAttentionConfig(2, 6, 8, 4, 4, 10),
                LatentAttentionConfig(2, 6, 8, 4, 4),
                LinearAttentionConfig(2, 4, 6, 3),
            ),
            'num_layers': 6,
            'post_norms': True,
        },
    ],
)
def test_parameters_are_those_of_the_model(changes: dict[str, Any]) -> None:
    config = dataclasses.replace(TINY, **changes)
    params = abstract_variables(Transformer(config))['params']
    assert parameter_report(config).total == sum(x.size for x in jax.tree.leaves(params))


def compiled_flops(config: TransformerConfig, batch: int, length: int) -> float:
    """XLA's own count of the forward pass, per token."""
    model = Transformer(config)
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    forward = jax.jit(lambda variables, tokens: model.apply(variables, tokens).logits)
    compiled = forward.lower(abstract_variables(model), tokens).compile()
    return compiled.cost_analysis()['flops'] / (batch * length)


@pytest.mark.parametrize('experts', [False, True])
def test_flops_are_xlas(experts: bool) -> None:
    """XLA also counts what is no product (norms, RoPE, softmax, activations): a few percent more.

    It computes the scores of all T keys and, with dense dispatch, all experts: hence causal=False,
    and K=E. Its count of a scan would hold the body once: hence no scan.
    """
    moe = MoEConfig(
        router=RouterConfig(num_experts=4, experts_per_token=4),
        expert_dim=96,
        shared_dim=64,
        dispatch='dense',
        first_dense_layers=1,
    )
    config = TransformerConfig(
        vocab_size=256,
        num_layers=2,
        embed_dim=128,
        mlp_dim=320,
        attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=32),
        moe=moe if experts else None,
        scan_layers=False,
    )
    length = 32
    counted = flops_per_token(config, context_length=length, causal=False).total
    ratio = compiled_flops(config, 2, length) / counted
    assert 1.0 < ratio < 1.03, ratio


def products(jaxpr: Any) -> int:
    """Counts 2 for each multiply-add of every `dot_general`, from shapes alone."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == 'dot_general':
            (contracted, _), _ = equation.params['dimension_numbers']
            left = equation.invars[0].aval.shape
            depth = 1
            for axis in contracted:
                depth *= left[axis]
            total += 2 * depth * equation.outvars[0].aval.size
        total += sum(map(products, jaxprs_in_params(equation.params)))
    return total


@pytest.mark.parametrize('attention', [TINY.attention, LatentAttentionConfig(2, 6, 8, 4, 5, 10)])
def test_flops_are_the_products_of_the_traced_model(attention: Any) -> None:
    everyone = dataclasses.replace(
        TINY.moe, router=RouterConfig(num_experts=3, experts_per_token=3), dispatch='dense'
    )
    config = dataclasses.replace(TINY, moe=everyone, attention=attention, scan_layers=False)
    model = Transformer(config)
    tokens = jax.ShapeDtypeStruct((1, 7), jnp.int32)
    traced = jax.make_jaxpr(lambda v, t: model.apply(v, t).logits)(
        abstract_variables(model), tokens
    )
    counted = flops_per_token(config, context_length=7, causal=False).total
    assert products(traced.jaxpr) == 7 * counted


def test_windows_latents_and_states_by_hand() -> None:
    kinds = (
        AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=2, window=3),
        LatentAttentionConfig(num_heads=2, kv_rank=6, nope_dim=8, rope_dim=4, value_dim=5),
        LinearAttentionConfig(num_heads=2, key_dim=4, value_dim=6, gate_rank=3),
    )
    config = dataclasses.replace(TINY, num_layers=3, attention=kinds, moe=None)
    flops = flops_per_token(config, context_length=5)
    # In a window of 3 five queries see 1 + 2 + 3 + 3 + 3 keys, and else 15 in all.
    window, latent, state = 12 * (4 * 2 * 2), 15 * (2 * 2 * (12 + 5)), 5 * (6 * 2 * 4 * 6)
    assert flops.by_part['attention_scores'] == (window + latent + state) // 5
    # Keys and values of 3 tokens, latents of 5; 3 inputs of a convolution, and a float32 state.
    kept = 3 * (2 * 2) + 5 * (6 + 4) + 3 * (2 * (4 + 4 + 6))
    cache = bytes_per_token(config, batch=1, context_length=5, cache_dtype='bfloat16').cache
    assert cache == 2 * kept + 4 * (2 * 4 * 6)
    assert bytes_per_token(config, batch=1, context_length=2).cache == 4 * (kept - 4 - 30 + 48)


def published(**fields: Any) -> TransformerConfig:
    moe = MoEConfig(
        router=RouterConfig(fields.pop('experts'), fields.pop('chosen')),
        expert_dim=fields.pop('expert_dim'),
    )
    return TransformerConfig(moe=moe, mlp_dim=1, **fields)


def test_qwen3_30b_a3b() -> None:
    """The card says 30.5B in all, 29.9B without embeddings, 3.3B active (cut, not rounded)."""
    config = published(
        vocab_size=151_936,
        num_layers=48,
        embed_dim=2048,
        attention=AttentionConfig(32, 4, 128, qk_norm='head'),
        experts=128,
        chosen=8,
        expert_dim=768,
    )
    report = parameter_report(config)
    assert report.total == pytest.approx(30.5e9, rel=0.01)
    assert report.total - report.embedding == pytest.approx(29.9e9, rel=0.01)
    assert 3.3e9 <= report.active < 3.4e9


def test_mixtral_8x7b() -> None:
    """The paper (arXiv 2401.04088) says 46.7B, of which a token uses 12.9B."""
    config = published(
        vocab_size=32_000,
        num_layers=32,
        embed_dim=4096,
        attention=AttentionConfig(32, 8, 128),
        experts=8,
        chosen=2,
        expert_dim=14_336,
    )
    report = parameter_report(config)
    assert report.total == pytest.approx(46.7e9, rel=0.01)
    assert report.active == pytest.approx(12.9e9, rel=0.01)


def test_bad_counts_are_refused() -> None:
    with pytest.raises(InputError, match='context_length must be at least 1; received 0'):
        flops_per_token(TINY, context_length=0)
    with pytest.raises(InputError, match='batch must be at least 1; received 0'):
        bytes_per_token(TINY, batch=0, context_length=1)
    with pytest.raises(InputError, match=r"dtype must be one of float32, .* received 'int4'"):
        bytes_per_token(TINY, batch=1, context_length=1, param_dtype='int4')  # type: ignore


def test_xla_counts_between_the_causal_and_the_full_products_of_long_rows() -> None:
    config = TransformerConfig(
        vocab_size=64,
        num_layers=1,
        embed_dim=32,
        mlp_dim=64,
        attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=32),
        scan_layers=False,
    )
    length = 256
    causal, full = (
        flops_per_token(config, context_length=length, causal=causal).total
        for causal in (True, False)
    )
    # Softmax, norms and the mask come on top of the products: a few percent of so small a model.
    assert causal < compiled_flops(config, 1, length) < 1.1 * full
    assert full > 1.2 * causal
