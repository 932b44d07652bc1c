"""The grouped product: rows sorted by group, each multiplied by its group's matrix.

On TPU and GPU it is `jax.lax.ragged_dot`. On CPU that expands to every group's product over all
rows, so here a loop takes each group's rows in tiles, see `moe.row_tiles`. The gradient of the
matrices expands on TPU too, and has a kernel there.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int

from moe.row_tiles import over_tiles, put_rows, rows_at
from moe.tpu_kernels import outer_products


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
        Rows in the dtype of `lhs`, accumulated in float32 or wider.
    """
    return jax.lax.platform_dependent(lhs, rhs, group_sizes, cpu=_tiled, default=ragged)


def _forward(lhs: Array, rhs: Array, group_sizes: Array) -> tuple[Array, tuple[Array, ...]]:
    return grouped_matmul(lhs, rhs, group_sizes), (lhs, rhs, group_sizes)


def _backward(residuals: tuple[Array, ...], cotangent: Array) -> tuple[Array, Array, None]:
    lhs, rhs, group_sizes = residuals
    d_lhs = jax.lax.platform_dependent(
        cotangent, rhs, group_sizes, cpu=_tiled_transposed, default=ragged_transposed
    )
    d_rhs = grouped_outer(lhs, cotangent, group_sizes, rhs.dtype)
    return d_lhs.astype(lhs.dtype), d_rhs, None


grouped_matmul.defvjp(_forward, _backward)


def accumulator(dtype: DTypeLike) -> DTypeLike:
    """Returns the dtype that products of `dtype` are summed in: float32 at least."""
    return jnp.promote_types(dtype, jnp.float32)


def ragged(lhs: Array, rhs: Array, group_sizes: Array, *, transposed: bool = False) -> Array:
    """Computes the product by `ragged_dot`; where `transposed`, by each matrix's transpose."""
    dimensions = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (2 if transposed else 1,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[0],
    )
    out = jax.lax.ragged_dot_general(
        lhs, rhs, group_sizes, dimensions, preferred_element_type=accumulator(lhs.dtype)
    )
    grouped = jnp.arange(lhs.shape[0]) < group_sizes.sum()
    return jnp.where(grouped[:, None], out, 0).astype(lhs.dtype)


def ragged_transposed(lhs: Array, rhs: Array, group_sizes: Array) -> Array:
    """Multiplies each row by its group's transposed matrix: [N, F] x [E, D, F] -> [N, D]."""
    return ragged(lhs, rhs, group_sizes, transposed=True)


def grouped_outer(
    lhs: Float[Array, 'N D'],
    rhs: Float[Array, 'N F'],
    group_sizes: Int[Array, 'E'],
    dtype: DTypeLike,
) -> Float[Array, 'E D F']:
    """Sums `lhs^T @ rhs` over each group's rows, in float32 or wider, then `dtype`; no gradient."""

    def narrowed(outer: Callable[..., Array]) -> Callable[..., Array]:
        return lambda *operands: outer(*operands).astype(dtype)

    # TPUs have no float64. The kernel rounds what it writes: nothing wide goes through memory.
    kernel = functools.partial(outer_products, dtype=dtype)
    return jax.lax.platform_dependent(
        lhs,
        rhs,
        group_sizes,
        cpu=narrowed(_tiled_outer),
        tpu=narrowed(ragged_outer) if lhs.dtype == jnp.float64 else kernel,
        default=narrowed(ragged_outer),
    )


def ragged_outer(lhs: Array, cotangent: Array, group_sizes: Array) -> Array:
    """Sums `lhs^T @ cotangent` over each group's rows -> [E, D, F], as accumulated."""
    dimensions = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[],
    )
    out = jax.lax.ragged_dot_general(
        lhs, cotangent, group_sizes, dimensions, preferred_element_type=accumulator(lhs.dtype)
    )
    return jnp.where((group_sizes > 0)[:, None, None], out, 0)


def _tiled(lhs: Array, rhs: Array, group_sizes: Array, *, transposed: bool = False) -> Array:
    product = dot_transposed if transposed else dot

    def group(out: Array, inputs: tuple[Array, ...]) -> tuple[Array, None]:
        matrix, start, end = inputs

        def tile(out: Array, first: Array, size: int, valid: Array, is_first: bool) -> Array:
            return put_rows(out, product(rows_at(lhs, first, size), matrix), first, valid)

        bounds = {'start': start, 'end': end, 'num_rows': lhs.shape[0], 'num_groups': rhs.shape[0]}
        return over_tiles(tile, out, **bounds), None

    width = rhs.shape[1 if transposed else 2]
    out = jnp.zeros_like(lhs, shape=(lhs.shape[0], width))
    ends = jnp.cumsum(group_sizes)
    return jax.lax.scan(group, out, (rhs, ends - group_sizes, ends))[0]


def _tiled_transposed(lhs: Array, rhs: Array, group_sizes: Array) -> Array:
    return _tiled(lhs, rhs, group_sizes, transposed=True)


def _tiled_outer(lhs: Array, cotangent: Array, group_sizes: Array) -> Array:
    num_rows, num_groups = lhs.shape[0], group_sizes.shape[0]

    def group(total: Array, inputs: tuple[Array, ...]) -> tuple[Array, Array]:
        start, end = inputs

        def tile(total: Array, first: Array, size: int, valid: Array, is_first: bool) -> Array:
            by = jnp.where(valid, rows_at(cotangent, first, size), 0)
            product = dot_rows(rows_at(lhs, first, size), by)
            return product if is_first else total + product

        bounds = {'start': start, 'end': end, 'num_rows': num_rows, 'num_groups': num_groups}
        total = over_tiles(tile, total, **bounds)
        return total, total

    # The first tile of each group overwrites what the group before left in the carry.
    total = jnp.zeros_like(lhs, accumulator(lhs.dtype), (lhs.shape[1], cotangent.shape[1]))
    ends = jnp.cumsum(group_sizes)
    return jax.lax.scan(group, total, (ends - group_sizes, ends))[1]


def dot(rows: Float[Array, 'n D'], matrix: Float[Array, 'D F']) -> Float[Array, 'n F']:
    """Multiplies rows by a matrix, in the accumulator's dtype."""
    return jnp.dot(rows, matrix, preferred_element_type=accumulator(rows.dtype))


def dot_transposed(rows: Float[Array, 'n F'], matrix: Float[Array, 'D F']) -> Float[Array, 'n D']:
    """Multiplies rows by the transpose of a matrix, which is not copied."""
    return jnp.einsum('nf,df->nd', rows, matrix, preferred_element_type=accumulator(rows.dtype))


def dot_rows(rows: Float[Array, 'n D'], by: Float[Array, 'n F']) -> Float[Array, 'D F']:
    """Sums the outer products of rows."""
    # XLA's fastest product on CPU takes columns that lie in memory as such, and is worth the copy.
    columns = jax.lax.optimization_barrier(rows.T)
    return jnp.dot(columns, by, preferred_element_type=accumulator(rows.dtype))
