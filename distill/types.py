"""Pytree records that pass between data, teachers, objectives and steps."""

from typing import Any

import flax.struct
from jaxtyping import Array, Bool, Float, Int


@flax.struct.dataclass
class Batch:
    """Packed rows of text; padding and the tokens before a document's first are never counted.

    Attributes:
        tokens: input ids.
        labels: the next token of the same document; arbitrary where `mask` is False.
        mask: True where the position counts in losses and metrics.
        segment_ids: 1, 2, ... a document within a row; 0 for padding. Attention stays within one.
        positions: from 0 within each document.
    """

    tokens: Int[Array, 'B T']
    labels: Int[Array, 'B T']
    mask: Bool[Array, 'B T']
    segment_ids: Int[Array, 'B T']
    positions: Int[Array, 'B T']


@flax.struct.dataclass
class HiddenTargets:
    """A teacher as its last hidden state and its head: logits are `hidden @ head`, never stored."""

    hidden: Float[Array, 'B T Dt']
    head: Float[Array, 'Dt V']


@flax.struct.dataclass
class DenseTargets:
    """A teacher as its logits."""

    logits: Float[Array, 'B T V']


@flax.struct.dataclass
class TrainState:
    """Everything that a training run needs to go on, bit for bit.

    Attributes:
        step: updates tried so far, including skipped ones; int32.
        params: the trained parameters.
        routing: selection biases of the MoE layers ({} where none are kept).
        opt_state: of the optimizer chain.
        skipped: updates skipped in a row because the loss or a gradient was not finite; int32.
    """

    step: Int[Array, '']
    params: Any
    routing: Any
    opt_state: Any
    skipped: Int[Array, '']
