"""Writing with a model: one pass over the prompts, then a token at a time, under one jit."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from moe.attention_context import segment_positions
from moe.attention_kinds import empty_cache
from moe.cache_layout import constrain_cache
from moe.sampling import (
    Sampling,
    SamplingRows,
    log_probs_of,
    penalise,
    row_keys,
    sample,
)
from moe.transformer import Transformer, output_logits
from moe.types import KVCache
from moe.writing_inputs import (
    check_writing,
    checked_variables,
    dropless,
    keys_of,
    pad_prompts,
    sampling_of,
)

Prompts = Int[Array, 'B T'] | np.ndarray | Sequence[Sequence[int]] | Sequence[np.ndarray]


@flax.struct.dataclass
class Written:
    """What was written after the prompts.

    Attributes:
        tokens: after the end of a row, its last token again.
        log_probs: in nats under the model itself: at temperature 1, without penalty or filter; 0
            after the end of a row.
        lengths: tokens of each row, the one that ended it among them.
        top_ids: at each position the likeliest tokens, best first.
        top_log_probs: of those.
    """

    tokens: Int[Array, 'B N']
    log_probs: Float[Array, 'B N']
    lengths: Int[Array, 'B']
    top_ids: Int[Array, 'B N top']
    top_log_probs: Float[Array, 'B N top']


def generate(
    model: Transformer,
    params: Any,
    prompts: Prompts,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    key: Key[Array, '*B'],
    prompt_mask: Bool[Array, 'B T'] | np.ndarray | None = None,
    eos_id: int | None = None,
) -> tuple[Int[Array, 'B N'], Float[Array, 'B N']]:
    """Continues prompts; `write` has more settings, and returns more.

    Args:
        model: what to sample from.
        params: the parameters, or all the variables: {'params': ..., 'routing': ...}.
        prompts: ids in [0, V): padded on the left to one length, or a list of any lengths.
        max_new_tokens: `N`, how many to write in each row.
        temperature: divides the logits; 0 is greedy.
        top_k: draws from that many likeliest tokens only; 0 from all.
        top_p: draws from the fewest likeliest tokens with this probability together.
        key: equal keys draw equal tokens; one for all rows, or one for each.
        prompt_mask: False for the padding; None where there is none.
        eos_id: ends a row: after it, the row is filled with it. None never ends one.

    Returns:
        The new tokens [B, N], and their log-probabilities in nats under the model itself: at
        temperature 1 and without top-k or top-p; 0 after the end of a row.

    Raises:
        InputError: as `write`.
    """
    written = write(
        model,
        params,
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature, top_k, top_p),
        key=key,
        prompt_mask=prompt_mask,
        stop_ids=() if eos_id is None else (eos_id,),
    )
    return written.tokens, written.log_probs


def write(
    model: Transformer,
    params: Any,
    prompts: Prompts,
    *,
    max_new_tokens: int,
    sampling: Sampling | Sequence[Sampling],
    key: Key[Array, '*B'],
    prompt_mask: Bool[Array, 'B T'] | np.ndarray | None = None,
    stop_ids: Sequence[int] = (),
    top_log_probs: int = 0,
) -> Written:
    """Continues prompts, each row by itself: no row depends on those beside it.

    Compiled once for each shape of prompts, `max_new_tokens`, `stop_ids` and `top_log_probs`. No
    token is ever dropped by an expert: a model whose dispatch is 'capacity' decodes with 'grouped'.
    On a mesh the rows are split as a batch is, and the cache with them.

    Args:
        model: what to sample from.
        params: the parameters, or all the variables: {'params': ..., 'routing': ...}.
        prompts: ids in [0, V): padded on the left to one length, or a list of any lengths.
        max_new_tokens: `N`, how many to write in each row.
        sampling: of all rows, or of each.
        key: equal keys draw equal tokens; one for each row, or one that is split over the rows.
        prompt_mask: False for the padding; None where there is none.
        stop_ids: each ends a row, as its last token.
        top_log_probs: how many likeliest tokens to name at each position.

    Raises:
        InputError: for prompts that are not such ids, padding elsewhere than on the left, a setting
            out of range, or missing selection biases.
    """
    if prompt_mask is None:
        prompts, prompt_mask = pad_prompts(prompts)
    prompts, mask = np.asarray(prompts), np.asarray(prompt_mask)
    stops = tuple(map(int, stop_ids))
    check_writing(model, prompts, mask, max_new_tokens, stops, top_log_probs)
    variables = checked_variables(model, params)
    run = _Run(dropless(model), max_new_tokens, stops, top_log_probs)
    rows = sampling_of(sampling, len(prompts))
    keys = keys_of(key, len(prompts))
    done = jnp.zeros(len(prompts), bool)
    ids = jnp.asarray(prompts, jnp.int32)
    return _write(run, variables, ids, jnp.asarray(mask), rows, keys, done)


def continue_rows(
    model: Transformer,
    variables: Any,
    prompts: Int[Array, 'B T'],
    prompt_mask: Bool[Array, 'B T'],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    key: Key[Array, '*B'],
    stop_ids: tuple[int, ...] = (),
    active: Bool[Array, 'B'] | None = None,
) -> Written:
    """Continues prompts as `write` does, inside a program that is being compiled.

    Nothing is checked, since nothing is known yet; no gradient flows through what is drawn.

    Args:
        model: what to sample from.
        variables: all of them: {'params': ..., 'routing': ...}.
        prompts: ids, padded on the left.
        prompt_mask: False for the padding.
        max_new_tokens: `N`, how many to write in each row.
        sampling: of all rows.
        key: one for each row, or one that is split over the rows.
        stop_ids: each ends a row, as its last token.
        active: the rows to write; the others get no token. None for all.
    """
    B = prompts.shape[0]
    run = _Run(dropless(model), max_new_tokens, stop_ids, 0)
    done = jnp.zeros(B, bool) if active is None else ~active
    rows, keys = sampling_of(sampling, B), keys_of(key, B)
    return _write(run, jax.lax.stop_gradient(variables), prompts, prompt_mask, rows, keys, done)


class _Run(NamedTuple):
    """What is known when the program is compiled."""

    model: Transformer
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    top_log_probs: int


class _State(NamedTuple):
    step: Int[Array, '']
    logits: Float[Array, 'B V']
    positions: Int[Array, 'B']
    done: Bool[Array, 'B']
    seen: Bool[Array, 'B V']
    cache: KVCache
    written: Written


@functools.partial(jax.jit, static_argnames='run')
def _write(
    run: _Run,
    variables: Any,
    prompts: Array,
    mask: Array,
    rows: SamplingRows,
    keys: Array,
    done: Array,
) -> Written:
    state = _prefilled(run, variables, prompts, mask)._replace(done=done)
    step = functools.partial(_decode_step, run, variables, rows, keys)

    def going(state: _State) -> Array:
        return (state.step < run.max_new_tokens) & ~state.done.all()

    return jax.lax.while_loop(going, step, state).written


def _prefilled(run: _Run, variables: Any, prompts: Array, mask: Array) -> _State:
    (B, T), N, model = prompts.shape, run.max_new_tokens, run.model
    cache = constrain_cache(model.config, empty_cache(model.config, B, T + N), model.mesh)
    segments = mask.astype(jnp.int32)
    positions = segment_positions(segments)
    output: Any = model.apply(variables, prompts, positions, segments, cache=cache, logits=False)
    shape = (B, N, run.top_log_probs)
    return _State(
        step=jnp.zeros((), jnp.int32),
        logits=output_logits(model.config, variables, output.hidden[:, -1:])[:, 0],
        positions=positions[:, -1] + 1,
        done=jnp.zeros(B, bool),
        seen=seen_tokens(prompts, mask, model.config.vocab_size),
        cache=constrain_cache(model.config, output.cache, model.mesh),
        written=Written(
            tokens=jnp.zeros((B, N), jnp.int32),
            log_probs=jnp.zeros((B, N), jnp.float32),
            lengths=jnp.zeros(B, jnp.int32),
            top_ids=jnp.zeros(shape, jnp.int32),
            top_log_probs=jnp.zeros(shape, jnp.float32),
        ),
    )


def seen_tokens(
    tokens: Int[Array, 'B T'], mask: Bool[Array, 'B T'], vocab_size: int
) -> Bool[Array, 'B V']:
    """Returns which tokens stand in each row."""
    rows = jnp.arange(tokens.shape[0])[:, None]
    return jnp.zeros((tokens.shape[0], vocab_size), bool).at[rows, tokens].max(mask)


def _decode_step(
    run: _Run, variables: Any, rows: SamplingRows, keys: Array, state: _State
) -> _State:
    """Writes a token in every row that has not ended, and runs the model on it."""
    penalised = penalise(state.logits, state.seen, rows.repetition_penalty)
    new = sample(penalised, rows, row_keys(keys, state.written.lengths))
    done = state.done | jnp.isin(new, jnp.asarray(run.stop_ids, jnp.int32))
    written = _noted(run, state, new)
    new = written.tokens[:, state.step]
    output: Any = run.model.apply(
        variables,
        new[:, None],
        state.positions[:, None],
        mask=~done[:, None],
        cache=state.cache,
    )
    return _State(
        step=state.step + 1,
        logits=output.logits[:, 0],
        positions=state.positions + 1,
        done=done,
        seen=state.seen.at[jnp.arange(new.size), new].set(True),
        cache=constrain_cache(run.model.config, output.cache, run.model.mesh),
        written=written,
    )


def _noted(run: _Run, state: _State, new: Array) -> Written:
    """Adds each row's new token, or, where the row has ended, its last one again."""
    done, at, written = state.done, state.step, state.written
    new = jnp.where(done, written.tokens[:, at - 1], new)
    chosen, log_probs = log_probs_of(state.logits, new)
    values, ids = jax.lax.top_k(log_probs, run.top_log_probs)
    # What no step comes to, because all rows have ended, is filled here too.
    later = jnp.arange(run.max_new_tokens) >= at
    return Written(
        tokens=jnp.where(later, new[:, None], written.tokens),
        log_probs=written.log_probs.at[:, at].set(jnp.where(done, 0.0, chosen)),
        lengths=written.lengths + ~done,
        top_ids=written.top_ids.at[:, at].set(ids),
        top_log_probs=written.top_log_probs.at[:, at].set(values),
    )
