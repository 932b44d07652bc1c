"""What a compiled program's text says: the arrays it holds."""

import math
import re

_ARRAY = re.compile(r'\b(?:pred|[subf]\d+|bf16|f8\w+)\[([\d,]+)\]')


def array_sizes(text: str) -> dict[tuple[int, ...], int]:
    """Returns the shapes of all arrays in a program, and the elements of each.

    Args:
        text: of the compiled program, `compiled.as_text()`.

    Raises:
        ValueError: where there is none: the text is not what this function reads.
    """
    shapes = {tuple(int(n) for n in dims.split(',')) for dims in _ARRAY.findall(text)}
    if not shapes:
        raise ValueError('The text of a compiled program must hold arrays; received none.')
    return {shape: math.prod(shape) for shape in shapes}


def check_not_expanded(text: str, *, most: int, what: str) -> None:
    """Checks that no array of a program is larger than it has to be.

    A grouped product that the compiler expands to a dense one multiplies every row by every group's
    matrix: its arrays are larger by the number of groups.

    Args:
        text: of the compiled program.
        most: elements of the largest of its inputs, outputs and rows.
        what: the program, for the error.

    Raises:
        RuntimeError: where an array has more elements than `most`.
    """
    larger = {shape: size for shape, size in array_sizes(text).items() if size > most}
    if larger:
        raise RuntimeError(
            f'{what} was compiled to dense products: no array should have more than {most} '
            f'elements, and it has {larger}.'
        )
