"""The one grouped product that XLA for TPUs expands to a dense one, as a Pallas kernel."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int

ROWS = 128
# Of the result, of bfloat16 and of wider dtypes: its sum in float32 has 6 or 3 MiB, and with two of
# all that is moved the whole takes less than the 16 MiB that a kernel is given on every TPU.
NARROW_BLOCK, BLOCK = (2048, 768), (1024, 768)


class Visits(NamedTuple):
    """Which rows each turn of a kernel takes: those of one group in one tile.

    Attributes:
        group: of each turn, ascending; `E` where it has nothing to do.
        tile: of `ROWS` rows.
        start: the group's first row.
        end: the row after its last.
    """

    group: Int[Array, 'V']
    tile: Int[Array, 'V']
    start: Int[Array, 'V']
    end: Int[Array, 'V']


def visits(group_sizes: Int[Array, 'E'], num_rows: int) -> Visits:
    """Lists every group with every tile that holds a row of it, and empty groups once.

    Args:
        group_sizes: rows of each group; together at most `num_rows`.
        num_rows: a multiple of `ROWS`.

    Returns:
        `num_rows / ROWS + E` turns, which is the most there can be.
    """
    groups, tiles = group_sizes.shape[0], num_rows // ROWS
    ends = jnp.cumsum(group_sizes).astype(jnp.int32)
    starts = ends - group_sizes.astype(jnp.int32)
    first = jnp.minimum(starts // ROWS, tiles - 1)
    count = jnp.where(group_sizes > 0, (ends - 1) // ROWS - first + 1, 1)
    done = jnp.cumsum(count)
    turn = jnp.arange(tiles + groups)
    group = (turn[:, None] >= done).sum(axis=1, dtype=jnp.int32)
    of = jnp.minimum(group, groups - 1)
    tile = jnp.where(group < groups, first[of] + turn - (done - count)[of], tiles - 1)
    return Visits(group, tile.astype(jnp.int32), starts[of], ends[of])


def outer_products(
    lhs: Float[Array, 'N D'],
    rhs: Float[Array, 'N F'],
    group_sizes: Int[Array, 'E'],
    *,
    dtype: DTypeLike = jnp.float32,
    interpret: bool = False,
) -> Float[Array, 'E D F']:
    """Sums `lhs^T @ rhs` over each group's rows, in float32.

    Args:
        lhs, rhs: rows sorted by group, see `moe.grouped_matmul.grouped_matmul`.
        group_sizes: rows of each group.
        dtype: that whole sums are rounded to before they are written.
        interpret: whether to run on a machine that is no TPU, slowly.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    excess = -lhs.shape[0] % ROWS
    lhs, rhs = (jnp.pad(rows, ((0, excess), (0, 0))) if excess else rows for rows in (lhs, rhs))
    shape = (group_sizes.shape[0], lhs.shape[1], rhs.shape[1])
    largest = NARROW_BLOCK if jnp.dtype(dtype).itemsize == 2 else BLOCK
    block = tuple(min(size, most) for size, most in zip(shape[1:], largest, strict=True))
    turns = visits(group_sizes, lhs.shape[0])
    grid = (*(pl.cdiv(size, part) for size, part in zip(shape[1:], block, strict=True)),)
    # As eval_shape gives it, the type says over which mesh axes the result varies.
    result = jax.eval_shape(lambda rows: jnp.zeros_like(rows, dtype, shape), lhs)
    call = pl.pallas_call(
        functools.partial(_outer_kernel, num_groups=shape[0]),
        out_shape=result,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(*grid, turns.group.shape[0]),
            in_specs=[
                pl.BlockSpec((ROWS, block[0]), lambda d, f, v, group, tile, *_: (tile[v], d)),
                pl.BlockSpec((ROWS, block[1]), lambda d, f, v, group, tile, *_: (tile[v], f)),
            ],
            # Turns with nothing to do stay at the last group's block, and leave it alone.
            out_specs=pl.BlockSpec(
                (None, *block),
                lambda d, f, v, group, *_: (jnp.minimum(group[v], shape[0] - 1), d, f),
            ),
            scratch_shapes=[pltpu.VMEM(block, jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=('parallel', 'parallel', 'arbitrary')
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * lhs.shape[0] * shape[1] * shape[2],
            bytes_accessed=lhs.nbytes * grid[1]
            + rhs.nbytes * grid[0]
            + result.size * result.dtype.itemsize,
            transcendentals=0,
        ),
        interpret=interpret,
    )
    return call(*turns, lhs, rhs)


def _outer_kernel(group, tile, start, end, lhs, rhs, out, total, *, num_groups: int) -> None:
    """Adds one turn to the sum of its group, and writes that after the group's last turn."""
    from jax.experimental import pallas as pl

    turn, last = pl.program_id(2), pl.num_programs(2) - 1
    here = group[turn]

    @pl.when((turn == 0) | (group[jnp.maximum(turn - 1, 0)] != here))
    def _begin() -> None:
        total[...] = jnp.zeros_like(total)

    @pl.when((here < num_groups) & (start[turn] < end[turn]))
    def _add() -> None:
        row = tile[turn] * ROWS + jax.lax.broadcasted_iota(jnp.int32, rhs.shape, 0)
        by = jnp.where((row >= start[turn]) & (row < end[turn]), rhs[...], jnp.zeros_like(rhs))
        total[...] += jax.lax.dot_general(
            lhs[...], by, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )

    @pl.when((here < num_groups) & ((turn == last) | (group[jnp.minimum(turn + 1, last)] != here)))
    def _write() -> None:
        out[...] = total[...].astype(out.dtype)
