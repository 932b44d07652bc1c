"""A model's own multi-token-prediction module as the draft of its text."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from moe.cache_layout import constrain_cache
from moe.drafts import Proposal, Text, draw_next
from moe.look_ahead import empty_module_cache, predict_ahead
from moe.sampling import SamplingRows
from moe.transformer import Transformer
from moe.types import KVCache


class ModuleState(NamedTuple):
    """What the module has read.

    Attributes:
        cache: of pairs of a hidden state and the token after it: of a text of length `L` the first
            `L - 2`.
        hidden: of the model at `L - 2`: with the text's last token it makes the next pair.
    """

    cache: KVCache
    hidden: Float[Array, 'B 1 D']


@dataclasses.dataclass(frozen=True)
class ModuleDraft:
    """Proposes what the first prediction module says; further tokens from its own results.

    Attributes:
        model: that writes, with `mtp_depth` of 1 or more.

    Source: DeepSeek-V3, arXiv 2412.19437, section 5.4.3; one module read repeatedly is of EAGLE,
        arXiv 2401.15077.
    """

    model: Transformer

    def start(
        self, variables: Any, prompts: Array, mask: Array, hidden: Array, num_slots: int
    ) -> ModuleState:
        """Reads the pairs of the prompts."""
        B, T = prompts.shape
        cache = empty_module_cache(self.model, B, num_slots, slack=num_slots)
        cache = constrain_cache(self.model.config, cache, self.model.mesh)
        if T > 1:
            padding = T - mask.sum(axis=1)
            positions = jnp.maximum(jnp.arange(T - 1) - padding[:, None], 0)
            real = mask[:, :-1].astype(jnp.int32)
            output = self._read(variables, hidden[:, :-1], prompts[:, 1:], positions, real, cache)
            cache = output.cache
        return ModuleState(cache, hidden[:, -1:])

    def propose(
        self,
        variables: Any,
        state: ModuleState,
        text: Text,
        sampling: SamplingRows,
        keys: Key[Array, 'B'],
        count: int,
    ) -> Proposal:
        """Draws one token after the other."""

        def step(carry: tuple, number: Array) -> tuple[tuple, tuple]:
            cache, hidden, token, seen = carry
            positions = (cache.length - text.padding)[:, None]
            real = jnp.ones(positions.shape, jnp.int32)
            output = self._read(variables, hidden, token[:, None], positions, real, cache, True)
            new, probs, seen = draw_next(output.logits[:, 0], seen, sampling, keys, number)
            return (output.cache, output.hidden, new, seen), (new, probs)

        carry = (state.cache, state.hidden, text.last, text.seen)
        _, (tokens, probs) = jax.lax.scan(step, carry, jnp.arange(count))
        return Proposal(tokens.T, probs.swapaxes(0, 1), None)

    def commit(
        self,
        variables: Any,
        before: ModuleState,
        proposal: Proposal,
        text: Text,
        kept: Int[Array, 'B'],
        hidden: Float[Array, 'B T D'],
    ) -> ModuleState:
        """Reads what was kept once more, with the model's own hidden states."""
        tokens = jnp.concatenate([text.last[:, None], proposal.tokens], axis=1)
        earlier = jnp.concatenate([before.hidden, hidden[:, :-1]], axis=1)
        places = jnp.arange(tokens.shape[1])
        positions = (before.cache.length - text.padding)[:, None] + places
        real = (places < kept[:, None]).astype(jnp.int32)
        output = self._read(variables, earlier, tokens, positions, real, before.cache)
        cache = dataclasses.replace(output.cache, length=before.cache.length + kept)
        last = jnp.concatenate([before.hidden, hidden], axis=1)
        last = jnp.take_along_axis(last, kept[:, None, None], axis=1)
        return ModuleState(constrain_cache(self.model.config, cache, self.model.mesh), last)

    def _read(
        self,
        variables: Any,
        hidden: Array,
        tokens: Array,
        positions: Array,
        segment_ids: Array,
        cache: KVCache,
        logits: bool = False,
    ) -> Any:
        return predict_ahead(
            self.model,
            variables,
            hidden,
            tokens,
            positions=positions,
            segment_ids=segment_ids,
            cache=cache,
            logits=logits,
        )
