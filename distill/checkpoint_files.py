"""What lies in a directory of checkpoints, and whether it is whole; needs no orbax to be read.

directory/120/state/            the arrays
directory/120/checkpoint.json   data position, metadata, metric, dtypes and shapes
directory/120/manifest.json     checksums of it all, written last: without it, it is not complete
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import logging

from distill.manifest import MANIFEST, damaged_files
from moe.errors import InputError

RECORD = 'checkpoint.json'
STATE = 'state'


@dataclasses.dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint is, without its arrays.

    Attributes:
        step: updates made.
        data_state: the position in the data, as the iterator gave it.
        metadata: as given to `CheckpointManager.save`: config, fingerprints.
        metric: the lower the better; None where none was measured.
        arrays: dtype and shape of each array, by its path in the state.
    """

    step: int
    data_state: dict[str, Any]
    metadata: dict[str, Any]
    metric: float | None
    arrays: dict[str, list[Any]]


def complete_steps(directory: str | os.PathLike[str]) -> tuple[int, ...]:
    """Lists the steps whose checkpoint was completed, in order; reads and verifies no file."""
    root = absolute(directory)
    return tuple(step for step in all_steps(root) if (root / str(step) / MANIFEST).exists())


def latest_good_step(directory: str | os.PathLike[str]) -> int | None:
    """Finds the newest step whose every file has its checksum; warns of what it passes over.

    Returns:
        The step; None where no checkpoint was ever completed.

    Raises:
        InputError: where there are complete checkpoints and all are damaged.
    """
    return newest_good(absolute(directory))[0]


def read_metadata(directory: str | os.PathLike[str], *, step: int | None = None) -> CheckpointInfo:
    """Reads what a checkpoint is; its arrays are neither loaded nor verified.

    Args:
        directory: of the checkpoints.
        step: which; None for the newest complete one.

    Raises:
        InputError: where there is no such checkpoint, or its record is damaged.
    """
    root = absolute(directory)
    steps = complete_steps(root)
    if not steps or (step is not None and step not in steps):
        raise InputError(absent(root, step))
    chosen = steps[-1] if step is None else step
    if damage := damaged_files(root / str(chosen), [RECORD]):
        raise InputError(damaged(root, {chosen: damage}))
    return read_record(root / str(chosen))


def absolute(directory: str | os.PathLike[str]) -> Path:
    """Makes a path absolute (orbax fails late on a relative one); refuses what is not a path."""
    if '://' in str(directory):
        raise InputError(
            f'Checkpoints require a directory that is mounted; received {directory}. Mount the '
            'bucket and give the path.'
        )
    return Path(directory).expanduser().absolute()


def all_steps(root: Path) -> list[int]:
    """Lists all steps, complete or not, in order."""
    if not root.is_dir():
        return []
    return sorted(int(p.name) for p in root.iterdir() if p.name.isdecimal() and p.is_dir())


def newest_good(root: Path) -> tuple[int | None, set[int]]:
    """Finds the newest good step (see `latest_good_step`), and the damaged ones after it."""
    damage: dict[int, list[str]] = {}
    for step in reversed(all_steps(root)):
        directory = root / str(step)
        if not (directory / MANIFEST).exists():
            logging.warning('Checkpoint %s was cut off (it has no manifest): ignored.', directory)
            continue
        files = damaged_files(directory)
        if not files:
            return step, set(damage)
        logging.warning('Checkpoint %s is damaged, an older is tried: %s.', directory, files)
        damage[step] = files
    if damage:
        raise InputError(damaged(root, damage))
    return None, set()


def absent(root: Path, step: int | None) -> str:
    """Words the error of a checkpoint that is not there."""
    which = '' if step is None else f' of step {step}'
    found = f'those of steps {list(complete_steps(root))}' if complete_steps(root) else 'none'
    return (
        f'A complete checkpoint{which} is required in {root}; found {found}. Name another '
        'directory or step, or train first.'
    )


def damaged(root: Path, damage: Mapping[int, list[str]]) -> str:
    """Words the error of checkpoints that are all damaged, naming up to five files of each."""
    lines = [f'  {root}/{step}/{file}' for step, files in damage.items() for file in files[:5]]
    return '\n'.join(
        [
            f'A checkpoint with every checksum right is required in {root}; damaged are:',
            *lines,
            'Bring the files back from a copy, or delete the directory to start from scratch.',
        ]
    )


def read_record(directory: Path) -> CheckpointInfo:
    """Reads the record of one step, unverified."""
    return CheckpointInfo(**json.loads((directory / RECORD).read_text(encoding='utf-8')))


def delete(directory: Path) -> None:
    """Deletes one step, its manifest first: cut short, it leaves nothing that looks complete."""
    (directory / MANIFEST).unlink(missing_ok=True)
    if directory.exists():
        shutil.rmtree(directory)
