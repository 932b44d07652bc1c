"""Quantised matrices: rounded as by hand and by qwix, multiplied as floats that were rounded."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix

from moe import few_tokens
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
from moe.look_ahead import predict_ahead
from moe.quantised import (
    FEW_ROWS,
    FORMATS,
    FP8,
    INT4,
    INT8,
    Quantised,
    dequantised,
    product,
    rounded,
)
from moe.quantising import matrix_shapes, quantise
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


def as_floats(float_tree, found, prefix=()):
    """The parameters with every matrix as its quantised form says, by NumPy."""
    tree = {}
    for name, leaf in float_tree.items():
        path = (*prefix, name)
        if isinstance(leaf, dict):
            tree[name] = as_floats(leaf, found, path)
            continue
        stored = functools.reduce(lambda t, n: t.get(n, {}), path, found)
        tree[name] = leaf
        if stored:
            values, scales = (np.asarray(stored[n], np.float64) for n in ('values', 'scales'))
            steps = np.repeat(scales, values.shape[-1] // scales.shape[-1], axis=-1)
            nearest, steps = (
                inputs_first(x, leaf.shape, path[-1]) for x in (values * steps, steps)
            )
            # Integers lie half a step apart at most, floats of three bits a sixteenth.
            integers = stored['values'].dtype != jnp.float8_e4m3fn
            apart = 0.5001 * steps if integers else np.maximum(np.abs(leaf) / 15.9, steps / 500)
            assert (np.abs(nearest - leaf) <= apart).all(), path
            tree[name] = jnp.asarray(nearest, jnp.float32)
    return tree


def inputs_first(x, shape, name):
    """Lays what has its inputs last as the kernel has them, each kind of kernel by its name."""
    outputs = 1 if name in ('o', 'down', 'kernel', 'projection', 'q_down', 'kv_down', 'beta') else 2
    outputs = 1 if name.endswith('_in') else outputs
    return np.moveaxis(x, -1, -1 - outputs).reshape(shape)


def test_rounding_by_hand():
    kernel = jnp.asarray([[63.75, 0.0, -127.5], [-31.7, 0.0, 25.2]])
    whole = rounded(kernel, 1)
    # The largest is 127.5 steps, half a step from an integer above zero and from one below.
    np.testing.assert_array_equal(whole.values, [[127, -63], [0, 0], [-128, 25]])
    np.testing.assert_allclose(whole.scales, [[0.5], [1.0], [1.0]], rtol=1e-6)
    expected = [[63.5, 0, -128], [-31.5, 0, 25]]
    np.testing.assert_allclose(dequantised(whole, jnp.float32), expected, rtol=1e-6)
    assert whole.shape == kernel.shape


def test_rounding_in_groups_and_to_floats_of_8_bits_by_hand():
    kernel = jnp.asarray([[[3.0], [-1.5], [0.7], [0.1]]])
    by_two = rounded(kernel, 1, dataclasses.replace(INT4, group=2), batch_axes=1)
    np.testing.assert_allclose(by_two.scales, [[[0.4, 0.7 / 7.5]]], rtol=1e-6)
    # 3 / 0.4 = 7.5, -1.5 / 0.4 = -3.75, 7.5 and 1.07
    np.testing.assert_array_equal(by_two.values.astype(jnp.int8), [[[7, -4, 7, 1]]])
    floats = [[[2.8], [-1.6], [7 * 0.7 / 7.5], [0.7 / 7.5]]]
    np.testing.assert_allclose(dequantised(by_two, jnp.float32), floats, rtol=1e-6)
    assert [INT4.group_size(n) for n in (128, 96, 7)] == [64, 48, 7]
    # Three bits after the first: between 2 and 4 in steps of a quarter.
    eight = rounded(jnp.asarray([[448.0], [2.6], [-2.4]]), 1, FP8)
    assert eight.values.dtype == jnp.float8_e4m3fn
    expected = [[448.0], [2.5], [-2.5]]
    np.testing.assert_array_equal(dequantised(eight, jnp.float32), expected)


@pytest.mark.parametrize('weights', FORMATS)
def test_rounding_is_that_of_qwix_to_the_bit(weights):
    kernel = jnp.asarray(np.random.default_rng(1).normal(size=(3, 128, 2, 5)), jnp.float32)
    kernel = kernel.at[0, :, 0].set(0).at[1, 0, 1].mul(50)
    form = FORMATS[weights]['experts']

    def theirs(kernel):
        tiles = {1: form.group_size(128)}
        return qwix.quantize(
            kernel, jnp.dtype(form.dtype), channelwise_axes=(0, 2, 3), tiled_axes=tiles
        )

    ours = jax.jit(lambda kernel: rounded(kernel, 2, form, batch_axes=1))(kernel)
    found = jax.jit(theirs)(kernel)
    values = jnp.moveaxis(ours.values, -1, 1)
    np.testing.assert_array_equal(values.astype(jnp.float32), found.qvalue.astype(jnp.float32))
    scales = jnp.moveaxis(ours.scales, -1, 1)
    np.testing.assert_array_equal(scales, found.scale)


@pytest.mark.parametrize('rows', [1, 3, FEW_ROWS + 1])
def test_products_equal_those_in_float64(rows):
    rng = np.random.default_rng(rows)
    values, scales = rng.integers(-128, 128, (6, 5)), rng.random(6)
    by_output = jnp.asarray(scales, jnp.float32)[:, None]
    weight = Quantised(jnp.asarray(values, jnp.int8), by_output, 1)
    x = rng.normal(size=(rows, 5))
    expected = x @ values.T.astype(np.float64) * scales
    found = jax.jit(product)(jnp.asarray(x, jnp.float32), weight)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)
    half = jax.jit(product)(jnp.asarray(x, jnp.bfloat16), weight)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(np.float32), expected, rtol=0.1, atol=4)


@pytest.mark.parametrize('form', [INT8, INT4], ids=['int8', 'int4'])
@pytest.mark.parametrize('rows', [1, 5])
def test_a_loop_over_tokens_keeps_no_copy_in_floats(rows, form):
    weight = rounded(jnp.ones((256, 512)), 1, form)
    x = jnp.ones((rows, 256))

    def text(x, weight):
        return jax.lax.fori_loop(0, 8, lambda _, x: product(x, weight)[:, :256], x)

    program = jax.jit(text).lower(x, weight).compile()
    outside = [line for line in program.as_text().splitlines() if ' while(' in line]
    assert outside
    assert not any('f32[512,256]' in line or 'f32[256,512]' in line for line in outside)


@pytest.mark.parametrize('weights', FORMATS)
@pytest.mark.parametrize('form', [few_tokens._one_by_one, few_tokens._at_once])
def test_experts_of_a_token_or_two_equal_rounded_floats(form, weights):
    rng = np.random.default_rng(0)
    x, by = jnp.asarray(rng.normal(size=(2, 6)), jnp.float32), jnp.ones((2, 2)) / 3
    narrow = FORMATS[weights]['experts']
    narrow = dataclasses.replace(narrow, group=narrow.group and 2)
    gate_up = rounded(jnp.asarray(rng.normal(size=(4, 6, 8))), 1, narrow, batch_axes=1)
    down = rounded(jnp.asarray(rng.normal(size=(4, 4, 6))), 1, narrow, batch_axes=1)
    ids = jnp.asarray([[3, 1], [0, 4]])
    run = functools.partial(form, x, ids, by, biases=None, activation='silu')
    floats = [dequantised(each, jnp.float32) for each in (gate_up, down)]
    np.testing.assert_allclose(run(gate_up, down), run(*floats), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ('weights', 'scanned'), [('int8', False), ('int4_experts', True), ('fp8', True)]
)
def test_a_model_computes_what_its_rounded_parameters_say(weights, scanned):
    attention = CONFIG.attention[0] if scanned else CONFIG.attention
    moe = dataclasses.replace(CONFIG.moe, layers=None if scanned else (1, 2))
    config = dataclasses.replace(
        CONFIG, scan_layers=scanned, attention=attention, moe=moe, tie_embeddings=not scanned
    )
    model, variables = model_of(config)
    whole = quantise(model, variables, weights)
    parameters = as_floats(variables['params'], whole['quantised'])
    tied = whole['quantised']['head']['kernel']
    assert 'head' not in whole['params']
    assert 'embedding' in whole['params']['embed']
    forward = jax.jit(functools.partial(model.apply, mtp=True))
    found, expected = forward(whole, TOKENS), forward({'params': parameters}, TOKENS)
    np.testing.assert_allclose(found.hidden, expected.hidden, atol=2e-4)
    np.testing.assert_allclose(found.ahead[0].hidden, expected.ahead[0].hidden, atol=2e-4)
    head = (np.asarray(tied['values'], np.float64) * np.asarray(tied['scales'])).T
    np.testing.assert_allclose(found.logits, np.asarray(found.hidden) @ head, atol=2e-4)
    again = output_logits(config, whole, found.hidden)
    np.testing.assert_allclose(again, found.logits, atol=2e-5)
    experts = [
        leaf.dtype
        for path, leaf in jax.tree.leaves_with_path(whole['quantised'])
        if jax.tree_util.keystr(path).endswith("['gate_up']['values']") and leaf.ndim == 4 + scanned
    ]
    assert set(experts) == {jnp.dtype(FORMATS[weights]['experts'].dtype)}
    shapes = matrix_shapes(model.clone(mesh=make_mesh(MeshConfig(), jax.devices()[:1])))
    rounded_shapes = jax.tree.map(lambda leaf: leaf.shape, whole['quantised'])
    for path, matrix in jax.tree.leaves_with_path(shapes):
        assert at(rounded_shapes, path[:-1])['values'] == matrix.shape


def at(tree, path):
    return functools.reduce(lambda subtree, key: subtree[key.key], path, tree)


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


def test_experts_stored_one_by_one_are_refused():
    apart = dataclasses.replace(CONFIG.moe, storage='per_expert')
    with pytest.raises(InputError, match=r"moe\.storage='fused'.* has 'per_expert'"):
        quantise(Transformer(dataclasses.replace(CONFIG, moe=apart)), {})
