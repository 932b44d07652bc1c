import dataclasses
import functools
import itertools

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.errors import InputError
from moe.linear_attention import LinearAttention, empty_linear_cache
from moe.linear_config import LinearAttentionConfig
from moe.sharding import MeshConfig, make_mesh, sharding_for

B, T, D, H, DK, DV, W, EPS = 2, 11, 6, 2, 4, 3, 3, 1e-6
CONFIG = LinearAttentionConfig(H, DK, DV, gate_rank=5, conv_width=W)
# Padding before, between and after documents; an id that comes back; a document of one token.
SEGMENTS = np.array([[0, 0, 1, 1, 1, 2, 2, 0, 0, 3, 3], [1, 1, 1, 1, 2, 1, 1, 1, 1, 0, 0]])


@flax.struct.dataclass
class Context:
    segment_ids: jax.Array | None


@functools.cache
def boxed_variables():
    layer = LinearAttention(CONFIG, EPS)
    return jax.jit(layer.init)(jax.random.key(0), inputs(), None, Context(None))


def variables():
    """Initial values, but with decays that matter within a few tokens."""
    unboxed = nn.unbox(boxed_variables())
    return {
        'params': unboxed['params'] | {'decay_bias': jnp.linspace(-4, 0, H * DK).reshape(H, DK)}
    }


def inputs() -> jax.Array:
    return jax.random.normal(jax.random.key(1), (B, T, D))


@functools.partial(jax.jit, static_argnames='mesh')
def compiled(values, x, cache, segments, mesh):
    return LinearAttention(CONFIG, EPS, mesh=mesh).apply(values, x, cache, Context(segments))


def apply(x, cache=None, segments=None, mesh=None, values=None):
    return compiled(values or variables(), x, cache, segments, mesh)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def reference(x: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """The layer in float64 NumPy, one document and one token at a time."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), variables()['params'])
    y = np.zeros(x.shape)
    for b in range(B):
        edges = np.flatnonzero(np.diff(segments[b], prepend=-1, append=-1))
        for start, stop in itertools.pairwise(edges):
            if segments[b, start] > 0:
                y[b, start:stop] = document(p, np.asarray(x[b, start:stop], np.float64))
    return y


def document(p, x: np.ndarray) -> np.ndarray:
    state, outputs = np.zeros((H, DK, DV)), []
    projected = np.concatenate([np.einsum('td,dhk->thk', x, p[n]) for n in 'qkv'], axis=-1)
    for t in range(len(x)):
        mixed = sum(p['conv'][i] * projected[t - i] for i in range(min(W, t + 1)))
        q, k, v = np.split(mixed * sigmoid(mixed), [DK, 2 * DK], axis=-1)
        q, k = (a / np.sqrt((a**2).sum(-1, keepdims=True) + 1e-6) for a in (q, k))
        steps = np.einsum('r,rhk->hk', x[t] @ p['decay_in'], p['decay_out']) + p['decay_bias']
        decay = np.exp(-np.exp(p['log_rate'])[:, None] * np.log1p(np.exp(steps)))
        beta, y = sigmoid(x[t] @ p['beta']), np.zeros(D)
        gate = sigmoid(np.einsum('r,rhv->hv', x[t] @ p['gate_in'], p['gate_out']))
        for h in range(H):
            state[h] *= decay[h][:, None]
            state[h] += beta[h] * np.outer(k[h], v[h] - state[h].T @ k[h])
            read = state[h].T @ q[h] / np.sqrt(DK)
            read /= np.sqrt((read**2).mean() + EPS)
            y += (read * p['o_norm']['scale'] * gate[h]) @ p['o'][h]
        outputs.append(y)
    return np.array(outputs)


def test_layer_equals_numpy() -> None:
    y, cache = apply(inputs(), segments=jnp.array(SEGMENTS))
    assert cache is None
    np.testing.assert_allclose(y, reference(inputs(), SEGMENTS), atol=3e-5)
    np.testing.assert_allclose(apply(inputs())[0], reference(inputs(), np.ones((B, T))), atol=3e-5)


@pytest.mark.parametrize('segmented', [True, False])
def test_token_by_token_equals_the_whole(segmented: bool) -> None:
    segments = jnp.array(SEGMENTS) if segmented else None
    whole, full = apply(inputs(), empty_linear_cache(CONFIG, B, 'float32'), segments)
    cache, steps = empty_linear_cache(CONFIG, B, 'float32'), []
    for t in range(T):
        now = None if segments is None else segments[:, t : t + 1]
        y, cache = apply(inputs()[:, t : t + 1], cache, now)
        steps.append(y)
    expected = reference(inputs(), SEGMENTS if segmented else np.ones((B, T)))
    np.testing.assert_allclose(jnp.concatenate(steps, 1), expected, atol=3e-5)
    np.testing.assert_allclose(whole, expected, atol=3e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), cache, full)
    assert cache.segment.tolist() == ([3, 1] if segmented else [1, 1])


def test_padding_leaves_the_cache() -> None:
    empty = empty_linear_cache(CONFIG, B, 'float32')
    x, ids = inputs(), jnp.array([[1, 1, 1, 0, 0], [0, 0, 0, 0, 0]])
    y, cache = apply(x[:, :5], empty, ids)
    np.testing.assert_array_equal(y[0, 3:], 0)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[1], b[1]), cache, empty)
    continued, _ = apply(x[:, 5:10], cache, jnp.ones((B, 5), jnp.int32))
    adjacent = np.concatenate([x[:, :3], x[:, 5:10]], axis=1)
    padded = np.concatenate([adjacent, np.zeros((B, T - 8, D))], axis=1)
    expected = reference(padded, np.ones((B, T)))[0, 3:8]
    np.testing.assert_allclose(continued[0], expected, atol=3e-5)


def test_gradients_reach_the_past_of_the_same_document_alone() -> None:
    segments = jnp.array(SEGMENTS)
    jacobian = jax.jacrev(lambda x: apply(x, segments=segments)[0].sum(-1))(inputs())
    assert bool(jnp.isfinite(jacobian).all())
    reaches = np.abs(jacobian).max(-1) > 0  # [B T] of the output, [B T] of the input
    runs = np.cumsum(np.diff(SEGMENTS, prepend=-1) != 0, axis=1)
    same = (runs[:, :, None] == runs[:, None]) & (SEGMENTS[:, :, None] > 0)
    for b in range(B):
        np.testing.assert_array_equal(reaches[b, :, b], same[b] & np.tri(T, dtype=bool))
        assert not reaches[b, :, 1 - b].any()


def test_heads_are_split_and_nothing_changes() -> None:
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
    boxed = boxed_variables()['params']
    axes = jax.tree.map(
        lambda box: box.names, boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned)
    )
    assert axes['q'] == ('embed', 'heads', 'head_dim')
    assert axes['conv'] == (None, 'heads', 'head_dim')
    assert axes['o'] == ('heads', 'head_dim', 'embed')
    values = {
        name: value
        if name == 'o_norm'
        else jax.device_put(value, sharding_for(value.shape, axes[name], mesh))
        for name, value in variables()['params'].items()
    }
    segments = jnp.array(SEGMENTS)
    cache = empty_linear_cache(CONFIG, B, 'float32')
    y, cache = apply(inputs(), cache, segments, mesh, {'params': values})
    expected, full = apply(inputs(), empty_linear_cache(CONFIG, B, 'float32'), segments)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    np.testing.assert_allclose(cache.state, full.state, atol=1e-5)
    assert cache.state.sharding.shard_shape(cache.state.shape)[1] == H // 2


def test_new_layers_remember() -> None:
    p = nn.unbox(boxed_variables())['params']
    rates, steps = np.exp(p['log_rate']), np.log1p(np.exp(p['decay_bias']))
    assert rates.min() >= 1
    assert rates.max() < 16
    assert steps.min() > 0.00099
    assert steps.max() < 0.101


@pytest.mark.parametrize(
    ('field', 'value', 'least'), [('num_heads', 0, 1), ('conv_width', 1, 2), ('key_dim', 2.5, 1)]
)
def test_config_refuses(field: str, value: object, least: int) -> None:
    with pytest.raises(InputError, match=f'{field} must be an integer of at least {least}'):
        dataclasses.replace(CONFIG, **{field: value})
