"""Rows and their weights, gathered: how XLA does it, and how on TPUs, where a gather is dear.

XLA for TPUs reads a whole tile for each number it gathers, so there a sort, which moves each number
once a pass, brings weights into the order of rows; rows have a kernel, see `moe.tpu_rows`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe import tpu_rows

FEW_GATHERS = 16


def gathered(rows: Float[Array, 'S D'], index: Int[Array, 'R']) -> Float[Array, 'R D']:
    """Returns the rows of an index, zero for one of `S` or more; no gradient on TPUs."""
    return _by_platform(rows, index[:, None], _gathered)


def gathered_sum(rows: Float[Array, 'S D'], index: Int[Array, 'R K']) -> Float[Array, 'R D']:
    """Sums the rows of each index over k, in float32 or wider, likewise."""
    return _by_platform(rows, index, _gathered_sum)


def _gathered(rows: Array, index: Array) -> Array:
    return rows.at[index[:, 0]].get(mode='fill', fill_value=0)


def _gathered_sum(rows: Array, index: Array) -> Array:
    # A few gathers become one loop with their sum; what a single one finds is written out first.
    few = index.shape[1] <= FEW_GATHERS
    total = jnp.zeros((), jnp.promote_types(rows.dtype, jnp.float32))
    for columns in jnp.split(index, index.shape[1] if few else 1, axis=1):
        found = rows.at[columns].get(mode='fill', fill_value=0)
        total += found.sum(axis=1, dtype=total.dtype)
    return total.astype(rows.dtype)


def _by_platform(rows: Array, index: Array, gather: Callable[[Array, Array], Array]) -> Array:
    if not tpu_rows.fits(rows, index.shape[1]):
        return gather(rows, index)
    return jax.lax.platform_dependent(rows, index, tpu=tpu_rows.sum_rows, default=gather)


@jax.custom_vjp
def sorted_weights(
    weights: Float[Array, 'N K'], source: Int[Array, 'N*K'], row: Int[Array, 'N K']
) -> Float[Array, 'N*K 1']:
    """Copies each assignment's weight to its row, of as many rows as there are assignments.

    Args:
        weights: of the assignments.
        source: the assignment of each row, the rows that hold one being first; `N * K` for none.
        row: of each assignment; `N * K` for none.
    """
    by_platform = {'tpu': _sorted, 'default': _found}
    return jax.lax.platform_dependent(weights.reshape(-1), source, row.reshape(-1), **by_platform)[
        :, None
    ]


def _forward(weights: Array, source: Array, row: Array) -> tuple[Array, tuple[Array, Array]]:
    return sorted_weights(weights, source, row), (source, row)


def _backward(residuals: tuple[Array, Array], cotangent: Array) -> tuple[Array, None, None]:
    source, row = residuals
    by_platform = {'tpu': _sorted_back, 'default': _found_back}
    operands = (cotangent[:, 0], source, row.reshape(-1))
    return jax.lax.platform_dependent(*operands, **by_platform).reshape(row.shape), None, None


sorted_weights.defvjp(_forward, _backward)


def _found(weights: Array, source: Array, row: Array) -> Array:
    return weights.at[source].get(mode='fill', fill_value=0)


def _found_back(cotangent: Array, source: Array, row: Array) -> Array:
    return cotangent.at[row].get(mode='fill', fill_value=0)


def _sorted(weights: Array, source: Array, row: Array) -> Array:
    ordered = jax.lax.sort((row, weights), num_keys=1, is_stable=False)[1]
    return jnp.where(source < source.size, ordered, 0)


def _sorted_back(cotangent: Array, source: Array, row: Array) -> Array:
    # Every number of an assignment once: of those with a row, then of the others, with zero.
    number = jnp.arange(row.size, dtype=source.dtype)
    others = jnp.where(row < row.size, row.size, number)
    keys = jnp.concatenate([source, others])
    values = jnp.concatenate([cotangent, jnp.zeros_like(cotangent)])
    return jax.lax.sort((keys, values), num_keys=1, is_stable=False)[1][: row.size]
