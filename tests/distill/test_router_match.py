"""Router distillation: by hand, against float64, and its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill.router_match import router_match_loss
from moe.types import RouterOutput

B, T, E = 2, 3, 4
MASK = jnp.array([[True, True, False], [False, True, True]])


def routers(seed: int, layers: int = 2, scale: float = 2.0) -> list[RouterOutput]:
    """Outputs whose logits alone mean anything."""
    logits = np.random.default_rng(seed).normal(scale=scale, size=(layers, B, T, E))
    nothing = jnp.zeros((B, T, 1))
    return [
        RouterOutput(jnp.asarray(x, jnp.float32), nothing.astype(int), nothing, nothing, nothing)
        for x in logits
    ]


def test_by_hand():
    logits = [jnp.log(jnp.array([[[0.5, 0.25, 0.25, 0.0]]])), jnp.zeros((1, 1, 4))]
    nothing = jnp.zeros((1, 1, 1))
    theirs, ours = (RouterOutput(x, nothing, nothing, nothing, nothing) for x in logits)
    theirs = theirs.replace(router_logits=jnp.maximum(theirs.router_logits, -1e4))
    total, weight = router_match_loss([ours], [theirs], jnp.ones((1, 1), bool))
    # Against the uniform distribution: log 4 less the entropy, 1.5 log 2.
    np.testing.assert_allclose(total, 0.5 * np.log(2), rtol=1e-6)
    assert weight == 1


def shares(router: RouterOutput, score: str) -> np.ndarray:
    x = np.asarray(router.router_logits, np.float64)
    scores = np.exp(x) if score == 'softmax' else 1 / (1 + np.exp(-x))
    return scores / scores.sum(-1, keepdims=True)


@pytest.mark.parametrize('scores', [('softmax', 'sigmoid'), ('sigmoid', 'softmax')])
def test_equals_float64_and_the_gradient_is_the_slope(scores):
    student, teacher = routers(0), routers(1)

    def loss(student, teacher):
        total, weight = router_match_loss(
            student, teacher, MASK, student_score=scores[0], teacher_score=scores[1]
        )
        return total / weight

    expected = 0.0
    for ours, theirs in zip(student, teacher, strict=True):
        p, q = shares(ours, scores[0]), shares(theirs, scores[1])
        expected += (q * np.log(q / p)).sum(-1)[np.asarray(MASK)].mean() / 2
    run = jax.jit(jax.value_and_grad(loss, (0, 1), allow_int=True))
    value, (gradient, frozen) = run(student, teacher)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for layer, ours in enumerate(student):
        at = np.asarray(gradient[layer].router_logits)
        assert (at[~np.asarray(MASK)] == 0).all()
        assert np.abs(at[np.asarray(MASK)]).min() > 1e-6
        assert not np.asarray(frozen[layer].router_logits).any()
        for index in ((0, 0, 1), (1, 2, 3)):
            step = np.zeros((B, T, E), np.float32)
            step[index] = 1e-2
            moved = [
                [*student[:layer], ours.replace(router_logits=logits), *student[layer + 1 :]]
                for logits in (ours.router_logits + step, ours.router_logits - step)
            ]
            slope = (run(moved[0], teacher)[0] - run(moved[1], teacher)[0]) / 2e-2
            np.testing.assert_allclose(at[index], slope, rtol=2e-2, atol=2e-5)


def test_of_equals_and_of_extremes():
    alike = routers(2)
    total, _ = router_match_loss(alike, alike, MASK)
    np.testing.assert_allclose(total, 0, atol=1e-6)
    far = [x.replace(router_logits=1e4 * x.router_logits) for x in routers(3)]
    for score in ('softmax', 'sigmoid'):
        total, _ = router_match_loss(alike, far, MASK, student_score=score, teacher_score=score)
        assert np.isfinite(total)
    nobody, weight = router_match_loss(alike, far, jnp.zeros((B, T), bool))
    assert nobody == weight == 0
