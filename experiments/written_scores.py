"""What a remote teacher said while it wrote the texts that a study now trains on."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator

import numpy as np

from distill.answer_ledger import AnswerLedger
from distill.data import TrainPipeline
from distill.formats import jsonl_records, record_text
from distill.remote_targets import Piece
from distill.token_names import TokenNames
from distill.token_scores import TopRows, nothing_said
from distill.written_targets import written_rows
from experiments.context import Context
from experiments.remote_texts import LEDGER, Texts
from moe.errors import InputError

# Documents whose rows are kept: those of a few batches.
_CACHED = 512


class WrittenScores:
    """Finds what was said of each position of the study's batches.

    Args:
        context: of a study whose source is the `texts.jsonl` that `experiments.remote` wrote.
        names: of the tokenizer.
        k: ids of each token.

    Raises:
        InputError: the source is another, its ledger is gone or has no log-probabilities.
    """

    def __init__(self, context: Context, names: TokenNames, k: int) -> None:
        source = pathlib.Path(context.study.data.source).expanduser()
        file = source.with_name(LEDGER)
        listed = context.study.teacher.remote.top_log_probs
        if context.documents.ledger is not None or not file.is_file():
            raise InputError(
                "config.teacher.remote.scoring='written' needs config.data.source to be the "
                f'texts.jsonl that experiments.remote wrote, beside its {LEDGER}; received '
                f'{str(source)!r}.'
            )
        if listed < k:
            raise InputError(
                f'config.teacher.remote.top_log_probs={listed} ids came with the texts, and '
                f'config.targets.k={k} are asked for. Lower k, or have texts written with more.'
            )
        self._context = context
        self._k = k
        self._table = names.table
        self._ledger = AnswerLedger(file, Texts(context.study, []).terms())
        self._documents = context.documents.of_epoch(0)
        self._answers = self._written(source)
        self._of_document = functools.lru_cache(maxsize=_CACHED)(self._rows)

    def close(self) -> None:
        """Lets others open the ledger."""
        self._ledger.close()

    def batches(self) -> Iterator[Callable[[Piece], TopRows]]:
        """Gives, batch by batch as the study has them, what was said of their pieces."""
        corpus = self._context.corpus
        # The same pipeline over numbers that say where each token is from.
        numbers = np.arange(len(corpus.tokens), dtype=np.int32)
        numbered = dataclasses.replace(corpus, tokens=numbers)
        for batch in TrainPipeline(numbered, self._context.batches):
            yield functools.partial(self._said, np.asarray(batch.tokens))

    def _said(self, numbers: np.ndarray, piece: Piece) -> TopRows:
        starts = self._context.corpus.starts
        first = int(numbers[piece.row, piece.start])
        document = int(np.searchsorted(starts, first, side='right')) - 1
        return self._of_document(document).part(first - int(starts[document]), piece.predicted)

    def _rows(self, document: int) -> TopRows:
        corpus, text = self._context.corpus, self._documents[document].text
        ids = corpus.tokens[corpus.starts[document] : corpus.starts[document + 1]]
        if text not in self._answers:
            return nothing_said(len(ids), self._k)
        record = self._ledger.entry(self._answers[text])['record']
        behind = '' if self._context.study.data.field == 'text' else '\n\n'
        start = len(text.encode()) - len((record['text'] + behind).encode()) - record['before']
        said = TopRows.unpacked(record['top']).likeliest(self._k)
        return written_rows(ids, self._table, start, record['lengths'], said)

    def _written(self, source: pathlib.Path) -> dict[str, str]:
        """The key of the answer that each text ends with."""
        field = self._context.study.data.field
        answers = {}
        for _, record, where in jsonl_records(str(source)):
            if self._ledger.outcome(record.get('key', '')) == 'answered':
                answers[record_text(record, field, where)] = record['key']
        return answers
