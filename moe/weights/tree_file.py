"""A tree of arrays in one safetensors file, integers of 4 bits two to a byte."""

import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from moe.errors import InputError
from moe.weights.files import Planned, read_header, write_file

_INT4 = np.dtype(ml_dtypes.int4)


def save_tree(file: pathlib.Path, tree: Mapping[str, Any]) -> None:
    """Writes arrays by their paths; one is in the host's memory at a time.

    Args:
        file: replaced where it is there, all of it or nothing.
        tree: nested mappings of arrays.
    """
    leaves = _by_path(tree)
    planned = [Planned(name, *_stored(leaf)) for name, leaf in leaves.items()]
    write_file(file, planned, lambda name: _packed(np.asarray(leaves[name])))


def load_tree(file: pathlib.Path, shapes: Any, shardings: Any = None) -> Any:
    """Reads what `save_tree` wrote, array by array, each part straight onto its devices.

    Args:
        file: of the arrays.
        shapes: the same tree, of what has a shape and a dtype.
        shardings: the same tree, of where they belong; None for all on the default device.

    Raises:
        InputError: names every array that is missing, too many, or of another shape or dtype.
    """
    header, wanted = read_header(file), _by_path(shapes)
    problems = [f'{name}: is missing' for name in wanted if name not in header]
    problems += [f'{name}: is not of this model' for name in header if name not in wanted]
    for name in wanted.keys() & header.keys():
        stored, expected = (header[name].dtype, header[name].shape), _stored(wanted[name])
        if stored != expected:
            problems.append(f'{name}: must be {_words(expected)}; is {_words(stored)}')
    if problems:
        lines = [f'  {problem}' for problem in sorted(problems)]
        told = f'{file} does not hold this model; {len(lines)} arrays are not as they must be:'
        raise InputError('\n'.join([told, *lines, 'Write it again from the checkpoint.']))

    def load(path: Any, leaf: Any, sharding: Any = None) -> jax.Array:
        array = _unpacked(header[_name(path)].view(), leaf)
        if sharding is None:
            return jnp.asarray(array)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: array[index])

    return jax.tree.map_with_path(load, shapes, *(() if shardings is None else (shardings,)))


def _by_path(tree: Any) -> dict[str, Any]:
    return {_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


_name = functools.partial(jax.tree_util.keystr, simple=True, separator='/')


def _stored(leaf: Any) -> tuple[np.dtype, tuple[int, ...]]:
    """The dtype and the shape that an array has in a file."""
    if np.dtype(leaf.dtype) != _INT4:
        return np.dtype(leaf.dtype), tuple(leaf.shape)
    return np.dtype(np.uint8), (-(-leaf.size // 2),)


def _words(stored: tuple[np.dtype, tuple[int, ...]]) -> str:
    return f'{stored[0]}{list(stored[1])}'


def _packed(array: np.ndarray) -> np.ndarray:
    if array.dtype != _INT4:
        return array
    bits = array.astype(np.int8).reshape(-1).view(np.uint8) & 15
    lower, upper = bits[0::2], bits[1::2]
    return lower | np.pad(upper, (0, lower.size - upper.size)) << 4


def _unpacked(array: np.ndarray, leaf: Any) -> np.ndarray:
    if np.dtype(leaf.dtype) != _INT4:
        return array
    bits = np.stack([array << 4, array], axis=-1).reshape(-1)[: leaf.size]
    numbers = bits.view(np.int8)
    # An arithmetic shift brings the sign down.
    numbers >>= 4
    return numbers.astype(_INT4).reshape(leaf.shape)
