"""What one process makes and the others read."""

from collections.abc import Callable
from typing import TypeVar

from distill import distributed

T = TypeVar('T')


def writer_first(make: Callable[[], T], name: str) -> T:
    """Lets one process write what the others then read; `make` must reach no barrier."""
    made = make() if distributed.is_writer() else None
    distributed.barrier(name)
    return make() if made is None else made
