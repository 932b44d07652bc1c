"""What an engine runs on the device: a chunk of prompts, their entry among the rows, a token each.

A prompt is padded on the left to whole chunks, which are run through a cache of its own; entering,
it leaves its padding behind. All three are compiled once for each size of the cache.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

from moe.attention_kinds import empty_cache
from moe.cache_layout import compacted, constrain_cache, inserted, resized
from moe.decode import seen_tokens
from moe.pages import PoolShape
from moe.sampling import SamplingRows, log_probs_of, penalise, row_keys, sample
from moe.transformer import Transformer, output_logits
from moe.types import KVCache


@flax.struct.dataclass
class Rows:
    """What the rows of a batch have come to.

    Attributes:
        cache: of the tokens so far.
        logits: of each row's next token.
        seen: which tokens stand in it.
    """

    cache: KVCache
    logits: Float[Array, 'B V']
    seen: Bool[Array, 'B V']


class Scores(NamedTuple):
    """Log-probabilities in nats under the model itself.

    Attributes:
        chosen: of the token that is there.
        top_ids: the likeliest tokens, best first; none where they were not asked for.
        top_log_probs: of those.
    """

    chosen: Float[Array, '*B']
    top_ids: Int[Array, '*B top']
    top_log_probs: Float[Array, '*B top']


@functools.partial(jax.jit, static_argnames=('model', 'batch', 'num_slots', 'pool'))
def empty_rows(
    model: Transformer, batch: int, num_slots: int, pool: PoolShape | None = None
) -> Rows:
    """Returns rows that hold nothing yet, in pages where there is a pool."""
    cache = empty_cache(model.config, batch, num_slots, pool=pool)
    V = model.config.vocab_size
    return Rows(
        cache=constrain_cache(model.config, cache, model.mesh),
        logits=jnp.zeros((batch, V), jnp.float32),
        seen=jnp.zeros((batch, V), bool),
    )


@functools.partial(jax.jit, static_argnames=('model', 'num_slots', 'pool'))
def resize_rows(model: Transformer, rows: Rows, num_slots: int, pool: PoolShape) -> Rows:
    """Gives rows as many slots each, which they must not have outgrown, and pools more pages."""
    cache = resized(model.config, rows.cache, num_slots, pool, model.mesh)
    return dataclasses.replace(rows, cache=cache)


@functools.partial(
    jax.jit, static_argnames=('model', 'score', 'top', 'vocab_size'), donate_argnames='rows'
)
def prefill_chunk(
    model: Transformer,
    variables: Any,
    rows: Rows,
    tokens: Int[Array, 'F C'],
    mask: Bool[Array, 'F C'],
    following: Int[Array, 'F C'],
    padding: Int[Array, 'F'],
    *,
    score: bool,
    top: int,
    vocab_size: int,
) -> tuple[Rows, Scores | None]:
    """Runs a chunk of each prompt.

    Args:
        model: that runs.
        variables: its.
        rows: what the chunks before have come to.
        tokens: of the prompts.
        mask: False for padding, at the start of the first chunk.
        following: the token after each, which its logits are scored by.
        padding: of each prompt in all.
        score: whether to score.
        top: how many of the likeliest tokens to name.
        vocab_size: ids below may be named.
    """
    config = model.config
    slots = rows.cache.length[:, None] + jnp.arange(tokens.shape[1])
    positions = jnp.maximum(slots - padding[:, None], 0)
    segments = mask.astype(jnp.int32)
    output: Any = model.apply(
        variables, tokens, positions, segments, cache=rows.cache, logits=False
    )
    hidden = output.hidden if score else output.hidden[:, -1:]
    logits = output_logits(config, variables, hidden)
    rows = Rows(
        cache=constrain_cache(config, output.cache, model.mesh),
        logits=logits[:, -1],
        seen=rows.seen | seen_tokens(tokens, mask, config.vocab_size),
    )
    return rows, _scores(logits, following, top, vocab_size) if score else None


def _scores(logits: Array, tokens: Array, top: int, vocab_size: int) -> Scores:
    chosen, log_probs = log_probs_of(logits, tokens)
    values, ids = jax.lax.top_k(log_probs[..., :vocab_size], top)
    return Scores(chosen, ids, values)


@functools.partial(jax.jit, static_argnames='model', donate_argnames='rows')
def enter_rows(
    model: Transformer,
    rows: Rows,
    table: Int[Array, 'G R P'],
    new: Rows,
    padding: Int[Array, 'F'],
    at: Int[Array, 'F'],
) -> Rows:
    """Puts prompts that have been run into rows, without their padding; `B` is no row."""
    config = model.config
    new_cache = compacted(config, new.cache, padding)
    cache = inserted(config, dataclasses.replace(rows.cache, table=table), new_cache, at)
    return Rows(
        cache=constrain_cache(config, cache, model.mesh),
        logits=rows.logits.at[at].set(new.logits, mode='drop'),
        seen=rows.seen.at[at].set(new.seen, mode='drop'),
    )


@functools.partial(jax.jit, static_argnames=('model', 'top', 'vocab_size'), donate_argnames='rows')
def write_token(
    model: Transformer,
    variables: Any,
    rows: Rows,
    table: Int[Array, 'G R P'],
    active: Bool[Array, 'B'],
    sampling: SamplingRows,
    seeds: UInt[Array, 'B'],
    written: Int[Array, 'B'],
    *,
    top: int,
    vocab_size: int,
) -> tuple[Rows, Int[Array, 'B'], Scores]:
    """Writes a token in every active row, and runs the model on it.

    Returns:
        The rows, their new tokens and the scores of those; what stands for rows that are not active
        means nothing.
    """
    penalised = penalise(rows.logits, rows.seen, sampling.repetition_penalty)
    real = jnp.arange(penalised.shape[-1]) < vocab_size
    penalised = jnp.where(real, penalised, -jnp.inf)
    keys = row_keys(jax.vmap(jax.random.key)(seeds), written)
    new = sample(penalised, sampling, keys)
    scores = _scores(rows.logits, new, top, vocab_size)
    # A row that is not active has no pages: what it writes goes to page 0.
    length = jnp.where(active, rows.cache.length, 0)
    cache = dataclasses.replace(rows.cache, table=table, length=length)
    output: Any = model.apply(variables, new[:, None], mask=active[:, None], cache=cache)
    cache = dataclasses.replace(output.cache, length=length + active)
    rows = Rows(
        cache=constrain_cache(model.config, cache, model.mesh),
        logits=output.logits[:, 0],
        seen=rows.seen.at[jnp.arange(new.size), new].set(True),
    )
    return rows, new, scores
