"""How the axes of a published tensor become those of a parameter: '(h k) d -> d h k', as data."""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping

from moe.errors import InputError


@dataclasses.dataclass(frozen=True)
class Layout:
    """A tensor's axes on the left, and on the right those of the part of a parameter that it is.

    Attributes:
        theirs: for each axis of the tensor the axes that it is made of, outermost first.
        ours: for each axis of the parameter a name; or digits, an index along it; or a name that
            the left side lacks: the index of an expert.
    """

    theirs: tuple[tuple[str, ...], ...]
    ours: tuple[str, ...]

    @property
    def unfolded(self) -> tuple[str, ...]:
        """The tensor's axes, each by itself."""
        return tuple(name for group in self.theirs for name in group)

    @property
    def order(self) -> tuple[int, ...]:
        """For each axis of the parameter that is no index, its place among the unfolded ones."""
        return tuple(self.unfolded.index(name) for name in self.ours if name in self.unfolded)

    def sizes(self, shape: tuple[int, ...]) -> dict[str, int]:
        """Returns the size of every named axis of a parameter of this shape."""
        return dict(zip(self.ours, shape, strict=True))

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Returns the shape of the tensor."""
        return tuple(math.prod(sizes[name] for name in group) for group in self.theirs)


@functools.cache
def parse_layout(text: str) -> Layout:
    """Reads '(h k) d -> d h k'."""
    left, right = text.split('->')
    groups = re.findall(r'\(([^)]*)\)|(\w+)', left)
    theirs = tuple(tuple((several or one).split()) for several, one in groups)
    layout = Layout(theirs, tuple(right.split()))
    if not set(layout.unfolded) <= set(layout.ours):
        raise InputError(f'Layout {text!r} must name on the right what it names on the left.')
    return layout
