"""Experts of a token or two: equal to a loop in float64, forward and backward, on every backend."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import few_tokens
from moe.dispatch import dispatch
from moe.expert_mlp import ExpertBiases

N, K, E, D, F = 2, 3, 5, 6, 4
RNG = np.random.default_rng(0)
X, WEIGHTS = RNG.normal(size=(N, D)), RNG.random((N, K))
EXPERTS = RNG.normal(size=(E, D, 2, F)), RNG.normal(size=(E, F, D))
BIASES = RNG.normal(size=(E, 2, F)), RNG.normal(size=(E, D))
IDS = np.array([[4, 0, 2], [0, E, 1]])  # the second token has one expert less


def one_at_a_time(x, weights, gate_up, down, biases):
    y = np.zeros((N, D))
    for n, k in np.ndindex(N, K):
        e = IDS[n, k]
        if e < E:
            gate, up = np.einsum('d,dgf->gf', x[n], gate_up[e]) + (biases[0][e] if biases else 0)
            out = (gate / (1 + np.exp(-gate)) * up) @ down[e] + (biases[1][e] if biases else 0)
            y[n] += weights[n, k] * out
    return y


def forms():
    def with_forms(form):
        def run(x, weights, gate_up, down, *biases):
            both = gate_up.reshape(E, D, -1)
            experts = (both, down, ExpertBiases(*biases) if biases else None)
            return form(x, jnp.asarray(IDS), weights, *experts, activation='silu')

        return run

    return {'cpu': with_forms(few_tokens._one_by_one), 'others': with_forms(few_tokens._at_once)}


@pytest.mark.parametrize('form', ['cpu', 'others'])
@pytest.mark.parametrize('biases', [(), BIASES])
def test_values_and_gradients_equal_a_loop_in_float64(form, biases):
    operands = [jnp.asarray(a, jnp.float32) for a in (X, WEIGHTS, *EXPERTS, *biases)]
    y, pullback = jax.vjp(jax.jit(forms()[form]), *operands)
    expected = one_at_a_time(X, WEIGHTS, *EXPERTS, biases)
    np.testing.assert_allclose(y, expected, atol=2e-5)
    cotangent = RNG.normal(size=(N, D))
    step = 1e-5
    gradients = pullback(jnp.asarray(cotangent, jnp.float32))
    for number, gradient in enumerate(gradients):
        operand = (X, WEIGHTS, *EXPERTS, *biases)[number]
        direction = RNG.normal(size=operand.shape)
        moved = []
        for sign in (1, -1):
            args = [X, WEIGHTS, *EXPERTS, *biases]
            args[number] = operand + sign * step * direction
            moved.append(one_at_a_time(*args[:4], tuple(args[4:])))
        slope = ((moved[0] - moved[1]) / (2 * step) * cotangent).sum()
        np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=1e-4, atol=1e-3)


def test_dispatch_takes_this_path_for_one_token_and_masks_it():
    x = jnp.asarray(X[:1, None], jnp.float32)
    ids, weights = jnp.asarray(IDS[:1, None]), jnp.asarray(WEIGHTS[:1, None], jnp.float32)
    experts = [jnp.asarray(a, jnp.float32) for a in EXPERTS]

    def run(mask):
        mask = jnp.full((1, 1), mask)
        return dispatch(x, ids, weights, mask, *experts, method='grouped', activation='silu')[0]

    expected = one_at_a_time(X, WEIGHTS, *EXPERTS, ())[0]
    np.testing.assert_allclose(run(True)[0, 0], expected, atol=2e-5)
    assert not run(False).any()
    text = jax.jit(run).lower(True).as_text()
    assert 'stablehlo.sort' not in text
