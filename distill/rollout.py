"""Rows that a model writes in the place of text, inside the step that learns from them."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from distill.config import RolloutConfig
from distill.prompts import Completions, Prompts, Sequences, as_rows, cut_prompts, joined
from distill.replay import ReplayBuffer, empty_buffer, remembered, replayable, replayed
from distill.types import WRITERS, Batch
from distill.writers import STUDENT, TEXT, choose_writers
from moe.decode import continue_rows
from moe.sampling import Sampling
from moe.transformer import Transformer

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


class Rolled(NamedTuple):
    """A batch with rows that were written anew.

    Attributes:
        batch: with its `writers`.
        replay: what the student wrote, this step's among it; None where nothing is kept.
        pairs: `(sum, weight)` of metrics: the share of rows by each author, the share of the
            student's that it had written before, and the mean length of completions in tokens.
    """

    batch: Batch
    replay: ReplayBuffer | None
    pairs: dict[str, tuple[Float[Array, ''], Float[Array, '']]]


def rollout_key(seed: int, step: Int[Array, ''] | int) -> Key[Array, '']:
    """Returns the key of all that is drawn to write a step's rows: a resumed run draws the same."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _KEY), step)


def initial_replay(config: RolloutConfig, rows: int, seq_len: int) -> ReplayBuffer | None:
    """Returns the buffer before the first step; None where nothing is replayed."""
    return empty_buffer(config.staleness, rows, seq_len) if config.staleness else None


def roll_out(
    rollout: Rollout,
    authors: Mapping[int, Author],
    batch: Batch,
    key: Key[Array, ''],
    *,
    step: Int[Array, ''] | int = 0,
    replay: ReplayBuffer | None = None,
) -> Rolled:
    """Writes a share of the rows anew.

    A row's tokens follow from its prompt, its author's logits and a key of its own, which is made
    of `key` and its number in the batch: so they are the same on every mesh, but where rounding of
    the logits turns a draw that was all but tied.

    Args:
        rollout: by whom, and how.
        authors: those whose share is not 0, by their number.
        batch: packed rows of text; the whole batch, before it is split.
        key: of the step.
        step: its number.
        replay: what the student wrote before. With the probability `replay_share`, where there is
            something, all its rows are drawn from there and nothing is written.
    """
    config = rollout.config
    choice, again, *keys = jax.random.split(key, 2 + len(WRITERS))
    prompts = cut_prompts(batch, config.max_new_tokens)
    writers = choose_writers(choice, batch.tokens.shape[0], config)
    writers = jnp.where(prompts.lengths > 0, writers, TEXT)
    sequences = joined(prompts, _nothing(prompts, config.max_new_tokens))
    pairs = {}
    for number, author in authors.items():
        chosen = writers == number
        if number == STUDENT and replay is not None:
            past = _Past(again, jnp.asarray(step, jnp.int32), replay)
            new, replay, old = _replayed(rollout, author, prompts, chosen, keys[number], past)
            pairs['replayed'] = _share(chosen & old, chosen)
        else:
            new = complete(rollout, author, prompts, chosen, keys[number])
        sequences = _choose(chosen, new, sequences)
        pairs[f'{WRITERS[number]}_written'] = _share(chosen, jnp.ones_like(chosen))
    written = writers != TEXT
    lengths = jnp.sum(jnp.where(written, sequences.lengths, 0), dtype=jnp.float32)
    pairs['completion_tokens'] = (lengths, jnp.sum(written, dtype=jnp.float32))
    rows = as_rows(sequences, rollout.pad_id)
    return Rolled(with_rows(batch, writers, rows), replay, pairs)


class _Past(NamedTuple):
    """What the student wrote before a step, and the key by which that is chosen from."""

    key: Key[Array, '']
    step: Int[Array, '']
    replay: ReplayBuffer


def _replayed(
    rollout: Rollout,
    author: Author,
    prompts: Prompts,
    chosen: Bool[Array, 'B'],
    key: Key[Array, ''],
    past: _Past,
) -> tuple[Sequences, ReplayBuffer, Bool[Array, '']]:
    """Takes the student's sequences from the past, or lets it write, and remembers that.

    Returns:
        The sequences, the past with those that are new, and whether they are old.
    """
    again, step, replay = past
    of_choice, of_draw = jax.random.split(again)
    old = jax.random.uniform(of_choice) < rollout.config.replay_share
    old &= replayable(replay, step).any()
    new = complete(rollout, author, prompts, chosen & ~old, key)
    more = remembered(replay, step, new, chosen)
    sequences = _choose(old, replayed(replay, step, of_draw), new)
    return sequences, _choose(old, replay, more), old


def complete(
    rollout: Rollout,
    author: Author,
    prompts: Prompts,
    chosen: Bool[Array, 'B'],
    key: Key[Array, ''],
) -> Sequences:
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
    return joined(prompts, jax.lax.cond(chosen.any(), write, lambda: nothing))


def with_rows(batch: Batch, writers: Int[Array, 'B'], rows: Batch) -> Batch:
    """Puts other rows in the place of those that have a writer."""
    rows = jax.tree.map(lambda old, new: new.astype(old.dtype), batch, rows)
    return dataclasses.replace(_choose(writers == TEXT, batch, rows), writers=writers)


def _nothing(prompts: Prompts, max_new_tokens: int) -> Completions:
    rows = prompts.tokens.shape[0]
    return Completions(jnp.zeros((rows, max_new_tokens), jnp.int32), jnp.zeros(rows, jnp.int32))


def _share(part: Bool[Array, 'B'], whole: Bool[Array, 'B']) -> tuple[Array, Array]:
    return jnp.sum(part, dtype=jnp.float32), jnp.sum(whole, dtype=jnp.float32)


def _choose(condition: Bool[Array, '*B'], yes: Any, no: Any) -> Any:
    """Takes whole rows, or everything, of one tree or the other."""

    def choose(a: Array, b: Array) -> Array:
        shape = condition.shape + (1,) * (a.ndim - condition.ndim)
        return jnp.where(condition.reshape(shape), a, b)

    return jax.tree.map(choose, yes, no)
