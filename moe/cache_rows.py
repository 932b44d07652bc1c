"""Writing into rows of a cache that have come to different lengths."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped


def write_rows(
    slots: Shaped[Array, 'B *row'],
    new: Shaped[Array, 'B *new'],
    start: Int[Array, 'B'],
    axis: int = 1,
) -> Shaped[Array, 'B *row']:
    """Writes `new` over each row's slots from `start` on, in the dtype of `slots`.

    Args:
        slots: the rows.
        new: at most `S` tokens; where they would not fit, they end with the row.
        start: of each row.
        axis: along which the slots lie; the heads along axis 1 where that is not it.
    """
    new = new.astype(slots.dtype)
    if slots.shape[0] == axis == 1:
        # In place on every backend, where one write for each row scatters.
        return jax.lax.dynamic_update_slice_in_dim(slots, new, start[0], axis)
    if axis == 1:
        return jax.vmap(_write_row)(slots, new, start)
    # For each head too, because of CPUs: XLA fuses a single write into all that read the row there,
    # and then copies the row for each of them; a scatter it leaves alone.
    head = functools.partial(_write_row, axis=axis - 2)
    starts = jnp.broadcast_to(start[:, None], slots.shape[:2])
    return jax.vmap(jax.vmap(head))(slots, new, starts)


def _write_row(row: Array, new: Array, start: Array, axis: int = 0) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(row, new, start, axis)


def write_ring(
    ring: Shaped[Array, 'B *row'],
    new: Shaped[Array, 'B *new'],
    start: Int[Array, 'B'],
    axis: int,
) -> Shaped[Array, 'B *row']:
    """Writes the last `S` of `new` so that the token in slot `t` of the text stands at `t % S`.

    Args:
        ring: the rows.
        new: tokens of each.
        start: slot of the text of each row's first new token.
        axis: along which the slots lie.
    """
    size, length = ring.shape[axis], new.shape[axis]
    kept = min(length, size)
    at = (start[:, None] + length - kept + jnp.arange(kept)) % size
    last = jax.lax.slice_in_dim(new, length - kept, length, axis=axis).astype(ring.dtype)

    def write(row: Array, values: Array, places: Array) -> Array:
        return row.at[(*(slice(None),) * (axis - 1), places)].set(values)

    return jax.vmap(write)(ring, last, at)
