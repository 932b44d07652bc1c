"""Speculative decoding: a draft proposes tokens, and the model judges several of them at once."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from moe.decode import Prompts, Written, seen_tokens
from moe.drafts import Draft, ModelDraft, Proposal, Text, advanced, prefill
from moe.errors import InputError
from moe.module_draft import ModuleDraft
from moe.sampling import (
    Sampling,
    SamplingRows,
    filter_logits,
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


@flax.struct.dataclass
class Speculated:
    """What was written, and what it took.

    Attributes:
        written: as `moe.decode.write` returns it, without top log-probabilities.
        passes: of the model over each row after its prompt; without a draft it takes one a token.
    """

    written: Written
    passes: Int[Array, 'B']


def speculate(
    model: Transformer,
    params: Any,
    prompts: Prompts,
    *,
    draft: Draft,
    draft_params: Any = None,
    num_draft: int = 4,
    max_new_tokens: int,
    sampling: Sampling | Sequence[Sampling],
    key: Key[Array, '*B'],
    prompt_mask: Bool[Array, 'B T'] | np.ndarray | None = None,
    stop_ids: Sequence[int] = (),
) -> Speculated:
    """Continues prompts as `moe.decode.write` does, in fewer passes of the model.

    Token `x` of a draft that would write it with probability `q(x)` is accepted with probability
    `min(1, p(x) / q(x))`, where `p` is what the model would draw from; the first that is refused is
    drawn anew from `max(0, p - q)`, normalised. What is written is distributed as without a draft,
    and at temperature 0 equal to it.

    Args:
        model: what to sample from.
        params: its parameters, or all its variables.
        prompts: ids in [0, V): padded on the left to one length, or a list of any lengths.
        draft: where proposals come from.
        draft_params: of a `ModelDraft`'s model.
        num_draft: tokens it proposes at a time.
        max_new_tokens: `N`, how many to write in each row.
        sampling: of all rows, or of each; the draft's model draws by it too.
        key: one for each row, or one that is split over the rows.
        prompt_mask: False for the padding; None where there is none.
        stop_ids: each ends a row, as its last token.

    Raises:
        InputError: as `write`; or where the draft has another vocabulary, or the model no module.

    Source: arXiv 2211.17192, section 2.3.
    """
    if prompt_mask is None:
        prompts, prompt_mask = pad_prompts(prompts)
    prompts, mask = np.asarray(prompts), np.asarray(prompt_mask)
    stops = tuple(map(int, stop_ids))
    check_writing(model, prompts, mask, max_new_tokens, stops, 0)
    draft, draft_variables = _checked_draft(model, draft, draft_params, num_draft)
    run = _Run(dropless(model), draft, num_draft, max_new_tokens, stops)
    own = checked_variables(model, params)
    variables = (own, own if isinstance(draft, ModuleDraft) else draft_variables)
    rows, keys = sampling_of(sampling, len(prompts)), keys_of(key, len(prompts))
    return _speculate(
        run, variables, jnp.asarray(prompts, jnp.int32), jnp.asarray(mask), rows, keys
    )


def _checked_draft(
    model: Transformer, draft: Draft, params: Any, num_draft: int
) -> tuple[Draft, Any]:
    if not isinstance(num_draft, int) or num_draft < 1:
        raise InputError(f'num_draft must be a positive integer; received {num_draft!r}.')
    if isinstance(draft, ModuleDraft):
        if model.config.mtp_depth < 1 or draft.model.config != model.config:
            raise InputError(
                'A ModuleDraft must be of the model that writes, with mtp_depth of 1 or more; '
                f'received mtp_depth={draft.model.config.mtp_depth}. Train the model with '
                'prediction modules, or draft by PromptLookup.'
            )
        return ModuleDraft(dropless(model)), None
    if not isinstance(draft, ModelDraft):
        return draft, None
    own, other = model.config.vocab_size, draft.model.config.vocab_size
    if own != other:
        raise InputError(
            f'A draft must have the vocabulary of the model, {own}; it has {other}. Train the '
            'student with the tokenizer of its teacher.'
        )
    if params is None:
        raise InputError('A ModelDraft needs draft_params: the variables of its model.')
    return ModelDraft(dropless(draft.model)), checked_variables(draft.model, params)


class _Run(NamedTuple):
    model: Transformer
    draft: Draft
    num_draft: int
    max_new_tokens: int
    stop_ids: tuple[int, ...]


class _State(NamedTuple):
    text: Text
    cache: KVCache
    draft: Any
    done: Bool[Array, 'B']
    written: Written
    passes: Int[Array, 'B']


@functools.partial(jax.jit, static_argnames='run')
def _speculate(
    run: _Run, variables: Any, prompts: Array, mask: Array, rows: SamplingRows, keys: Array
) -> Speculated:
    step = functools.partial(_step, run, variables, rows, keys)
    state = _started(run, variables, prompts, mask, rows, keys)
    state = jax.lax.while_loop(lambda state: ~state.done.all(), step, state)
    written, N = state.written, run.max_new_tokens
    at = jnp.minimum(jnp.arange(N), written.lengths[:, None] - 1)
    tokens = jnp.take_along_axis(written.tokens, at, axis=1)
    return Speculated(written.replace(tokens=tokens), state.passes)  # type: ignore


def _started(
    run: _Run, variables: Any, prompts: Array, mask: Array, rows: SamplingRows, keys: Array
) -> _State:
    """Runs the prompts, and writes the first token."""
    (B, T), N, (own, draft) = prompts.shape, run.max_new_tokens, variables
    slots, config = T + N + run.num_draft + 1, run.model.config
    cache, hidden = prefill(run.model, own, prompts, mask, slots, slack=run.num_draft + 1)
    logits = output_logits(config, own, hidden[:, -1:])[:, 0]
    seen = seen_tokens(prompts, mask, config.vocab_size)
    penalised = penalise(logits, seen, rows.repetition_penalty)
    first = sample(penalised, rows, row_keys(keys, jnp.zeros(B, jnp.int32)))
    text = Text(
        tokens=jnp.zeros((B, slots), jnp.int32).at[:, :T].set(prompts),
        length=jnp.full(B, T),
        padding=T - mask.sum(axis=1),
        seen=seen,
    )
    empty = Written(
        tokens=jnp.zeros((B, N), jnp.int32),
        log_probs=jnp.zeros((B, N), jnp.float32),
        lengths=jnp.zeros(B, jnp.int32),
        top_ids=jnp.zeros((B, N, 0), jnp.int32),
        top_log_probs=jnp.zeros((B, N, 0), jnp.float32),
    )
    state = _State(
        text=text,
        cache=cache,
        draft=run.draft.start(draft, prompts, mask, hidden, slots),
        done=jnp.zeros(B, bool),
        written=empty,
        passes=jnp.zeros(B, jnp.int32),
    )
    return _noted(run, state, first[:, None], logits[:, None], jnp.ones(B, jnp.int32))


def _step(run: _Run, variables: Any, rows: SamplingRows, keys: Array, state: _State) -> _State:
    """Proposes, judges, and keeps what was accepted and one token more."""
    (own, draft), text, g = variables, state.text, run.num_draft
    keys = row_keys(keys, state.written.lengths)
    drafting, judging = jax.vmap(lambda key: tuple(jax.random.split(key)))(keys)
    proposal = run.draft.propose(draft, state.draft, text, rows, drafting, g)
    tokens = jnp.concatenate([text.last[:, None], proposal.tokens], axis=1)
    positions = (state.cache.length - text.padding)[:, None] + jnp.arange(g + 1)
    going = jnp.broadcast_to(~state.done[:, None], tokens.shape)
    output: Any = run.model.apply(own, tokens, positions, mask=going, cache=state.cache)
    probs = _probs(output.logits, proposal, text, rows)
    accepted, new = jax.vmap(judge)(probs, proposal.probs, proposal.tokens, judging)
    kept = jnp.where(state.done, 0, accepted + 1)
    cache = advanced(run.model, own, state.cache, output.cache, tokens, text.padding, kept)
    state = state._replace(
        cache=cache,
        draft=run.draft.commit(draft, state.draft, proposal, text, kept, output.hidden),
        passes=state.passes + ~state.done,
    )
    chosen = jnp.concatenate([proposal.tokens, new[:, None]], axis=1)
    chosen = jnp.where(jnp.arange(g + 1) == accepted[:, None], new[:, None], chosen)
    return _noted(run, state, chosen, output.logits, kept)


def _probs(
    logits: Float[Array, 'B T V'], proposal: Proposal, text: Text, rows: SamplingRows
) -> Float[Array, 'B T V']:
    """Returns what the model would draw from at each place, had the proposal been accepted."""
    T, V = logits.shape[1:]
    proposed = jnp.cumsum(jax.nn.one_hot(proposal.tokens, V, dtype=jnp.int32), axis=1) > 0
    seen = jnp.pad(proposed, ((0, 0), (1, 0), (0, 0))) | text.seen[:, None]

    def at_once(logits: Array, seen: Array, rows: SamplingRows) -> Array:
        penalised = penalise(logits, seen, rows.repetition_penalty)
        return jax.nn.softmax(filter_logits(penalised, rows))

    flat = jax.tree.map(lambda column: jnp.repeat(column, T), rows)
    return at_once(logits.reshape(-1, V), seen.reshape(-1, V), flat).reshape(logits.shape)


def judge(
    probs: Float[Array, 'T V'],
    draft_probs: Float[Array, 'g V'],
    tokens: Int[Array, 'g'],
    key: Key[Array, ''],
) -> tuple[Int[Array, ''], Int[Array, '']]:
    """Accepts a row's tokens up to the first that is refused, and draws the one that follows.

    Args:
        probs: the model's, at `T = g + 1` places.
        draft_probs: the draft's.
        tokens: drawn from those.
        key: of this draw.

    Returns:
        How many were accepted, and the token after them.
    """
    places = jnp.arange(tokens.size)
    uniform_key, draw_key = jax.random.split(key)
    uniform = jax.random.uniform(uniform_key, tokens.shape)
    # u < p / q, without a division by a q that may be tiny.
    accepts = uniform * draft_probs[places, tokens] < probs[places, tokens]
    accepted = jnp.cumprod(accepts.astype(jnp.int32)).sum()
    # After the last token nothing was proposed: there the draft's part is zero.
    padded = jnp.pad(draft_probs, ((0, 1), (0, 0)))
    left = jnp.maximum(probs[accepted] - padded[accepted], 0)
    # Where rounding leaves nothing, both were the same.
    left = jnp.where(left.sum() > 0, left, probs[accepted])
    return accepted, jax.random.categorical(draw_key, jnp.log(left)).astype(jnp.int32)


def _noted(run: _Run, state: _State, new: Array, logits: Array, count: Array) -> _State:
    """Adds the first `count` of some tokens to each row, up to what ends it."""
    text, written, places = state.text, state.written, jnp.arange(new.shape[1])
    count = jnp.where(state.done, 0, count)
    ends = jnp.isin(new, jnp.asarray(run.stop_ids, jnp.int32)) & (places < count[:, None])
    count = jnp.minimum(count, jnp.where(ends.any(axis=1), ends.argmax(axis=1) + 1, count))
    count = jnp.minimum(count, run.max_new_tokens - written.lengths)
    taken = places < count[:, None]
    rows = jnp.arange(len(new))[:, None]
    log_probs, _ = log_probs_of(logits, new)
    slots = jnp.where(taken, text.length[:, None] + places, text.tokens.shape[1])
    outputs = jnp.where(taken, written.lengths[:, None] + places, run.max_new_tokens)
    lengths = written.lengths + count
    stopped = (ends & taken).any(axis=1)
    return state._replace(
        text=text._replace(
            tokens=text.tokens.at[rows, slots].set(new, mode='drop'),
            length=text.length + count,
            seen=text.seen.at[rows, new].max(taken),
        ),
        written=written.replace(  # type: ignore
            tokens=written.tokens.at[rows, outputs].set(new, mode='drop'),
            log_probs=written.log_probs.at[rows, outputs].set(log_probs, mode='drop'),
            lengths=lengths,
        ),
        done=state.done | stopped | (lengths == run.max_new_tokens),
    )
