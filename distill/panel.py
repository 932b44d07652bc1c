"""Several teachers of one student: each token has shares of them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from distill.fused import Metrics, fused_distillation_loss
from distill.objective import Term
from distill.teacher import OnlineTeacher
from distill.types import Batch, HiddenTargets
from moe.errors import InputError
from moe.validation import require


@dataclasses.dataclass(frozen=True)
class TeacherPanel:
    """Frozen teachers beside the student, on its vocabulary.

    Where a batch has `routes`, a token's teacher is the one that its route numbers; else all teach
    it, in the proportion of their weights.

    Attributes:
        teachers: two or more.
        weights: one for each, positive.
    """

    teachers: tuple[OnlineTeacher, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        count = len(self.teachers)
        require(count > 1, 'teachers', 'two or more; one alone is an OnlineTeacher', count)
        valid = len(self.weights) == count and all(weight > 0 for weight in self.weights)
        require(valid, 'weights', f'{count} positive numbers, one for each teacher', self.weights)
        sizes = {teacher.model.config.vocab_size for teacher in self.teachers}
        require(len(sizes) == 1, 'teachers', 'of one vocabulary', sorted(sizes))

    def targets(self, variables: tuple[Any, ...], batch: Batch) -> tuple[HiddenTargets, ...]:
        """Runs every teacher up to its last hidden state.

        Args:
            variables: of each, unboxed.
            batch: what the student is trained on.
        """
        pairs = zip(self.teachers, variables, strict=True)
        return tuple(teacher.targets(own, batch) for teacher, own in pairs)

    def shares(self, batch: Batch) -> Float[Array, 'teachers B T']:
        """Returns how much each teacher counts for each token; those of a token sum to 1.

        A route that numbers no teacher is the first's.
        """
        numbers = jnp.arange(len(self.teachers))[:, None, None]
        if batch.routes is None:
            weights = jnp.asarray(self.weights, jnp.float32)
            shares = (weights / weights.sum())[:, None, None]
            return jnp.broadcast_to(shares, (numbers.size, *batch.tokens.shape))
        known = (batch.routes >= 0) & (batch.routes < numbers.size)
        return (numbers == jnp.where(known, batch.routes, 0)).astype(jnp.float32)


def panel_loss(
    hidden: Float[Array, 'B T D'],
    head: Float[Array, 'D V'],
    targets: tuple[HiddenTargets, ...],
    terms: tuple[Term, ...],
    *,
    shares: Float[Array, 'teachers B T'],
    labels: Int[Array, 'B T'],
    mask: Bool[Array, 'B T'],
    normalizer: Float[Array, ''],
    chunk_size: int,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, ''], Metrics]:
    """Computes `sum over terms of weight * sum over teachers of share * divergence`.

    The divergences are averaged, not the teachers; of forward KL that has the same gradient. Terms
    against labels count once. A pass over the student's head is made for each teacher.

    Args:
        hidden: the student's last hidden states.
        head: its output head.
        targets: of each teacher.
        terms: with schedules resolved.
        shares: of each teacher in each token, summing to 1.
        labels: the next tokens.
        mask: True where the token counts.
        normalizer: divides the sum over tokens.
        chunk_size: as of the fused loss.
        mesh: likewise.

    Returns:
        The loss in nats per token counted by `normalizer`; and for each term its unweighted
        `(sum over unmasked tokens, count of unmasked tokens)`, averaged over the teachers by share.
    """
    settings: Any = {
        'labels': labels,
        'mask': mask,
        'normalizer': normalizer,
        'chunk_size': chunk_size,
        'mesh': mesh,
    }
    taught = tuple(term for term in terms if term.needs_teacher)
    labelled = tuple(term for term in terms if not term.needs_teacher)
    loss, metrics = jnp.zeros(()), {}
    if labelled:
        loss, metrics = fused_distillation_loss(hidden, head, None, labelled, **settings)
    sums: Metrics = {}
    for said, share in zip(targets, shares, strict=True):
        weights = jnp.broadcast_to(share[..., None], (*share.shape, len(taught)))
        part, pairs = fused_distillation_loss(
            hidden, head, said, taught, token_weights=weights, **settings
        )
        loss += part
        sums = jax.tree.map(jnp.add, sums, pairs) if sums else pairs
    return loss, metrics | sums


def require_panel(panel: TeacherPanel, *, writes: bool, ahead: bool) -> None:
    """Refuses what one teacher alone can do.

    Args:
        panel: of teachers.
        writes: whether sequences are written in training.
        ahead: whether the objective is also of tokens further ahead.

    Raises:
        InputError: where either holds.
    """
    if writes or ahead:
        what = 'a rollout' if writes else 'an mtp_weight above 0'
        raise InputError(
            f'{len(panel.teachers)} teachers together go with no {what.split(" ", 1)[1]}; received '
            f'{what}. Leave it out, or keep one teacher.'
        )
