"""What the student wrote in the last steps, to learn from again."""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key

from distill.prompts import Sequences


@flax.struct.dataclass
class ReplayBuffer:
    """The sequences of the last `K` steps: a step's stand in the slot `step % K`.

    Attributes:
        sequences: of each step; rows that were not the student's have length 0.
        steps: in which each slot was written; -1 for never.
    """

    sequences: Sequences
    steps: Int[Array, 'K']


def empty_buffer(staleness: int, rows: int, seq_len: int) -> ReplayBuffer:
    """Returns a buffer for `staleness` steps that holds nothing."""

    def zeros(*shape: int) -> Array:
        return jnp.zeros((staleness, rows, *shape), jnp.int32)

    sequences = Sequences(zeros(seq_len), zeros(), zeros())
    return ReplayBuffer(sequences, jnp.full(staleness, -1, jnp.int32))


def replayable(buffer: ReplayBuffer, step: Int[Array, '']) -> Bool[Array, 'K B']:
    """Marks the sequences that are at most `K` steps old."""
    age = step - buffer.steps
    fresh = (buffer.steps >= 0) & (age <= buffer.steps.size)
    return fresh[:, None] & (buffer.sequences.lengths > 0)


def replayed(buffer: ReplayBuffer, step: Int[Array, ''], key: Key[Array, '']) -> Sequences:
    """Draws a sequence for each row, all of those that are not too old alike; one at least is."""
    valid = replayable(buffer, step)
    log_probs = jnp.where(valid.reshape(-1), 0.0, -jnp.inf)
    drawn = jax.random.categorical(key, log_probs, shape=(valid.shape[1],))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[drawn], buffer.sequences)


def remembered(
    buffer: ReplayBuffer, step: Int[Array, ''], sequences: Sequences, rows: Bool[Array, 'B']
) -> ReplayBuffer:
    """Puts a step's sequences, those of some rows alone, in the place of those `K` steps older."""
    slot = step % buffer.steps.size
    kept = Sequences(
        sequences.tokens, sequences.prompt_lengths, jnp.where(rows, sequences.lengths, 0)
    )
    put = jax.tree.map(lambda old, new: old.at[slot].set(new), buffer.sequences, kept)
    return ReplayBuffer(put, buffer.steps.at[slot].set(step))
