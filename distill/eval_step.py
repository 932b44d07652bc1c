"""One jitted step of evaluation: sums of each row, with logits that exist only in chunks."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from distill.calibration import RELIABILITY_BINS, binned_sums, confidence_bins, position_buckets
from distill.types import Batch
from moe.balance import router_confidence
from moe.errors import InputError
from moe.sharding import constrain
from moe.transformer import Transformer, head_of


@flax.struct.dataclass
class RowSums:
    """Sums over the unmasked positions of each row, and the expert load of the batch.

    Attributes:
        tokens: predicted tokens.
        nats: cross-entropy.
        correct: tokens where the most probable next token is the label.
        kl: KL(teacher || student), nats; None without a teacher.
        agree: tokens where teacher and student have the same most probable next token; likewise.
        reliability: for each bin of confidence its tokens, their confidence, and how many are
            correct; see `distill.calibration`.
        agree_at: for each bucket of positions its tokens, and how many agree; None without a
            teacher.
        load: assignments to each expert, one array for each MoE layer.
        dropped: assignments among them that found no slot, one number for each MoE layer.
        confidence: each router's largest scores, summed over the tokens it routed, and how many
            those are; see `moe.balance.router_confidence`.
    """

    tokens: Float[Array, 'B']
    nats: Float[Array, 'B']
    correct: Float[Array, 'B']
    kl: Float[Array, 'B'] | None
    agree: Float[Array, 'B'] | None
    reliability: Float[Array, 'B M 3']
    agree_at: Float[Array, 'B P 2'] | None
    load: tuple[Float[Array, 'E'], ...]
    dropped: tuple[Float[Array, ''], ...]
    confidence: tuple[tuple[Float[Array, ''], Float[Array, '']], ...]


EvalStep = Callable[[Any, Any, Batch], RowSums]


def make_eval_step(
    student: Transformer, teacher: Transformer | None = None, *, chunk_size: int = 1024
) -> EvalStep:
    """Makes `step(student_variables, teacher_variables, batch) -> RowSums`, jitted.

    Args:
        student: the model that is judged.
        teacher: whom it is compared with; None leaves `kl`, `agree` and `agree_at` out, and the
            step then ignores its second argument.
        chunk_size: tokens whose logits exist at one time; at least one position of every row.

    Returns:
        The step. Steps of equal models and chunk size share one compilation. Under the models' mesh
        the rows are split over the batch axes, and the sums come back on every device.

    Raises:
        InputError: where teacher and student have vocabularies of different size.
    """
    if chunk_size < 1:
        raise ValueError(f'chunk_size must be positive; received {chunk_size}')
    if teacher is not None and teacher.config.vocab_size != student.config.vocab_size:
        raise InputError(
            'A divergence from the teacher needs one vocabulary; received a teacher of '
            f'{teacher.config.vocab_size} tokens and a student of {student.config.vocab_size}. '
            'Train both on one tokenizer, or evaluate without the teacher.'
        )
    return functools.partial(_row_sums, student, teacher, chunk_size)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _row_sums(
    student: Transformer,
    teacher: Transformer | None,
    chunk_size: int,
    student_variables: Any,
    teacher_variables: Any,
    batch: Batch,
) -> RowSums:
    hidden, head, router = _forward(student, student_variables, batch)
    states, heads = [hidden], [head]
    if teacher is not None:
        hidden, head, _ = _forward(teacher, teacher_variables, batch)
        states.append(hidden)
        heads.append(head)
    rows, length = batch.tokens.shape
    width = min(length, max(1, chunk_size // rows))
    operands = (states, batch.labels, batch.mask, position_buckets(batch.positions))
    chunks = jax.tree.map(lambda x: in_chunks(x, width), operands)
    buckets = (length - 1).bit_length() + 1

    def add(sums: dict[str, Array], chunk: Any) -> tuple[dict[str, Array], None]:
        states, labels, mask, at = chunk
        product = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
        logits = [product(x, head) for x, head in zip(states, heads, strict=True)]
        return jax.tree.map(jnp.add, sums, _chunk_sums(logits, labels, mask, at, buckets)), None

    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(('tokens', 'nats', 'correct'), (rows,))
    shapes['reliability'] = (rows, RELIABILITY_BINS, 3)
    if teacher is not None:
        shapes |= {'kl': (rows,), 'agree': (rows,), 'agree_at': (rows, buckets, 2)}
    zeros = {name: jnp.zeros(shape, jnp.float32) for name, shape in shapes.items()}
    sums, _ = jax.lax.scan(add, zeros, chunks)
    load = tuple(layer.load for layer in router)
    dropped = tuple(layer.dropped for layer in router)
    confidence = _confidence(student, router, batch.segment_ids > 0)
    sums = {'kl': None, 'agree': None, 'agree_at': None, **sums}
    result = RowSums(**sums, load=load, dropped=dropped, confidence=confidence)
    return jax.tree.map(lambda x: constrain(x, (None,) * x.ndim, student.mesh), result)


def _forward(model: Transformer, variables: Any, batch: Batch) -> tuple[Array, Array, tuple]:
    """Returns the last hidden state, the head in the same dtype, and the routers' outputs."""
    output: Any = model.apply(
        variables,
        batch.tokens,
        positions=batch.positions,
        segment_ids=batch.segment_ids,
        logits=False,
    )
    head = head_of(model.config, variables, output.hidden.dtype)
    # Gathered once over fsdp, ahead of the scan, rather than in each of its iterations.
    return output.hidden, constrain(head, (None, 'vocab'), model.mesh), output.router


def _confidence(model: Transformer, routers: tuple, mask: Array) -> tuple:
    if model.config.moe is None:
        return ()
    score = model.config.moe.router.score
    return tuple(router_confidence(router, mask, score=score) for router in routers)


def in_chunks(x: Array, width: int) -> Array:
    """Splits `[B, T, ...]` into `[T / width, B, width, ...]`, the last one filled with zeros."""
    count = math.ceil(x.shape[1] / width)
    padding = [(0, 0)] * x.ndim
    padding[1] = (0, count * width - x.shape[1])
    chunks = jnp.pad(x, padding).reshape(x.shape[0], count, width, *x.shape[2:])
    return jnp.moveaxis(chunks, 1, 0)


def _chunk_sums(
    logits: Sequence[Float[Array, 'B C V']],
    labels: Int[Array, 'B C'],
    mask: Bool[Array, 'B C'],
    bucket: Int[Array, 'B C'],
    buckets: int,
) -> dict[str, Float[Array, 'B ...']]:
    """Sums each metric over the positions of a chunk; `logits` are the student's, then a
    teacher's, and each position lies in one of the `buckets`."""

    def total(x: Array) -> Array:
        return jnp.where(mask, x, 0).sum(-1, dtype=jnp.float32)

    log_probs = [jax.nn.log_softmax(x) for x in logits]
    choices = [x.argmax(-1) for x in logits]
    nats = -jnp.take_along_axis(log_probs[0], labels[..., None], -1)[..., 0]
    correct, one = choices[0] == labels, jnp.ones_like(nats)
    confidence = jnp.exp(log_probs[0].max(-1))
    bins = confidence_bins(confidence)
    sums = {
        'tokens': total(one),
        'nats': total(nats),
        'correct': total(correct),
        'reliability': binned_sums(bins, (one, confidence, correct), mask, RELIABILITY_BINS),
    }
    if len(logits) == 2:
        # 0 log 0 = 0: what the teacher excludes costs nothing, even where the student does too.
        teacher = jnp.exp(log_probs[1])
        terms = jnp.where(teacher > 0, teacher * (log_probs[1] - log_probs[0]), 0)
        agree = choices[0] == choices[1]
        sums |= {'kl': total(terms.sum(-1)), 'agree': total(agree)}
        sums['agree_at'] = binned_sums(bucket, (one, agree), mask, buckets)
    return sums
