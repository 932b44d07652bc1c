"""Feature losses: by hand, against float64, their gradients, padding and extremes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill.feature_losses import (
    attention_match_loss,
    attention_scores,
    hidden_match_loss,
    relation_match_loss,
    usage_match_loss,
)
from moe.types import RouterOutput

B, T = 2, 5
SEGMENTS = np.array([[1, 1, 2, 2, 0], [1, 1, 1, 0, 0]])
MASK = SEGMENTS > 0
TOGETHER = SEGMENTS[:, :, None] == SEGMENTS[:, None]
CAUSAL = TOGETHER & np.tri(T, dtype=bool)


def drawn(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(B, T, *shape)), jnp.float32)


def router(logits: jax.Array) -> RouterOutput:
    """An output whose logits alone mean anything."""
    nothing = jnp.zeros((1, 1, 1))
    return RouterOutput(logits, nothing, nothing, nothing, nothing)


def softmax(scores: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    weights = np.where(allowed, np.exp(scores), 0)
    return weights / weights.sum(-1, keepdims=True)


def divergence(teacher: np.ndarray, student: np.ndarray) -> np.ndarray:
    """KL over the last axis; 0 where the teacher has nothing."""
    with np.errstate(divide='ignore', invalid='ignore'):
        return np.where(teacher > 0, teacher * np.log(teacher / student), 0).sum(-1)


def relation(x: jax.Array, heads: int) -> np.ndarray:
    parts = np.asarray(x, np.float64).reshape(B, T, heads, -1)
    scores = np.einsum('btad,bsad->bats', parts, parts) / np.sqrt(parts.shape[-1])
    return softmax(scores, TOGETHER[:, None])


def attention(x: jax.Array) -> np.ndarray:
    return softmax(np.asarray(x, np.float64).transpose(0, 3, 1, 2), CAUSAL[:, None])


def usage(logits: jax.Array) -> np.ndarray:
    shares = softmax(np.asarray(logits, np.float64), np.True_)
    shared = np.where(TOGETHER, np.einsum('bte,bse->bts', shares, shares), 0)
    return (shared / shared.sum(-1, keepdims=True))[:, None]


def mse(student, teacher):
    return np.square(np.float64(student) - np.float64(teacher)).mean(-1)


def cosine(student, teacher):
    ours, theirs = np.float64(student), np.float64(teacher)
    lengths = np.linalg.norm(ours, axis=-1) * np.linalg.norm(theirs, axis=-1)
    return 1 - (ours * theirs).sum(-1) / lengths


def maps_loss(student, teacher, mask):
    ours, theirs = (x.transpose(0, 3, 1, 2) for x in (student, teacher))
    return attention_match_loss(ours, theirs, jnp.asarray(CAUSAL), mask)


def segmented(loss):
    return lambda student, teacher, mask: loss(student, teacher, jnp.asarray(SEGMENTS) * mask)


# The loss, the last dims of student and teacher, and the loss of each token in float64.
CASES = {
    'mse': (hidden_match_loss, (6,), (6,), mse),
    'cosine': (functools.partial(hidden_match_loss, metric='cosine'), (6,), (6,), cosine),
    'relation': (
        segmented(functools.partial(relation_match_loss, heads=2)),
        (2, 3),
        (4, 5),
        lambda s, t: divergence(relation(t, 2), relation(s, 2)).mean(1),
    ),
    'attention': (
        maps_loss,
        (T, 3),
        (T, 3),
        lambda s, t: divergence(attention(t), attention(s)).mean(1),
    ),
    'usage': (
        segmented(lambda s, t, segments: usage_match_loss(router(s), router(t), segments)),
        (4,),
        (7,),
        lambda s, t: divergence(usage(t), usage(s)).mean(1),
    ),
}


@pytest.mark.parametrize('name', CASES)
def test_equals_float64_and_the_gradient_is_the_slope(name):
    loss, ours, theirs, reference = CASES[name]
    student, teacher = drawn(0, *ours), drawn(1, *theirs)
    run = jax.jit(jax.value_and_grad(lambda *x: loss(*x, jnp.asarray(MASK))[0], (0, 1)))
    value, (gradient, frozen) = run(student, teacher)
    expected = reference(student, teacher)[MASK].sum()
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    assert loss(student, teacher, jnp.asarray(MASK))[1] == MASK.sum()
    assert not np.asarray(frozen).any()
    assert np.abs(gradient).max() > 1e-3
    direction = np.random.default_rng(2).normal(size=student.shape)
    ends = [reference(np.float64(student) + e * direction, teacher) for e in (1e-4, -1e-4)]
    slope = (ends[0] - ends[1])[MASK].sum() / 2e-4
    np.testing.assert_allclose((np.asarray(gradient) * direction).sum(), slope, rtol=1e-3)
    # What stands in padding is nothing: neither to the loss nor to its gradient.
    assert not np.asarray(gradient)[~MASK].any()
    noise = jnp.asarray(~MASK).reshape(B, T, *[1] * len(ours))
    elsewhere, (same, _) = run(student + 9.0 * noise, teacher)
    np.testing.assert_allclose(elsewhere, value, rtol=1e-5)
    np.testing.assert_allclose(np.asarray(same)[MASK], np.asarray(gradient)[MASK], atol=1e-5)


@pytest.mark.parametrize('name', CASES)
def test_of_equals_and_of_extremes(name):
    loss, ours, _, _ = CASES[name]
    run = jax.jit(jax.value_and_grad(lambda *x: loss(*x, jnp.asarray(MASK))[0]))
    alike = drawn(3, *ours)
    np.testing.assert_allclose(run(alike, alike)[0], 0, atol=1e-5)
    for scale in (0.0, 1e4):
        value, gradient = run(scale * drawn(4, *ours), alike)
        assert np.isfinite(value)
        assert np.isfinite(gradient).all()
    assert loss(alike, alike, jnp.zeros((B, T), bool)) == (0, 0)


def test_hidden_by_hand():
    student, teacher = jnp.array([[[3.0, 4.0]]]), jnp.array([[[0.0, 2.0]]])
    one = jnp.ones((1, 1), bool)
    assert hidden_match_loss(student, teacher, one)[0] == (9 + 4) / 2
    total, _ = hidden_match_loss(student, teacher, one, metric='cosine')
    np.testing.assert_allclose(total, 1 - 4 / 5, rtol=1e-6)


def test_relation_by_hand():
    """Of unit vectors at a right angle, scores are 1 / sqrt(2) with oneself and 0 else."""
    teacher, student = jnp.eye(2)[None], jnp.zeros((1, 2, 3))
    total, count = relation_match_loss(student, teacher, jnp.ones((1, 2), int), heads=1)
    p = 1 / (1 + np.exp(-(0.5**0.5)))
    expected = p * np.log(2 * p) + (1 - p) * np.log(2 * (1 - p))
    np.testing.assert_allclose([total, count], [2 * expected, 2], rtol=1e-5)


def test_usage_by_hand():
    """Two tokens of different experts, against two that share all of four equally."""
    teacher = router(1e4 * jnp.eye(2)[None])
    even = router(jnp.zeros((1, 2, 4)))
    total, count = usage_match_loss(even, teacher, jnp.ones((1, 2), int))
    np.testing.assert_allclose([total, count], [2 * np.log(2), 2], rtol=1e-5)


def test_usage_is_blind_to_the_experts_numbers_and_to_copies():
    logits = drawn(5, 4)
    renumbered = logits[..., jnp.array([2, 0, 3, 1])]
    copied = jnp.repeat(logits, 2, axis=-1)
    for other in (renumbered, copied):
        total, _ = usage_match_loss(router(other), router(logits), jnp.asarray(SEGMENTS))
        np.testing.assert_allclose(total, 0, atol=1e-5)
    gates = dict(student_score='sigmoid', teacher_score='sigmoid')
    total, _ = usage_match_loss(router(logits), router(logits), jnp.asarray(SEGMENTS), **gates)
    np.testing.assert_allclose(total, 0, atol=1e-5)
    total, _ = usage_match_loss(
        router(logits), router(logits), jnp.asarray(SEGMENTS), student_score='sigmoid'
    )
    assert total > 1e-3


def test_scores_of_shared_key_heads_equal_those_of_repeated_ones():
    queries, keys = drawn(6, 4, 6), drawn(7, 2, 6)
    repeated = np.repeat(np.asarray(keys, np.float64), 2, axis=2)
    scores = 0.3 * np.einsum('bthd,bshd->bhts', np.asarray(queries, np.float64), repeated)
    np.testing.assert_allclose(attention_scores(queries, keys, scale=0.3), scores, atol=1e-5)
    capped = attention_scores(queries, keys, scale=0.3, score_cap=0.5)
    np.testing.assert_allclose(capped, 0.5 * np.tanh(scores / 0.5), atol=1e-5)
