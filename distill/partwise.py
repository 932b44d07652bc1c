"""A teacher that reads a batch in parts of its own, however the student's is split."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from distill.teacher import EstimatedTeacher, OnlineTeacher
from distill.types import Batch, HiddenTargets, SampledTargets, TopKTargets
from moe.errors import InputError
from moe.transformer import Transformer, head_of
from moe.validation import require


def split_rows(batch: Any, parts: int) -> Any:
    """Splits rows into equal parts, each of every `parts`-th row, so that row shards stay local.

    Args:
        batch: arrays of `[B, ...]`.
        parts: that divide `B`.

    Returns:
        The same of `[parts, B / parts, ...]`.
    """

    def split(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)

    return jax.tree.map(split, batch)


def joined_rows(parts: Any) -> Any:
    """Puts what `split_rows` split together again."""

    def join(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 0, 1).reshape(x.shape[0] * x.shape[1], *x.shape[2:])

    return jax.tree.map(join, parts)


@dataclasses.dataclass(frozen=True)
class PartwiseTeacher:
    """A teacher in the same program that reads the whole batch before the student begins.

    One part of the rows after the other, so that what a forward of the teacher needs of memory, and
    how large its products are, is chosen apart from the student's micro-batches. What it says of
    all rows waits for them: `B T Dt` hidden states, or the estimate.

    Attributes:
        teacher: that runs.
        micro_batches: the parts; they divide the rows of a batch.
    """

    teacher: OnlineTeacher | EstimatedTeacher
    micro_batches: int

    def __post_init__(self) -> None:
        require(self.micro_batches >= 1, 'micro_batches', 'at least 1', self.micro_batches)

    @property
    def model(self) -> Transformer:
        """The model that runs."""
        return self.teacher.model

    def ahead(self, variables: Any, batch: Batch) -> Batch:
        """Returns the batch with what the teacher says of it, through which no gradient flows.

        Args:
            variables: the teacher's.
            batch: without targets.

        Raises:
            InputError: where the parts do not divide the rows.
        """
        rows, count = batch.tokens.shape[0], self.micro_batches
        if rows % count:
            raise InputError(
                f"The teacher's micro_batches must divide the {rows} rows of a batch; received "
                f'{count}. Choose a divisor, such as {_divisor(rows, count)}.'
            )

        def said(part: Batch) -> Any:
            targets = self.teacher.targets(variables, part)
            return targets.hidden if isinstance(targets, HiddenTargets) else targets

        if count == 1:
            return dataclasses.replace(batch, targets=said(batch))
        parts = jax.lax.map(said, split_rows(batch, count))
        return dataclasses.replace(batch, targets=joined_rows(parts))

    def targets(self, variables: Any, batch: Batch) -> HiddenTargets | TopKTargets | SampledTargets:
        """Takes what was said of these rows, from a batch that `ahead` has returned."""
        if batch.targets is None:
            raise InputError(
                'A PartwiseTeacher needs batches that carry what it said of them; received one '
                'without. Take them from its method `ahead`.'
            )
        targets: Any = batch.targets
        if isinstance(self.teacher, EstimatedTeacher):
            return targets
        head = head_of(self.model.config, variables, targets.dtype)
        return jax.lax.stop_gradient(HiddenTargets(hidden=targets, head=head))


def _divisor(rows: int, count: int) -> int:
    """The divisor of the rows that is nearest, the larger of two."""
    divisors = (n for n in range(1, rows + 1) if rows % n == 0)
    return min(divisors, key=lambda n: (abs(n - count), -n))
