"""Filters of logged text, by the name under which their owner installed them.

What may be trained on of people's words is for the owner of the logs to say, in code of their own.
A config cannot name any code at all, only what an installed package declares as an entry point:

    [project.entry-points.'fractional.filters']
    no-names = 'our_package.privacy:without_names'  # (text) -> text to train on, or None
"""

from importlib import metadata

from distill.logs import Filter
from moe.errors import InputError

GROUP = 'fractional.filters'


def load_filter(name: str) -> tuple[Filter, str]:
    """Loads an installed filter.

    Args:
        name: of its entry point.

    Returns:
        The filter; and its name with the version of its package, which the ledger keeps.

    Raises:
        InputError: no package, or more than one, declares it; or it cannot be loaded.
    """
    declared = metadata.entry_points(group=GROUP)
    found = [point for point in declared if point.name == name]
    if len(found) != 1:
        raise InputError(
            f'data.filter must name an entry point of the group {GROUP!r} that one installed '
            f'package declares; received {name!r}, which {len(found)} declare. There are: '
            f'{", ".join(sorted(point.name for point in declared)) or "none"}.'
        )
    (point,) = found
    try:
        keep = point.load()
    except (ImportError, AttributeError) as error:
        raise InputError(
            f'data.filter={name!r} must be a function that can be imported; {point.value}: {error}.'
        ) from error
    package = '' if point.dist is None else f' of {point.dist.name} {point.dist.version}'
    return keep, f'{name}{package}'
