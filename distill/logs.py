"""A folder of logs that grows while models learn from it, and a ledger that keeps it reproducible.

The ledger says which files joined at which epoch, with their hashes: an epoch that has been begun
is the same for ever, for every model of a study and for a run that resumes. Files are added to the
folder and never changed: a file counts from the moment its last line has ended.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

from distill.corpus import documents_sha256
from distill.files import file_sha256
from distill.formats import jsonl_records, record_text
from distill.manifest import write_json
from distill.sources import Document
from moe.errors import InputError

Filter = Callable[[str], str | None]


@dataclasses.dataclass(frozen=True)
class Logs:
    """How rows of logged text become documents.

    Attributes:
        folder: of `.jsonl` files; those below it and those whose name begins with a dot are not
            read.
        field: of a row: a text, or OpenAI-style messages.
        allow_unlicensed: whether rows without a `licence` (a text that is not blank) are trained
            on; else they are left out, and counted.
        keep: given each text, returns what of it is trained on, or None to leave it out: what is
            personal is for the owner of the logs to take out. None keeps everything as it is.
        keep_name: of `keep`, for the ledger.
    """

    folder: str
    field: str = 'messages'
    allow_unlicensed: bool = False
    keep: Filter | None = None
    keep_name: str | None = None


@dataclasses.dataclass(frozen=True)
class Epoch:
    """What is trained on in one pass over the logs.

    Attributes:
        files: that joined at this epoch, with their sha256; those of earlier epochs count too.
        documents: sha256 of all documents of the epoch.
        unlicensed: rows that were left out for want of a licence, of all files.
        filtered: rows that the filter left out.
    """

    files: dict[str, str]
    documents: str
    unlicensed: int
    filtered: int


class Ledger:
    """The epochs of a growing folder, in a file that is written before an epoch begins.

    Args:
        file: of the ledger; there or not.
        logs: the folder and what is read from it.

    Raises:
        InputError: the ledger is damaged, or was kept for another folder or filter.
    """

    def __init__(self, file: str | os.PathLike, logs: Logs) -> None:
        self._file = pathlib.Path(file)
        self._logs = logs
        self._epochs = self._read()

    def __len__(self) -> int:
        """Counts the epochs that have begun."""
        return len(self._epochs)

    def epoch(self, number: int) -> Epoch:
        """Gives what is known of an epoch that has begun."""
        return self._epochs[number]

    def documents(self, number: int, *, write: bool = True) -> list[Document]:
        """Reads the documents of an epoch, which begins if it is the next one.

        Args:
            number: of the epoch, from 0; at most the number of those that have begun.
            write: whether this process keeps the ledger; the others call after it has.

        Returns:
            Documents in order of the epochs that files joined at, of their names and rows.

        Raises:
            InputError: a file of a begun epoch has changed or is gone, or its rows give other
                documents than before; names it. Or the folder holds no text.
        """
        self._epochs = self._read()
        begun = number < len(self._epochs)
        known = {
            name: sha256
            for epoch in self._epochs[: number + 1]
            for name, sha256 in epoch.files.items()
        }
        self._require_unchanged(known)
        joining = {} if begun else self._joining(known)
        documents, unlicensed, filtered = _read(self._logs, [*known, *joining])
        epoch = Epoch(joining, documents_sha256(documents), unlicensed, filtered)
        if begun:
            self._require_same(number, epoch)
        elif write:
            self._epochs.append(epoch)
            self._write()
        else:
            raise RuntimeError(f'epoch {number} has to be begun by the process that writes')
        return documents

    def _joining(self, known: dict[str, str]) -> dict[str, str]:
        """Finds the files that are new and finished, with their hashes."""
        folder = pathlib.Path(self._logs.folder)
        found = {
            path.name: file_sha256(path)
            for path in sorted(folder.glob('*.jsonl'))
            if path.name not in known and not path.name.startswith('.') and _ended(path)
        }
        if not (known or found):
            raise InputError(
                f'data.source must be a folder with .jsonl files whose last line has ended; '
                f'{folder} holds none. Add some, or name another folder.'
            )
        return found

    def _require_unchanged(self, known: dict[str, str]) -> None:
        for name, sha256 in known.items():
            path = pathlib.Path(self._logs.folder, name)
            if not path.is_file():
                raise InputError(_changed(path, 'it is gone', self._file))
            if file_sha256(path) != sha256:
                raise InputError(_changed(path, 'its content has changed', self._file))

    def _require_same(self, number: int, epoch: Epoch) -> None:
        if epoch.documents != self._epochs[number].documents:
            raise InputError(
                f'The documents of epoch {number} must be those that {self._file} was kept for; '
                'the files are, so what is read from them has changed: data.filter, data.field or '
                'data.allow_unlicensed. Restore it, or start anew in another workdir.'
            )

    def _read(self) -> list[Epoch]:
        if not self._file.exists():
            return []
        try:
            values = json.loads(self._file.read_text(encoding='utf-8'))
            epochs = [Epoch(**epoch) for epoch in values['epochs']]
            kept_for = values['logs']
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(
                f'{self._file} must be a ledger of logs; it cannot be read ({error}). Bring it '
                'back from a copy, or start anew in another workdir.'
            ) from error
        if kept_for != self._terms():
            raise InputError(
                f'{self._file} was kept for {kept_for}; received {self._terms()}. Restore these '
                'keys of data, or start anew in another workdir.'
            )
        return epochs

    def _write(self) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        epochs = [dataclasses.asdict(epoch) for epoch in self._epochs]
        write_json(self._file, {'logs': self._terms(), 'epochs': epochs})

    def _terms(self) -> dict[str, Any]:
        """What the documents depend on besides the files; the folder may be moved."""
        return {
            'field': self._logs.field,
            'allow_unlicensed': self._logs.allow_unlicensed,
            'filter': self._logs.keep_name,
        }


def _read(logs: Logs, names: list[str]) -> tuple[list[Document], int, int]:
    """Reads documents; and counts rows without a licence, and those that were filtered out."""
    documents: list[Document] = []
    unlicensed = filtered = 0
    for name in names:
        for suffix, record, where in jsonl_records(os.path.join(logs.folder, name)):
            text = record_text(record, logs.field, where)
            if not (logs.allow_unlicensed or _licensed(record)):
                unlicensed += 1
                continue
            kept = text if logs.keep is None else logs.keep(text)
            if kept is None:
                filtered += 1
            elif not isinstance(kept, str):
                raise InputError(
                    f'{where}: data.filter must return a text or None; {logs.keep_name} returned a '
                    f'{type(kept).__name__}.'
                )
            elif kept.strip():
                documents.append(Document(name + suffix, kept))
    if not documents:
        raise InputError(
            f'{logs.folder} must hold text to train on; {unlicensed} rows have no licence (see '
            f'data.allow_unlicensed) and {filtered} were filtered out. Add rows with a "licence".'
        )
    return documents, unlicensed, filtered


def _licensed(record: Any) -> bool:
    licence = record.get('licence')
    return isinstance(licence, str) and bool(licence.strip())


def _ended(path: pathlib.Path) -> bool:
    """Whether a file's last line has ended; one that has not may still be written."""
    with path.open('rb') as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b'\n'


def _changed(path: pathlib.Path, what: str, ledger: pathlib.Path) -> str:
    return (
        f'{path} belongs to an epoch that has begun ({ledger}), and {what}. Bring it back as it '
        'was: logs are added as new files, never changed. Or start anew in another workdir.'
    )
