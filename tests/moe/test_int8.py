"""Matrices as integers: rounded as by hand, multiplied as floats that were rounded."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import few_tokens, int8
from moe.config import (
    AttentionConfig,
    LatentAttentionConfig,
    LinearAttentionConfig,
    MoEConfig,
    RouterConfig,
    TransformerConfig,
)
from moe.decode import write
from moe.errors import InputError
from moe.int8 import Int8, dequantised, product, quantise, quantised
from moe.look_ahead import predict_ahead
from moe.sampling import Sampling
from moe.sharding import MeshConfig, make_mesh
from moe.transformer import Transformer, output_logits

CONFIG = TransformerConfig(
    32,
    3,
    8,
    12,
    (
        AttentionConfig(2, 1, 4),
        LatentAttentionConfig(2, 6, 4, 4, 4),
        LinearAttentionConfig(2, 4, 4, 3),
    ),
    moe=MoEConfig(RouterConfig(4, 2), 6, layers=(1, 2), shared_dim=6),
    tie_embeddings=True,
    mtp_depth=1,
    scan_layers=False,
)
TOKENS = jnp.asarray([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


@functools.cache
def model_of(config: TransformerConfig):
    model = Transformer(config)
    drawn = jax.jit(lambda key: nn.unbox(model.init(key, TOKENS)))
    return model, drawn(jax.random.key(0))


def as_floats(float_tree, integers, prefix=()):
    """The parameters with every matrix rounded, by NumPy."""
    tree = {}
    for name, leaf in float_tree.items():
        path = (*prefix, name)
        if isinstance(leaf, dict):
            tree[name] = as_floats(leaf, integers, path)
            continue
        stored = functools.reduce(lambda t, n: t.get(n, {}), path, integers)
        if not stored:
            tree[name] = leaf
            continue
        values, scales = np.asarray(stored['values'], np.float64), np.asarray(stored['scales'])
        rounded = (values * scales[..., None]).swapaxes(-1, -2).reshape(leaf.shape)
        steps = np.broadcast_to(scales[..., None, :], (*values.shape[:-2], *values.shape[:-3:-1]))
        assert (np.abs(rounded - leaf) <= 0.5001 * steps.reshape(leaf.shape)).all(), path
        tree[name] = jnp.asarray(rounded, jnp.float32)
    return tree


def test_rounding_by_hand():
    kernel = jnp.asarray([[1.27, 0.0, -2.0], [-0.634, 0.0, 0.5]])
    whole = quantised(kernel, (3,))
    np.testing.assert_array_equal(whole.values, [[127, -63], [0, 0], [-127, 32]])
    np.testing.assert_allclose(whole.scales, [0.01, 1.0, 2 / 127], rtol=1e-6)
    expected = [[1.27, 0, -2], [-0.63, 0, 64 / 127]]
    np.testing.assert_allclose(dequantised(whole, jnp.float32), expected, rtol=1e-6)
    assert whole.shape == kernel.shape


@pytest.mark.parametrize('rows', [1, 3, int8.FEW_ROWS + 1])
def test_products_equal_those_in_float64(rows):
    rng = np.random.default_rng(rows)
    values, scales = rng.integers(-127, 128, (6, 5)), rng.random(6)
    weight = Int8(jnp.asarray(values, jnp.int8), jnp.asarray(scales, jnp.float32), (2, 3))
    x = rng.normal(size=(rows, 5))
    expected = x @ values.T.astype(np.float64) * scales
    found = jax.jit(product)(jnp.asarray(x, jnp.float32), weight)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)
    half = jax.jit(product)(jnp.asarray(x, jnp.bfloat16), weight)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(np.float32), expected, rtol=0.1, atol=4)


@pytest.mark.parametrize('rows', [1, 5])
def test_a_loop_over_tokens_keeps_no_copy_in_floats(rows):
    weight = quantised(jnp.ones((256, 512)), (512,))
    x = jnp.ones((rows, 256))

    def text(x, weight):
        return jax.lax.fori_loop(0, 8, lambda _, x: product(x, weight)[:, :256], x)

    program = jax.jit(text).lower(x, weight).compile()
    outside = [line for line in program.as_text().splitlines() if ' while(' in line]
    assert outside
    assert not any('f32[512,256]' in line or 'f32[256,512]' in line for line in outside)


@pytest.mark.parametrize('form', [few_tokens._one_by_one, few_tokens._at_once])
def test_experts_of_a_token_or_two_equal_rounded_floats(form):
    rng = np.random.default_rng(0)
    x, weights = jnp.asarray(rng.normal(size=(2, 6)), jnp.float32), jnp.ones((2, 2)) / 3
    gate_up = quantised(jnp.asarray(rng.normal(size=(4, 6, 8))), (8,), batch_axes=1)
    down = quantised(jnp.asarray(rng.normal(size=(4, 4, 6))), (6,), batch_axes=1)
    ids = jnp.asarray([[3, 1], [0, 4]])
    run = functools.partial(form, x, ids, weights, biases=None, activation='silu')
    floats = [dequantised(each, jnp.float32) for each in (gate_up, down)]
    np.testing.assert_allclose(run(gate_up, down), run(*floats), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('scanned', [False, True])
def test_a_model_computes_what_its_rounded_parameters_say(scanned):
    attention = CONFIG.attention[0] if scanned else CONFIG.attention
    moe = dataclasses.replace(CONFIG.moe, layers=None if scanned else (1, 2))
    config = dataclasses.replace(
        CONFIG, scan_layers=scanned, attention=attention, moe=moe, tie_embeddings=not scanned
    )
    model, variables = model_of(config)
    whole = quantise(model, variables)
    rounded = as_floats(variables['params'], whole['int8'])
    tied = whole['int8']['head']['kernel']
    assert 'head' not in whole['params']
    assert 'embedding' in whole['params']['embed']
    forward = jax.jit(functools.partial(model.apply, mtp=True))
    found, expected = forward(whole, TOKENS), forward({'params': rounded}, TOKENS)
    np.testing.assert_allclose(found.hidden, expected.hidden, atol=2e-4)
    np.testing.assert_allclose(found.ahead[0].hidden, expected.ahead[0].hidden, atol=2e-4)
    head = (np.asarray(tied['values'], np.float64) * np.asarray(tied['scales'])[:, None]).T
    np.testing.assert_allclose(found.logits, np.asarray(found.hidden) @ head, atol=2e-4)
    again = output_logits(config, whole, found.hidden)
    np.testing.assert_allclose(again, found.logits, atol=2e-5)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(whole))
    assert size < sum(leaf.nbytes for leaf in jax.tree.leaves(variables))


def test_text_is_that_of_the_whole_forward():
    attention, moe = CONFIG.attention[0], dataclasses.replace(CONFIG.moe, layers=None)
    config = dataclasses.replace(CONFIG, num_layers=1, attention=attention, moe=moe)
    model, variables = model_of(config)
    whole = quantise(model, variables)
    how = {'max_new_tokens': 4, 'sampling': Sampling(0.0), 'key': jax.random.key(0)}
    written = np.asarray(write(model, whole, [[3, 1, 4]], **how).tokens)
    output = jax.jit(model.apply)(whole, jnp.asarray([[3, 1, 4, *written[0]]]))
    for place, token in enumerate(written[0], start=2):
        logits = np.asarray(output.logits[0, place])
        assert logits[token] >= logits.max() - 1e-4
    hidden = jnp.broadcast_to(output.hidden[:, :5], (2, 5, 8))
    assert predict_ahead(model, whole, hidden, TOKENS).logits.shape == (2, 5, 32)


def test_a_mesh_and_experts_stored_one_by_one_are_refused():
    model = Transformer(CONFIG, make_mesh(MeshConfig(), jax.devices()[:1]))
    with pytest.raises(InputError, match='one device; the model has a mesh'):
        quantise(model, {})
    apart = dataclasses.replace(CONFIG.moe, storage='per_expert')
    with pytest.raises(InputError, match=r"moe\.storage='fused'.* has 'per_expert'"):
        quantise(Transformer(dataclasses.replace(CONFIG, moe=apart)), {})
