"""What a compiled program's text says: the arrays it holds, and what runs under an exchange."""

import math
import re
from typing import NamedTuple

_ARRAY = re.compile(r'\b(?:pred|[subf]\d+|bf16|f8\w+)\[([\d,]+)\]')
_INSTRUCTION = re.compile(r'^\s+(?:ROOT )?%(\S+) = (.*)$', re.MULTILINE)
_EXCHANGE = re.compile(r' (?:ragged-)?all-to-all(-start|-done)?\(%([^\s,)]+)')
# Kernels, and what the compiler makes of a matrix product and what follows it.
_PRODUCT = re.compile(r'custom_call_target="tpu_custom_call"|kind=kOutput')


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


class Exchange(NamedTuple):
    """One exchange of rows, as a program for TPUs is scheduled.

    Attributes:
        elements: of the buffer that it fills.
        products: that run between its start and its end; none where the program waits for it.
    """

    elements: int
    products: int


def exchanges(text: str) -> list[Exchange]:
    """Reads every exchange of a scheduled program for TPUs, in the order in which they end.

    Args:
        text: of the compiled program, whose entry lists instructions as they are issued.

    Raises:
        ValueError: where there is no entry.
    """
    if '\nENTRY ' not in text:
        raise ValueError('The text of a compiled program must have an ENTRY; received none.')
    entry = text.split('\nENTRY ', 1)[1]
    found, started, products = [], {}, 0
    for name, body in _INSTRUCTION.findall(entry):
        products += _PRODUCT.search(body) is not None
        exchange = _EXCHANGE.search(body)
        if exchange is None:
            continue
        stage, first_operand = exchange.groups()
        if stage == '-start':
            started[name] = products
            continue
        (shape,) = _ARRAY.findall(body[: exchange.start()])
        size = math.prod(int(n) for n in shape.split(','))
        since = started.get(first_operand, products)
        found.append(Exchange(size, products - since))
    return found
