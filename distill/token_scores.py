"""What a server says of tokens, read into rows of a few ids, their log-probabilities and the rest.

Servers differ in how they name tokens and in how many they list. What is not a distribution over
the ids of the tokenizer, or not over the tokens that were asked about, is malformed.
"""

import base64
import dataclasses
import math
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from distill.asking import MalformedError
from distill.token_names import TokenNames

# Log-probabilities come rounded: how far a token's probabilities may sum to more than 1.
SLACK = 1e-3
Entry = tuple[int | None, float]


@dataclasses.dataclass(frozen=True)
class TopRows:
    """Likeliest ids of `n` tokens, as `distill.types.TopKTargets` holds them.

    Attributes:
        ids: in falling order of probability; 0 in unused slots.
        log_probs: nats; -inf in unused slots.
        tail_log_probs: log of the mass of all other ids.
    """

    ids: Int[np.ndarray, 'n k']
    log_probs: Float[np.ndarray, 'n k']
    tail_log_probs: Float[np.ndarray, 'n']

    def part(self, start: int, count: int) -> 'TopRows':
        """Returns the rows of consecutive tokens."""
        place = slice(start, start + count)
        return TopRows(self.ids[place], self.log_probs[place], self.tail_log_probs[place])

    def likeliest(self, k: int) -> 'TopRows':
        """Returns the `k` likeliest of each token's ids; the mass of the others joins the tail."""
        rest = np.exp(self.log_probs[:, k:].astype(np.float64)).sum(-1)
        with np.errstate(divide='ignore'):
            tail = np.log(np.exp(self.tail_log_probs.astype(np.float64)) + rest)
        return TopRows(self.ids[:, :k], self.log_probs[:, :k], tail.astype(np.float32))

    def packed(self) -> dict[str, Any]:
        """Returns JSON that `unpacked` reads."""
        return {
            'shape': list(self.ids.shape),
            'ids': _packed(self.ids.astype('<i4')),
            'log_probs': _packed(self.log_probs.astype('<f4')),
            'tail_log_probs': _packed(self.tail_log_probs.astype('<f4')),
        }

    @classmethod
    def unpacked(cls, values: dict[str, Any]) -> 'TopRows':
        """Reads what `packed` returned."""
        shape = values['shape']
        return cls(
            _unpacked(values['ids'], '<i4').reshape(shape),
            _unpacked(values['log_probs'], '<f4').reshape(shape),
            _unpacked(values['tail_log_probs'], '<f4'),
        )


def nothing_said(n: int, k: int) -> TopRows:
    """Returns rows of tokens that the teacher said nothing of: all mass is in the tail.

    On the k + 1 buckets a student then has all of its mass there too: a divergence and its gradient
    are 0.
    """
    return TopRows(
        np.zeros((n, k), np.int32), np.full((n, k), -np.inf, np.float32), np.zeros(n, np.float32)
    )


def top_rows(tokens: Sequence[Sequence[Entry]], k: int, vocab_size: int) -> TopRows:
    """Keeps the likeliest ids of each token; all else is its tail.

    Args:
        tokens: for each, pairs of id and log-probability in any order; an id of None stands for
            one that the server's name does not tell, whose mass is the tail's.
        k: ids kept.
        vocab_size: `V`.

    Raises:
        MalformedError: a log-probability is none, an id is listed twice, fewer are listed than are
            to be kept, or their probabilities sum to more than 1.
    """
    rows = nothing_said(len(tokens), k)
    for place, entries in enumerate(tokens):
        known = _checked(entries, place, min(k, vocab_size))[:k]
        log_probs = np.array([value for _, value in known], np.float64)
        total = math.fsum(np.exp(log_probs))
        if total > 1 + SLACK:
            raise MalformedError(f'token {place}: its probabilities sum to {total:.6f}')
        rows.ids[place, : len(known)] = [index for index, _ in known]
        rows.log_probs[place, : len(known)] = log_probs - math.log(max(total, 1.0))
        rows.tail_log_probs[place] = math.log1p(-total) if total < 1 else -np.inf
    return rows


def _checked(entries: Sequence[Entry], place: int, least: int) -> list[tuple[int, float]]:
    """Returns the entries that name an id, the likeliest first."""
    for _, value in entries:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not value <= SLACK:
            raise MalformedError(f'token {place}: {value!r} is no log-probability')
    if len(entries) < least:
        raise MalformedError(
            f'token {place}: {len(entries)} log-probabilities are listed, and {least} were asked '
            'for; lower config.targets.k to what the server gives'
        )
    known = [(index, min(0.0, float(value))) for index, value in entries if index is not None]
    if len({index for index, _ in known}) < len(known):
        raise MalformedError(f'token {place}: an id is listed twice')
    return sorted(known, key=lambda entry: (-entry[1], entry[0]))


def echoed(choice: dict[str, Any], sent: Sequence[int], names: TokenNames) -> list[list[Entry]]:
    """Reads the log-probabilities of a prompt that was sent as ids and is echoed.

    Args:
        choice: of a completion with `echo` and `logprobs`.
        sent: the prompt.
        names: of the tokenizer.

    Returns:
        Entries for each token but the first, which nothing stands before.

    Raises:
        MalformedError: the tokens are not those that were sent, or nothing is said of one.
    """
    scores = _part(choice, 'logprobs', dict)
    tokens, top = _part(scores, 'tokens', list), _part(scores, 'top_logprobs', list)
    if not len(sent) <= len(tokens) == len(top):
        raise MalformedError(
            f'misaligned: {len(tokens)} tokens with {len(top)} lists came back of {len(sent)}'
        )
    for place, (name, index) in enumerate(zip(tokens, sent, strict=False)):
        if not (isinstance(name, str) and names.may_mean(name, index)):
            raise MalformedError(
                f'misaligned at token {place}: {name!r} came back of id {index}, which stands for '
                f'{names.table[index]!r}; the server has another tokenizer'
            )
    entries = [_dictionary(value, place) for place, value in enumerate(top[1 : len(sent)], start=1)]
    return [[(names.id_of(name), value) for name, value in found.items()] for found in entries]


def prompt_log_probs(choice: dict[str, Any], sent: Sequence[int]) -> list[list[Entry]]:
    """Reads vLLM's `prompt_logprobs`, which name tokens by their ids; as `echoed`."""
    lists = _part(choice, 'prompt_logprobs', list)
    if len(lists) != len(sent):
        raise MalformedError(f'misaligned: {len(lists)} tokens came back of {len(sent)}')
    tokens = []
    for place, index in enumerate(sent[1:], start=1):
        found = _dictionary(lists[place], place)
        if str(index) not in found:
            raise MalformedError(
                f'misaligned at token {place}: id {index} was sent, and the server lists '
                f'{sorted(found)[:4]}'
            )
        tokens.append(
            [(_number(key, place), _part(value, 'logprob', object)) for key, value in found.items()]
        )
    return tokens


def written(choice: dict[str, Any], names: TokenNames) -> tuple[list[bytes], list[list[Entry]]]:
    """Reads the log-probabilities of what the teacher wrote itself, in either protocol.

    Args:
        choice: of a chat completion with `top_logprobs`, or of a completion with `logprobs`.
        names: of the tokenizer.

    Returns:
        The bytes of each token, and its entries.

    Raises:
        MalformedError: a token's bytes are not told.
    """
    scores = _part(choice, 'logprobs', dict)
    spelt: Iterable[tuple[str, Any]]
    if 'content' in scores:
        content = _part(scores, 'content', list)
        spelt = [(_part(token, 'token', str), token.get('bytes')) for token in content]
        tops = [
            [
                (names.id_of(_part(entry, 'token', str), entry.get('bytes')), entry.get('logprob'))
                for entry in _part(token, 'top_logprobs', list)
            ]
            for token in content
        ]
    else:
        spelt = [(name, None) for name in _part(scores, 'tokens', list)]
        tops = [
            [(names.id_of(name), value) for name, value in _dictionary(found, place).items()]
            for place, found in enumerate(_part(scores, 'top_logprobs', list))
        ]
    tokens = [_bytes_of(name, given, place, names) for place, (name, given) in enumerate(spelt)]
    if len(tokens) != len(tops):
        raise MalformedError(f'misaligned: {len(tokens)} tokens came with {len(tops)} lists')
    return tokens, tops


def _bytes_of(name: Any, given: Any, place: int, names: TokenNames) -> bytes:
    if given:
        return bytes(given)
    index = names.id_of(name) if isinstance(name, str) else None
    if index is None:
        raise MalformedError(f'token {place}: {name!r} does not tell its bytes')
    return names.table[index]


def _part(values: Any, name: str, kind: type) -> Any:
    found = values.get(name) if isinstance(values, dict) else None
    if found is None or not isinstance(found, kind):
        raise MalformedError(f'{name!r} is missing, or no {kind.__name__}')
    return found


def _dictionary(value: Any, place: int) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise MalformedError(f'token {place}: no log-probabilities are listed')
    return value


def _number(key: str, place: int) -> int:
    if not key.isdecimal():
        raise MalformedError(f'token {place}: {key!r} is no id')
    return int(key)


def _packed(array: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(array.tobytes(), 1)).decode()


def _unpacked(text: str, dtype: str) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype)
