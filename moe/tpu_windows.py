"""Windows: how the kernels of a whole MLP on TPUs walk over rows that lie sorted by group.

A window is up to `W` rows of one group, as many as fast memory holds, so most groups are one window
and their matrices are read once. Rows move in tiles of 16, which is what memory is divided into: a
window starts at a tile, and of its first and its last tile some rows may be another group's.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Int

TILE = 16
# Rows of one product, and of one copy where there are as many.
CHUNK = 128
# Every TPU that the kernels are for has 64 MiB of fast memory; the compiler needs some itself.
FAST_BYTES, BUDGET = 64 * 2**20, 56 * 2**20

Ref = Any


class Windows(NamedTuple):
    """The turns of a kernel: the windows of each group, one of an empty group, then rows of none.

    Attributes:
        group: whose gradients the turn adds to; `E` for rows of no group, `E + 1` for nothing.
        weights: the group whose matrices the turn needs; the one before's where it needs none.
        tile: the window's first.
        low: the window's first row that is the group's, in [0, `TILE`).
        high: the row after its last; 0 where it has none.
        begins: whether the window is its group's first.
    """

    group: Int[Array, 'V']
    weights: Int[Array, 'V']
    tile: Int[Array, 'V']
    low: Int[Array, 'V']
    high: Int[Array, 'V']
    begins: Int[Array, 'V']


def most_windows(num_rows: int, num_groups: int, rows: int) -> int:
    """Returns how many windows there can be, rows of no group being one group more."""
    return num_groups + 1 + -(-(num_rows + (TILE - 1) * (num_groups + 1)) // rows)


def windows_each(num_rows: int, num_groups: int, rows: int) -> int:
    """Returns the windows of each group where loads are balanced."""
    return -(-(num_rows // num_groups + TILE - 1) // rows)


def windows(group_sizes: Int[Array, 'E'], num_rows: int, rows: int) -> Windows:
    """Lists the windows, `most_windows` of them.

    Args:
        group_sizes: rows of each group; together at most `num_rows`.
        num_rows: a multiple of `TILE`.
        rows: of a window, `W`, a multiple of `CHUNK`.
    """
    groups = group_sizes.shape[0]
    ends = jnp.cumsum(group_sizes).astype(jnp.int32)
    starts = jnp.append(ends - group_sizes.astype(jnp.int32), ends[-1])
    ends = jnp.append(ends, num_rows)
    first = starts // TILE * TILE
    count = jnp.where(ends > starts, -(-(ends - first) // rows), 1)
    done = jnp.cumsum(count)
    turn = jnp.arange(most_windows(num_rows, groups, rows), dtype=jnp.int32)
    group = (turn[:, None] >= done).sum(axis=1, dtype=jnp.int32)
    of = jnp.minimum(group, groups)
    index = turn - (done - count)[of]
    base = first[of] + index * rows
    taken = (group <= groups) & (ends > starts)[of]
    # An empty window lies where its group would begin.
    low = jnp.where(index == 0, starts[of] - base, 0)
    high = jnp.where(taken, jnp.minimum(ends[of] - base, rows), 0)
    needed = jnp.where(taken & (group < groups), group, 0)
    return Windows(
        group,
        jax.lax.cummax(needed),
        base // TILE,
        low,
        high,
        (index == 0).astype(jnp.int32),
    )


def to_windows(
    values: Float[Array, 'M 1'], turns: Windows, rows: int
) -> Float[Array, 'V rows/128 128']:
    """Lays a value of each row out by window; zero where a row is not the window's.

    Rows of no group have windows too.
    """
    tiles = values.reshape(-1, TILE)
    index = turns.tile[:, None] + jnp.arange(rows // TILE)
    found = tiles.at[index].get(mode='clip').reshape(-1, rows)
    row = jnp.arange(rows)
    own = (row >= turns.low[:, None]) & (row < turns.high[:, None])
    return jnp.where(own, found, 0).reshape(-1, rows // CHUNK, CHUNK)


def from_windows(
    values: Float[Array, 'V rows/128 128'], turns: Windows, num_rows: int, num_groups: int
) -> Float[Array, 'M 1']:
    """Collects a value of each row from the windows.

    Args:
        values: by window; zero where a row is not the window's.
        turns: the windows.
        num_rows: `M`.
        num_groups: `E`; rows of no group have zero.
    """
    tiles = values.reshape(-1, TILE)
    each = tiles.shape[0] // values.shape[0]
    number = jnp.arange(num_rows // TILE, dtype=jnp.int32)
    taking = turns.group < num_groups
    # A tile is in one window that did not begin inside of it, at most, and in any that did.
    shared = taking & (turns.low > 0)
    first = jnp.where(turns.group <= num_groups, turns.tile + (turns.low > 0), len(number))
    turn = (number[:, None] >= first).sum(axis=1, dtype=jnp.int32) - 1
    # Of the window of each tile its own first one, found without a gather of single numbers.
    start = jnp.where(turn[:, None] == jnp.arange(len(first)), turns.tile, 0).sum(axis=1)
    inside = (turn >= 0) & (number - start < each)
    found = tiles.at[jnp.where(inside, turn * each + number - start, 0)].get(mode='clip')
    found = jnp.where(inside[:, None], found, 0)
    heads = values[:, 0, :TILE] * shared[:, None]
    to = jnp.where(shared, turns.tile, len(number))
    return found.at[to].add(heads, mode='drop').reshape(-1, 1)


def like(rows: Array, shape: tuple[int, ...], dtype: DTypeLike | None = None) -> Any:
    """Returns the type of a kernel's result, which varies over the mesh axes that rows do."""
    return jax.eval_shape(lambda rows: jnp.zeros_like(rows, dtype, shape), rows)


def width_tile(hidden: int, dim: int, itemsize: int, most_bytes: int) -> int:
    """Returns how many hidden columns a turn takes, of which the matrices take `most_bytes`."""
    fitting = (tile for tile in (512, 256) if hidden % tile == 0)
    return next((tile for tile in fitting if 3 * dim * tile * itemsize <= most_bytes), CHUNK)


def window_rows(num_rows: int, num_groups: int, fixed_bytes: int, row_bytes: int) -> int:
    """Returns the rows of a window: what fast memory holds, but not far more than groups have.

    The largest load that is expected is four times the mean; 0 stands for no room.
    """
    fitting = (BUDGET - fixed_bytes) // row_bytes // CHUNK * CHUNK
    enough = min(num_rows + TILE - 1, max(4 * CHUNK, 4 * num_rows // num_groups))
    return max(0, min(fitting, -(-enough // CHUNK) * CHUNK))


def copy_rows(
    move: Callable[[Any, int], Any], rows: Int[Array, ''], act: Callable[[Any], None]
) -> None:
    """Starts or awaits the copies of a window's first rows, a whole number of tiles.

    Args:
        move: from a copy's first row and its number of rows to the copy.
        rows: how many.
        act: what is done with each copy.
    """
    whole, tiles = jax.lax.div(rows, CHUNK), jax.lax.div(rows + TILE - 1, TILE)

    def large(i: Any, _: None) -> None:
        act(move(i * CHUNK, CHUNK))

    def small(i: Any, _: None) -> None:
        act(move(i * TILE, TILE))

    jax.lax.fori_loop(0, whole, large, None)
    jax.lax.fori_loop(whole * (CHUNK // TILE), tiles, small, None)


def over_chunks(rows: Int[Array, ''], chunk: Callable[[Any], None]) -> None:
    """Runs `chunk(first row)` for every chunk that holds one of a window's first rows."""
    from jax.experimental import pallas as pl

    def body(i: Any, _: None) -> None:
        chunk(pl.multiple_of(i * CHUNK, CHUNK))

    jax.lax.fori_loop(0, jax.lax.div(rows + CHUNK - 1, CHUNK), body, None)


def own(first: Any, size: int, low: Any, high: Any) -> Array:
    """Says which of `size` rows of a window are its group's, [size, 1]."""
    row = first + jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0)
    return (row >= low) & (row < high)


def column(line: Float[Array, '1 128']) -> Float[Array, '128 1']:
    """Turns a line of values into a column."""
    return jnp.broadcast_to(line, (CHUNK, CHUNK)).T[:, :1]


def line(column: Float[Array, '128 1']) -> Float[Array, '1 128']:
    """Turns a column of values into a line."""
    return jnp.broadcast_to(column, (CHUNK, CHUNK)).T[:1]


def round_sum(window: Ref, total: Ref, rows: Int[Array, ''], real: Bool[Array, '']) -> None:
    """Writes a window's sum over its rows, or zeros where they are of no group."""
    from jax.experimental import pallas as pl

    def chunk(first: Any) -> None:
        narrow = total[pl.ds(first, CHUNK)].astype(window.dtype)
        window[pl.ds(first, CHUNK)] = jnp.where(real, narrow, jnp.zeros_like(narrow))

    over_chunks(rows, chunk)


def merge_edge(window: Ref, edge: Ref, low: Any, high: Any) -> None:
    """Gives a window's first rows back to the groups before, and keeps its last tile for the next.

    Args:
        window: what is about to be written, [..., W, width].
        edge: the last tile that was written, [..., `TILE`, width].
        low: how many of the window's first rows are other groups'.
        high: the row after the window's last.
    """
    from jax.experimental import pallas as pl

    mine = jax.lax.broadcasted_iota(jnp.int32, edge.shape, len(edge.shape) - 2) >= low
    ahead = (slice(None),) * (len(edge.shape) - 2)
    first = (*ahead, pl.ds(0, TILE), slice(None))
    window[first] = jnp.where(mine, window[first], edge[...])
    last = pl.multiple_of(jax.lax.div(high - 1, TILE) * TILE, TILE)
    edge[...] = window[(*ahead, pl.ds(last, TILE), slice(None))]
