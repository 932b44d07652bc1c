"""What a divergence sees of a token's logits, and the way back for its gradient.

A view makes a few or many `entries` of the logits; `pull` carries a derivative in the entries back
to the logits. Four are enough: the whole vocabulary as log-probabilities; a few ids and all the
others as one; a few ids drawn from it; and a few ids' logits as they are. Each works on a
vocabulary that is split over a mesh axis: the few are then known on every device, and what is
pulled back is each device's own part.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Logits = Float[Array, '... V']
STANDARD_EPS = 1e-7


class View(NamedTuple):
    """Entries of a token, and the pull-back from derivatives in them to those in the logits."""

    entries: Float[Array, '... n']
    pull: Callable[[Float[Array, '... n']], Logits]


def whole(logits: Logits, axis_name: str | None = None) -> View:
    """The log-probabilities of the vocabulary."""
    log_p = log_softmax(logits, axis_name)
    return View(log_p, lambda h: h - jnp.exp(log_p) * vocabulary_sum(h, axis_name))


def buckets(
    logits: Logits, ids: Int[Array, '... K'], used: Bool[Array, '... K'], axis_name: str | None
) -> View:
    """The log-probabilities of K ids and, last, of all the others together.

    The last is a sum over the others, not 1 less the K: it keeps its digits where it is small. An
    unused slot has a probability of zero.
    """
    here = _here(ids, used, logits.shape[-1], axis_name)
    kept = jnp.where(used, _gather(logits, here, axis_name), -jnp.inf)
    others = _scatter(logits, here, jnp.full(here.shape, -jnp.inf, logits.dtype), 'set')
    log_rest = _log_sum_exp(others, axis_name)
    log_p = log_softmax(jnp.concatenate([kept, log_rest], -1))

    def pull(h: Array) -> Array:
        g = h - jnp.exp(log_p) * jnp.sum(h, -1, keepdims=True)
        share = jnp.exp(others - jnp.where(log_rest > -jnp.inf, log_rest, 0))
        return _scatter(g[..., -1:] * share, here, g[..., :-1], 'add')

    return View(log_p, pull)


def drawn(logits: Logits, ids: Int[Array, '... K'], axis_name: str | None) -> View:
    """The log-probabilities of K ids, which may repeat."""
    log_p = log_softmax(logits, axis_name)
    here = _here(ids, jnp.ones(ids.shape, bool), logits.shape[-1], axis_name)

    def pull(h: Array) -> Array:
        return _scatter(-jnp.exp(log_p) * jnp.sum(h, -1, keepdims=True), here, h, 'add')

    return View(_gather(log_p, here, axis_name), pull)


def chosen(logits: Logits, ids: Int[Array, '... K'], axis_name: str | None) -> View:
    """The logits of K distinct ids."""
    here = _here(ids, jnp.ones(ids.shape, bool), logits.shape[-1], axis_name)
    entries = _gather(logits, here, axis_name)
    return View(entries, lambda h: _scatter(jnp.zeros_like(logits), here, h, 'add'))


def standardized(logits: Logits, axis_name: str | None = None) -> View:
    """The logits less their mean, over their standard deviation; -inf stays, outside of both.

    Source: the Z-score of arXiv 2403.01427; 1e-7 is added to the deviation as in its code.
    """
    finite = logits > -jnp.inf
    count = vocabulary_sum(finite.astype(logits.dtype), axis_name)
    mean = vocabulary_sum(jnp.where(finite, logits, 0), axis_name) / count
    centred = jnp.where(finite, logits - mean, 0)
    deviation = jnp.sqrt(vocabulary_sum(centred**2, axis_name) / count)
    z = centred / (deviation + STANDARD_EPS)

    def pull(g: Array) -> Array:
        g = jnp.where(finite, g, 0)
        along = (
            vocabulary_sum(g * centred, axis_name) / count / jnp.maximum(deviation, STANDARD_EPS)
        )
        level = vocabulary_sum(g, axis_name) / count
        return jnp.where(finite, (g - level - z * along) / (deviation + STANDARD_EPS), 0)

    return View(jnp.where(finite, z, -jnp.inf), pull)


def top_ids(
    logits: Logits, k: int, axis_name: str | None
) -> tuple[Float[Array, '... K'], Int[Array, '... K']]:
    """The k largest logits, largest first, and their ids."""
    values, ids = jax.lax.top_k(logits, min(k, logits.shape[-1]))
    if axis_name is None:
        return values, ids
    ids = ids + jax.lax.axis_index(axis_name) * logits.shape[-1]
    values, ids = (_everywhere(x, axis_name) for x in (values, ids))
    values, order = jax.lax.top_k(values, k)
    return values, jnp.take_along_axis(ids, order, -1)


def log_softmax(logits: Logits, axis_name: str | None = None) -> Array:
    """Normalises logits to log-probabilities, over a vocabulary split on `axis_name` if given."""
    peak = jnp.max(logits, axis=-1, keepdims=True)
    if axis_name is not None:
        peak = jax.lax.pmax(peak, axis_name)
    shifted = logits - peak
    return shifted - jnp.log(vocabulary_sum(jnp.exp(shifted), axis_name))


def vocabulary_sum(values: Float[Array, '... V'], axis_name: str | None = None) -> Array:
    """Sums over the vocabulary, split on `axis_name` if given; keeps the dimension."""
    total = jnp.sum(values, axis=-1, keepdims=True)
    return total if axis_name is None else jax.lax.psum(total, axis_name)


def _log_sum_exp(logits: Logits, axis_name: str | None) -> Array:
    """-inf, not NaN, where there is nothing to sum."""
    peak = jnp.max(logits, axis=-1, keepdims=True)
    if axis_name is not None:
        peak = jax.lax.pmax(peak, axis_name)
    peak = jnp.where(peak > -jnp.inf, peak, 0)
    return peak + jnp.log(vocabulary_sum(jnp.exp(logits - peak), axis_name))


def _everywhere(x: Array, axis_name: str) -> Array:
    """Joins the parts of the last dimension, known to be alike on every device afterwards."""
    size, index = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
    whole = jnp.zeros((*x.shape[:-1], size * x.shape[-1]), x.dtype)
    part = jax.lax.dynamic_update_slice_in_dim(whole, x, index * x.shape[-1], -1)
    return jax.lax.psum(part, axis_name)


def _here(ids: Array, used: Array, width: int, axis_name: str | None) -> Int[Array, '... K']:
    """Positions among the `width` entries that are here; `width` for those that are not."""
    first = 0 if axis_name is None else jax.lax.axis_index(axis_name) * width
    local = ids - first
    return jnp.where(used & (local >= 0) & (local < width), local, width)


def _gather(logits: Logits, here: Int[Array, '... K'], axis_name: str | None) -> Array:
    """-inf for an id that is nowhere."""
    found = jnp.take_along_axis(logits, here, -1, mode='fill', fill_value=-jnp.inf)
    return found if axis_name is None else jax.lax.pmax(found, axis_name)


def _scatter(logits: Logits, here: Int[Array, '... K'], values: Array, how: str) -> Logits:
    """Sets or adds values at positions, but for those that are not here."""
    rows = jnp.indices(here.shape, sparse=True)[:-1]
    at = logits.at[(*rows, here)]
    return at.set(values, mode='drop') if how == 'set' else at.add(values, mode='drop')
