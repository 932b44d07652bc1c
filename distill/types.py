"""Pytree records that pass between data, teachers, objectives and steps."""

from typing import Any

import flax.struct
from jaxtyping import Array, Bool, Float, Int

# Who wrote a row of a batch; `Batch.writers` has their numbers.
WRITERS = ('text', 'student', 'teacher')


@flax.struct.dataclass
class Batch:
    """Packed rows of text; padding and the tokens before a document's first are never counted.

    Attributes:
        tokens: input ids.
        labels: the next token of the same document; arbitrary where `mask` is False.
        mask: True where the position counts in losses and metrics.
        segment_ids: 1, 2, ... a document within a row; 0 for padding. Attention stays within one.
        positions: from 0 within each document.
        targets: what a teacher said of these rows before, or hidden states that came from devices
            of its own; None where it is asked, or there is none.
        routes: the number of each token's teacher, where there are several and data choose among
            them; None otherwise.
        writers: who wrote each row, by their place in `WRITERS`; None where all is text.
        counterpart: the same text in the tokens of a teacher with a tokenizer of its own; None
            where it reads these.
    """

    tokens: Int[Array, 'B T']
    labels: Int[Array, 'B T']
    mask: Bool[Array, 'B T']
    segment_ids: Int[Array, 'B T']
    positions: Int[Array, 'B T']
    targets: "TopKTargets | SampledTargets | Float[Array, 'B T Dt'] | None" = None
    routes: Int[Array, 'B T'] | None = None
    writers: Int[Array, 'B'] | None = None
    counterpart: 'Counterpart | None' = None


@flax.struct.dataclass
class Counterpart:
    """The text of a batch's rows in the tokens of another tokenizer, and the spans of both.

    Attributes:
        tokens: ids of the other tokenizer.
        labels: the next token of the same document.
        segment_ids: of the same documents as those of the batch; 0 for padding.
        positions: from 0 within each document's piece.
        student_spans: of the batch's labels, as `distill.spans.SpanAlignment.student` numbers them.
        teacher_spans: of these labels, likewise; -1 where a label is part of no span.
    """

    tokens: Int[Array, 'B Tt']
    labels: Int[Array, 'B Tt']
    segment_ids: Int[Array, 'B Tt']
    positions: Int[Array, 'B Tt']
    student_spans: Int[Array, 'B T']
    teacher_spans: Int[Array, 'B Tt']


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
class TopKTargets:
    """A teacher as the probabilities of a few ids of each token, and of all the others together.

    Attributes:
        ids: distinct within a token.
        log_probs: of the ids, in nats, normalised over the whole vocabulary; -inf marks an unused
            slot, whose id may be anything.
        tail_log_prob: log of the probability of all other ids together; -inf where there is none.
            A token's probabilities and its tail sum to 1.
        temperature: that the teacher's logits were divided by when this was recorded; positive.
    """

    ids: Int[Array, 'B T Vk']
    log_probs: Float[Array, 'B T Vk']
    tail_log_prob: Float[Array, 'B T']
    temperature: float = flax.struct.field(pytree_node=False, default=1.0)


@flax.struct.dataclass
class SampledTargets:
    """A teacher as ids drawn from its distribution, independently and with replacement.

    Attributes:
        ids: that were drawn.
        counts: how often; 0 marks an unused slot, whose id may be anything. A token's draws are the
            sum of its counts; a token without any teaches nothing.
        temperature: that the teacher's logits were divided by when they were drawn; positive.
    """

    ids: Int[Array, 'B T Vk']
    counts: Int[Array, 'B T Vk']
    temperature: float = flax.struct.field(pytree_node=False, default=1.0)


@flax.struct.dataclass
class TrainState:
    """Everything that a training run needs to go on, bit for bit.

    Attributes:
        step: updates tried so far, including skipped ones; int32.
        params: the trained parameters.
        routing: selection biases of the MoE layers ({} where none are kept).
        opt_state: of the optimizer chain.
        skipped: updates skipped in a row because the loss or a gradient was not finite; int32.
        replay: what the student wrote in the last steps, see `distill.replay`; None where nothing
            is kept.
        ema: variables whose average over the updates teaches; None where another does.
    """

    step: Int[Array, '']
    params: Any
    routing: Any
    opt_state: Any
    skipped: Int[Array, '']
    replay: Any = None
    ema: Any = None
