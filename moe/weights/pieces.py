"""Which part of which parameter every tensor of a published checkpoint is."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from moe.config import TransformerConfig
from moe.families.family import Family, Tensor
from moe.sharding import abstract_variables
from moe.stacking import layer_paths
from moe.transformer import Transformer
from moe.weights.layout import Layout, parse_layout

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Piece:
    """One published tensor, as a part of one variable.

    Attributes:
        name: of the tensor.
        shape: of the tensor.
        path: of the variable, its collection first.
        fixed: for each axis of the variable the index that the part has, or None for all of it.
        unfolded: the tensor's shape with every axis by itself.
        order: the permutation of the unfolded axes that gives the variable's other axes.
    """

    name: str
    shape: tuple[int, ...]
    path: Path
    fixed: tuple[int | None, ...]
    unfolded: tuple[int, ...]
    order: tuple[int, ...]

    def part(self, box: tuple[slice, ...]) -> tuple[tuple[slice, ...], tuple[int, ...]] | None:
        """Cuts the tensor to what falls into a box of the variable.

        Args:
            box: a range with both ends for each axis of the variable.

        Returns:
            A range of each unfolded axis, and where in the box the cut part begins; None where the
            box holds nothing of it.
        """
        cut = [slice(None)] * len(self.unfolded)
        start = []
        free = iter(self.order)
        for index, within in zip(self.fixed, box, strict=True):
            if index is None:
                cut[next(free)] = within
                start.append(0)
            elif within.start <= index < within.stop:
                start.append(index - within.start)
            else:
                return None
        return tuple(cut), tuple(start)


def model_pieces(config: TransformerConfig, family: Family) -> list[Piece]:
    """Lists the pieces of a whole model, in the order of its layers.

    Raises:
        ValueError: where they are not the whole of every variable: the family's table is wrong.
    """
    shapes = variable_shapes(config)
    pieces = [piece for tensor in family.top for piece in _pieces(tensor, '', (), None, shapes)]
    for i, (path, index) in enumerate(layer_paths(config)):
        prefix = family.layer_prefix.format(i=i)
        for tensor in family.layer:
            pieces += _pieces(tensor, prefix, path, index, shapes)
    _check_whole(pieces, shapes)
    return pieces


def variable_shapes(config: TransformerConfig) -> dict[Path, tuple[int, ...]]:
    """Returns the shape of every variable by its path, its collection first."""
    leaves = jax.tree_util.tree_leaves_with_path(abstract_variables(Transformer(config)))
    return {tuple(key.key for key in path): leaf.shape for path, leaf in leaves}


def _pieces(
    tensor: Tensor, prefix: str, path: Path, index: int | None, shapes: dict[Path, Any]
) -> Iterator[Piece]:
    """Yields a row of the table as pieces: none where the model lacks the variable."""
    ours = (*path, *tensor.ours.split('/'))
    found = [(collection, *ours) for collection in ('params', 'routing')]
    variable = next((path for path in found if path in shapes), None)
    if variable is None:
        return
    layout = parse_layout(tensor.layout)
    stacked = () if index is None else (index,)
    shape = shapes[variable][len(stacked) :]
    if len(shape) != len(layout.ours):
        return
    sizes = layout.sizes(shape)
    for e in range(sizes['e'] if '{e}' in tensor.theirs else 1):
        fixed = (*stacked, *(_index(name, layout, e) for name in layout.ours))
        unfolded = tuple(sizes[name] for name in layout.unfolded)
        name = prefix + tensor.theirs.replace('{e}', str(e))
        yield Piece(name, layout.shape(sizes), variable, fixed, unfolded, layout.order)


def _index(name: str, layout: Layout, expert: int) -> int | None:
    if name.isdigit():
        return int(name)
    return None if name in layout.unfolded else expert


def _check_whole(pieces: list[Piece], shapes: dict[Path, tuple[int, ...]]) -> None:
    held = dict.fromkeys(shapes, 0)
    for piece in pieces:
        held[piece.path] += math.prod(piece.shape)
    wrong = ['/'.join(path) for path, shape in shapes.items() if held[path] != math.prod(shape)]
    if wrong:
        raise ValueError(f'The table does not say where these come from: {wrong}.')


def to_theirs(block: np.ndarray, piece: Piece) -> np.ndarray:
    """Turns a piece, cut out of its variable without the axes of its indices, into the tensor."""
    return block.transpose(np.argsort(piece.order)).reshape(piece.shape)
