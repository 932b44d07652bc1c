"""The text of a study, as a config."""

import dataclasses
from typing import Literal

from distill.tokenizer import ByteTokenizer
from moe.config import require
from moe.errors import InputError


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Which text, how it becomes tokens and how tokens become batches.

    Attributes:
        source: 'python', a path or glob, or a folder of `.jsonl` logs that may grow.
        field: of a row of .jsonl, .parquet or ArrayRecord; or a text in which each `{name}` stands
            for that of a field.
        filter: of a folder of logs: the installed filter that takes out what is personal; None for
            none. See `experiments.filters`.
        allow_unlicensed: of a folder of logs: whether rows without a licence are trained on.
        route_field: of a row, whose text names its teacher, one of `more_teachers`; any other text
            is the first teacher's. None lets all teach all.
        max_bytes: of text that is read, whole documents at a time.
        tokenizer: 'byte', or 'bpe', trained once on the train split.
        vocab_size: entries of the 'bpe' tokenizer.
        held_out_fraction: of the documents.
        held_out_source: text of its own to hold out, as `source` but no folder, instead of that
            fraction; what of it is in `source` too is not trained on. None for none.
        held_out_field: of its rows; None for `field`.
        held_out_documents: evaluated at most.
        seq_len: tokens of a row.
        batch_size: rows of a batch, over all hosts.
    """

    source: str
    field: str
    filter: str | None
    allow_unlicensed: bool
    max_bytes: int
    tokenizer: Literal['bpe', 'byte']
    vocab_size: int
    held_out_fraction: float
    held_out_documents: int
    seq_len: int
    batch_size: int
    held_out_source: str | None = None
    held_out_field: str | None = None
    route_field: str | None = None

    def __post_init__(self) -> None:
        for name in ('max_bytes', 'vocab_size', 'held_out_documents', 'seq_len', 'batch_size'):
            require(getattr(self, name) > 0, f'data.{name}', 'positive', getattr(self, name))
        fraction = self.held_out_fraction
        require(0 < fraction < 1, 'data.held_out_fraction', 'between 0 and 1', fraction)
        if self.held_out_field is not None and self.held_out_source is None:
            raise InputError(
                'data.held_out_field is of the rows of data.held_out_source; received '
                f'{self.held_out_field!r} and None. Name the source too, or leave the field out.'
            )

    @property
    def model_vocab_size(self) -> int:
        """`V` of every model of the study."""
        return ByteTokenizer().vocab_size if self.tokenizer == 'byte' else self.vocab_size
