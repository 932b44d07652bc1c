"""Checks of config values: each names the field, what it must be and what was received."""

from typing import get_args

from moe.errors import InputError


def require(condition: bool, where: str, required: str, received: object) -> None:
    """Raises an `InputError` that names the field, the requirement and the value received."""
    if not condition:
        raise InputError(f'{where} must be {required}; received {received!r}.')


def one_of(where: str, value: object, literal: object) -> None:
    """Requires `value` to be among the choices of a `Literal`."""
    choices = get_args(literal)
    require(value in choices, where, f'one of {", ".join(map(repr, choices))}', value)


def positive(where: str, value: object) -> None:
    """Requires a positive integer; a bool is none."""
    valid = isinstance(value, int) and not isinstance(value, bool) and value > 0
    require(valid, where, 'a positive integer', value)
