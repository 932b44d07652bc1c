"""Pytree records that pass between the parts of a model."""

import flax.struct
from jaxtyping import Array, Float, Int


@flax.struct.dataclass
class RouterOutput:
    """What one MoE layer's router decided, as a value: to log, store, replay or match.

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
class KVCache:
    """Keys and values of the positions seen so far, for every layer.

    Attributes:
        keys: `S` preallocated positions.
        values: likewise.
        segment_ids: of the cached positions; 0 marks an empty slot or padding.
        length: slots filled so far; the next token is written here.
    """

    keys: Float[Array, 'L B S Hkv Dh']
    values: Float[Array, 'L B S Hkv Dh']
    segment_ids: Int[Array, 'B S']
    length: Int[Array, '']


@flax.struct.dataclass
class ModelOutput:
    """What a `Transformer` returns.

    Attributes:
        hidden: the last block's output after the final norm: what the head multiplies.
        logits: float32, or None where they were not asked for.
        router: one `RouterOutput` for each MoE layer, in order.
        cache: the extended cache, or None where none was given.
    """

    hidden: Float[Array, 'B T D']
    logits: Float[Array, 'B T V'] | None
    router: tuple[RouterOutput, ...]
    cache: KVCache | None = None
