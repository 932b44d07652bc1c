"""The tokenizer of a remote teacher: that of its folder, of whoever's making."""

import pathlib

from distill.pretrained_tokenizer import PretrainedTokenizer
from distill.tokenizer import METADATA_FILE, ByteTokenizer, Tokenizer, load_tokenizer
from moe.errors import InputError


def folder_tokenizer(folder: str) -> Tokenizer:
    """Loads what a study of ours saved, or the tokenizer of a published model."""
    if (pathlib.Path(folder) / METADATA_FILE).exists():
        return load_tokenizer(folder)
    return PretrainedTokenizer(folder)


def remote_tokenizer(folder: str | None, kind: str) -> Tokenizer:
    """Returns the tokenizer that a remote teacher's log-probabilities are read with.

    Args:
        folder: config.teacher.remote.tokenizer.
        kind: config.data.tokenizer, which counts where there is no folder.

    Raises:
        InputError: where neither says what the server's tokenizer is.
    """
    if folder is not None:
        return folder_tokenizer(folder)
    if kind == 'byte':
        return ByteTokenizer()
    raise InputError(
        "A remote teacher's log-probabilities are of its own tokens: config.teacher.remote."
        "tokenizer must be the folder of its tokenizer, or config.data.tokenizer='byte' where it "
        f'reads bytes; received None and {kind!r}.'
    )
