"""Rows to the shards of the `expert` axis that want them, and back: one exchange, however it runs.

`counts[s, r]` rows go from shard s to shard r. A shard's rows lie sorted by receiver, without gaps;
what it gets lies sorted by sender, likewise. The way back, and the transpose, is the same exchange
with `counts` transposed.

Where the platform has a ragged collective only these rows travel. CPU has none: there every pair of
shards exchanges a buffer of the most rows that one can send another, and gathers make the same
result of it. All of it runs under `shard_map`.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

AXIS = 'expert'


class Bounds(NamedTuple):
    """The sizes of buffers, which are known when the program is compiled.

    Attributes:
        sent: rows that a shard holds before the exchange.
        received: rows that it has room for after it.
        pair: rows that one shard can send another.
    """

    sent: int
    received: int
    pair: int

    @property
    def reversed(self) -> 'Bounds':
        """Those of the way back."""
        return Bounds(self.received, self.sent, self.pair)


def compiler_options(mesh: Mesh) -> dict[str, bool]:
    """Options for `jax.jit` under which exchanges need not be waited for.

    A TPU's compiler runs them beneath other work if it is told to; elsewhere there is nothing to
    tell. In one piece there is little to run meanwhile: see `MoEConfig.exchange_chunks`.

    Args:
        mesh: that the program runs on.
    """
    if mesh.devices.flat[0].platform != 'tpu' or mesh.shape[AXIS] == 1:
        return {}
    return {
        'xla_tpu_enable_async_all_to_all': True,
        'xla_tpu_enable_async_ragged_all_to_all': True,
    }


def exchange_bounds(
    tokens: int, k: int, num_experts: int, shards: int, factor: float | None
) -> Bounds:
    """Bounds the exchange of the assignments of `tokens` tokens a shard.

    Balanced load brings a shard `N K` rows, as many as it sends. Experts of a token are distinct,
    so the worst load brings it `N min(K, E / shards)` from every shard: `min(shards, E / K)` times
    as many.

    Args:
        tokens: `N` of one shard.
        k: experts of each.
        num_experts: `E`, over all shards.
        shards: of the `expert` axis.
        factor: of the balanced load that a shard has room for; None for the worst.
    """
    pair = tokens * min(k, num_experts // shards)
    received = shards * pair
    if factor is not None:
        received = min(received, math.ceil(tokens * k * factor))
    return Bounds(tokens * k, received, min(pair, received))


def accepted_counts(
    wanted: Int[Array, 'shards shards'], capacity: int
) -> Int[Array, 'shards shards']:
    """Limits what each shard receives: senders are served in order until its room is used up.

    Args:
        wanted: rows of each sender (first axis) for each receiver.
        capacity: rows that a receiver has room for.

    Returns:
        Rows that are sent; their sum over senders is at most `capacity`.
    """
    before = jnp.cumsum(wanted, axis=0) - wanted
    return jnp.clip(capacity - before, 0, wanted)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def exchange_rows(
    rows: Float[Array, 'sent D'], counts: Int[Array, 'shards shards'], bounds: Bounds
) -> Float[Array, 'received D']:
    """Sends each shard its rows.

    Args:
        rows: of this shard, those for shard 0 first; rows past the sum of its counts stay.
        counts: rows from each sender (first axis) to each receiver, the same on every shard; none
            above `bounds.pair`, and their sums within the other bounds.
        bounds: of the buffers.

    Returns:
        The rows from every shard, those of shard 0 first; zero past the last.
    """
    return jax.lax.platform_dependent(
        rows,
        counts,
        cpu=functools.partial(_padded_exchange, bounds=bounds),
        default=functools.partial(_ragged_exchange, bounds=bounds),
    )


def _forward(rows: Array, counts: Array, bounds: Bounds) -> tuple[Array, Array]:
    return exchange_rows(rows, counts, bounds), counts


def _backward(bounds: Bounds, counts: Array, cotangent: Array) -> tuple[Array, None]:
    return exchange_rows(cotangent, counts.T, bounds.reversed), None


exchange_rows.defvjp(_forward, _backward)


def _starts(sizes: Array, axis: int = 0) -> Array:
    return jnp.cumsum(sizes, axis=axis) - sizes


def _ragged_exchange(rows: Array, counts: Array, bounds: Bounds) -> Array:
    this = jax.lax.axis_index(AXIS)
    sent, received = counts[this], counts[:, this]
    return jax.lax.ragged_all_to_all(
        rows,
        jnp.zeros_like(rows, shape=(bounds.received, rows.shape[1])),
        _starts(sent),
        sent,
        # Where, in the buffer of each receiver, what this shard sends it begins.
        _starts(counts)[this],
        received,
        axis_name=AXIS,
    )


def _padded_exchange(rows: Array, counts: Array, bounds: Bounds) -> Array:
    this = jax.lax.axis_index(AXIS)
    sent, received = counts[this], counts[:, this]
    offset = jnp.arange(bounds.pair)
    source = _starts(sent)[:, None] + offset
    source = jnp.where(offset < sent[:, None], source, bounds.sent)
    buffers = rows.at[source].get(mode='fill', fill_value=0)
    buffers = jax.lax.all_to_all(buffers, AXIS, split_axis=0, concat_axis=0, tiled=True)
    position = jnp.arange(bounds.received)
    sender = segment_of(position, received)
    within = position - _starts(received).at[sender].get(mode='fill', fill_value=0)
    source = jnp.where(sender < received.size, sender * bounds.pair + within, buffers.size)
    return buffers.reshape(-1, rows.shape[1]).at[source].get(mode='fill', fill_value=0)


def segment_of(position: Int[Array, 'M'], sizes: Int[Array, 'S']) -> Int[Array, 'M']:
    """Returns in which of the segments, one after the other, each position lies; `S` for none."""
    ends = jnp.cumsum(sizes)
    return jnp.searchsorted(ends, position, side='right', method='compare_all').astype(jnp.int32)
