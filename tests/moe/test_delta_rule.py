import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.delta_rule import chunked_delta_rule, recurrent_delta_rule

B, T, H, DK, DV = 2, 21, 2, 4, 3


def arrays(seed: int = 0, heads_share_decay: bool = False) -> list[np.ndarray]:
    """Inputs with every extreme: no decay, all decay, documents, steps of 0 and 1."""
    rng = np.random.default_rng(seed)
    q, k = rng.normal(size=(2, B, T, H, DK))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    v = rng.normal(size=(B, T, H, DV))
    g = -np.exp(3 * rng.normal(size=(B, T, H, 1 if heads_share_decay else DK)))
    g[:, 3] = 0
    g[:, 4] = -1e5
    g[0, (0, 7, 8, 15)] = -np.inf
    g[1, 20] = -np.inf
    g[1, 12, 1, 0] = -np.inf
    beta = rng.uniform(size=(B, T, H))
    beta[:, 5], beta[:, 6], beta[1, 13:15] = 0, 1, 1
    return [q, k, v, g, beta, rng.normal(size=(B, H, DK, DV))]


def plain_loop(q, k, v, g, beta, state) -> tuple[np.ndarray, np.ndarray]:
    """The definition, matrix by matrix: decay, then the reflection of the key, then the write."""
    outputs, state = np.zeros(v.shape), np.array(state)
    g = np.broadcast_to(g, k.shape)
    for b, t, h in np.ndindex(*beta.shape):
        transition = np.eye(DK) - beta[b, t, h] * np.outer(k[b, t, h], k[b, t, h])
        state[b, h] = transition @ np.diag(np.exp(g[b, t, h])) @ state[b, h]
        state[b, h] += beta[b, t, h] * np.outer(k[b, t, h], v[b, t, h])
        outputs[b, t, h] = state[b, h].T @ q[b, t, h]
    return outputs, state


def weighed(rule, *inputs):
    """A scalar of outputs and state in which every element has a weight of its own."""
    parts = [jnp.sum(jnp.cos(jnp.arange(x.size)) * x.ravel()) for x in rule(*inputs)]
    return parts[0] + 2 * parts[1]


def results(rule, inputs):
    """Outputs, state, and the gradients of all inputs."""

    def run(*inputs):
        gradients = jax.grad(functools.partial(weighed, rule), range(len(inputs)))(*inputs)
        return *rule(*inputs), *gradients

    return [np.asarray(x) for x in jax.jit(run)(*map(jnp.asarray, inputs))]


def test_recurrence_by_hand() -> None:
    # One head, two channels. Decay halves the first channel and keeps the second.
    q = np.array([[1.0, 0], [1, 1]])
    k = np.array([[1.0, 0], [0.6, 0.8]])
    v = np.array([[2.0], [3.0]])
    g = np.log([[0.5, 1.0], [0.5, 1.0]])
    beta = np.array([1.0, 0.5])
    state = np.array([[4.0], [1.0]])
    # t=1: decayed to (2, 1); the memory answers 2, which is right: nothing changes. Read 2.
    # t=2: decayed to (1, 1); it answers 1.4, half the error is 0.8: (1.48, 1.64). Read 3.12.
    batched = [jnp.asarray(x)[None, :, None] for x in (q, k, v, g, beta)]
    outputs, final = recurrent_delta_rule(*batched, jnp.asarray(state)[None, None])
    np.testing.assert_allclose(outputs[0, :, 0, 0], [2, 3.12], rtol=1e-6)
    np.testing.assert_allclose(final[0, 0, :, 0], [1.48, 1.64], rtol=1e-6)


@pytest.mark.parametrize('heads_share_decay', [False, True])
def test_recurrence_equals_the_matrices(heads_share_decay: bool) -> None:
    inputs = arrays(heads_share_decay=heads_share_decay)
    with jax.enable_x64(True):
        outputs, state = recurrent_delta_rule(*map(jnp.asarray, inputs))
        expected = plain_loop(*inputs)
        np.testing.assert_allclose(outputs, expected[0], atol=1e-12)
        np.testing.assert_allclose(state, expected[1], atol=1e-12)


@pytest.mark.parametrize(
    ('chunk_size', 'heads_share_decay'),
    [(1, False), (4, False), (16, True), (16, False), (64, False)],
)
def test_chunks_equal_the_recurrence(chunk_size: int, heads_share_decay: bool) -> None:
    inputs = arrays(1, heads_share_decay)
    with jax.enable_x64(True):
        expected = results(recurrent_delta_rule, inputs)
        chunked = functools.partial(chunked_delta_rule, chunk_size=chunk_size)
        for value, reference in zip(results(chunked, inputs), expected, strict=True):
            assert np.abs(reference).max() > 0.1
            np.testing.assert_allclose(value, reference, atol=1e-10, rtol=0)


def test_split_rows_carry_the_state() -> None:
    with jax.enable_x64(True):
        *inputs, state = map(jnp.asarray, arrays(2))
        outputs, final = recurrent_delta_rule(*inputs, state)
        rule = jax.jit(functools.partial(chunked_delta_rule, chunk_size=4))
        parts = []
        for tokens in (slice(0, 1), slice(1, 8), slice(8, T)):
            part, state = rule(*(x[:, tokens] for x in inputs), state)
            parts.append(part)
        np.testing.assert_allclose(jnp.concatenate(parts, 1), outputs, atol=1e-12)
        np.testing.assert_allclose(state, final, atol=1e-12)
        fresh = rule(*inputs)
        zeros = recurrent_delta_rule(*inputs, jnp.zeros_like(state))
        np.testing.assert_allclose(fresh[0], zeros[0], atol=1e-12)


def test_steep_decays_keep_float32_exact() -> None:
    # Sums of log decays reach -6e6 within the chunk, of which a difference would keep no digit.
    q, k, v, _, beta, state = arrays(3)
    g = np.where(np.arange(T)[:, None, None] % 3 == 0, -1e6, -0.1) * np.ones((B, T, H, DK))
    expected = plain_loop(q, k, v, g, beta, state)
    narrow = [jnp.asarray(x, jnp.float32) for x in (q, k, v, g, beta, state)]
    outputs, final, *gradients = results(chunked_delta_rule, narrow)
    np.testing.assert_allclose(outputs, expected[0], atol=3e-6)
    np.testing.assert_allclose(final, expected[1], atol=3e-6)
    assert all(np.isfinite(x).all() for x in gradients)


def test_many_small_blocks_have_gradients() -> None:
    # Wide enough for the vectorised kernels, which the tests above are not.
    rng = np.random.default_rng(4)
    k = rng.normal(size=(1, 128, 2, 16)).astype(np.float32)
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    inputs = [k[:, ::-1].copy(), k, k + 1, -np.abs(k), np.abs(k[..., 0])]
    expected = results(recurrent_delta_rule, inputs)
    for value, reference in zip(results(chunked_delta_rule, inputs), expected, strict=True):
        np.testing.assert_allclose(value, reference, atol=2e-5 * np.abs(reference).max())


def test_low_precision_inputs_accumulate_in_float32() -> None:
    inputs = [jnp.asarray(x, jnp.bfloat16) for x in arrays(5)]
    outputs, state = chunked_delta_rule(*inputs)
    expected = recurrent_delta_rule(*(x.astype(jnp.float32) for x in inputs))
    assert outputs.dtype == jnp.bfloat16
    assert state.dtype == jnp.float32
    np.testing.assert_allclose(outputs.astype(jnp.float32), expected[0], rtol=2**-8, atol=1e-6)
    np.testing.assert_allclose(state, expected[1], atol=1e-5)


def test_chunk_size_must_be_a_power_of_two() -> None:
    with pytest.raises(ValueError, match='power of two; received 12'):
        chunked_delta_rule(*map(jnp.asarray, arrays()), chunk_size=12)
