"""Dual-space distillation: by hand, against float64, and where its gradients go."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill.dual_space import Reader, dual_space_loss
from distill.projectors import DUAL
from distill.types import Batch
from moe.config import AttentionConfig, TransformerConfig

B, T, TT, V, VT, D, DT = 2, 5, 4, 7, 9, 3, 4
TEMPERATURE = 1.7


def config(vocab_size: int, width: int) -> TransformerConfig:
    return TransformerConfig(vocab_size, 1, width, 2, AttentionConfig(1, 1, 2))


def reader(rng: np.random.Generator, size: tuple[int, ...], counted: np.ndarray) -> Reader:
    length, vocab_size, width = size
    tokens, labels = rng.integers(0, vocab_size, (2, B, length))
    # Two documents a row; the second of the last row is not read by the teacher.
    segments = np.tile(np.where(np.arange(length) < length // 2, 1, 2), (B, 1))
    batch = Batch(tokens, labels, counted, segments, tokens)
    normal = rng.standard_normal
    arrays = normal((vocab_size, width)), normal((B, length, width)), normal((width, vocab_size))
    embedding, hidden, head = (jnp.asarray(x, jnp.float32) for x in arrays)
    return Reader(config(vocab_size, width), embedding, hidden, head, batch, jnp.asarray(counted))


def operands() -> tuple[Reader, Reader, dict[str, jax.Array]]:
    rng = np.random.default_rng(0)
    counted = np.array([[1, 1, 1, 0, 1], [1, 0, 0, 0, 0]], bool)
    theirs = np.array([[1, 1, 1, 1], [1, 1, 0, 0]], bool)
    student, teacher = reader(rng, (T, V, D), counted), reader(rng, (TT, VT, DT), theirs)
    shapes = (1, 2 * D, 2 * DT), (1, DT, D), (1, D, DT)
    kernels = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]
    return student, teacher, dict(zip(DUAL, kernels, strict=True))


def loss_of(student: Reader, teacher: Reader, kernels: dict, chunk_size: int = 4):
    counts = tuple(jnp.sum(one.counted, dtype=jnp.float32) for one in (student, teacher))
    return dual_space_loss(
        student, teacher, kernels, counts, temperature=TEMPERATURE, chunk_size=chunk_size
    )


def log_softmax64(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def kl64(wanted: np.ndarray, own: np.ndarray) -> float:
    p, q = log_softmax64(wanted / TEMPERATURE), log_softmax64(own / TEMPERATURE)
    return (np.exp(p) * (p - q)).sum()


def normed64(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True))


class Dual64:
    """The definition, a token at a time; `at` are the values that gradients are taken in."""

    def __init__(self) -> None:
        self.student, self.teacher, kernels = operands()
        self.base = [
            np.asarray(x, np.float64)
            for x in (self.student.hidden, self.student.head, *(kernels[name][0] for name in DUAL))
        ]

    def pairs(self, one: Reader) -> np.ndarray:
        table = np.asarray(one.embedding, np.float64)
        sides = table[np.asarray(one.batch.tokens)], table[np.asarray(one.batch.labels)]
        return np.concatenate(sides, axis=-1)

    def mixed(self, hidden, query, of_teacher, of_student):
        """The teacher's states in the student's space, and the reverse."""
        scores = (
            self.pairs(self.student)
            @ query
            @ np.swapaxes(normed64(self.pairs(self.teacher)), 1, 2)
            / math.sqrt(2 * DT)
        )
        following = self.pairs(self.teacher)[..., DT:]
        own = normed64(np.asarray(self.teacher.hidden, np.float64)) + normed64(following)
        both = np.zeros((B, T, D)), np.zeros((B, TT, DT))
        for b in range(B):
            same = (
                np.asarray(self.student.batch.segment_ids)[b][:, None]
                == np.asarray(self.teacher.batch.segment_ids)[b]
            )
            same &= np.asarray(self.student.counted)[b][:, None]
            same &= np.asarray(self.teacher.counted)[b]
            weights = np.where(same, np.exp(scores[b]), 0)
            for t in np.flatnonzero(same.any(1)):
                both[0][b, t] = weights[t] / weights[t].sum() @ own[b] @ of_teacher
            for s in np.flatnonzero(same.any(0)):
                both[1][b, s] = weights[:, s] / weights[:, s].sum() @ hidden[b] @ of_student
        return both

    def loss(self, hidden, head, *kernels) -> float:
        theirs, ours = self.mixed(hidden, *kernels)
        taught, _ = self.mixed(self.base[0], *self.base[2:])
        frozen, their_head = self.base[1], np.asarray(self.teacher.head, np.float64)
        said = np.asarray(self.teacher.hidden, np.float64)
        first = second = third = 0.0
        counted = np.argwhere(np.asarray(self.student.counted))
        for b, t in counted:
            label = np.asarray(self.student.batch.labels)[b, t]
            first -= log_softmax64(theirs[b, t] @ frozen)[label]
            if np.argmax(taught[b, t] @ frozen) == label:
                second += kl64(taught[b, t] @ frozen, hidden[b, t] @ head)
        of_teacher = np.argwhere(np.asarray(self.teacher.counted))
        for b, t in of_teacher:
            third += kl64(said[b, t] @ their_head, ours[b, t] @ their_head)
        assert second > 0, 'some token is hit'
        return (first + second) / len(counted) + third / len(of_teacher)


@pytest.mark.parametrize('chunk_size', [1, 100])
def test_it_is_its_definition(chunk_size: int) -> None:
    loss, metrics = loss_of(*operands(), chunk_size)
    dual = Dual64()
    np.testing.assert_allclose(loss, dual.loss(*dual.base), rtol=1e-4)
    assert {name: int(count) for name, (_, count) in metrics.items()} | {
        'dskd_student_space': 0
    } == {'dskd_projection': 5, 'dskd_student_space': 0, 'dskd_teacher_space': 6}


def test_gradients_are_those_of_the_definition() -> None:
    student, teacher, kernels = operands()

    def loss(hidden, head, kernels):
        return loss_of(student._replace(hidden=hidden, head=head), teacher, kernels)[0]

    found = jax.jit(jax.grad(loss, (0, 1, 2)))(student.hidden, student.head, kernels)
    gradients = [*found[:2], *(found[2][name][0] for name in DUAL)]
    dual, rng, step = Dual64(), np.random.default_rng(1), 1e-6
    for place, gradient in enumerate(gradients):
        way = rng.standard_normal(gradient.shape)
        ends = []
        for sign in (1, -1):
            moved = list(dual.base)
            moved[place] = moved[place] + sign * step * way
            ends.append(dual.loss(*moved))
        slope = (ends[0] - ends[1]) / (2 * step)
        np.testing.assert_allclose((np.asarray(gradient) * way).sum(), slope, rtol=2e-3, atol=1e-5)


def test_nothing_reaches_teacher_or_embeddings() -> None:
    student, teacher, kernels = operands()

    def loss(own, hidden, head, embedding):
        changed = teacher._replace(hidden=hidden, head=head, embedding=embedding)
        return loss_of(student._replace(embedding=own), changed, kernels)[0]

    arguments = student.embedding, teacher.hidden, teacher.head, teacher.embedding
    for gradient in jax.grad(loss, (0, 1, 2, 3))(*arguments):
        np.testing.assert_array_equal(gradient, 0)


def test_one_token_by_hand() -> None:
    """Of width one, a normed vector is its sign: the teacher says 2 k_t, the student k_s h."""
    one = np.ones((1, 1), np.int32)
    batch = Batch(0 * one, 0 * one, one > 0, one, 0 * one)
    counted = jnp.ones((1, 1), bool)

    def side(hidden: float, head: list[float]) -> Reader:
        table, states = jnp.ones((2, 1)), jnp.full((1, 1, 1), hidden)
        return Reader(config(2, 1), table, states, jnp.array([head]), batch, counted)

    kernels = [jnp.zeros((1, 2, 2)), jnp.full((1, 1, 1), 0.5), jnp.full((1, 1, 1), 0.0)]
    student, teacher = side(1.0, [1.0, -1.0]), side(2.0, [1.0, 0.0])
    loss, _ = dual_space_loss(
        *(student, teacher, dict(zip(DUAL, kernels, strict=True)), (jnp.ones(()), jnp.ones(()))),
        temperature=1.0,
        chunk_size=1,
    )
    # h_ts = 0.5 (1 + 1) = 1 = h_s: logits 1 and -1, no divergence; h_st = 0: uniform against
    # sigmoid(2).
    p = 1 / (1 + math.exp(-2))
    teacher_space = math.log(2) + p * math.log(p) + (1 - p) * math.log(1 - p)
    np.testing.assert_allclose(loss, math.log1p(math.exp(-2)) + teacher_space, rtol=1e-5)
