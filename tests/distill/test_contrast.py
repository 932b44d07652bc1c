"""Terms on the sequences of some writers alone: DistiLLM-2's contrast, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill.config import RolloutConfig
from distill.fused import fused_distillation_loss
from distill.objective import Objective, Term
from distill.types import Batch, HiddenTargets
from distill.writers import STUDENT, TEACHER, TEXT, require_writers, term_weights, tokens_by_writer
from moe.errors import InputError
from moe.sharding import MeshConfig, make_mesh

B, T, D, V = 4, 6, 8, 10
ALPHA = 0.1
TERMS = (
    Term('skew_forward_kl', weight=0.5, lam=ALPHA, on='teacher'),
    Term('skew_reverse_kl', weight=0.5, lam=ALPHA, on='student'),
    Term('cross_entropy', weight=0.25, on='text'),
    Term('forward_kl', weight=0.125),
)


@functools.cache
def case():
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(B, T, D)), rng.normal(size=(D, V))
    theirs, their_head = rng.normal(size=(B, T, D)), rng.normal(size=(D, V))
    mask = rng.random((B, T)) < 0.6
    labels = rng.integers(0, V, (B, T))
    writers = np.array([TEACHER, STUDENT, TEXT, STUDENT])
    return hidden, head, theirs, their_head, mask, labels, writers


def reference(hidden, head):
    """In float64, straight from the equations: p the teacher, q the student, `a` the skew."""
    _, _, theirs, their_head, mask, labels, writers = case()

    def softmax(x):
        return np.exp(x) / np.exp(x).sum(-1, keepdims=True)

    p, q = softmax(theirs @ their_head), softmax(hidden @ head)
    skew_forward = (p * np.log(p / (ALPHA * p + (1 - ALPHA) * q))).sum(-1)
    skew_reverse = (q * np.log(q / ((1 - ALPHA) * p + ALPHA * q))).sum(-1)
    entropy = -np.log(np.take_along_axis(q, labels[..., None], -1)[..., 0])
    forward = (p * np.log(p / q)).sum(-1)
    on = [mask & (writers == writer)[:, None] for writer in (TEACHER, STUDENT, TEXT)]
    return (
        0.5 * skew_forward[on[0]].mean()
        + 0.5 * skew_reverse[on[1]].mean()
        + 0.25 * entropy[on[2]].mean()
        + 0.125 * forward[mask].mean()
    )


def loss_and_gradient(mesh=None):
    hidden, head, theirs, their_head, mask, labels, writers = map(jnp.asarray, case())
    batch = Batch(labels, labels, mask, labels, labels, writers=writers)
    targets = HiddenTargets(theirs.astype(jnp.float32), their_head.astype(jnp.float32))

    def loss(hidden, head):
        weights = term_weights(TERMS, writers, mask, tokens_by_writer(batch))
        return fused_distillation_loss(
            hidden, head, targets, TERMS, labels=labels, mask=mask,
            token_weights=weights, chunk_size=8, mesh=mesh,
        )  # fmt: skip

    arguments = hidden.astype(jnp.float32), head.astype(jnp.float32)
    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(*arguments)


@functools.cache
def plain():
    return jax.device_get(loss_and_gradient())


def test_each_term_is_the_mean_over_its_own_sequences():
    (loss, metrics), gradients = plain()
    hidden, head = case()[:2]
    np.testing.assert_allclose(loss, reference(hidden, head), rtol=1e-5)
    names = 'skew_forward_kl_on_teacher', 'skew_reverse_kl_on_student', 'cross_entropy_on_text'
    assert set(metrics) == {*names, 'forward_kl'}
    means = {name: total / count for name, (total, count) in metrics.items()}
    parts = [means[name] for name in (*names, 'forward_kl')]
    np.testing.assert_allclose(np.dot(parts, [0.5, 0.5, 0.25, 0.125]), loss, rtol=1e-5)
    for index in ((0, 1, 2), (1, 3, 0), (2, 2, 5), (3, 0, 7)):
        ends = []
        for sign in (1, -1):
            moved = hidden.copy()
            moved[index] += sign * 1e-5
            ends.append(reference(moved, head))
        slope = (ends[0] - ends[1]) / 2e-5
        np.testing.assert_allclose(gradients[0][index], slope, rtol=1e-3, atol=1e-6)


def test_the_same_on_a_mesh():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, jax.device_get(loss_and_gradient(mesh)), plain())


def test_a_term_whose_sequences_are_not_there_adds_nothing():
    mask = jnp.ones((2, 3), bool)
    tokens = jnp.array([0.0, 6.0, 0.0])
    weights = term_weights(TERMS, jnp.array([STUDENT] * 2), mask, tokens)
    np.testing.assert_array_equal(weights[0, 0], [0, 1, 0, 1])


@pytest.mark.parametrize(
    ('objective', 'config', 'message'),
    [
        (Objective(TERMS), None, "skew_forward_kl on='teacher' needs a rollout with a share"),
        (Objective(TERMS), dict(teacher_share=0.5), "cross_entropy on='text' needs a rollout"),
        (Objective(TERMS, mtp_weight=0.1), dict(teacher_share=0.2), 'of the next token alone'),
        (
            Objective((Term('reverse_kl'),), return_weight=1.0),
            dict(temperature=0.9),
            r'needs sequences that the student writes at\s+temperature 1 and in the same step',
        ),
        (Objective((Term('reverse_kl'),), return_weight=1.0), None, 'received None'),
    ],
)
def test_what_nobody_writes_is_refused(objective, config, message):
    rollout = None if config is None else RolloutConfig(**config)
    with pytest.raises(InputError, match=message):
        require_writers(objective, rollout)


def test_whose_sequences_there_are_is_known():
    with pytest.raises(InputError, match="on must be one of 'text', 'student', 'teacher'"):
        Term('forward_kl', on='studnt')
