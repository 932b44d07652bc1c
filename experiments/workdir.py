"""The folder a study lives in: its config, and each stage's result once it is complete."""

import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import ml_collections

from distill.nested import flatten
from moe.errors import InputError

# What a study may be moved to or watched by without becoming another study.
_FREE_KEYS = re.compile(
    r'mesh\.\w+|(teacher|student|quantise)\.train\.(log_every|checkpoint_every|keep_latest|max_skipped)'
)


class Workdir:
    """A folder with one `config.json` and a subfolder for each stage.

    The folder becomes this study's when its first stage starts to write: a config that failed
    before may still be mended.

    Args:
        path: made absolute; created when it is first written to.
        config: the study's config. A folder that holds another study is refused.
        writer: whether this process writes files (one process of a run does).

    Raises:
        InputError: where the folder belongs to another config; names the keys that differ.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        config: ml_collections.ConfigDict,
        *,
        writer: bool = True,
    ):
        self.path = pathlib.Path(path).expanduser().absolute()
        self._writer = writer
        if self.path.exists() and not self.path.is_dir():
            raise InputError(
                f'--workdir must be a folder; {self.path} is a file. Choose another path.'
            )
        self._values = json.loads(config.to_json_best_effort())
        self._file = self.path / 'config.json'
        if self._file.exists():
            _refuse_other_config(self._file, self._values)

    def stage(self, name: str) -> pathlib.Path:
        """The folder of a stage, created in what is this study's folder from now on."""
        folder = self.path / name
        folder.mkdir(parents=True, exist_ok=True)
        if self._writer and not self._file.exists():
            write_json(self._file, self._values)
        return folder

    def result(self, name: str) -> dict[str, Any] | None:
        """What a complete stage wrote, or None where it is not complete."""
        file = self.path / name / 'result.json'
        return read_json(file) if file.exists() else None

    def require_result(self, name: str, *, wanted_by: str) -> dict[str, Any]:
        """What a complete stage wrote.

        Raises:
            InputError: where the stage is not complete; says which stages to run.
        """
        result = self.result(name)
        if result is None:
            raise InputError(
                f'Stage {wanted_by!r} needs the result of stage {name!r}, which is not complete in '
                f'{self.path}. Run with --stages={name},{wanted_by}.'
            )
        return result

    def complete(self, name: str, result: Mapping[str, Any]) -> None:
        """Marks a stage as complete."""
        if self._writer:
            write_json(self.stage(name) / 'result.json', result)


def write_json(file: pathlib.Path, values: Mapping[str, Any]) -> None:
    """Writes JSON under a temporary name and renames it: a reader sees all of it or none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f'.{file.name}.tmp')
    temporary.write_text(json.dumps(values, indent=2, allow_nan=False) + '\n')
    os.replace(temporary, file)


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        InputError: where the file is not JSON.
    """
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise InputError(
            f'{file} is not valid JSON ({error}). Delete it to run its stage again.'
        ) from error


def _refuse_other_config(file: pathlib.Path, values: dict[str, Any]) -> None:
    saved, current = flatten(read_json(file)), flatten(values)
    differing = sorted(
        key
        for key in saved.keys() | current.keys()
        if saved.get(key) != current.get(key) and not _FREE_KEYS.fullmatch(key)
    )
    if not differing:
        return
    shown = [
        f'  {key}: {saved.get(key)!r} there, {current.get(key)!r} now' for key in differing[:8]
    ]
    more = [f'  ... and {len(differing) - 8} more'] if len(differing) > 8 else []
    raise InputError(
        '\n'.join(
            [
                f'{file.parent} holds a study of another config:',
                *shown,
                *more,
                'Choose another --workdir, or delete that folder to start over.',
            ]
        )
    )
