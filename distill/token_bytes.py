"""The bytes that each id of a tokenizer stands for: what two tokenizers have in common."""

import functools
import json
from typing import Any, cast

from distill.tokenizer import BYTES, SPECIALS, ByteTokenizer, Tokenizer
from moe.errors import InputError

_SPACE_MARK = '▁'


def token_bytes(tokenizer: Tokenizer) -> tuple[bytes, ...]:
    """Lists the bytes of text that each id adds; those of special tokens are none.

    Args:
        tokenizer: of bytes, of byte-level BPE (as GPT-2, Llama 3, Qwen and DeepSeek have it), or of
            BPE over characters with single bytes to fall back on and '▁' for a space (as
            Mixtral and Gemma have it).

    Returns:
        An entry for each id in [0, vocab_size).

    Raises:
        InputError: where tokens are pieces of words whose bytes their names do not tell.
    """
    if isinstance(tokenizer, ByteTokenizer):
        return tuple(
            bytes([index]) if index < BYTES else b'' for index in range(tokenizer.vocab_size)
        )
    description = _described(tokenizer)
    vocabulary: dict[str, int] = description['model']['vocab']
    added = {token['id']: token for token in description['added_tokens']}
    spell = _speller(description, vocabulary)
    table = [b''] * tokenizer.vocab_size
    for token, index in vocabulary.items():
        if index not in added:
            table[index] = spell(token)
    for index, token in added.items():
        if not token['special']:
            table[index] = token['content'].encode()
    return tuple(table)


def special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Returns the ids of the tokens that stand for no text, by what they are called."""
    if isinstance(tokenizer, ByteTokenizer):
        return {name: BYTES + place for place, name in enumerate(SPECIALS)}
    added = _described(tokenizer)['added_tokens']
    return {token['content']: token['id'] for token in added if token['special']}


def _described(tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns what the library `tokenizers` writes of a tokenizer that it made."""
    return json.loads(cast(Any, tokenizer).to_json())


def _speller(description: dict[str, Any], vocabulary: dict[str, int]) -> Any:
    """Returns the function from a token's name to its bytes."""
    if 'ByteLevel' in json.dumps([description['pre_tokenizer'], description['decoder']]):
        return _byte_level
    if '<0x00>' in vocabulary:
        return _byte_fallback
    raise InputError(
        'To align tokenizers the bytes of each token must be known: of a byte-level BPE, or of a '
        'BPE with byte fallback; received a tokenizer of neither kind. Choose a teacher with one.'
    )


def _byte_level(token: str) -> bytes:
    return bytes(_printable()[character] for character in token)


@functools.cache
def _printable() -> dict[str, int]:
    """The character that byte-level BPE writes for each byte, turned round.

    Source: GPT-2: bytes that print stand for themselves, the others for characters from U+0100 on.
    """
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(BYTES) if byte not in kept]
    named = {chr(byte): byte for byte in kept}
    return named | {chr(BYTES + place): byte for place, byte in enumerate(others)}


def _byte_fallback(token: str) -> bytes:
    if len(token) == 6 and token.startswith('<0x') and token.endswith('>'):
        return bytes.fromhex(token[3:5])
    return token.replace(_SPACE_MARK, ' ').encode()
