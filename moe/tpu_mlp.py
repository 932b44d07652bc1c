"""The experts' whole MLP on TPUs, forward, as one Pallas kernel: weights are read once.

A turn of the grid is a window of one group's rows (`moe.tpu_windows`) with a part of the hidden
columns. The window and its sum stay in fast memory while the group's matrices pass through it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe.config import Activation
from moe.expert_mlp import weighted_hidden
from moe.tpu_windows import (
    CHUNK,
    FAST_BYTES,
    TILE,
    Windows,
    column,
    copy_rows,
    like,
    merge_edge,
    over_chunks,
    round_sum,
    to_windows,
    width_tile,
    window_rows,
    windows,
    windows_each,
)

# Of the matrices' part in fast memory, of which there are two.
MATRIX_BYTES = 6 * 2**20


def forward_window(
    rows: Array, groups: int, dim: int, hidden: int, most_rows: int | None = None
) -> tuple[int, int]:
    """Returns how many rows and hidden columns a turn takes; no rows where it does not fit."""
    itemsize = rows.dtype.itemsize
    part = width_tile(hidden, dim, itemsize, MATRIX_BYTES)
    fixed = itemsize * (2 * 3 * dim * part + TILE * (dim + 2 * hidden))
    size = window_rows(rows.shape[0], groups, fixed, dim * (itemsize + 4) + 4 * part * itemsize)
    return min(size, most_rows or size), part


def mlp(
    activation: Activation,
    keep: bool,
    rows: Float[Array, 'M D'],
    weights: Float[Array, 'M 1'],
    gate_up: Float[Array, 'E 2 D F'],
    down: Float[Array, 'E F D'],
    group_sizes: Int[Array, 'E'],
    *,
    most_rows: int | None = None,
    interpret: Any = False,
) -> tuple[Float[Array, 'M D'], Float[Array, 'M 2*F'] | None]:
    """Computes each row's expert times its weight, see `moe.grouped_mlp.grouped_mlp`.

    What it says it moves is what it moves where loads are balanced, each group having `M / E` rows:
    the matrices once for each window of a group, rows and results once. Its FLOPs are those of all
    rows, be they of a group or not.

    Args:
        activation: of the gate.
        keep: whether to return what the activation is computed from.
        rows: sorted by group; `M` is a multiple of `TILE`, `D` and `F` are of 128.
        weights: of each row.
        gate_up: gate (index 0) and up projections.
        down: down projections.
        group_sizes: rows of each group.
        most_rows: of a window; None for as many as fit.
        interpret: for machines that are no TPU.

    Returns:
        The outputs, zero for rows of no group; and, where kept, gate and up projections of the rows
        of groups, and anything for others.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    num_rows, dim = rows.shape
    groups, hidden = down.shape[:2]
    size, part = forward_window(rows, groups, dim, hidden, most_rows)
    turns, parts = windows(group_sizes, num_rows, size), hidden // part
    results = [like(rows, rows.shape)] + [like(rows, (num_rows, 2 * hidden))] * keep
    kept = [
        pltpu.VMEM((2, 2, size, part), rows.dtype),
        pltpu.VMEM((parts, 2, TILE, part), rows.dtype),
        pltpu.SemaphoreType.DMA((2,)),
    ]
    moved = windows_each(num_rows, groups, size) * (gate_up.nbytes + down.nbytes) + 2 * rows.nbytes
    out = pl.pallas_call(
        functools.partial(_kernel, activation=activation, keep=keep, groups=groups),
        out_shape=results,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(turns),
            grid=(turns.group.shape[0], parts),
            in_specs=[
                pl.BlockSpec(memory_space=pl.ANY),
                pl.BlockSpec((None, size // CHUNK, CHUNK), lambda v, f, *_: (v, 0, 0)),
                *matrix_specs(dim, part, parts),
            ],
            out_specs=[pl.BlockSpec(memory_space=pl.ANY)] * len(results),
            scratch_shapes=[
                pltpu.VMEM((size, dim), rows.dtype),
                pltpu.VMEM((size, dim), jnp.float32),
                pltpu.VMEM((TILE, dim), rows.dtype),
                pltpu.SemaphoreType.DMA,
                *(kept if keep else []),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=('arbitrary', 'arbitrary'), vmem_limit_bytes=FAST_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * num_rows * 3 * dim * hidden,
            bytes_accessed=moved + keep * 2 * num_rows * hidden * rows.dtype.itemsize,
            transcendentals=num_rows * hidden,
        ),
        interpret=interpret,
    )(*turns, rows, to_windows(weights, turns, size), gate_up, down)
    return out[0], out[1] if keep else None


def matrix_specs(dim: int, part: int, parts: int) -> list[Any]:
    """Returns which part of gate_up [E, 2, D, F] and down [E, F, D] a turn takes.

    Turns without rows of a group keep the part that the one before ended with.
    """
    from jax.experimental import pallas as pl

    def column_part(v: Any, f: Any, turns: Windows) -> Any:
        needed = (turns.high[v] > 0) & (turns.group[v] == turns.weights[v])
        return jnp.where(needed, f, parts - 1)

    def gate_up(v: Any, f: Any, *turns: Any) -> tuple[Any, ...]:
        of = Windows(*turns)
        return of.weights[v], 0, 0, column_part(v, f, of)

    def down(v: Any, f: Any, *turns: Any) -> tuple[Any, ...]:
        of = Windows(*turns)
        return of.weights[v], column_part(v, f, of), 0

    return [pl.BlockSpec((None, 2, dim, part), gate_up), pl.BlockSpec((None, part, dim), down)]


def _kernel(*refs: Any, activation: Activation, keep: bool, groups: int) -> None:
    """Takes one window with one part of its group's hidden columns."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    turns, refs = Windows(*refs[: len(Windows._fields)]), refs[len(Windows._fields) :]
    rows, weights, gate_up, down, out = refs[:5]
    both: Any = refs[5] if keep else None
    refs = refs[6:] if keep else refs[5:]
    window, total, edge, moving, *kept = refs
    turn, f, last = pl.program_id(0), pl.program_id(1), pl.num_programs(1) - 1
    low, high, group = turns.low[turn], turns.high[turn], turns.group[turn]
    base = pl.multiple_of(turns.tile[turn] * TILE, TILE)
    real = (group < groups) & (high > 0)
    part, hidden = down.shape[0], (down.shape[0] * pl.num_programs(1))

    def load(first: Any, size: int) -> Any:
        source = rows.at[pl.ds(pl.multiple_of(base + first, TILE), size)]
        return pltpu.make_async_copy(source, window.at[pl.ds(first, size)], moving)

    def store(first: Any, size: int) -> Any:
        to = out.at[pl.ds(pl.multiple_of(base + first, TILE), size)]
        return pltpu.make_async_copy(window.at[pl.ds(first, size)], to, moving)

    def storing_kept(f: Any, act: Any) -> None:
        for side in range(2):

            def move(first: Any, size: int, side: int = side) -> Any:
                columns = pl.ds(pl.multiple_of(side * hidden + f * part, CHUNK), part)
                to = both.at[pl.ds(pl.multiple_of(base + first, TILE), size), columns]
                source = kept[0].at[jax.lax.rem(f, 2), side, pl.ds(first, size)]
                return pltpu.make_async_copy(source, to, kept[2].at[jax.lax.rem(f, 2)])

            copy_rows(move, high, act)

    @pl.when(real & (f == 0))
    def _begin() -> None:
        copy_rows(load, high, lambda copy: copy.start())
        copy_rows(load, high, lambda copy: copy.wait())

        def clear(first: Any) -> None:
            total[pl.ds(first, CHUNK)] = jnp.zeros((CHUNK, total.shape[1]), total.dtype)

        over_chunks(high, clear)

    if keep:

        @pl.when(real & (f >= 2))
        def _reuse() -> None:
            storing_kept(f - 2, lambda copy: copy.wait())

    @pl.when(real)
    def _add() -> None:
        def chunk(first: Any) -> None:
            here = window[pl.ds(first, CHUNK)]
            sides = [
                jnp.dot(here, gate_up[side], preferred_element_type=jnp.float32).astype(here.dtype)
                for side in range(2)
            ]
            if keep:
                for side in range(2):
                    kept[0][jax.lax.rem(f, 2), side, pl.ds(first, CHUNK)] = sides[side]
            by = column(weights[pl.ds(jax.lax.div(first, CHUNK), 1)])
            middle = weighted_hidden(jnp.concatenate(sides, axis=-1), by, activation)
            total[pl.ds(first, CHUNK)] += jnp.dot(
                middle, down[...], preferred_element_type=jnp.float32
            )

        over_chunks(high, chunk)
        if keep:
            merge_edge(kept[0].at[jax.lax.rem(f, 2)], kept[1].at[f], low, high)
            storing_kept(f, lambda copy: copy.start())

    @pl.when((group <= groups) & (high > 0) & (f == last))
    def _end() -> None:
        round_sum(window, total, high, real)
        merge_edge(window, edge, low, high)
        copy_rows(store, high, lambda copy: copy.start())
        copy_rows(store, high, lambda copy: copy.wait())

    if keep:

        @pl.when(real & (f == last))
        def _await() -> None:
            pl.when(f >= 1)(lambda: storing_kept(f - 1, lambda copy: copy.wait()))
            storing_kept(f, lambda copy: copy.wait())
