"""Variables that are filled part by part, each part only on the devices that hold it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from moe.weights.pieces import Path, Piece


class Filling:
    """A variable under construction: one buffer on every local device that holds some of it.

    Args:
        shape: of the whole variable.
        dtype: of its elements.
        sharding: where they lie.
    """

    def __init__(self, shape: tuple[int, ...], dtype: Any, sharding: Sharding):
        self._shape = shape
        self._sharding = sharding
        self._boxes = {
            device: tuple(slice(*part.indices(n)[:2]) for part, n in zip(box, shape, strict=True))
            for device, box in sharding.addressable_devices_indices_map(shape).items()
            if box is not None
        }
        self._buffers = {
            device: jnp.zeros([part.stop - part.start for part in box], dtype, device=device)
            for device, box in self._boxes.items()
        }

    def write(self, piece: Piece, tensor: np.ndarray) -> list[jax.Array]:
        """Writes a tensor to its place.

        Returns:
            For each device that holds some of it, whether all of that is finite.
        """
        unfolded = tensor.reshape(piece.unfolded)
        block_axes = tuple(index is None for index in piece.fixed)
        checks = []
        for device, box in self._boxes.items():
            part = piece.part(box)
            if part is None:
                continue
            cut, start = part
            block = jax.device_put(unfolded[cut], device)
            self._buffers[device], finite = _write(
                self._buffers[device], block, start, piece.order, block_axes
            )
            checks.append(finite)
        # What is still on its way would be in memory besides the next tensor.
        return jax.block_until_ready(checks)

    def finish(self) -> jax.Array:
        """Returns the variable; nothing may be written after it."""
        buffers = [self._buffers.pop(device) for device in self._boxes]
        return jax.make_array_from_single_device_arrays(self._shape, self._sharding, buffers)


@functools.partial(jax.jit, static_argnames=('order', 'block_axes'), donate_argnums=0)
def _write(
    buffer: jax.Array,
    block: jax.Array,
    start: tuple[int, ...],
    order: tuple[int, ...],
    block_axes: tuple[bool, ...],
) -> tuple[jax.Array, jax.Array]:
    moved = iter(block.transpose(order).shape)
    shape = [next(moved) if is_free else 1 for is_free in block_axes]
    update = block.transpose(order).reshape(shape).astype(buffer.dtype)
    written = jax.lax.dynamic_update_slice(buffer, update, start)
    return written, jnp.isfinite(block).all()


def read_part(variable: Any, piece: Piece) -> np.ndarray:
    """Cuts a piece out of a variable, without the axes of its indices.

    Every process that holds some of the variable has to call it.
    """
    sizes = tuple(
        n if index is None else 1 for index, n in zip(piece.fixed, variable.shape, strict=True)
    )
    start = tuple(index or 0 for index in piece.fixed)
    kept = [n for index, n in zip(piece.fixed, variable.shape, strict=True) if index is None]
    if not isinstance(variable, jax.Array) or _on_host(variable):
        box = tuple(slice(at, at + n) for at, n in zip(start, sizes, strict=True))
        return np.asarray(variable)[box].reshape(kept)
    part = _slice(variable, start, sizes)
    if not part.is_fully_addressable:
        from jax.experimental import multihost_utils

        part = multihost_utils.process_allgather(part, tiled=True)
    return np.asarray(part).reshape(kept)


def _on_host(variable: jax.Array) -> bool:
    """Whether NumPy can look at an array where it lies."""
    devices = variable.sharding.device_set
    return len(devices) == 1 and next(iter(devices)).platform == 'cpu'


@functools.partial(jax.jit, static_argnames='sizes')
def _slice(variable: jax.Array, start: tuple[int, ...], sizes: tuple[int, ...]) -> jax.Array:
    return jax.lax.dynamic_slice(variable, start, sizes)


def nested(leaves: dict[Path, Any]) -> dict[str, Any]:
    """Builds the tree whose leaves have these paths."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        node = functools.reduce(lambda node, name: node.setdefault(name, {}), path[:-1], tree)
        node[path[-1]] = leaf
    return tree
