"""Adaptive KL: forward where the student misses the teacher's head, reverse where its tail."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from distill.integrands import Integrand, Parameter, forward_kl, reverse_kl
from distill.views import vocabulary_sum


def adaptive_kl(
    log_p: Float[Array, '... V'],
    log_q: Float[Array, '... V'],
    mu: Parameter,
    axis_name: str | None = None,
) -> Integrand:
    """f = w KL(q, p) + (1 - w) KL(p, q), w the share of |p - q| that lies on the teacher's head.

    The weights are constants to the gradient, and 1/2 each where p = q.

    Source: AKL, arXiv 2404.02657, and its published code (`get_ratio`), from which it differs
    where probabilities tie at the head's edge: all of them are inside or all outside.
    """
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    gap = jnp.abs(p - q)
    inside = vocabulary_sum(jnp.where(_head(q, mu, axis_name), gap, 0), axis_name)
    total = vocabulary_sum(gap, axis_name)
    share = jnp.where(total > 0, inside / jnp.where(total > 0, total, 1), 0.5)
    forward, reverse = forward_kl(log_p, log_q), reverse_kl(log_p, log_q)
    value, pull = (_mixed(share, a, b) for a, b in zip(forward, reverse, strict=True))
    return value, pull


def _mixed(share: Array, a: Array, b: Array) -> Array:
    """A part without weight adds nothing, even where it is infinite."""
    return jnp.where(share > 0, share * a, 0) + jnp.where(share < 1, (1 - share) * b, 0)


def _head(q: Float[Array, '... V'], mu: Parameter, axis_name: str | None) -> Bool[Array, '... V']:
    """Marks the most probable entries that together hold at most `mu`, and the first whatever.

    No sort, which a split vocabulary would have to be gathered for: the least probability that is
    inside is found by bisection. Floats that are not negative are in the order of their bits.
    """
    bits = jax.lax.bitcast_convert_type(q.astype(jnp.float32), jnp.int32)
    top = jnp.max(bits, -1, keepdims=True)
    if axis_name is not None:
        top = jax.lax.pmax(top, axis_name)

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        # Those from `low` on hold too much; those from `high` on do not.
        low, high = bounds
        middle = low + (high - low) // 2
        mass = vocabulary_sum(jnp.where(bits >= middle, q, 0), axis_name)
        return jnp.where(mass > mu, middle, low), jnp.where(mass > mu, high, middle)

    start = 0 * top - 1, top + 1
    _, least = jax.lax.fori_loop(0, 31, halve, start)
    return (bits >= least) | (bits == top)
