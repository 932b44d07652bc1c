"""Which documents a study trains on, and which it holds out."""

import functools
import hashlib
import itertools
import pathlib
import sys
from collections.abc import Iterable

import numpy as np

from distill import distributed
from distill.logs import Ledger, Logs
from distill.sources import Document, read_documents, split_documents
from experiments.filters import load_filter
from experiments.text_config import TextConfig
from experiments.writer_first import writer_first
from moe.errors import InputError


class Documents:
    """The text of a study: read when needed, and grown by epochs where it is a folder of logs.

    Args:
        data: the text's config.
        seed: of what is held out.
        folder: of the study, where the ledger of logs is.
        teachers: that documents may be routed to, by name, in the order of their numbers from 1.
    """

    def __init__(
        self, data: TextConfig, seed: int, folder: pathlib.Path, teachers: Iterable[str]
    ) -> None:
        self._data = data
        self._seed = seed
        self._folder = folder
        self._teachers = tuple(teachers)

    @functools.cached_property
    def split(self) -> tuple[list[Document], list[Document]]:
        """Train and held-out documents."""
        data = self._data
        if self.ledger is None:
            found = read_documents(data.source, field=data.field)
        else:
            found = self._logged(0)
        documents = _limited(found, data.max_bytes)
        if len(documents) < len(found) and distributed.is_writer():
            print(
                f'text: {len(documents)} of {len(found)} documents are used, within '
                f'data.max_bytes={data.max_bytes}',
                file=sys.stderr,
            )
        if data.held_out_source is None:
            return split_documents(documents, data.held_out_fraction, self._seed)
        held_out = read_documents(data.held_out_source, field=data.held_out_field or data.field)
        return _without(documents, held_out), held_out

    @functools.cached_property
    def ledger(self) -> Ledger | None:
        """The epochs of a folder of logs; None for text of another source."""
        data = self._data
        folder, file = pathlib.Path(data.source).expanduser(), self._folder / 'ledger.json'
        if folder.is_dir() and (file.exists() or any(folder.glob('*.jsonl'))):
            keep, name = (None, None) if data.filter is None else load_filter(data.filter)
            logs = Logs(str(folder), data.field, data.allow_unlicensed, keep, name)
            return Ledger(file, logs)
        if data.filter is not None or data.allow_unlicensed:
            raise InputError(
                'data.filter and data.allow_unlicensed are for a folder of .jsonl logs; received '
                f'data.source={data.source!r}. Name the folder, or leave them out.'
            )
        return None

    def _logged(self, epoch: int) -> list[Document]:
        """The logs of an epoch; the first process to ask for a new one fixes what it is."""
        assert self.ledger is not None
        read = functools.partial(self.ledger.documents, epoch, write=distributed.is_writer())
        documents = writer_first(read, f'logs of epoch {epoch}')
        known = self.ledger.epoch(epoch)
        if distributed.is_writer() and (known.unlicensed or known.filtered):
            print(
                f'logs of epoch {epoch}: {known.unlicensed} rows without a licence and '
                f'{known.filtered} that the filter refused are left out',
                file=sys.stderr,
            )
        return documents

    def of_epoch(self, epoch: int) -> list[Document]:
        """What is trained on in an epoch: all that was held out at first stays held out."""
        if self.ledger is None or epoch == 0:
            return self.split[0]
        return _without(_limited(self._logged(epoch), self._data.max_bytes), self.split[1])

    def routes(self, documents: list[Document]) -> np.ndarray | None:
        """The number of each document's teacher, where a field of the data names it."""
        data = self._data
        if data.route_field is None:
            return None
        if self.ledger is not None:
            raise InputError(
                'data.route_field is for a source that does not grow; received the folder of logs '
                f'{data.source!r}. Name its files with a glob, or leave the field out.'
            )
        named = read_documents(data.source, field=data.route_field)
        names = {document.name: document.text.strip() for document in named}
        numbers = {name: i for i, name in enumerate(self._teachers, start=1)}
        return np.array([numbers.get(names.get(doc.name, ''), 0) for doc in documents], np.int64)


def _without(documents: list[Document], held_out: list[Document]) -> list[Document]:
    """Leaves out the text that is held out."""
    texts = {document.text for document in held_out}
    kept = [document for document in documents if document.text not in texts]
    if not kept:
        raise InputError(
            f'data.source must hold text besides what is held out; all of its {len(documents)} '
            'documents are held out. Name another.'
        )
    return kept


def _limited(documents: list[Document], max_bytes: int) -> list[Document]:
    """Keeps whole documents, chosen by a hash of their text, up to `max_bytes` of UTF-8."""
    ranked = sorted(
        range(len(documents)),
        key=lambda index: hashlib.sha256(documents[index].text.encode()).digest(),
    )
    sizes = (len(documents[index].text.encode()) for index in ranked)
    behind = itertools.accumulate(sizes)
    kept = {index for index, size in zip(ranked, behind, strict=True) if size <= max_bytes}
    if documents and len(kept) < 2 <= len(documents):
        raise InputError(
            f'data.max_bytes must leave room for 2 documents at least; received {max_bytes}, which '
            f'{len(kept)} of {len(documents)} fit in. Raise it, or cut the text into smaller files.'
        )
    return [document for index, document in enumerate(documents) if index in kept]
