"""Losses of order: what the teacher puts first, the student should. On logits, not probabilities.

Over the pairs (i, j) of the teacher's k first ids with a teacher's logit gap `t = t_i - t_j > 0`,
and the student's gap `s` of the same pair, both divided by the temperature: the mean over pairs of

    hinge     max(0, t - s)          zero where every gap is at least the teacher's
    ranking   log(1 + exp(-s))       the likelihood of the teacher's order

Log-probabilities have the gaps of logits, so targets of top ids know as much as logits do.

Source: RankNet (Burges et al. 2005) for `ranking`; the teacher's gap as the margin as in
DistillKit's hinge, which takes it of probabilities.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from distill.integrands import Integrand


def hinge(student: Float[Array, '... K'], teacher: Float[Array, '... K']) -> Integrand:
    """`(f, h)` of each id: its pairs' losses as their first, and the derivative in its logit."""
    s, t, weight = _pairs(student, teacher)
    short = weight * (t > s)
    return jnp.where(weight > 0, jnp.maximum(t - s, 0) * weight, 0).sum(-1), _to_ids(-short)


def ranking(student: Float[Array, '... K'], teacher: Float[Array, '... K']) -> Integrand:
    """`(f, h)` of each id, as `hinge`."""
    s, _, weight = _pairs(student, teacher)
    value = jnp.where(weight > 0, jax.nn.softplus(-s) * weight, 0)
    return value.sum(-1), _to_ids(-weight * jax.nn.sigmoid(-s))


def _pairs(student: Array, teacher: Array) -> tuple[Array, Array, Array]:
    """Gaps of both and the weights of pairs: 1 over their number, 0 where there is none."""
    s, t = (x[..., :, None] - x[..., None, :] for x in (student, teacher))
    # A word that both hold impossible, like one that the teacher does, is in no order.
    s = jnp.where(jnp.isnan(s), 0, s)
    counts = (t > 0) & jnp.isfinite(t)
    number = jnp.sum(counts, (-2, -1), keepdims=True)
    return s, t, counts / jnp.maximum(number, 1).astype(s.dtype)


def _to_ids(by_gap: Float[Array, '... K K']) -> Float[Array, '... K']:
    """From derivatives in the gaps `s_i - s_j` to those in the `s_i`."""
    return by_gap.sum(-1) - by_gap.sum(-2)
