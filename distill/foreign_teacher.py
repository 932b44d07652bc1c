"""A teacher that reads the text in tokens of its own, and what a student learns from it."""

import dataclasses
from typing import Any

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from distill.across import CrossTokenizer
from distill.cross_tokenizer import span_loss
from distill.dual_space import Reader, dual_space_loss
from distill.fused import Metrics
from distill.objective import Objective
from distill.projectors import PROJECTORS
from distill.schedules import value_at
from distill.spans import MatchedVocabulary, SpanAlignment
from distill.teacher import OnlineTeacher, Teacher
from distill.types import Batch, Counterpart, HiddenTargets
from moe.errors import InputError
from moe.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class ForeignTeacher:
    """A frozen model in the same program, with a tokenizer of its own.

    Attributes:
        model: the teacher.
        vocabulary: its ids that stand for the same bytes as a student's.
    """

    model: Transformer
    vocabulary: MatchedVocabulary

    def targets(self, variables: Any, batch: Batch) -> HiddenTargets:
        """Runs the teacher on its own tokens of the batch's text; no gradient flows through it.

        Args:
            variables: the teacher's, unboxed.
            batch: with a counterpart.
        """
        its = counterpart_of(batch)
        own = Batch(its.tokens, its.labels, its.segment_ids > 0, its.segment_ids, its.positions)
        return OnlineTeacher(self.model).targets(variables, own)


def require_foreign(objective: Objective, teacher: Teacher | None, *, writes: bool) -> None:
    """Refuses a teacher of another tokenizer where nothing compares across, and the reverse.

    Args:
        objective: what the student is trained for.
        teacher: its teacher.
        writes: whether sequences are written in training.

    Raises:
        InputError: where one is there without the other, or where what is written anew would have
            to be read by the teacher.
    """
    foreign = isinstance(teacher, ForeignTeacher)
    if foreign != (objective.across is not None):
        raise InputError(
            'A teacher of another tokenizer (ForeignTeacher) and Objective.across go together; '
            f'received {type(teacher).__name__} and across={objective.across!r}. Give both, or '
            'neither.'
        )
    if foreign and writes:
        raise InputError(
            'A rollout needs a teacher that reads what is written, token by token; received one of '
            'another tokenizer. Leave the rollout out.'
        )


def counterpart_of(batch: Batch) -> Counterpart:
    """Returns a batch's text in the teacher's tokens.

    Raises:
        InputError: where the batch has none.
    """
    if batch.counterpart is None:
        raise InputError(
            'A teacher of another tokenizer needs batches with a counterpart; received one '
            'without. Take them from a corpus that went through distill.counterpart.with_parallel.'
        )
    return batch.counterpart


@flax.struct.dataclass
class SharedCounts:
    """What a batch has in common with its counterpart, each at least 1.

    Attributes:
        spans: that both hold.
        student: labels of the student within them.
        teacher: labels of the teacher within them.
    """

    spans: Float[Array, '']
    student: Float[Array, '']
    teacher: Float[Array, '']

    @classmethod
    def of(cls, batch: Batch) -> 'SharedCounts':
        """Counts them."""
        its = counterpart_of(batch)
        rows = its.student_spans.max(axis=1) + 1, its.student_spans >= 0, its.teacher_spans >= 0
        return cls(*(jnp.maximum(jnp.sum(row, dtype=jnp.float32), 1) for row in rows))


def foreign_loss(
    across: CrossTokenizer | None,
    teacher: ForeignTeacher,
    variables: Any,
    targets: HiddenTargets,
    batch: Batch,
    *,
    student: tuple[Transformer, Any, Float[Array, 'B T D'], Float[Array, 'D V']],
    shared: SharedCounts | None,
    step: Int[Array, ''] | int,
    chunk_size: int,
) -> tuple[Float[Array, ''], Metrics]:
    """Computes `weight` times the mean over spans, or tokens, of how far both sides lie apart.

    Args:
        across: how they are compared.
        teacher: who teaches.
        variables: the teacher's.
        targets: what it says of its own tokens.
        batch: the text, with its counterpart.
        student: the model, its parameters, its last hidden states and its output head.
        shared: by the whole batch, of which this may be a part.
        step: of the weight's schedule.
        chunk_size: spans, or tokens, whose measures exist at one time.

    Returns:
        The loss; by name `(sum, count)` of its parts, and of the counted tokens those that are part
        of a span, 'aligned'.
    """
    assert across is not None
    assert shared is not None
    its = counterpart_of(batch)
    model, params, hidden, head = student
    if across.method == 'dskd':
        loss, metrics = dual_space_loss(
            Reader(model.config, _embedding(params), hidden, head, batch, its.student_spans >= 0),
            Reader(
                *(teacher.model.config, _embedding(variables['params'])),
                *(targets.hidden, targets.head, its, its.teacher_spans >= 0),
            ),
            params[PROJECTORS],
            (shared.student, shared.teacher),
            temperature=across.temperature,
            chunk_size=chunk_size,
            mesh=model.mesh,
        )
    else:
        total, count = span_loss(
            *(hidden, head, batch.labels, targets, its.labels),
            SpanAlignment(its.student_spans, its.teacher_spans),
            across.span_loss(teacher.vocabulary, chunk_size=chunk_size),
        )
        loss, metrics = total / shared.spans, {f'{across.method}_loss': (total, count)}
    aligned = jnp.sum(its.student_spans >= 0, dtype=jnp.float32)
    counted = jnp.sum(batch.mask, dtype=jnp.float32)
    return value_at(across.weight, step) * loss, metrics | {'aligned': (aligned, counted)}


def _embedding(params: Any) -> Float[Array, 'V D']:
    return params['embed']['embedding']
