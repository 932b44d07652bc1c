"""The grouped product: rows sorted by group, each multiplied by its group's matrix.

On TPU and GPU it is `jax.lax.ragged_dot`. On CPU that expands to every group's product over all
rows, so here a loop takes each group's rows in tiles. The tiles have several sizes, all in the
program at once: whole large ones first, then the one that just holds the rest. A group of few rows
thus wastes little, and rows need no padding between groups.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

TILE_STEP = 32
LARGEST_TILE = 256

Carry = Any
# (carry, first row, tile size, which rows of the tile belong to the group) -> carry
Tile = Callable[[Carry, Int[Array, ''], int, Bool[Array, 'rows 1']], Carry]


@jax.custom_vjp
def grouped_matmul(
    lhs: Float[Array, 'N D'], rhs: Float[Array, 'E D F'], group_sizes: Int[Array, 'E']
) -> Float[Array, 'N F']:
    """Multiplies each row by the matrix of its group.

    Rows lie sorted by group: the first `group_sizes[0]` rows belong to group 0, and so on. Rows
    past `sum(group_sizes)` belong to none: their result and their gradient are zero. Under
    `shard_map` all arguments must vary over the same mesh axes.

    Args:
        lhs: the rows.
        rhs: a matrix for each group.
        group_sizes: rows of each group, at least 0, with a sum of at most `N`.

    Returns:
        Rows in the dtype of `lhs`, accumulated in float32.
    """
    return jax.lax.platform_dependent(lhs, rhs, group_sizes, cpu=_tiled, default=_ragged)


def _forward(lhs: Array, rhs: Array, group_sizes: Array) -> tuple[Array, tuple[Array, ...]]:
    return grouped_matmul(lhs, rhs, group_sizes), (lhs, rhs, group_sizes)


def _backward(residuals: tuple[Array, ...], cotangent: Array) -> tuple[Array, Array, None]:
    lhs, rhs, group_sizes = residuals
    d_lhs = grouped_matmul(cotangent, rhs.swapaxes(1, 2), group_sizes)
    d_rhs = jax.lax.platform_dependent(
        lhs, cotangent, group_sizes, cpu=_tiled_outer, default=_ragged_outer
    )
    return d_lhs.astype(lhs.dtype), d_rhs.astype(rhs.dtype), None


grouped_matmul.defvjp(_forward, _backward)


def _ragged(lhs: Array, rhs: Array, group_sizes: Array) -> Array:
    out = jax.lax.ragged_dot(lhs, rhs, group_sizes, preferred_element_type=jnp.float32)
    grouped = jnp.arange(lhs.shape[0]) < group_sizes.sum()
    return jnp.where(grouped[:, None], out, 0.0).astype(lhs.dtype)


def _ragged_outer(lhs: Array, cotangent: Array, group_sizes: Array) -> Array:
    """Sums `lhs^T @ cotangent` over each group's rows -> [E, D, F] float32."""
    dimensions = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[],
    )
    out = jax.lax.ragged_dot_general(
        lhs, cotangent, group_sizes, dimensions, preferred_element_type=jnp.float32
    )
    return jnp.where((group_sizes > 0)[:, None, None], out, 0.0)


def _tiled(lhs: Array, rhs: Array, group_sizes: Array) -> Array:
    def visit(group: Array) -> Tile:
        matrix = rhs[group]

        def tile(out: Array, first: Array, size: int, valid: Array) -> Array:
            rows = jax.lax.dynamic_slice_in_dim(lhs, first, size)
            product = jnp.dot(rows, matrix, preferred_element_type=jnp.float32).astype(out.dtype)
            kept = jax.lax.dynamic_slice_in_dim(out, first, size)
            product = jnp.where(valid, product, kept)
            return jax.lax.dynamic_update_slice_in_dim(out, product, first, 0)

        return tile

    out = jnp.zeros_like(lhs, shape=(lhs.shape[0], rhs.shape[-1]))
    return over_tiles(visit, out, group_sizes, lhs.shape[0])


def _tiled_outer(lhs: Array, cotangent: Array, group_sizes: Array) -> Array:
    """Sums `lhs^T @ cotangent` over each group's rows -> [E, D, F] float32."""

    def visit(group: Array) -> Tile:
        def tile(out: Array, first: Array, size: int, valid: Array) -> Array:
            rows = jax.lax.dynamic_slice_in_dim(lhs, first, size)
            by = jnp.where(valid, jax.lax.dynamic_slice_in_dim(cotangent, first, size), 0)
            product = jnp.einsum('nd,nf->df', rows, by, preferred_element_type=jnp.float32)
            return out.at[group].add(product)

        return tile

    shape = (group_sizes.shape[0], lhs.shape[1], cotangent.shape[1])
    out = jnp.zeros_like(lhs, jnp.float32, shape)
    return over_tiles(visit, out, group_sizes, lhs.shape[0])


def over_tiles(
    visit: Callable[[Int[Array, '']], Tile],
    carry: Carry,
    group_sizes: Int[Array, 'E'],
    num_rows: int,
) -> Carry:
    """Folds over the row tiles of every group.

    Args:
        visit: group -> tile function; what it computes from the group alone is computed once a
            group.
        carry: the initial value.
        group_sizes: rows of each group, summing to at most `num_rows`.
        num_rows: rows there are; a tile at the end is moved back to fit, and masked.

    Returns:
        The carry after the last tile.
    """
    step = min(TILE_STEP, num_rows)
    sizes = [*range(step, min(LARGEST_TILE, num_rows), step), min(LARGEST_TILE, num_rows)]
    ends = jnp.cumsum(group_sizes)

    def group_body(group: Array, carry: Carry) -> Carry:
        tile, end = visit(group), ends[group]

        def while_rows(state: tuple[Array, Carry], size: int, fewest: int) -> tuple[Array, Carry]:
            """Takes tiles of `size` rows while at least `fewest` rows are left."""

            def body(state: tuple[Array, Carry]) -> tuple[Array, Carry]:
                start, carry = state
                first = jnp.minimum(start, num_rows - size)
                row = first + jnp.arange(size)
                valid = (row >= start) & (row < end)
                return start + size, tile(carry, first, size, valid[:, None])

            return jax.lax.while_loop(lambda state: end - state[0] >= fewest, body, state)

        state = (end - group_sizes[group], carry)
        # A loop of at most one turn updates the carry in place, where a conditional would copy it.
        for smaller, size in reversed(list(zip([0, *sizes], sizes, strict=False))):
            state = while_rows(state, size, smaller + 1)
        return state[1]

    return jax.lax.fori_loop(0, group_sizes.shape[0], group_body, carry)
