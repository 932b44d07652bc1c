"""The kernels of the whole MLP on TPUs, given operands of any size as `moe.grouped_mlp` has them.

`gate_up` is read as [E, 2, D, F]: no copy where memory holds it so, which a program may ask for
(`jax.experimental.layout`), and one where it does not.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe.config import Activation
from moe.quantised import Kernel, Quantised
from moe.tpu_mlp import forward_window, mlp
from moe.tpu_mlp_backward import backward_window, mlp_gradients
from moe.tpu_windows import CHUNK, TILE


def fits(rows: Array, gate_up: Kernel, down: Kernel) -> bool:
    """Whether there are kernels for these: of one dtype that TPUs have, a window in fast memory."""
    if isinstance(gate_up, Quantised) or isinstance(down, Quantised):
        return False
    if {gate_up.dtype, down.dtype} != {rows.dtype} or rows.dtype.itemsize > 4:
        return False
    hidden, dim = (size + -size % CHUNK for size in down.shape[1:])
    sizes = (rows, down.shape[0], dim, hidden)
    return min(forward_window(*sizes)[0], backward_window(*sizes)[0]) > 0


def forward(
    activation: Activation,
    keep: bool,
    rows: Float[Array, 'M D'],
    weights: Float[Array, 'M 1'],
    gate_up: Float[Array, 'E D 2*F'],
    down: Float[Array, 'E F D'],
    group_sizes: Int[Array, 'E'],
    **settings: Any,
) -> tuple[Array, Array | None]:
    """Returns the output and, where kept, what the activation is computed from, [M, 2 F]."""
    num_rows, (hidden, dim) = rows.shape[0], down.shape[1:]
    operands = _padded(rows, weights, gate_up, down)
    out, both = mlp(activation, keep, *operands, group_sizes, **settings)
    if both is not None and both.shape != (num_rows, 2 * hidden):
        both = both.reshape(len(both), 2, -1)[:num_rows, :, :hidden].reshape(num_rows, -1)
    return out[:num_rows, :dim], both


def backward(
    activation: Activation,
    rows: Float[Array, 'M D'],
    weights: Float[Array, 'M 1'],
    gate_up: Float[Array, 'E D 2*F'],
    down: Float[Array, 'E F D'],
    group_sizes: Int[Array, 'E'],
    both: Float[Array, 'M 2*F'],
    cotangent: Float[Array, 'M D'],
    **settings: Any,
) -> tuple[Array, Array, Array, Array]:
    """Returns the gradients of rows, weights, gate_up and down."""
    num_rows, (hidden, dim) = rows.shape[0], down.shape[1:]
    operands = _padded(rows, weights, gate_up, down)
    sides = _whole(both.reshape(num_rows, 2, hidden), (TILE, 1, CHUNK))
    both, cotangent = sides.reshape(len(sides), -1), _whole(cotangent, (TILE, CHUNK))
    d_rows, d_weights, d_gate_up, d_down = mlp_gradients(
        activation, *operands, group_sizes, both, cotangent, **settings
    )
    d_gate_up = jnp.moveaxis(d_gate_up, 1, 2)[:, :dim, :, :hidden].reshape(gate_up.shape)
    return (
        d_rows[:num_rows, :dim],
        d_weights[:num_rows],
        d_gate_up,
        d_down[:, :hidden, :dim],
    )


def _padded(
    rows: Array, weights: Array, gate_up: Array, down: Array
) -> tuple[Array, Array, Array, Array]:
    """Zeros in place of rows and columns that there are not: they add nothing."""
    sides = jnp.moveaxis(gate_up.reshape(*gate_up.shape[:2], 2, -1), 2, 1)
    return (
        _whole(rows, (TILE, CHUNK)),
        _whole(weights, (TILE, 1)),
        _whole(sides, (1, 1, CHUNK, CHUNK)),
        _whole(down, (1, CHUNK, CHUNK)),
    )


def _whole(array: Array, multiples: tuple[int, ...]) -> Array:
    """Pads each axis with zeros to a multiple."""
    excess = [(0, -size % of) for size, of in zip(array.shape, multiples, strict=True)]
    return jnp.pad(array, excess) if any(after for _, after in excess) else array
