"""How likely a model holds given text: the log-probability and the rank of each token.

Texts are run in batches, one a row, padded on the right to a power of two; no text depends on those
beside it, and no array of [texts, tokens, vocabulary] exists.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from distill.eval_step import in_chunks
from distill.evaluate import placed
from moe.errors import InputError
from moe.filling import batch_shards
from moe.sampling import log_probs_of
from moe.sharding import constrain
from moe.transformer import Transformer, output_logits
from moe.writing_inputs import checked_variables, dropless

# A context and its continuation, as ids.
Pair = tuple[Sequence[int], Sequence[int]]
_SHORTEST = 16


@dataclasses.dataclass(frozen=True)
class Scored:
    """What a model holds of a continuation.

    Attributes:
        log_probs: of each of its tokens, nats.
        ranks: how many other tokens are likelier in the place of each.
    """

    log_probs: np.ndarray
    ranks: np.ndarray

    @property
    def log_prob(self) -> float:
        """Log-probability of the whole continuation, nats."""
        return float(self.log_probs.sum(dtype=np.float64))

    @property
    def is_greedy(self) -> bool:
        """Whether taking the likeliest token at each step writes it."""
        return not self.ranks.any()


def score(
    model: Transformer,
    params: Any,
    pairs: Sequence[Pair],
    *,
    batch_size: int,
    vocab_size: int | None = None,
    chunk_size: int = 1024,
) -> list[Scored]:
    """Scores continuations, each by itself.

    Compiled once for each power of two that a text's length reaches. A model whose dispatch drops
    tokens is run with one that does not.

    Args:
        model: that judges.
        params: the parameters, or all the variables.
        pairs: of a context, one id or more, and a continuation, which may be empty.
        batch_size: texts run at once; rounded up to what a mesh splits a batch into.
        vocab_size: ids below are ranked, where the model's vocabulary is wider than that of its
            tokenizer; probabilities are over all.
        chunk_size: tokens whose logits exist at one time; at least one position of every row.

    Returns:
        For each pair what the model holds of its continuation.

    Raises:
        InputError: for a pair without a context, or ids outside of the vocabulary.
    """
    for number, (context, continuation) in enumerate(pairs):
        _check(number, context, continuation, model.config.vocab_size)
    variables = checked_variables(model, params)
    model, size = dropless(model), batch_size + -batch_size % batch_shards(model.mesh)
    ranked = vocab_size or model.config.vocab_size
    scored: dict[int, Scored] = {}
    for numbers in _batches(pairs, size):
        length = _padded(max(sum(map(len, pairs[n])) - 1 for n in numbers))
        tokens, labels, mask = _rows([pairs[n] for n in numbers], size, length)
        operands: Any = placed((tokens, labels, mask), model.mesh)
        found = jax.device_get(_scores(model, chunk_size, ranked, variables, *operands))
        for row, number in enumerate(numbers):
            context, continuation = pairs[number]
            here = slice(len(context) - 1, len(context) - 1 + len(continuation))
            scored[number] = Scored(*(values[row, here] for values in found))
    return [scored[number] for number in range(len(pairs))]


def _check(
    number: int, context: Sequence[int], continuation: Sequence[int], vocab_size: int
) -> None:
    if not len(context):
        raise InputError(
            f'A context must hold one id or more; that of pair {number} is empty. Begin an empty '
            'text with the bos id.'
        )
    outside = [i for i in (*context, *continuation) if not 0 <= i < vocab_size]
    if outside:
        raise InputError(
            f'Ids must be in [0, {vocab_size}), the vocabulary of the model; pair {number} has '
            f'{outside[:8]}. Encode with the tokenizer of the model.'
        )


def _batches(pairs: Sequence[Pair], size: int) -> Iterator[tuple[int, ...]]:
    """Yields which pairs are run together: those of about one length."""
    order = sorted(range(len(pairs)), key=lambda n: sum(map(len, pairs[n])))
    groups = itertools.groupby(order, key=lambda n: _padded(sum(map(len, pairs[n])) - 1))
    for _, group in groups:
        numbers = tuple(group)
        yield from (numbers[start : start + size] for start in range(0, len(numbers), size))


def _padded(length: int) -> int:
    return max(_SHORTEST, 1 << (length - 1).bit_length())


def _rows(pairs: Sequence[Pair], size: int, length: int) -> tuple[np.ndarray, ...]:
    """Lays texts out in rows: what is read, what is to be predicted, and where there is text."""
    tokens, labels = np.zeros((2, size, length), np.int32)
    mask = np.zeros((size, length), bool)
    # Rows that are left over repeat the first: a row of padding alone has nothing to attend to.
    filler = [pairs[0]] * (size - len(pairs))
    for row, (context, continuation) in enumerate([*pairs, *filler]):
        text = np.array([*context, *continuation], np.int32)
        count = max(1, len(text) - 1)
        tokens[row, :count], mask[row, :count] = text[:count], True
        labels[row, : len(text) - 1] = text[1:]
    return tokens, labels, mask


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _scores(
    model: Transformer,
    chunk_size: int,
    ranked: int,
    variables: Any,
    tokens: Int[Array, 'B T'],
    labels: Int[Array, 'B T'],
    mask: Bool[Array, 'B T'],
) -> tuple[Float[Array, 'B T'], Int[Array, 'B T']]:
    segments = mask.astype(jnp.int32)
    output: Any = model.apply(variables, tokens, segment_ids=segments, logits=False)
    rows, length = tokens.shape
    width = min(length, max(1, chunk_size // rows))
    chunks = jax.tree.map(lambda x: in_chunks(x, width), (output.hidden, labels))

    def judge(carry: None, chunk: tuple[Array, Array]) -> tuple[None, tuple[Array, Array]]:
        hidden, labels = chunk
        logits = output_logits(model.config, variables, hidden)
        chosen, _ = log_probs_of(logits, labels)
        own = jnp.take_along_axis(logits, labels[..., None], -1)
        return carry, (chosen, (logits[..., :ranked] > own).sum(-1))

    _, (log_probs, ranks) = jax.lax.scan(judge, None, chunks)
    found = [jnp.moveaxis(x, 0, 1).reshape(rows, -1)[:, :length] for x in (log_probs, ranks)]
    log_probs, ranks = (constrain(x, (None, None), model.mesh) for x in found)
    return log_probs, ranks
