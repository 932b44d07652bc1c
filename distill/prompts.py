"""Prompts cut from packed rows, completions, and the rows that both make.

A row of text is a few pieces of documents. Its prompt is the first part of the longest of them (of
equals, the first), read by itself: from position 0, without its neighbours in the row. The
completion stands for the piece's last `max_new_tokens` tokens, or for its second half where it is
shorter than twice as many; a piece of one token has no prompt, and its row stays text. The new row
holds prompt and completion from its start on, as one document, and padding after. Only tokens of
the completion are predicted; end-of-text ends it, and is itself predicted.
"""

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from distill.types import Batch
from moe.attention_context import segment_positions


@flax.struct.dataclass
class Prompts:
    """First parts of documents, one a row, padded on the left.

    Attributes:
        tokens: ids; 0 where `mask` is False.
        mask: False for the padding.
        lengths: tokens of each; 0 where a row has none.
    """

    tokens: Int[Array, 'B P']
    mask: Bool[Array, 'B P']
    lengths: Int[Array, 'B']


@flax.struct.dataclass
class Completions:
    """What follows the prompts.

    Attributes:
        tokens: ids; arbitrary from `lengths` on.
        lengths: tokens of each, that which ended it among them; 0 where nothing was written.
    """

    tokens: Int[Array, 'B N']
    lengths: Int[Array, 'B']


@flax.struct.dataclass
class Sequences:
    """Prompts and their completions, each from the start of its row on.

    Attributes:
        tokens: ids; arbitrary from `prompt_lengths + lengths` on.
        prompt_lengths: tokens of each prompt.
        lengths: tokens of each completion; 0 where there is no sequence.
    """

    tokens: Int[Array, '*K B T']
    prompt_lengths: Int[Array, '*K B']
    lengths: Int[Array, '*K B']


def cut_prompts(batch: Batch, max_new_tokens: int) -> Prompts:
    """Takes the first part of each row's longest piece of a document; see above."""
    room = batch.tokens.shape[1] - max_new_tokens
    behind = jnp.where(batch.segment_ids > 0, segment_positions(batch.segment_ids) + 1, 0)
    size = behind.max(axis=1)
    start = jnp.argmax(behind, axis=1) + 1 - size
    lengths = jnp.minimum(size - jnp.minimum(max_new_tokens, size // 2), room)
    column = jnp.arange(room) - (room - lengths)[:, None]
    index = start[:, None] + jnp.maximum(column, 0)
    tokens = jnp.take_along_axis(batch.tokens, index, axis=1)
    return Prompts(
        tokens=jnp.where(column >= 0, tokens, 0),
        mask=column >= 0,
        lengths=jnp.where(size >= 2, lengths, 0),
    )


def joined(prompts: Prompts, completions: Completions) -> Sequences:
    """Puts each completion after its prompt, in rows of as many tokens as both have room for."""
    both = jnp.concatenate([prompts.tokens, completions.tokens], axis=1)
    T = both.shape[1]
    padding = (prompts.tokens.shape[1] - prompts.lengths)[:, None]
    tokens = jnp.take_along_axis(both, jnp.minimum(jnp.arange(T) + padding, T - 1), axis=1)
    return Sequences(tokens, prompts.lengths, completions.lengths)


def as_rows(sequences: Sequences, pad_id: int) -> Batch:
    """Makes a row of a batch of each sequence: what predicts its completion counts, no more."""
    index = jnp.arange(sequences.tokens.shape[1])
    first = sequences.prompt_lengths[:, None]
    end = first + sequences.lengths[:, None]
    within = index < end
    tokens = jnp.where(within, sequences.tokens, pad_id)
    return Batch(
        tokens=tokens,
        labels=jnp.roll(tokens, -1, axis=1).at[:, -1].set(pad_id),
        mask=(index >= first - 1) & (index < end - 1),
        segment_ids=within.astype(jnp.int32),
        positions=jnp.where(within, index, 0),
    )
