"""The loss of a batch whose rows have several writers: each term on the sequences that it is on."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from distill.fused import Metrics, fused_distillation_loss
from distill.objective import Term
from distill.pairs import Targets
from distill.returns import returns
from distill.types import Batch
from distill.writers import STUDENT, term_weights


def written_loss(
    hidden: Float[Array, 'B T D'],
    head: Float[Array, 'D V'],
    targets: Targets | None,
    terms: tuple[Term, ...],
    batch: Batch,
    *,
    return_weight: float,
    written: Float[Array, 'writers'] | None,
    normalizer: Float[Array, ''],
    **settings: Any,
) -> tuple[Float[Array, ''], Metrics]:
    """Computes the terms' loss, and with it the surrogate of the student's returns.

    Args:
        hidden: the student's last hidden states.
        head: its output head.
        targets: the teacher; hidden states where returns count.
        terms: with schedules resolved.
        batch: the tokens, and who wrote its rows.
        return_weight: of the surrogate, see `distill.returns`.
        written: unmasked tokens by each writer in the whole batch; None where all is text.
        normalizer: unmasked tokens of the whole batch.
        settings: of the fused loss: `chunk_size` and `mesh`.

    Returns:
        The loss in nats per token; each term's `(sum, weight)`, and where returns count theirs over
        the student's tokens, 'return' in nats.
    """

    def loss_of(terms: tuple[Term, ...], weights: Array | None) -> tuple[Array, Metrics]:
        return fused_distillation_loss(
            hidden,
            head,
            targets,
            terms,
            labels=batch.labels,
            mask=batch.mask,
            normalizer=normalizer,
            token_weights=weights,
            **settings,
        )

    if written is None or batch.writers is None:
        return loss_of(terms, None)
    if return_weight == 0:
        some = any(term.on is not None for term in terms)
        weights = term_weights(terms, batch.writers, batch.mask, written) if some else None
        return loss_of(terms, weights)
    all_terms = (*terms, Term('cross_entropy', weight=return_weight, on='student'))
    weights = term_weights(all_terms, batch.writers, batch.mask, written)
    own: Any = targets
    future = returns(hidden, head, own, batch, chunk_size=settings['chunk_size'])
    counted = batch.mask & (batch.writers == STUDENT)[:, None]
    future = jnp.where(counted, future, 0)
    loss, pairs = loss_of(all_terms, weights.at[..., -1].multiply(future))
    # The value of a surrogate means nothing; its gradient does.
    pairs.popitem()
    return loss, pairs | {'return': (jnp.sum(future), jnp.sum(counted, dtype=jnp.float32))}
