"""Who writes the rows of a batch: shares, and terms that count on the rows of some alone."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from distill.config import RolloutConfig
from distill.objective import Objective, Term
from distill.types import WRITERS, Batch
from moe.errors import InputError

TEXT, STUDENT, TEACHER = range(len(WRITERS))


def choose_writers(key: Key[Array, ''], rows: int, config: RolloutConfig) -> Int[Array, 'B']:
    """Chooses who writes each row: any rows, of each author its share to within one.

    Of `B` rows the first `floor(lmbda B + u)` in a random order are the student's, and those up to
    `floor((lmbda + teacher_share) B + u)` the teacher's, with one `u` that is uniform in [0, 1): in
    expectation the shares are met exactly.
    """
    of_count, of_order = jax.random.split(key)
    fraction = jax.random.uniform(of_count)
    rank = jnp.argsort(jnp.argsort(jax.random.uniform(of_order, (rows,))))
    student, both = (
        jnp.floor(share * rows + fraction)
        for share in (config.lmbda, config.lmbda + config.teacher_share)
    )
    return jnp.where(rank < student, STUDENT, jnp.where(rank < both, TEACHER, TEXT))


def term_weights(
    terms: Sequence[Term],
    writers: Int[Array, 'B'],
    mask: Bool[Array, 'B T'],
    tokens: Float[Array, 'writers'],
) -> Float[Array, 'B T terms']:
    """Returns the weights that make each term's mean one over the sequences that it is on.

    The loss divides by all `M` unmasked tokens of the whole batch; a term on the `M_w` tokens of
    writer `w` weighs those by `M / M_w`, and all others by 0. So its weight means the same whatever
    the share of `w`.

    Args:
        terms: of the loss.
        writers: of the rows.
        mask: True where the token counts.
        tokens: `M_w` of each writer, of the whole batch.

    Source: 'skew_forward_kl' on the teacher's sequences with 'skew_reverse_kl' on the student's,
        each of weight 1/2, the contrast of DistiLLM-2, arXiv 2503.07067, section 3.1. There both
        complete every prompt, here one of them does; and its schedules of `lam` and weight by
        difficulty are left out.
    """
    scale = tokens.sum() / jnp.maximum(tokens, 1)

    def of(term: Term) -> Array:
        if term.on is None:
            return mask.astype(jnp.float32)
        number = WRITERS.index(term.on)
        return (mask & (writers == number)[:, None]) * scale[number]

    return jnp.stack([of(term) for term in terms], axis=-1)


def tokens_by_writer(batch: Batch) -> Float[Array, 'writers']:
    """Counts the unmasked tokens of each writer's rows."""
    counts = batch.mask.sum(axis=1, dtype=jnp.float32)
    assert batch.writers is not None
    return jnp.stack([jnp.where(batch.writers == i, counts, 0).sum() for i in range(len(WRITERS))])


def require_writers(objective: Objective, config: RolloutConfig | None) -> None:
    """Refuses an objective on sequences that nobody writes.

    Raises:
        InputError: for a term on a writer whose share is 0; for tokens further ahead of some
            sequences alone; for returns of what was not drawn from the student as it is.
    """
    shares = {'text': 1.0}
    if config is not None:
        shares = {'student': config.lmbda, 'teacher': config.teacher_share}
        shares['text'] = round(1 - sum(shares.values()), 6)
    for term in objective.terms:
        if term.on is not None and not shares.get(term.on, 0) > 0:
            raise InputError(
                f'{term.name} on={term.on!r} needs a rollout with a share of such sequences above '
                f'0; received {config}. Set lmbda or teacher_share, or leave `on` out.'
            )
        if term.on is not None and objective.uses_mtp:
            raise InputError(
                f'{term.name} on={term.on!r} is of the next token alone; received '
                f'mtp_weight={objective.mtp_weight!r} too. Leave one of them out.'
            )
    if objective.return_weight > 0 and not (
        config is not None
        and config.lmbda > 0
        and config.temperature == 1
        and config.staleness == 0
    ):
        raise InputError(
            f'return_weight={objective.return_weight} needs sequences that the student writes at '
            'temperature 1 and in the same step, as its policy gradient is of those; received '
            f'{config}. Set rollout.lmbda, temperature=1 and staleness=0, or return_weight=0.'
        )
