"""Sequences that a model writes in the place of text: prompts, completions, and rows made of both.

A row of text is a few pieces of documents. Its prompt is the first part of the longest of them (of
equals, the first), read by itself: from position 0, without its neighbours in the row. The
completion stands for the piece's last `max_new_tokens` tokens, or for its second half where it is
shorter than twice as many; a piece of one token has no prompt, and its row stays text. The row then
holds prompt and completion from its start on, as one document, and padding after. Only tokens of
the completion are predicted; end-of-text ends it, and is itself predicted.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from distill.config import RolloutConfig
from distill.types import Batch
from moe.attention_context import segment_positions
from moe.decode import Sampling, continue_rows
from moe.transformer import Transformer

# Who wrote a row; `WRITERS[i]` is the name of writer `i`.
WRITERS = ('text', 'student', 'teacher')
TEXT, STUDENT, TEACHER = range(len(WRITERS))
# Apart from the keys that other draws of a step are made of, which are folded with its number.
_KEY = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Rollout:
    """How rows of a batch are written anew.

    Attributes:
        config: by whom, and how long.
        eos_id: ends a sequence, as its last token.
        pad_id: fills a row after it.
    """

    config: RolloutConfig
    eos_id: int
    pad_id: int


class Author(NamedTuple):
    """A model that writes, with all its variables."""

    model: Transformer
    variables: Any


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


def rollout_key(seed: int, step: Int[Array, ''] | int) -> Key[Array, '']:
    """Returns the key of all that is drawn to write a step's rows: a resumed run draws the same."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _KEY), step)


def roll_out(
    rollout: Rollout, authors: Mapping[int, Author], batch: Batch, key: Key[Array, '']
) -> tuple[Batch, dict[str, tuple[Float[Array, ''], Float[Array, '']]]]:
    """Writes a share of the rows anew.

    A row's tokens follow from its prompt, its author's logits and a key of its own, which is made
    of `key` and its number in the batch: so they are the same on every mesh, but where rounding of
    the logits turns a draw that was all but tied.

    Args:
        rollout: by whom, and how.
        authors: those whose share is not 0, by their number.
        batch: packed rows of text; the whole batch, before it is split.
        key: of the step.

    Returns:
        The batch with its `writers`; and `(sum, weight)` pairs: the share of rows by each author,
        and the mean length of completions in tokens.
    """
    config = rollout.config
    choice, *keys = jax.random.split(key, 1 + len(WRITERS))
    prompts = cut_prompts(batch, config.max_new_tokens)
    writers = choose_writers(choice, batch.tokens.shape[0], config)
    writers = jnp.where(prompts.lengths > 0, writers, TEXT)
    completions = _nothing(prompts, config.max_new_tokens)
    for number, author in authors.items():
        chosen = writers == number
        new = complete(rollout, author, prompts, chosen, keys[number])
        completions = jax.tree.map(lambda a, b: _by_row(chosen, a, b), new, completions)  # noqa: B023
    batch = with_rows(batch, writers, joined(prompts, completions, rollout.pad_id))
    rows = jnp.float32(writers.size)
    pairs = {
        f'{WRITERS[number]}_written': (jnp.sum(writers == number, dtype=jnp.float32), rows)
        for number in authors
    }
    written = jnp.sum(writers != TEXT, dtype=jnp.float32)
    lengths = jnp.sum(completions.lengths, dtype=jnp.float32)
    return batch, pairs | {'completion_tokens': (lengths, written)}


def choose_writers(key: Key[Array, ''], rows: int, config: RolloutConfig) -> Int[Array, 'B']:
    """Chooses who writes each row: any rows, of each author its share to within one.

    Of `B` rows the first `floor(lmbda B + u)` in a random order are the student's, and those up to
    `floor((lmbda + teacher_share) B + u)` the teacher's, with one `u` that is uniform in [0, 1): in
    expectation the shares are met exactly.
    """
    of_count, of_order = jax.random.split(key)
    fraction = jax.random.uniform(of_count)
    rank = jnp.argsort(jnp.argsort(jax.random.uniform(of_order, (rows,))))
    student, both = (
        jnp.floor(share * rows + fraction)
        for share in (config.lmbda, config.lmbda + config.teacher_share)
    )
    return jnp.where(rank < student, STUDENT, jnp.where(rank < both, TEACHER, TEXT))


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


def complete(
    rollout: Rollout,
    author: Author,
    prompts: Prompts,
    chosen: Bool[Array, 'B'],
    key: Key[Array, ''],
) -> Completions:
    """Lets an author write the chosen rows; costs nothing where there is none."""
    config = rollout.config

    def write() -> Completions:
        written = continue_rows(
            author.model,
            author.variables,
            prompts.tokens,
            prompts.mask,
            max_new_tokens=config.max_new_tokens,
            sampling=Sampling(config.temperature),
            key=key,
            stop_ids=(rollout.eos_id,),
            active=chosen,
        )
        return Completions(written.tokens, written.lengths)

    nothing = _nothing(prompts, config.max_new_tokens)
    return jax.lax.cond(chosen.any(), write, lambda: nothing)


def joined(prompts: Prompts, completions: Completions, pad_id: int) -> Batch:
    """Makes a row of each prompt and its completion; `T` tokens, as many as both have room for."""
    both = jnp.concatenate([prompts.tokens, completions.tokens], axis=1)
    T = both.shape[1]
    index = jnp.arange(T)
    padding = (prompts.tokens.shape[1] - prompts.lengths)[:, None]
    tokens = jnp.take_along_axis(both, jnp.minimum(index + padding, T - 1), axis=1)
    first = prompts.lengths[:, None]
    end = first + completions.lengths[:, None]
    within = index < end
    tokens = jnp.where(within, tokens, pad_id)
    return Batch(
        tokens=tokens,
        labels=jnp.roll(tokens, -1, axis=1).at[:, -1].set(pad_id),
        mask=(index >= first - 1) & (index < end - 1),
        segment_ids=within.astype(jnp.int32),
        positions=jnp.where(within, index, 0),
    )


def with_rows(batch: Batch, writers: Int[Array, 'B'], rows: Batch) -> Batch:
    """Puts other rows in the place of those that have a writer."""

    def chosen(old: Array, new: Array) -> Array:
        return _by_row(writers == TEXT, old, new.astype(old.dtype))

    return dataclasses.replace(jax.tree.map(chosen, batch, rows), writers=writers)


def _nothing(prompts: Prompts, max_new_tokens: int) -> Completions:
    rows = prompts.tokens.shape[0]
    return Completions(jnp.zeros((rows, max_new_tokens), jnp.int32), jnp.zeros(rows, jnp.int32))


def _by_row(condition: Bool[Array, 'B'], yes: Array, no: Array) -> Array:
    return jnp.where(condition.reshape(-1, *[1] * (yes.ndim - 1)), yes, no)
