import jax
import jax.numpy as jnp
import numpy as np

from moe.dispatch import ExpertBiases
from moe.soft_moe import soft_dispatch, soft_weights

B, T, D, E, P, F = 2, 5, 4, 3, 2, 6
MASK = np.array([[True, True, False, True, True], [False] * 5])


def operands():
    rng = np.random.default_rng(0)
    shapes = ((B, T, D), (B, T, E, P), (E, D, 2, F), (E, F, D), (E, 2, F), (E, D))
    return [rng.normal(size=shape) for shape in shapes]


def silu(x):
    return x / (1 + np.exp(-x))


def reference(x, logits, gate_up, down, gate_up_bias, down_bias, scale):
    """Slot by slot and token by token, in float64."""
    y, share = np.zeros((B, T, D)), np.zeros((B, T, E))
    for b in range(B):
        kept = np.flatnonzero(MASK[b])
        if not kept.size:
            continue
        slots = np.zeros((E, P, D))
        for e, p in np.ndindex(E, P):
            into = np.exp(logits[b, kept, e, p])
            mean = (into[:, None] * x[b, kept]).sum(0) / into.sum()
            gate, up = np.einsum('d,dcf->cf', mean, gate_up[e]) + gate_up_bias[e]
            slots[e, p] = (silu(gate) * up) @ down[e] + down_bias[e]
        for t in kept:
            back = np.exp(logits[b, t]) / np.exp(logits[b, t]).sum()
            y[b, t] = scale * np.einsum('ep,epd->d', back, slots)
            share[b, t] = back.sum(-1)
    return y, share


def run(x, logits, gate_up, down, gate_up_bias, down_bias):
    biases = ExpertBiases(gate_up_bias, down_bias)
    mask = jnp.array(MASK)
    settings = {'activation': 'silu', 'scale': 1.5, 'biases': biases}
    return soft_dispatch(x, logits, mask, gate_up, down, **settings)


def test_slots_and_tokens_are_weighted_means():
    args = operands()
    y, router = jax.jit(run)(*(jnp.array(a, jnp.float32) for a in args))
    expected, share = reference(*args, 1.5)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(router.load, share.sum((0, 1)), rtol=1e-5)
    order = np.argsort(-share[MASK], axis=-1)
    np.testing.assert_array_equal(router.expert_ids[MASK], order)
    sorted_share = np.take_along_axis(share[MASK], order, -1)
    np.testing.assert_allclose(router.expert_weights[MASK], 1.5 * sorted_share, rtol=1e-5)
    summed = np.log(np.exp(args[1]).sum(-1))
    np.testing.assert_allclose(router.router_logits, summed, rtol=1e-5)


def test_masked_tokens_get_and_give_nothing():
    x, *rest = (jnp.array(a, jnp.float32) for a in operands())
    clean, _ = run(x, *rest)
    dirty, _ = run(jnp.where(MASK[..., None], x, jnp.nan), *rest)
    np.testing.assert_array_equal(clean, dirty)
    assert np.all(np.asarray(clean)[~MASK] == 0)
    gradients = jax.grad(lambda *args: (run(*args)[0] ** 2).sum(), argnums=(0, 1))(x, *rest)
    for gradient in gradients:
        assert np.all(np.asarray(gradient)[~MASK] == 0)
        assert np.all(np.isfinite(gradient))
        assert np.abs(np.asarray(gradient)[MASK]).min() > 0


def test_weights_sum_to_one_over_tokens_and_over_slots():
    into, back = soft_weights(jnp.array(operands()[1], jnp.float32) * 30, jnp.array(MASK))
    np.testing.assert_allclose(into.sum(axis=1)[0], np.ones((E, P)), rtol=1e-5)
    np.testing.assert_allclose(back.sum(axis=(2, 3)), MASK, rtol=1e-5)
    assert np.all(np.asarray(into)[1] == 0)
