"""Nested mappings -> frozen dataclasses.

Every key must be a field and every value must have the field's type: a typo is an error that names
the nearest field, never a default.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from moe.errors import InputError

T = TypeVar('T')


def build(cls: type[T], values: Mapping[str, Any], path: str) -> T:
    """Builds `cls` from the mapping found at `path` of the config.

    Args:
        cls: a frozen dataclass; nested dataclasses are built likewise.
        values: its fields by name; fields with defaults may be left out.
        path: where the mapping stands, for messages: 'config.student.model'.

    Raises:
        InputError: for an unknown or missing key, a value of the wrong type, or what `cls` refuses.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(typing.cast(Any, cls))}
    for key in values:
        if key not in fields:
            raise InputError(unknown_key(path, key, list(fields)))
    arguments = {key: _convert(value, hints[key], f'{path}.{key}') for key, value in values.items()}
    missing = [
        name
        for name, field in fields.items()
        if name not in arguments
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise InputError(f'{path} needs {", ".join(missing)}: add it to the config file.')
    try:
        return cls(**arguments)
    except InputError as error:
        raise InputError(f'In {path}: {error}') from error


def unknown_key(path: str, key: str, known: list[str]) -> str:
    """Says which key is unknown, the nearest known one and all of them."""
    near = difflib.get_close_matches(key, known, n=1)
    hint = f' Did you mean {near[0]!r}?' if near else ''
    return f'{path} has no key {key!r}.{hint} Known keys: {", ".join(sorted(known))}.'


def _convert(value: Any, hint: Any, path: str) -> Any:
    """Checks `value` against a type hint, building nested dataclasses; casts int to float alone."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(value, typing.get_args(hint), path)
    if origin is typing.Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            raise InputError(
                f'{path} must be one of {", ".join(map(repr, choices))}; received {value!r}.'
            )
        return value
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, Mapping):
            raise _wrong_type(path, f'mapping, of the fields of {hint.__name__}', value)
        return build(hint, value, path)
    if origin is tuple:
        if not isinstance(value, tuple | list):
            raise _wrong_type(path, 'tuple', value)
        inner = typing.get_args(hint)[0]
        return tuple(_convert(item, inner, f'{path}[{i}]') for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _wrong_type(path, 'mapping', value)
        inner = typing.get_args(hint)[1]
        return {key: _convert(item, inner, f'{path}.{key}') for key, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return _of_class(value, hint, path)


def _of_class(value: Any, hint: Any, path: str) -> Any:
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise _wrong_type(path, hint.__name__, value)
    return value


def _convert_union(value: Any, hints: tuple[Any, ...], path: str) -> Any:
    if value is None and type(None) in hints:
        return None
    candidates = [hint for hint in hints if hint is not type(None)]
    is_mapping = isinstance(value, Mapping)
    matching = [hint for hint in candidates if dataclasses.is_dataclass(hint) == is_mapping]
    errors = []
    for hint in matching or candidates:
        try:
            return _convert(value, hint, path)
        except InputError as error:
            errors.append(error)
    raise errors[0]


def _wrong_type(path: str, required: str, value: Any) -> InputError:
    return InputError(
        f'{path} must be of type {required}; received {value!r} ({type(value).__name__}).'
    )
