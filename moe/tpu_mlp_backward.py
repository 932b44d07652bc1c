"""The gradients of the experts' whole MLP on TPUs, as one Pallas kernel.

Turns are those of `moe.tpu_mlp`: weights are read once, and each gradient is written once where its
group's rows are one window. Those of a group of more windows are read back and added to.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe.config import Activation
from moe.tpu_mlp import matrix_specs
from moe.tpu_mlp_turn import turn
from moe.tpu_windows import (
    CHUNK,
    FAST_BYTES,
    TILE,
    from_windows,
    like,
    to_windows,
    width_tile,
    window_rows,
    windows,
    windows_each,
)

# Of the matrices' part in fast memory, of which there are two, and one of its gradients as narrow.
MATRIX_BYTES = 4 * 2**20


def backward_window(
    rows: Array, groups: int, dim: int, hidden: int, most_rows: int | None = None
) -> tuple[int, int]:
    """Returns how many rows and hidden columns a turn takes; no rows where it does not fit."""
    itemsize = rows.dtype.itemsize
    part = width_tile(hidden, dim, itemsize, MATRIX_BYTES)
    fixed = 3 * dim * part * (3 * itemsize + 4) + TILE * dim * itemsize
    size = window_rows(rows.shape[0], groups, fixed, dim * (2 * itemsize + 4) + 4 * part * itemsize)
    return min(size, most_rows or size), part


def mlp_gradients(
    activation: Activation,
    rows: Float[Array, 'M D'],
    weights: Float[Array, 'M 1'],
    gate_up: Float[Array, 'E 2 D F'],
    down: Float[Array, 'E F D'],
    group_sizes: Int[Array, 'E'],
    both: Float[Array, 'M 2*F'],
    cotangent: Float[Array, 'M D'],
    *,
    most_rows: int | None = None,
    interpret: Any = False,
) -> tuple[Array, Array, Array, Array]:
    """Computes the gradients of what `moe.tpu_mlp.mlp` computes.

    The sums of a window are in float32; those of a group's windows are added in the dtype of the
    matrices. What it says it moves, it moves where loads are balanced, each group having `M / E`
    rows.

    Args:
        activation, rows, weights, gate_up, down, group_sizes: as there.
        both: what it kept.
        cotangent: of its outputs.
        most_rows: of a window; None for as many as fit.
        interpret: for machines that are no TPU.

    Returns:
        The gradients of rows and weights, zero for rows of no group, and of gate_up and down.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    num_rows, dim = rows.shape
    groups, hidden = down.shape[:2]
    size, part = backward_window(rows, groups, dim, hidden, most_rows)
    turns, parts = windows(group_sizes, num_rows, size), hidden // part
    by_window = pl.BlockSpec((None, size // CHUNK, CHUNK), lambda v, f, *_: (v, 0, 0))
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    row_weights = to_windows(weights, turns, size)
    again = windows_each(num_rows, groups, size)
    d_rows, d_weights, d_gate_up, d_down = pl.pallas_call(
        functools.partial(turn, activation=activation, groups=groups),
        out_shape=[
            like(rows, rows.shape),
            like(rows, row_weights.shape, jnp.float32),
            like(rows, gate_up.shape),
            like(rows, down.shape),
        ],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(turns),
            grid=(turns.group.shape[0], parts),
            in_specs=[
                anywhere,
                by_window,
                *matrix_specs(dim, part, parts),
                anywhere,
                anywhere,
            ],
            out_specs=[anywhere, by_window, anywhere, anywhere],
            scratch_shapes=[
                pltpu.VMEM((size, dim), rows.dtype),
                pltpu.VMEM((size, dim), rows.dtype),
                pltpu.VMEM((size, dim), jnp.float32),
                pltpu.VMEM((TILE, dim), rows.dtype),
                pltpu.VMEM((2, 2, size, part), rows.dtype),
                pltpu.VMEM((2, dim, part), jnp.float32),
                pltpu.VMEM((part, dim), jnp.float32),
                pltpu.VMEM((2, dim, part), gate_up.dtype),
                pltpu.VMEM((part, dim), down.dtype),
                pltpu.SemaphoreType.DMA,
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA,
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=('arbitrary', 'arbitrary'), vmem_limit_bytes=FAST_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * num_rows * 6 * dim * hidden,
            bytes_accessed=(3 * again - 1) * (gate_up.nbytes + down.nbytes)
            + 3 * rows.nbytes
            + both.nbytes,
            transcendentals=num_rows * hidden,
        ),
        interpret=interpret,
    )(*turns, rows, row_weights, gate_up, down, both, cotangent)
    d_weights = from_windows(d_weights, turns, num_rows, groups).astype(weights.dtype)
    return d_rows, d_weights, d_gate_up, d_down
