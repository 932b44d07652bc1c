"""Random draws that follow from a row's content, by inversion of the cumulative distribution."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

BLOCK = 128
# Constants of integer hashes: fractional parts of square roots, as SHA-256 has them.
_MIXERS = (0x9E3779B1, 0x6A09E667, 0xBB67AE85, 0x3C6EF373)


def row_keys(tokens: Int[Array, 'B T'], segment_ids: Int[Array, 'B T'], seed: int) -> Array:
    """Derives a random key for each row from its tokens and segments, and from nothing else.

    Args:
        tokens: of the rows.
        segment_ids: likewise.
        seed: another one gives other keys.

    Returns:
        `B` typed keys.
    """
    place = jnp.arange(tokens.shape[1], dtype=jnp.uint32)
    words = []
    for salt in _MIXERS[:2]:
        x = _mixed(tokens.astype(jnp.uint32) + jnp.uint32(salt))
        x = _mixed(x ^ segment_ids.astype(jnp.uint32))
        words.append(_mixed(x + place * jnp.uint32(_MIXERS[2])).sum(1, dtype=jnp.uint32))

    def key(first: Array, second: Array) -> Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), first), second)

    return jax.vmap(key)(*words)


def _mixed(x: Array) -> Array:
    for shift, factor in ((16, _MIXERS[0]), (15, _MIXERS[3] | 1)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)


def sorted_uniforms(keys: Array, length: int, draws: int) -> Float[Array, 'B T n']:
    """Draws `n` independent uniforms for each position, in rising order, without sorting.

    The first n partial sums of n + 1 exponentials, over the whole sum, are the order statistics of
    n uniforms.
    """

    def of_row(key: Array) -> Array:
        sums = jnp.cumsum(jax.random.exponential(key, (length, draws + 1)), axis=-1)
        return sums[:, :-1] / sums[:, -1:]

    return jax.vmap(of_row)(keys)


def draw_sorted(
    logits: Float[Array, '... V'], uniforms: Float[Array, '... n'], block: int = BLOCK
) -> Int[Array, '... n']:
    """Inverts the cumulative distribution of `softmax(logits)`: first to a block, then within it.

    Probabilities are summed in float32: those of one draw are off by some 1e-7 at most.

    Args:
        logits: of the distribution; an entry of -inf is never drawn.
        uniforms: in [0, 1), rising.
        block: entries of a block.

    Returns:
        Ids, rising.
    """
    V = logits.shape[-1]
    padding = [(0, 0)] * (logits.ndim - 1) + [(0, -V % block)]
    # Without the barrier XLA computes the exponentials again within each sum, one at a time on CPU.
    p = jax.lax.optimization_barrier(jnp.exp(logits - logits.max(-1, keepdims=True)))
    p = jnp.pad(p, padding).reshape(*logits.shape[:-1], -1, block)
    ends = jnp.cumsum(p.sum(-1), axis=-1)
    goal = jnp.minimum(uniforms, 1 - 2**-23) * ends[..., -1:]
    chosen = _first_above(ends, goal)
    begin = jnp.take_along_axis(ends, jnp.maximum(chosen - 1, 0), axis=-1)
    rest = goal - jnp.where(chosen == 0, 0, begin)
    within = jnp.take_along_axis(p, chosen[..., None], axis=-2)
    place, sound = _first_within(within, rest)
    likeliest = jnp.argmax(logits, axis=-1)[..., None]
    return jnp.where(sound, chosen * block + place, likeliest)


def _first_within(
    p: Float[Array, '... n block'], rest: Float[Array, '... n']
) -> tuple[Int[Array, '... n'], Array]:
    """Finds the entry of each block at which its sum passes `rest`; and whether there is one.

    Sums that are rounded may rise where nothing was added, or not reach what was rounded elsewhere:
    an entry of probability 0 is never taken, and the likeliest stands in for one past the end.
    """
    passed = (jnp.cumsum(p, axis=-1) > rest[..., None]) & (p > 0)
    place = jnp.where(passed.any(-1), passed.argmax(-1), p.argmax(-1))
    return place, p.max(-1) > 0


def _first_above(ends: Float[Array, '... G'], goal: Float[Array, '... n']) -> Int[Array, '... n']:
    """Finds the first entry of a rising array that is above each goal."""
    shape = goal.shape
    flat = jax.vmap(lambda row, x: jnp.searchsorted(row, x, side='right'))(
        ends.reshape(-1, ends.shape[-1]), goal.reshape(-1, shape[-1])
    )
    return jnp.minimum(flat.reshape(shape), ends.shape[-1] - 1)


def run_lengths(ids: Int[Array, '... n']) -> Int[Array, '... n']:
    """Counts each run of equal neighbours at its first entry; 0 at the others."""
    n = ids.shape[-1]
    first = jnp.concatenate(
        [jnp.ones_like(ids[..., :1], bool), ids[..., 1:] != ids[..., :-1]], axis=-1
    )
    place = jnp.where(first, jnp.arange(n), n)
    following = jax.lax.cummin(place, axis=place.ndim - 1, reverse=True)
    following = jnp.concatenate([following[..., 1:], jnp.full_like(following[..., :1], n)], axis=-1)
    return jnp.where(first, following - jnp.arange(n), 0)
