"""Tiles of rows: how a CPU walks over rows that lie sorted by group.

A program's shapes are fixed and the sizes of groups are not, so tiles of many sizes are in the
program at once. A group takes first the one that just holds what whole largest tiles leave over,
and then those. The sizes follow the mean load, which is known when the program is built: little of
the work falls on other groups' rows, and rows need no padding between groups.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

SIZES = 16
LARGEST_TILE = 512
# Every size is compiled by itself: few rows have few of them.
FEW_ROWS = 2048

Carry = Any
# (carry, first row, tile size, which rows of the tile are the group's, whether it is the group's
# first) -> carry
Tile = Callable[[Carry, Int[Array, ''], int, Bool[Array, 'rows 1'], bool], Carry]


def tile_sizes(num_rows: int, num_groups: int) -> list[int]:
    """Returns the sizes of tiles, in equal steps up to twice the mean load or `LARGEST_TILE`.

    There are at most `SIZES`, in steps of at least 8 rows, and of 32 where rows are few.

    Args:
        num_rows: rows there are, at least 1; no tile is larger.
        num_groups: that they are divided into.
    """
    mean = -(-num_rows // num_groups)
    largest = min(num_rows, LARGEST_TILE, max(64, 2 * mean))
    step = max(32 if num_rows < FEW_ROWS else 8, -(-largest // (4 * SIZES)) * 4)
    return [*range(step, largest, step), largest]


def over_tiles(
    tile: Tile,
    carry: Carry,
    *,
    start: Int[Array, ''],
    end: Int[Array, ''],
    num_rows: int,
    num_groups: int,
) -> Carry:
    """Folds over the tiles of one group.

    There is always a first tile: that of an empty group has no row of it.

    Args:
        tile: the function of a tile.
        carry: the initial value.
        start: the group's first row.
        end: the row after its last.
        num_rows: rows there are; a tile at the end is moved back to fit.
        num_groups: that they are divided into.

    Returns:
        The carry after the last tile.
    """
    sizes = tile_sizes(num_rows, num_groups)
    rows = end - start
    whole = jnp.maximum(rows - 1, 0) // sizes[-1] * sizes[-1]
    rest = end - whole

    def take(carry: Carry, start: Array, stop: Array, size: int, is_first: bool) -> Carry:
        first = jnp.minimum(start, num_rows - size)
        row = first + jnp.arange(size)
        valid = (row >= start) & (row < stop)
        return tile(carry, first, size, valid[:, None], is_first)

    # A loop of at most one turn updates the carry in place, where a conditional would copy it.
    state = (rows - whole, carry)
    for smaller, size in zip([-1, *sizes], sizes, strict=False):
        state = jax.lax.while_loop(
            lambda state, smaller=smaller, size=size: (smaller < state[0]) & (state[0] <= size),
            lambda state, size=size: (
                jnp.full_like(state[0], -1),
                take(state[1], start, rest, size, True),
            ),
            state,
        )
    return jax.lax.while_loop(
        lambda state: state[0] < end,
        lambda state: (
            state[0] + sizes[-1],
            take(state[1], state[0], end, sizes[-1], False),
        ),
        (rest, state[1]),
    )[1]


def rows_at(array: Array, first: Array, size: int) -> Array:
    """Returns `size` rows from `first` on."""
    return jax.lax.dynamic_slice_in_dim(array, first, size)


def put_rows(array: Array, rows: Array, first: Array, valid: Array) -> Array:
    """Writes the valid rows of a tile in place."""
    kept = rows_at(array, first, rows.shape[0])
    rows = jnp.where(valid, rows.astype(array.dtype), kept)
    return jax.lax.dynamic_update_slice_in_dim(array, rows, first, 0)
