import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill.algebra import Divergence
from distill.cross_tokenizer import SpanLoss, compare, ranked_difference, span_log_probs, span_loss
from distill.spans import MatchedVocabulary, SpanAlignment
from distill.types import HiddenTargets
from moe.errors import InputError

V, VT, D, DT = 7, 9, 5, 4
# Row 0: spans of (2, 1), (1, 2), (1, 1) tokens; row 1: (1, 1), then a token with no counterpart.
STUDENT_SPANS = np.array([[0, 0, 1, 2, -1], [0, -1, 1, 1, -1]])
TEACHER_SPANS = np.array([[0, 1, 1, 2], [0, 1, -1, -1]])
SHARED = MatchedVocabulary(
    student=np.array([0, 2, 3]),
    teacher=np.array([1, 0, 5]),
    student_rest=np.array([1, 4, 5, 6]),
    teacher_rest=np.array([2, 3, 4, 6, 7, 8]),
)


def operands(dtype=np.float32):
    generator = np.random.default_rng(0)
    normal = generator.standard_normal
    hidden, head = normal((2, 5, D)), normal((D, V))
    targets = HiddenTargets(normal((2, 4, DT)).astype(dtype), normal((DT, VT)).astype(dtype))
    labels, teacher_labels = generator.integers(0, V, (2, 5)), generator.integers(0, VT, (2, 4))
    return hidden.astype(dtype), head.astype(dtype), labels, targets, teacher_labels


def softmax64(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def merged64(hidden, head, labels, spans, span, temperature) -> np.ndarray | None:
    """The definition, one row and one span: first token's distribution times the later tokens."""
    at = np.flatnonzero(spans == span)
    if not at.size:
        return None
    probs = softmax64(hidden.astype(np.float64) @ head.astype(np.float64) / temperature)
    return probs[at[0]] * math.prod(probs[i, labels[i]] for i in at[1:])


def ranked64(a: np.ndarray, b: np.ndarray) -> float:
    a, b = np.sort(a)[::-1], np.sort(b)[::-1]
    width = max(len(a), len(b))
    return np.abs(np.pad(a, (0, width - len(a))) - np.pad(b, (0, width - len(b)))).sum()


def jsd64(p: np.ndarray, q: np.ndarray, beta: float) -> float:
    m = beta * q + (1 - beta) * p
    return (beta * q * np.log(q / m) + (1 - beta) * p * np.log(p / m)).sum()


def reference(loss: SpanLoss, hidden, head, labels, targets, teacher_labels) -> tuple[float, int]:
    total, count = 0.0, 0
    for row in range(2):
        for span in range(3):
            temperature = loss.temperature
            p = merged64(hidden[row], head, labels[row], STUDENT_SPANS[row], span, temperature)
            q = merged64(
                *(targets.hidden[row], targets.head, teacher_labels[row]),
                *(TEACHER_SPANS[row], span, temperature),
            )
            if p is None or q is None:
                continue
            count += 1
            if loss.vocabulary is None:
                total += ranked64(p, q)
            else:
                matched, rest = loss.weights(VT)
                beta = loss.divergence.parameter
                assert beta is not None
                total += matched * jsd64(p[SHARED.student], q[SHARED.teacher], beta)
                total += rest * ranked64(p[SHARED.student_rest], q[SHARED.teacher_rest])
    return total, count


LOSSES = {
    'uld': SpanLoss(),
    'uld, warm': SpanLoss(temperature=2.0),
    'hybrid': SpanLoss(SHARED, Divergence('jsd', 0.3)),
    'hybrid, weighted': SpanLoss(SHARED, matched_weight=2.0, unmatched_weight=0.5),
}


def alignment() -> SpanAlignment:
    return SpanAlignment(jnp.asarray(STUDENT_SPANS), jnp.asarray(TEACHER_SPANS))


@pytest.mark.parametrize('name', LOSSES)
@pytest.mark.parametrize('chunk_size', [1, 4, 100])
def test_loss_is_its_definition(name: str, chunk_size: int) -> None:
    loss = dataclasses.replace(LOSSES[name], chunk_size=chunk_size)
    values = operands()
    total, count = span_loss(*values, alignment(), loss)
    expected, spans = reference(loss, *values)
    assert int(count) == spans == 5
    np.testing.assert_allclose(total, expected, rtol=2e-5)


@pytest.mark.parametrize('name', LOSSES)
def test_gradient_is_that_of_the_definition(name: str) -> None:
    hidden, head, *rest = operands()
    step = 1e-5

    def loss(hidden, head):
        return span_loss(hidden, head, *rest, alignment(), LOSSES[name])[0]

    gradients = jax.grad(loss, argnums=(0, 1))(jnp.asarray(hidden), jnp.asarray(head))
    generator = np.random.default_rng(1)
    ways = [generator.standard_normal(x.shape) for x in (hidden, head)]
    ahead, behind = (
        reference(
            LOSSES[name], hidden + sign * step * ways[0], head + sign * step * ways[1], *rest
        )[0]
        for sign in (1, -1)
    )
    slope = sum((np.asarray(g) * way).sum() for g, way in zip(gradients, ways, strict=True))
    np.testing.assert_allclose(slope, (ahead - behind) / (2 * step), rtol=1e-3)


def test_positions_without_a_span_are_not_looked_at() -> None:
    hidden, head, labels, targets, teacher_labels = operands()
    loss = LOSSES['hybrid']

    def total(hidden, labels):
        operands = (hidden, head, labels, targets, teacher_labels)
        return span_loss(*operands, alignment(), loss)[0]

    absent = STUDENT_SPANS < 0
    other_labels = np.where(absent, V + 100, labels)
    expected = total(jnp.asarray(hidden), labels)
    np.testing.assert_array_equal(total(jnp.asarray(hidden), other_labels), expected)
    gradient = jax.grad(total)(jnp.asarray(hidden), labels)
    np.testing.assert_array_equal(gradient[absent], 0)
    # Span 1 of row 1 has two tokens: both are looked at.
    assert (np.abs(np.asarray(gradient))[STUDENT_SPANS >= 0].sum(-1) > 0).all()


def test_teacher_gets_no_gradient() -> None:
    hidden, head, labels, targets, teacher_labels = operands()

    def total(targets):
        operands = (hidden, head, labels, targets, teacher_labels)
        return span_loss(*operands, alignment(), LOSSES['hybrid'])[0]

    for leaf in jax.tree.leaves(jax.grad(total)(jax.tree.map(jnp.asarray, targets))):
        np.testing.assert_array_equal(leaf, 0)


def test_span_log_probs_sum_to_those_of_the_text() -> None:
    log_probs = -np.random.default_rng(0).exponential(size=(2, 5)).astype(np.float32)
    sums = span_log_probs(jnp.asarray(log_probs), jnp.asarray(STUDENT_SPANS), 5)
    counted = np.where(STUDENT_SPANS >= 0, log_probs, 0)
    np.testing.assert_allclose(sums.sum(1), counted.sum(1), rtol=1e-6)
    np.testing.assert_allclose(sums[0, :3], [log_probs[0, :2].sum(), *log_probs[0, 2:4]], rtol=1e-6)
    np.testing.assert_array_equal(sums[1, 2:], 0)


def test_ranks_by_hand() -> None:
    # Sorted: 0.7 0.2 0.1 and 0.5 0.5 0: |0.2| + |0.3| + |0.1|.
    difference = ranked_difference(jnp.array([0.1, 0.7, 0.2]), jnp.array([0.5, 0.5]))
    np.testing.assert_allclose(difference, 0.6, rtol=1e-6)


def test_a_renamed_vocabulary_is_no_difference_by_rank_and_one_by_name() -> None:
    logits = np.log(softmax64(np.random.default_rng(0).standard_normal(VT)))
    renamed = logits[np.roll(np.arange(VT), 1)]
    everything = np.arange(VT)
    nothing = np.array([], np.int32)
    together = SpanLoss(MatchedVocabulary(everything, everything, nothing, nothing))
    np.testing.assert_allclose(
        compare(jnp.asarray(logits), jnp.asarray(renamed), SpanLoss()), 0, atol=1e-6
    )
    assert compare(jnp.asarray(logits), jnp.asarray(renamed), together) > 0.01
    np.testing.assert_allclose(
        compare(jnp.asarray(logits), jnp.asarray(logits), together), 0, atol=1e-6
    )


def test_what_is_not_defined_is_refused() -> None:
    with pytest.raises(InputError, match='positive; received 0'):
        SpanLoss(temperature=0)
    with pytest.raises(InputError, match="received 'total_variation'"):
        SpanLoss(divergence=Divergence('total_variation'))


@pytest.mark.parametrize('name', ['uld', 'hybrid'])
def test_loss_is_that_of_trl(name: str) -> None:
    torch = pytest.importorskip('torch')
    gold = pytest.importorskip('trl.experimental.gold.gold_trainer')
    peer = object.__new__(gold.ULDLoss)
    torch.nn.Module.__init__(peer)
    peer.hybrid_matched_weight, peer.hybrid_unmatched_weight = 0.6, 0.4
    peer.beta, peer.token_merge_strategy = 0.3, 'observed'
    peer._teacher_matched_ids = set(SHARED.teacher.tolist())
    peer._student_matched_ids = set(SHARED.student.tolist())
    peer.mapping_tensor = torch.full((VT,), -1, dtype=torch.long)
    peer.mapping_tensor[SHARED.teacher.tolist()] = torch.tensor(SHARED.student.tolist())
    hidden, head, labels, targets, teacher_labels = operands()
    sides = []
    for x, matrix, ids, spans in (
        (hidden, head, labels, STUDENT_SPANS),
        (targets.hidden, targets.head, teacher_labels, TEACHER_SPANS),
    ):
        probs = torch.tensor(softmax64(x[0] @ matrix))
        groups = [np.flatnonzero(spans[0] == span).tolist() for span in range(3)]
        merge = peer._merge_probabilities_with_alignment_groups
        sides.append(merge(probs, groups, ids[0].tolist()))
    if name == 'hybrid':
        loss = SpanLoss(SHARED, Divergence('jsd', 0.3), 0.6, 0.4)
        expected = peer._compute_hybrid_uld_loss(*sides)
    else:
        loss = SpanLoss()
        student, teacher = (side.sort(dim=-1, descending=True).values for side in sides)
        student = torch.nn.functional.pad(student, (0, VT - V))
        expected = (student - teacher).abs().sum() / 3
    first = lambda x: x[:1]  # noqa: E731
    total, count = span_loss(
        *(hidden[:1], head, labels[:1], HiddenTargets(targets.hidden[:1], targets.head)),
        teacher_labels[:1],
        jax.tree.map(first, alignment()),
        loss,
    )
    assert int(count) == 3
    np.testing.assert_allclose(total / count, float(expected), rtol=1e-5)
