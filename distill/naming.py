"""Distinct names for things that may be of one kind."""

from collections.abc import Sequence


def numbered(names: Sequence[str]) -> tuple[str, ...]:
    """Returns the names, each numbered from its second appearance on: 'a', 'b', 'a_2'."""
    counts = [names[:i].count(name) for i, name in enumerate(names)]
    return tuple(f'{n}_{c + 1}' if c else n for n, c in zip(names, counts, strict=True))
