"""Where the tokens come from that a model is asked to accept or refuse: its own text, or a student.

A draft says with which probability it would have written each token; that is all that acceptance
needs, and why the text comes out as if there were no draft.
"""

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from moe.attention_kinds import empty_cache
from moe.cache_layout import constrain_cache, has_state
from moe.errors import InputError
from moe.sampling import SamplingRows, filter_logits, penalise
from moe.transformer import Transformer
from moe.types import KVCache


class Text(NamedTuple):
    """What every row holds.

    Attributes:
        tokens: prompts, padded on the left, and what was written after them.
        length: of each row, padding and all; the caches hold all but its last token.
        padding: of each row.
        seen: which tokens stand in it.
    """

    tokens: Int[Array, 'B S']
    length: Int[Array, 'B']
    padding: Int[Array, 'B']
    seen: Bool[Array, 'B V']

    @property
    def last(self) -> Int[Array, 'B']:
        """The last token of each row."""
        return jnp.take_along_axis(self.tokens, self.length[:, None] - 1, axis=1)[:, 0]


class Proposal(NamedTuple):
    """Tokens that may come next.

    Attributes:
        tokens: the draft's.
        probs: that it drew each of them from.
        state: of the draft after it has read them all.
    """

    tokens: Int[Array, 'B g']
    probs: Float[Array, 'B g V']
    state: Any


class Draft(Protocol):
    """A source of proposals; hashable, for it is known when the program is compiled."""

    def start(
        self, variables: Any, prompts: Array, mask: Array, hidden: Array, num_slots: int
    ) -> Any:
        """Returns the state after the prompts [B, T], given the model's hidden states [B, T, D]."""
        ...

    def propose(
        self,
        variables: Any,
        state: Any,
        text: Text,
        sampling: SamplingRows,
        keys: Key[Array, 'B'],
        count: int,
    ) -> Proposal:
        """Proposes `count` tokens for each row, by its own key."""
        ...

    def commit(
        self,
        variables: Any,
        before: Any,
        proposal: Proposal,
        text: Text,
        kept: Any,
        hidden: Any,
    ) -> Any:
        """Returns the state after `kept` [B] tokens: the row's last and the accepted ones.

        The model's hidden states [B, g + 1, D] are those of that last and of all proposed.
        """
        ...


def draw_next(
    logits: Float[Array, 'B V'],
    seen: Bool[Array, 'B V'],
    sampling: SamplingRows,
    keys: Key[Array, 'B'],
    number: Int[Array, ''],
) -> tuple[Int[Array, 'B'], Float[Array, 'B V'], Bool[Array, 'B V']]:
    """Draws the next token of a proposal.

    Args:
        logits: of the draft.
        seen: which tokens stand in the text and in what is proposed so far.
        sampling: of each row.
        keys: of each row, for the whole proposal.
        number: of the token in it.

    Returns:
        The tokens, what they were drawn from, and `seen` with them.
    """
    filtered = filter_logits(penalise(logits, seen, sampling.repetition_penalty), sampling)
    own = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
    new = jax.vmap(jax.random.categorical)(own, filtered).astype(jnp.int32)
    return new, jax.nn.softmax(filtered), seen.at[jnp.arange(new.size), new].set(True)


@dataclasses.dataclass(frozen=True)
class PromptLookup:
    """Proposes what followed the last tokens where they stood before; costs next to nothing.

    Attributes:
        ngram: how many tokens have to agree.

    Source: the idea is that of prompt look-up decoding, as known from `transformers`.
    """

    ngram: int = 2

    def __post_init__(self) -> None:
        if not isinstance(self.ngram, int) or self.ngram < 1:
            raise InputError(f'ngram must be a positive integer; received {self.ngram!r}.')

    def start(
        self, variables: Any, prompts: Array, mask: Array, hidden: Array, num_slots: int
    ) -> Any:
        """There is no state: the text is all that is read."""
        return ()

    def propose(
        self,
        variables: Any,
        state: Any,
        text: Text,
        sampling: SamplingRows,
        keys: Key[Array, 'B'],
        count: int,
    ) -> Proposal:
        """Takes the latest place that agrees; anything where there is none."""
        tokens, S = text.tokens, text.tokens.shape[1]
        end = text.length[:, None]
        at = jnp.arange(S)
        agrees = (at >= text.padding[:, None] + self.ngram) & (at < end)
        for back in range(1, self.ngram + 1):
            wanted = jnp.take_along_axis(tokens, jnp.maximum(end - back, 0), axis=1)
            agrees &= jnp.roll(tokens, back, axis=1) == wanted
        # Where nothing agrees the row's last token starts the proposal: as good as any.
        start = jnp.where(agrees, at, -1).max(axis=1, keepdims=True)
        start = jnp.where(start < 0, end - 1, start)
        places = jnp.minimum(start + jnp.arange(count), S - 1)
        # Past the end the text goes round: it repeats from where it was found.
        places = jnp.where(places < end, places, start + (places - start) % (end - start))
        found = jnp.take_along_axis(tokens, places, axis=1)
        return Proposal(found, jax.nn.one_hot(found, text.seen.shape[1]), ())

    def commit(
        self,
        variables: Any,
        before: Any,
        proposal: Proposal,
        text: Text,
        kept: Any,
        hidden: Any,
    ) -> Any:
        """There is no state."""
        return ()


@dataclasses.dataclass(frozen=True)
class ModelDraft:
    """Proposes what a smaller model of the same vocabulary writes.

    Attributes:
        model: the smaller model.
    """

    model: Transformer

    def start(
        self, variables: Any, prompts: Array, mask: Array, hidden: Array, num_slots: int
    ) -> KVCache:
        """Runs the prompts."""
        return prefill(self.model, variables, prompts, mask, num_slots, slack=num_slots)[0]

    def propose(
        self,
        variables: Any,
        state: KVCache,
        text: Text,
        sampling: SamplingRows,
        keys: Key[Array, 'B'],
        count: int,
    ) -> Proposal:
        """Writes one token after the other, and reads the last one too."""

        def step(carry: tuple, number: Array) -> tuple[tuple, tuple]:
            cache, token, seen = carry
            positions = (cache.length - text.padding)[:, None]
            output: Any = self.model.apply(variables, token[:, None], positions, cache=cache)
            new, probs, seen = draw_next(output.logits[:, 0], seen, sampling, keys, number)
            return (output.cache, new, seen), (new, probs)

        carry = (state, text.last, text.seen)
        (cache, _, _), (tokens, probs) = jax.lax.scan(step, carry, jnp.arange(count + 1))
        return Proposal(tokens[:-1].T, probs[:-1].swapaxes(0, 1), cache)

    def commit(
        self,
        variables: Any,
        before: KVCache,
        proposal: Proposal,
        text: Text,
        kept: Array,
        hidden: Array,
    ) -> KVCache:
        """Sets the cache back to what was accepted."""
        tokens = jnp.concatenate([text.last[:, None], proposal.tokens], axis=1)
        return advanced(self.model, variables, before, proposal.state, tokens, text.padding, kept)


def prefill(
    model: Transformer, variables: Any, prompts: Array, mask: Array, num_slots: int, *, slack: int
) -> tuple[KVCache, Float[Array, 'B T D']]:
    """Runs prompts that are padded on the left; returns the cache, and the hidden states."""
    cache = empty_cache(model.config, len(prompts), num_slots, slack=slack)
    padding = prompts.shape[1] - mask.sum(axis=1)
    positions = jnp.maximum(jnp.arange(prompts.shape[1]) - padding[:, None], 0)
    output: Any = model.apply(
        variables, prompts, positions, mask.astype(jnp.int32), cache=cache, logits=False
    )
    return constrain_cache(model.config, output.cache, model.mesh), output.hidden


def advanced(
    model: Transformer,
    variables: Any,
    before: KVCache,
    after: KVCache,
    tokens: Int[Array, 'B T'],
    padding: Int[Array, 'B'],
    kept: Int[Array, 'B'],
) -> KVCache:
    """Returns the cache after the first `kept` of some tokens.

    Keys and values past a row's length are as good as not there. A state cannot go back: a model
    that has one reads the tokens that were kept once more.

    Args:
        model: whose cache it is.
        variables: its.
        before: the cache before the tokens.
        after: the cache after all of them.
        tokens: that were read.
        padding: of each row's prompt.
        kept: how many of them stay.
    """
    if has_state(model.config):
        places = jnp.arange(tokens.shape[1])
        positions = (before.length - padding)[:, None] + places
        real = (places < kept[:, None]).astype(jnp.int32)
        output: Any = model.apply(variables, tokens, positions, real, cache=before, logits=False)
        after = output.cache
    cache = dataclasses.replace(after, length=before.length + kept)
    return constrain_cache(model.config, cache, model.mesh)
