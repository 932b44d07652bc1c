"""The keys of a config.json, read so that what is missing or not expressible is named."""

import pathlib
from collections.abc import Mapping
from typing import Any

from moe.errors import InputError

_REQUIRED = object()


class Fields:
    """A config.json.

    Args:
        values: what it holds.
        file: where it was read, for messages.
    """

    def __init__(self, values: Mapping[str, Any], file: pathlib.Path | str):
        self.values = values
        self.file = file

    def get(self, *names: str, default: Any = _REQUIRED) -> Any:
        """Returns the first of several spellings that is there and not null.

        Raises:
            InputError: where none is and there is no default.
        """
        for name in names:
            if self.values.get(name) is not None:
                return self.values[name]
        if default is _REQUIRED:
            raise InputError(
                f'{self.file} must have {" or ".join(names)}; it has neither that nor a default '
                'that all versions share. Add the value that the model was trained with.'
            )
        return default

    def has(self, name: str) -> bool:
        """Whether a key is there, null or not."""
        return name in self.values

    def require(self, name: str, *allowed: Any) -> None:
        """Refuses a model that needs what no layer here does.

        Args:
            name: a key; where it is missing or null, all is well.
            allowed: its values that change nothing.

        Raises:
            InputError: for another value.
        """
        value = self.values.get(name)
        if value is not None and value not in allowed:
            raise InputError(
                f'{self.file}: {name} must be {" or ".join(map(repr, allowed))}; received '
                f'{value!r}, which no layer here computes. Choose another model.'
            )
