"""What multi-token prediction adds to a loss: the objective again, of tokens further ahead."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from distill.divergences import Targets
from distill.fused import Metrics, fused_distillation_loss
from distill.objective import Objective, Term
from distill.types import Batch, HiddenTargets
from moe.config import TransformerConfig
from moe.errors import InputError
from moe.mtp import ahead, same_segment_ahead
from moe.stacking import module_name
from moe.types import ModelOutput


def require_weight(config: TransformerConfig, objective: Objective) -> None:
    """Refuses modules that nothing trains, and a weight that has nothing to weigh.

    Raises:
        InputError: where one of `mtp_depth` and `mtp_weight` is zero and the other is not.
    """
    if objective.uses_mtp == (config.mtp_depth > 0):
        return
    required = 'above 0 (0.3, say)' if config.mtp_depth else '0'
    raise InputError(
        f'A model with mtp_depth={config.mtp_depth} needs an mtp_weight that is {required}; '
        f'received {objective.mtp_weight!r}. The one counts modules of multi-token prediction, the '
        'other weighs their loss: set both or neither.'
    )


def batch_ahead(batch: Batch, distance: int) -> Batch:
    """Moves labels and mask of the positions `distance` ahead to the positions that predict them.

    A position counts where the one ahead does and is of the same document.
    """
    counted = ahead(batch.mask, distance) & same_segment_ahead(batch.segment_ids, distance)
    return dataclasses.replace(batch, labels=ahead(batch.labels, distance), mask=counted)


def targets_ahead(targets: Targets, distance: int) -> Targets:
    """Moves what the teacher says `distance` positions ahead; zeros past the end."""
    if isinstance(targets, HiddenTargets):
        return dataclasses.replace(targets, hidden=ahead(targets.hidden, distance))
    return jax.tree.map(lambda leaf: ahead(leaf, distance), targets)


def mtp_loss(
    outputs: Sequence[ModelOutput],
    head: Float[Array, 'D V'],
    targets: Targets | None,
    terms: tuple[Term, ...],
    batch: Batch,
    *,
    normalizer: Float[Array, ''],
    chunk_size: int,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, ''], Metrics]:
    """Averages the terms' loss over the depths of multi-token prediction.

    The module of depth `d` predicts at position `t` what the model predicts at `t + d`: the label
    there, and the teacher's distribution there. So with `M` tokens counted by `normalizer`

        loss = (1 / depths) * sum over d of (sum over positions of terms(d)) / M.

    Args:
        outputs: one for each depth (`ModelOutput.ahead`), at least one.
        head: the student's output head.
        targets: the teacher at the batch's own positions; None where no term needs one.
        terms: with schedules resolved.
        batch: what the model read; a position counts where the one `d` ahead does and is of the
            same document.
        normalizer: `M`, of the next-token loss: documents lose their last `d` positions, and their
            other tokens weigh as much as there.
        chunk_size: as of the fused loss.
        mesh: likewise.

    Returns:
        The loss in nats per token of `M`; and for each term and depth its unweighted
        `(sum, count)`, named 'mtp_1/cross_entropy'.

    Source: DeepSeek-V3, arXiv 2412.19437, equations 24 (which divides by the length of the text,
        as `M` here) and 25; there with cross-entropy alone.
    """
    loss, metrics = jnp.zeros(()), {}
    for distance, output in enumerate(outputs, start=1):
        further = batch_ahead(batch, distance)
        share, pairs = fused_distillation_loss(
            output.hidden,
            head,
            None if targets is None else targets_ahead(targets, distance),
            terms,
            labels=further.labels,
            mask=further.mask,
            normalizer=normalizer,
            chunk_size=chunk_size,
            mesh=mesh,
        )
        loss += share / len(outputs)
        metrics |= {f'{module_name(distance)}/{name}': pair for name, pair in pairs.items()}
    return loss, metrics
