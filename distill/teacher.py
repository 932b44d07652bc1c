"""Teachers: those that run beside the student, and those that have spoken before."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax

from distill.estimators import Estimator, TruncatedEstimator
from distill.types import Batch, HiddenTargets, SampledTargets, TopKTargets
from moe.activations import Activation
from moe.errors import InputError
from moe.transformer import Transformer, head_of
from moe.types import RouterOutput


class Teacher(Protocol):
    """What a student learns from, inside of its jitted step."""

    def targets(self, variables: Any, batch: Batch) -> Any: ...


@dataclasses.dataclass(frozen=True)
class OnlineTeacher:
    """A frozen model in the same program: no gradient, no optimizer state.

    Its weights keep the dtype and sharding that they are given in; its products run in the dtype of
    its own config.

    Attributes:
        model: the teacher; its vocabulary is the student's.
    """

    model: Transformer

    def targets(self, variables: Any, batch: Batch) -> HiddenTargets:
        """Runs the teacher up to its last hidden state; logits are left to the loss.

        Args:
            variables: the teacher's, unboxed: 'params' and 'routing'; its matrices may be
                quantised (`moe.quantising`).
            batch: what the student is trained on.

        Returns:
            The last hidden states and the head, through which no gradient flows.
        """
        return self.targets_and_inside(variables, batch)[0]

    def targets_and_inside(
        self, variables: Any, batch: Batch, activations: Sequence[Activation] = ()
    ) -> tuple[HiddenTargets, tuple[RouterOutput, ...], Mapping[str, Any]]:
        """Runs the teacher as `targets` does, and returns what its routers decided too.

        And what its layers noted of the activations that are asked for, see `moe.activations`.
        """
        result: Any = self.model.apply(
            variables,
            batch.tokens,
            positions=batch.positions,
            segment_ids=batch.segment_ids,
            logits=False,
            mutable=list(activations) or False,
        )
        output, noted = result if activations else (result, {})
        head = head_of(self.model.config, variables, output.hidden.dtype)
        targets = HiddenTargets(hidden=output.hidden, head=head)
        return jax.lax.stop_gradient((targets, output.router, noted))


@dataclasses.dataclass(frozen=True)
class EstimatedTeacher:
    """A teacher in the same program of whom only an estimate is used: that which is cached.

    Attributes:
        teacher: that runs.
        estimator: what is kept of it.
    """

    teacher: OnlineTeacher
    estimator: Estimator | TruncatedEstimator

    @property
    def model(self) -> Transformer:
        """The model that runs."""
        return self.teacher.model

    def targets(self, variables: Any, batch: Batch) -> TopKTargets | SampledTargets:
        """Runs the teacher and estimates; no gradient flows through either."""
        hidden = self.teacher.targets(variables, batch)
        return jax.lax.stop_gradient(self.estimator.estimate(hidden, batch))


@dataclasses.dataclass(frozen=True)
class CachedTeacher:
    """A teacher whose targets came with the batch: it is not there any more."""

    def targets(self, variables: Any, batch: Batch) -> TopKTargets | SampledTargets:
        """Takes the batch's targets; there are no variables."""
        if batch.targets is None:
            raise InputError(
                'A cached teacher needs batches that carry targets; received one without. Take '
                'them from a distill.target_stream.TargetStream.'
            )
        targets: Any = batch.targets
        return targets
