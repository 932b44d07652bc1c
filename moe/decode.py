"""Sampling from a model: one pass over the prompts, then a token at a time, under one jit."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from moe.attention_context import segment_positions
from moe.attention_kinds import empty_cache
from moe.errors import InputError
from moe.transformer import Transformer, output_logits
from moe.types import KVCache


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn from the logits.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: keeps that many likeliest tokens; 0 keeps all.
        top_p: keeps the fewest likeliest tokens whose probabilities sum to at least this.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        checks = {
            'temperature': (self.temperature >= 0, 'zero (greedy) or more', self.temperature),
            'top_k': (self.top_k >= 0, 'a count of tokens, or 0 for all', self.top_k),
            'top_p': (0 < self.top_p <= 1, 'in (0, 1]', self.top_p),
        }
        for name, (valid, required, received) in checks.items():
            if not valid:
                raise InputError(f'{name} must be {required}; received {received!r}.')


def filter_logits(logits: Float[Array, 'B V'], sampling: Sampling) -> Float[Array, 'B V']:
    """Divides by the temperature, then removes what top-k and after it top-p leave out.

    Top-p looks at the probabilities at that temperature, renormalised over what top-k kept; the
    likeliest token always stays. Among equal logits the lower id counts as the likelier.

    Args:
        logits: of one position each.
        sampling: with a temperature above 0.

    Returns:
        Logits at temperature 1, -inf where removed.

    Source: arXiv 1904.09751 (top-p).
    """
    logits = logits / sampling.temperature
    if not sampling.top_k and sampling.top_p == 1.0:
        return logits
    order = jnp.argsort(logits, axis=-1, descending=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    rank = jnp.arange(logits.shape[-1])
    kept = rank < (sampling.top_k or logits.shape[-1])
    probs = jax.nn.softmax(jnp.where(kept, ranked, -jnp.inf), axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    kept &= (before < sampling.top_p) | (rank == 0)
    kept = jnp.take_along_axis(kept, jnp.argsort(order, axis=-1), axis=-1)
    return jnp.where(kept, logits, -jnp.inf)


def sample(
    logits: Float[Array, 'B V'], sampling: Sampling, key: PRNGKeyArray
) -> tuple[Int[Array, 'B'], Float[Array, 'B']]:
    """Draws one token a row, and its log-probability at temperature 1 without any filter."""
    if sampling.temperature == 0:
        tokens = jnp.argmax(logits, axis=-1)
    else:
        tokens = jax.random.categorical(key, filter_logits(logits, sampling), axis=-1)
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(log_probs, tokens[:, None], axis=-1)[:, 0]
    return tokens.astype(jnp.int32), chosen


def generate(
    model: Transformer,
    params: Any,
    prompts: Int[Array, 'B T'] | np.ndarray,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    key: PRNGKeyArray,
    prompt_mask: Bool[Array, 'B T'] | np.ndarray | None = None,
    eos_id: int | None = None,
) -> tuple[Int[Array, 'B N'], Float[Array, 'B N']]:
    """Continues prompts.

    Compiled once for each shape of prompts and each setting. No token is ever dropped by an expert:
    a model whose dispatch is 'capacity' decodes with 'grouped'.

    Args:
        model: what to sample from.
        params: the parameters, or all the variables: {'params': ..., 'routing': ...}.
        prompts: ids in [0, V), padded on the left to one length.
        max_new_tokens: `N`, how many to write in each row.
        temperature: divides the logits; 0 is greedy.
        top_k: draws from that many likeliest tokens only; 0 from all.
        top_p: draws from the fewest likeliest tokens with this probability together.
        key: equal keys draw equal tokens.
        prompt_mask: False for the padding; None where there is none.
        eos_id: ends a row: after it, the row is filled with it. None never ends one.

    Returns:
        The new tokens [B, N], and their log-probabilities in nats under the model itself: at
        temperature 1 and without top-k or top-p; 0 after the end of a row.

    Raises:
        InputError: for prompts that are not such ids, padding elsewhere than on the left, a setting
            out of range, or missing selection biases.
    """
    sampling = Sampling(temperature, top_k, top_p)
    mask = np.ones(np.shape(prompts), bool) if prompt_mask is None else np.asarray(prompt_mask)
    _check(model, np.asarray(prompts), mask, max_new_tokens, eos_id)
    variables = _variables(model, params)
    run = _Run(_dropless(model), sampling, max_new_tokens, eos_id)
    return _generate(run, variables, jnp.asarray(prompts, jnp.int32), jnp.asarray(mask), key)


class _Run(NamedTuple):
    model: Transformer
    sampling: Sampling
    max_new_tokens: int
    eos_id: int | None


class _State(NamedTuple):
    step: Int[Array, '']
    logits: Float[Array, 'B V']
    positions: Int[Array, 'B']
    done: Bool[Array, 'B']
    cache: KVCache
    tokens: Int[Array, 'B N']
    log_probs: Float[Array, 'B N']


@functools.partial(jax.jit, static_argnames='run')
def _generate(
    run: _Run, variables: Any, prompts: Array, mask: Array, key: PRNGKeyArray
) -> tuple[Array, Array]:
    (B, T), N = prompts.shape, run.max_new_tokens
    cache = empty_cache(run.model.config, B, T + N)
    segments = mask.astype(jnp.int32)
    positions = segment_positions(segments)
    output: Any = run.model.apply(
        variables, prompts, positions, segments, cache=cache, logits=False
    )
    fill = 0 if run.eos_id is None else run.eos_id
    state = _State(
        step=jnp.zeros((), jnp.int32),
        logits=output_logits(run.model.config, variables['params'], output.hidden[:, -1:])[:, 0],
        positions=positions[:, -1] + 1,
        done=jnp.zeros(B, bool),
        cache=output.cache,
        tokens=jnp.full((B, N), fill, jnp.int32),
        log_probs=jnp.zeros((B, N), jnp.float32),
    )
    step = functools.partial(_decode_step, run, variables, key)
    state = jax.lax.while_loop(lambda s: (s.step < N) & ~s.done.all(), step, state)
    return state.tokens, state.log_probs


def _decode_step(run: _Run, variables: Any, key: PRNGKeyArray, state: _State) -> _State:
    """Writes a token in every row that has not ended, and runs the model on it."""
    new, log_probs = sample(state.logits, run.sampling, jax.random.fold_in(key, state.step))
    if run.eos_id is not None:
        new = jnp.where(state.done, run.eos_id, new)
    log_probs = jnp.where(state.done, 0.0, log_probs)
    done = state.done if run.eos_id is None else state.done | (new == run.eos_id)
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
        cache=output.cache,
        tokens=state.tokens.at[:, state.step].set(new),
        log_probs=state.log_probs.at[:, state.step].set(log_probs),
    )


def _dropless(model: Transformer) -> Transformer:
    config = model.config
    if config.moe is None or config.moe.dispatch != 'capacity':
        return model
    moe = dataclasses.replace(config.moe, dispatch='grouped')
    return model.clone(config=dataclasses.replace(config, moe=moe))


def _variables(model: Transformer, params: Any) -> Mapping[str, Any]:
    variables = params if 'params' in params else {'params': params}
    moe = model.config.moe
    if moe is not None and moe.router.selection_bias and not variables.get('routing'):
        raise InputError(
            'The routers of this model have selection biases, which were not given. Pass all the '
            "variables, {'params': ..., 'routing': ...}, rather than the parameters alone."
        )
    return variables


def _check(
    model: Transformer,
    prompts: np.ndarray,
    mask: np.ndarray,
    max_new_tokens: int,
    eos_id: int | None,
) -> None:
    vocab = model.config.vocab_size
    if prompts.ndim != 2 or not prompts.size or not np.issubdtype(prompts.dtype, np.integer):
        raise InputError(
            f'prompts must be integer ids of shape [B, T], neither of them 0; received '
            f'{prompts.dtype}{prompts.shape}. Encode text, and pad shorter prompts on the left.'
        )
    if prompts.min() < 0 or prompts.max() >= vocab:
        raise InputError(
            f'prompts must be ids in [0, {vocab}), the vocabulary of the model; received ids from '
            f'{prompts.min()} to {prompts.max()}. Encode with the tokenizer of the model.'
        )
    left_padded = mask.shape == prompts.shape and mask.dtype == bool and mask[:, -1].all()
    if not left_padded or (np.diff(mask.astype(np.int8), axis=1) < 0).any():
        raise InputError(
            f'prompt_mask must be bool of the shape of prompts, {prompts.shape}: in each row False '
            f'for the padding, then True to the end; received {mask.dtype}{mask.shape} with '
            f'{mask.sum()} True. Pad on the left.'
        )
    if (
        isinstance(max_new_tokens, bool)
        or not isinstance(max_new_tokens, int)
        or max_new_tokens < 1
    ):
        raise InputError(f'max_new_tokens must be a positive integer; received {max_new_tokens!r}.')
    if eos_id is not None and not 0 <= eos_id < vocab:
        raise InputError(f'eos_id must be None or an id in [0, {vocab}); received {eos_id!r}.')
