"""Teachers that run beside the student."""

import dataclasses
from typing import Any

import jax

from distill.types import Batch, HiddenTargets
from moe.transformer import Transformer, output_head


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
            variables: the teacher's, unboxed: 'params' and 'routing'.
            batch: what the student is trained on.

        Returns:
            The last hidden states and the head, through which no gradient flows.
        """
        output: Any = self.model.apply(
            variables,
            batch.tokens,
            positions=batch.positions,
            segment_ids=batch.segment_ids,
            logits=False,
        )
        head = output_head(self.model.config, variables['params']).astype(output.hidden.dtype)
        return jax.lax.stop_gradient(HiddenTargets(hidden=output.hidden, head=head))
