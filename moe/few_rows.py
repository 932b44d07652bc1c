"""Experts of few rows each, as where a batch is decoded: one loop over the tiles that there are.

The tiles of all experts are numbered through, and each finds its expert: one without rows is not
read, and a tile is no larger than most experts need. With the extra `cpu`, large float32
experts take the loop of `moe.compiled_rows` instead.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe.config import Activation
from moe.expert_mlp import weighted_hidden
from moe.grouped_matmul import dot
from moe.quantised import Kernel, dequantised
from moe.row_tiles import put_rows, rows_at

# (largest mean load, rows of a tile); above, `moe.row_tiles` fits sizes to the groups.
TILES = ((4, 4), (16, 8))


def tile_size(num_rows: int, num_groups: int) -> int | None:
    """Returns the rows of a tile, at most all; None where experts have more than a few each."""
    for largest, size in TILES:
        if num_rows <= largest * num_groups:
            return min(size, num_rows)
    return None


def few_rows_mlp(
    activation: Activation,
    rows: Float[Array, 'M D'],
    weights: Float[Array, 'M 1'],
    gate_up: Kernel,
    down: Kernel,
    group_sizes: Int[Array, 'E'],
    *,
    size: int,
) -> Float[Array, 'M D']:
    """Computes each row's expert, times the row's weight; there is no gradient.

    Args:
        activation: of the gate.
        rows: sorted by expert.
        weights: of each row.
        gate_up: gate and up projections, [E, D, 2 F].
        down: down projections, [E, F, D].
        group_sizes: rows of each expert.
        size: rows of a tile, at most `M`.

    Returns:
        Weighted expert outputs; zero for rows past the last group.
    """
    num_rows, ends = rows.shape[0], jnp.cumsum(group_sizes)
    tiles = -(-group_sizes // size)
    last = jnp.cumsum(tiles)

    def tile(state: tuple[Array, Array]) -> tuple[Array, Array]:
        number, out = state
        expert = jnp.searchsorted(last, number, side='right', method='compare_all')
        before = last[expert] - tiles[expert]
        start = ends[expert] - group_sizes[expert] + (number - before) * size
        first = jnp.minimum(start, num_rows - size)
        row = first + jnp.arange(size)
        valid = (row >= start) & (row < ends[expert])
        into, out_of = (
            dequantised(jax.tree.map(lambda leaf: leaf[expert], each), rows.dtype)
            for each in (gate_up, down)
        )
        both = dot(rows_at(rows, first, size), into).astype(rows.dtype)
        hidden = weighted_hidden(both, rows_at(weights, first, size), activation)
        return number + 1, put_rows(out, dot(hidden, out_of), first, valid[:, None])

    start = (jnp.zeros_like(last[-1]), jnp.zeros_like(rows))
    return jax.lax.while_loop(lambda state: state[0] < last[-1], tile, start)[1]
