"""Pytree records that pass between the parts of a model."""

from typing import Any

import flax.struct
from jaxtyping import Array, Float, Int


@flax.struct.dataclass
class RouterOutput:
    """What one MoE layer's router decided, as a value: to log, store, replay or match.

    See `moe.replay` to store it, and `Transformer` to replay it.

    Attributes:
        router_logits: before the score function, float32.
        expert_ids: the chosen experts, best first.
        expert_weights: of the chosen experts, float32, from the *unbiased* scores.
        load: unmasked assignments that chose each expert, summed over the whole (global) batch.
        dropped: assignments among them that found no slot; zero where dispatch is dropless.
    """

    router_logits: Float[Array, 'B T E']
    expert_ids: Int[Array, 'B T K']
    expert_weights: Float[Array, 'B T K']
    load: Float[Array, 'E']
    dropped: Float[Array, '']


@flax.struct.dataclass
class KeyValueCache:
    """Keys and values that one layer keeps, laid out as the products of a new token read them.

    Attributes:
        keys: of `S` tokens from the first on, or, where queries see a window, of the last `S`:
            token `t` then stands in slot `t % S`. Slots from a row's length on may hold anything.
        values: likewise.
    """

    keys: Float[Array, 'B Hkv Dh S']
    values: Float[Array, 'B Hkv S Dh']


@flax.struct.dataclass
class LatentCache:
    """What one layer of latent attention keeps: of each token its latent, and a rotated key.

    Attributes:
        latents: the normalised latent, and after it the channels of the key that all heads share.
    """

    latents: Float[Array, 'B S latent']


@flax.struct.dataclass
class KVCache:
    """What every layer keeps of the tokens so far, in `S` slots; rows may differ in length.

    A row's length may be set back by up to `slack` tokens, which are then as never given (but for
    linear attention, whose state cannot go back).

    Attributes:
        layers: for each of the model's blocks what its attention keeps (`KeyValueCache`,
            `LatentCache`, `LinearCache`); with `scan_layers` one block stacks the layers of one
            place in the scanned pattern, along a leading axis, as its parameters do.
        segment_ids: of the tokens so far; 0 marks an empty slot or padding.
        length: slots of each row filled so far; its next token is written here.
        slack: how many slots more than their window the rings of windowed layers have.
        table: of a cache in pages, see `moe.pages`: the pages that each row's slots are in. Keys,
            values and latents of layers without a window are then pools [G, N, ...], each
            page laid out as a row of as many slots; segment ids, rings and states are of rows all
            the same. None where a row's slots lie in order.
    """

    layers: tuple[Any, ...]
    segment_ids: Int[Array, 'B S']
    length: Int[Array, 'B']
    slack: int = flax.struct.field(pytree_node=False, default=0)
    table: Int[Array, 'G R P'] | None = None


@flax.struct.dataclass
class ModelOutput:
    """What a `Transformer` returns.

    Attributes:
        hidden: the last block's output after the final norm: what the head multiplies.
        logits: float32, or None where they were not asked for.
        router: one `RouterOutput` for each MoE layer, in order.
        cache: the extended cache, or None where none was given.
        ahead: where asked for, what each multi-token-prediction module returned, in the order of
            their depths: hidden states and, with experts, its one router.
    """

    hidden: Float[Array, 'B T D']
    logits: Float[Array, 'B T V'] | None
    router: tuple[RouterOutput, ...]
    cache: KVCache | None = None
    ahead: tuple['ModelOutput', ...] = ()

    @property
    def all_routers(self) -> tuple[RouterOutput, ...]:
        """Those of the MoE layers, and after them those of the modules: what `replay` takes."""
        return self.router + tuple(router for module in self.ahead for router in module.router)
