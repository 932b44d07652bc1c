"""Which keys each query may see, and at which angles: computed once a call, not once a layer."""

import dataclasses
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from moe.attention_config import AttentionLike
from moe.cache_rows import write_rows
from moe.linear_config import LinearAttentionConfig
from moe.pages import read_pages, write_pages
from moe.rope import rope_tables
from moe.types import KVCache


@flax.struct.dataclass
class AttentionContext:
    """What all layers of one kind of attention share.

    Attributes:
        cos: of the rotary angles of the new tokens; None without rotary positions.
        sin: likewise.
        allowed: True where a query may look at a key; its batch dim is 1 where all rows agree. None
            where the kind has no keys.
        segment_ids: documents of the new tokens, 0 for padding; None where a row is one document.
        start: of each row the cache slot of the first new token; None without a cache.
        table: of a cache in pages.
    """

    cos: Float[Array, 'B T half'] | None
    sin: Float[Array, 'B T half'] | None
    allowed: Bool[Array, 'B T S'] | None
    segment_ids: Int[Array, 'B T'] | None
    start: Int[Array, 'B'] | None
    table: Int[Array, 'G R P'] | None = None

    def extended(
        self, kept: Shaped[Array, '...'], new: Shaped[Array, 'B *new'], axis: int = 1
    ) -> tuple[Shaped[Array, 'B *row'], Shaped[Array, '...']]:
        """Writes what is new behind what a layer without a window has kept.

        Args:
            kept: the slots of each row, or a pool of pages.
            new: of the new tokens.
            axis: along which the slots of a row lie, and the new tokens.

        Returns:
            All of each row, a place for each slot, and what is kept from now on.
        """
        assert self.start is not None
        if self.table is None:
            kept = write_rows(kept, new, self.start, axis)
            return kept, kept
        kept = write_pages(kept, new, self.start, self.table, axis)
        rows = read_pages(kept, self.table, axis)
        # What other rows have left behind may not be finite: zero times it is not nothing.
        written = jnp.arange(rows.shape[axis]) < self.start[:, None] + new.shape[axis]
        others = tuple(i for i in range(1, rows.ndim) if i != axis)
        written = jnp.expand_dims(written, others)
        return jnp.where(written, rows, jnp.zeros_like(rows)), kept


def segment_positions(segment_ids: Int[Array, 'B T']) -> Int[Array, 'B T']:
    """Counts from 0 at the start of every run of equal segment ids."""
    index = jnp.arange(segment_ids.shape[1])
    changed = segment_ids[:, 1:] != segment_ids[:, :-1]
    starts = jnp.where(jnp.pad(changed, ((0, 0), (1, 0))), index, 0)
    return index - jax.lax.cummax(starts, axis=1)


def attention_mask(
    query_slots: Int[Array, '*B T'],
    key_slots: Int[Array, '*B S'],
    query_segments: Int[Array, 'B T'] | None = None,
    key_segments: Int[Array, 'B S'] | None = None,
    window: int | None = None,
) -> Bool[Array, 'B T S']:
    """Lets a query look at the keys of its own segment that stand no later than itself.

    Padding (segment 0) looks at padding, so every query has at least itself to look at, and no
    softmax is empty.

    Args:
        query_slots: where the queries stand in the text; without `B` all rows agree.
        key_slots: where the keys stand; negative where there is none.
        query_segments: None where the row is one document.
        key_segments: None where the row is one document.
        window: how many tokens a query sees, itself among them; None for all.

    Returns:
        True where allowed; [1, T, S] without segments.
    """
    keys = key_slots[..., None, :]
    distance = query_slots[..., :, None] - keys
    near = (distance >= 0) & (keys >= 0)
    if window is not None:
        near &= distance < window
    if query_segments is None or key_segments is None:
        return near if near.ndim == 3 else near[None]
    return near & (query_segments[:, :, None] == key_segments[:, None, :])


def ring_slots(start: Int[Array, '*B'], size: int) -> Int[Array, '*B size']:
    """Returns where in the text the keys of a ring stand that holds the last `size` before `start`.

    Slot `t` of the text is kept at `t % size`; negative where nothing was kept yet.
    """
    last = start[..., None] - 1
    return last - (last - jnp.arange(size)) % size


class _Placement(NamedTuple):
    """Where the new tokens stand, and the segments of everything in the cache, if there is one."""

    slots: Int[Array, '*B T']
    positions: Int[Array, 'B T']
    segment_ids: Int[Array, 'B T'] | None
    cached: Int[Array, 'B S'] | None
    start: Int[Array, 'B'] | None
    slack: int
    table: Int[Array, 'G R P'] | None


def attention_contexts(
    kinds: tuple[AttentionLike, ...],
    positions: Int[Array, 'B T'] | None,
    segment_ids: Int[Array, 'B T'] | None,
    shape: tuple[int, ...],
    cache: KVCache | None,
) -> tuple[tuple[AttentionContext, ...], KVCache | None]:
    """Computes rotary tables and masks, and notes the new tokens' segments in the cache.

    Args:
        kinds: of attention.
        positions: None counts from each segment's start, or from the first slot with a cache.
        segment_ids: 0 for padding; None makes a row one document.
        shape: (B, T) of the new tokens.
        cache: whose keys come first, or None.

    Returns:
        A context for each kind, and the cache with its segments and length advanced (not yet what
        its layers hold).
    """
    placement, cache = _place(positions, segment_ids, shape, cache)
    return tuple(_context(kind, placement) for kind in kinds), cache


def _place(
    positions: Array | None,
    segment_ids: Array | None,
    shape: tuple[int, ...],
    cache: KVCache | None,
) -> tuple[_Placement, KVCache | None]:
    slots, start, cached, slack, table = jnp.arange(shape[1]), None, None, 0, None
    if cache is not None:
        start, slack, table = cache.length, cache.slack, cache.table
        slots = slots + start[:, None]
        if segment_ids is None:
            segment_ids = jnp.ones(shape, jnp.int32)
        cached = write_rows(cache.segment_ids, segment_ids, start)
        cache = dataclasses.replace(cache, segment_ids=cached, length=start + shape[1])
    elif positions is None and segment_ids is not None:
        positions = segment_positions(segment_ids)
    if positions is None:
        positions = jnp.broadcast_to(slots, shape)
    return _Placement(slots, positions, segment_ids, cached, start, slack, table), cache


def _context(kind: AttentionLike, placement: _Placement) -> AttentionContext:
    segment_ids, start = placement.segment_ids, placement.start
    if isinstance(kind, LinearAttentionConfig):
        return AttentionContext(None, None, None, segment_ids, start)
    keys, segments = _keys(kind.window, placement)
    allowed = attention_mask(placement.slots, keys, segment_ids, segments, kind.window)
    cos, sin = None, None
    if kind.rope_theta is not None:
        cos, sin = rope_tables(
            placement.positions, kind.rotary_dim, kind.rope_theta, kind.rope_scaling
        )
    return AttentionContext(cos, sin, allowed, segment_ids, start, placement.table)


def _keys(window: int | None, placement: _Placement) -> tuple[Array, Array | None]:
    """Returns slots and segments of the keys that a layer's queries are multiplied by."""
    slots, cached = placement.slots, placement.cached
    if cached is None or placement.start is None:
        return slots, placement.segment_ids
    if window is None:
        return jnp.arange(cached.shape[1]), cached
    ring = ring_slots(placement.start, min(window + placement.slack, cached.shape[1]))
    keys = jnp.concatenate([ring, slots], axis=1)
    return keys, jnp.take_along_axis(cached, jnp.maximum(keys, 0), axis=1)
