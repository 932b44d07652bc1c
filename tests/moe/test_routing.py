import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.config import RouterConfig
from moe.routing import expert_load, route, router_scores


def logits_of(scores: list[float]) -> jax.Array:
    """Softmax logits of one token whose scores are given."""
    return jnp.log(jnp.array(scores, jnp.float32))[None, None]


@pytest.mark.parametrize(
    ('normalize', 'expected'),
    [('none', [0.5, 0.3]), ('before', [0.5, 0.3]), ('after', [0.625, 0.375])],
)
def test_softmax_weights_by_hand(normalize, expected):
    config = RouterConfig(4, 2, normalize=normalize, scale=2.0)
    ids, weights = route(logits_of([0.15, 0.5, 0.05, 0.3]), config)
    np.testing.assert_array_equal(ids[0, 0], [1, 3])
    np.testing.assert_allclose(weights[0, 0], 2.0 * np.array(expected), rtol=1e-6)


@pytest.mark.parametrize(
    ('normalize', 'expected'),
    [
        ('none', [0.8, 0.6]),
        ('before', [0.8 / 2.25, 0.6 / 2.25]),
        ('after', [0.8 / 1.65, 0.6 / 1.65]),
    ],
)
def test_sigmoid_weights_by_hand(normalize, expected):
    scores = np.array([0.6, 0.1, 0.8, 0.5])
    config = RouterConfig(4, 2, score='sigmoid', normalize=normalize, eps=0.25)
    ids, weights = route(jnp.array(np.log(scores / (1 - scores)))[None, None], config)
    np.testing.assert_array_equal(ids[0, 0], [2, 0])
    np.testing.assert_allclose(weights[0, 0], expected, rtol=1e-6)


def test_ties_go_to_the_lowest_id():
    ids, weights = route(jnp.zeros((1, 1, 5)), RouterConfig(5, 3))
    np.testing.assert_array_equal(ids[0, 0], [0, 1, 2])
    np.testing.assert_allclose(weights[0, 0], 1 / 3, rtol=1e-6)


def test_every_expert_chosen_gives_every_score():
    scores = [0.1, 0.2, 0.3, 0.4]
    ids, weights = route(logits_of(scores), RouterConfig(4, 4, normalize='none'))
    np.testing.assert_array_equal(ids[0, 0], [3, 2, 1, 0])
    np.testing.assert_allclose(weights[0, 0], scores[::-1], rtol=1e-6)


@pytest.mark.parametrize('score', ['softmax', 'sigmoid'])
@pytest.mark.parametrize(
    ('bias', 'chosen'),
    [
        ([0.0, 0.0, 1e9, 0.0], [2, 1]),
        ([0.0, -1e9, 0.0, 0.0], [3, 0]),
        ([-3.0, -4.0, -5.0, -6.0], [0, 1]),
    ],
)
def test_selection_bias_changes_the_choice_and_never_the_weights(score, bias, chosen):
    logits = jnp.array([[[0.3, 2.0, -1.0, 1.0]]])
    config = RouterConfig(4, 2, score=score, normalize='none')
    bias = jnp.array(bias)
    ids, weights = route(logits, config, selection_bias=bias)
    np.testing.assert_array_equal(ids[0, 0], chosen)
    unbiased = np.asarray(router_scores(logits, score))[0, 0]
    np.testing.assert_array_equal(weights[0, 0], unbiased[np.array(chosen)])

    def total(bias):
        return route(logits, config, selection_bias=bias)[1].sum()

    np.testing.assert_array_equal(jax.grad(total)(bias), np.zeros(4))


def test_gradient_of_the_weights_equals_finite_differences():
    rng = np.random.default_rng(0)
    logits, direction = rng.normal(size=(2, 3, 6)), rng.normal(size=(2, 3, 6))
    cotangent = rng.normal(size=(2, 3, 2))
    config = RouterConfig(6, 2, score='sigmoid', scale=1.5)

    def reference(logits):
        scores = 1 / (1 + np.exp(-logits))
        best = np.sort(scores, axis=-1)[..., :-3:-1]
        return (1.5 * best / best.sum(-1, keepdims=True) * cotangent).sum()

    slope = (reference(logits + 1e-6 * direction) - reference(logits - 1e-6 * direction)) / 2e-6
    gradient = jax.grad(lambda x: (route(x, config)[1] * cotangent).sum())(jnp.array(logits))
    np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=1e-4)


def test_half_precision_logits_are_scored_in_float32():
    logits = jnp.array([[[0.0, 1.0, 2.0]]], jnp.bfloat16)
    _, weights = route(logits, RouterConfig(3, 1, normalize='none'))
    assert weights.dtype == jnp.float32
    np.testing.assert_allclose(weights[0, 0, 0], np.e**2 / (1 + np.e + np.e**2), rtol=1e-6)


def test_expert_load_counts_unmasked_assignments():
    ids = jnp.array([[[0, 2], [2, 3], [2, 1]], [[3, 2], [0, 1], [0, 1]]])
    mask = jnp.array([[True, True, False], [True, False, False]])
    np.testing.assert_array_equal(expert_load(ids, mask, 5), [1, 0, 3, 2, 0])
