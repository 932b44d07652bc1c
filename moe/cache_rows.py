"""Writing into rows of a cache that have come to different lengths."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped


def write_rows(
    slots: Shaped[Array, 'B S *rest'], new: Shaped[Array, 'B T *rest'], start: Int[Array, 'B']
) -> Shaped[Array, 'B S *rest']:
    """Writes `new` over each row's slots from `start` on, in the dtype of `slots`.

    Args:
        slots: the rows.
        new: at most `S` tokens; where they would not fit, they end with the row.
        start: of each row.
    """
    new = new.astype(slots.dtype)
    if slots.shape[0] == 1:  # in place on every backend, where one write for each row scatters
        return jax.lax.dynamic_update_slice_in_dim(slots, new, start[0], axis=1)

    def write(row: Array, values: Array, first: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(row, values, first, axis=0)

    return jax.vmap(write)(slots, new, start)


def write_ring(
    ring: Shaped[Array, 'B S *rest'], new: Shaped[Array, 'B T *rest'], start: Int[Array, 'B']
) -> Shaped[Array, 'B S *rest']:
    """Writes the last `S` of `new` so that the token in slot `t` of the text stands at `t % S`."""
    size, length = ring.shape[1], new.shape[1]
    kept = min(length, size)
    at = (start[:, None] + length - kept + jnp.arange(kept)) % size
    rows = jnp.arange(ring.shape[0])[:, None]
    return ring.at[rows, at].set(new[:, length - kept :].astype(ring.dtype))
