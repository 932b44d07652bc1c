"""Which documents a model was trained on, so that none of them is held out for it elsewhere."""

import hashlib
import pathlib
from collections.abc import Sequence

from distill.manifest import write_json
from distill.sources import Document
from experiments.workdir import read_json
from moe.errors import InputError

_FILE = 'documents.json'


def record_seen(folder: pathlib.Path, documents: Sequence[Document]) -> None:
    """Writes 64 bits of each document's hash beside the model that is trained on them."""
    write_json(folder / _FILE, {'sha256': sorted(_hashes(documents))})


def is_recorded(folder: pathlib.Path) -> bool:
    """Whether it is known what the model in `folder` was trained on: not of one from elsewhere."""
    return (folder / _FILE).exists()


def refuse_seen(folder: pathlib.Path, held_out: Sequence[Document], *, key: str) -> None:
    """Refuses to hold out what a model in `folder` was trained on.

    Args:
        folder: of the stage that trained it.
        held_out: documents.
        key: what names the folder, of the config or a flag.

    Raises:
        InputError: where the folder has no record, or held-out documents are on it.
    """
    file = folder / _FILE
    if not is_recorded(folder):
        raise InputError(
            f'{folder} must be a stage that a launch has trained, with its {_FILE}; there is none. '
            f"Give {key} the stage's folder, such as runs/quickstart/teacher."
        )
    seen = _hashes(held_out) & set(read_json(file)['sha256'])
    if seen:
        raise InputError(
            f'{len(seen)} of {len(held_out)} held-out documents were training text of the model in '
            f'{folder}: what is measured on them says nothing. Keep the seed, data.source, its '
            'files, data.max_bytes and data.held_out_fraction of its study, or give '
            f'{key} another folder.'
        )


def _hashes(documents: Sequence[Document]) -> set[str]:
    return {hashlib.sha256(document.text.encode()).hexdigest()[:16] for document in documents}
