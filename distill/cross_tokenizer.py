"""Losses between models of different vocabularies, over spans of tokens that hold equal bytes.

Over a span the tokens' probabilities multiply, by the chain rule, to the probability of its bytes
as that side spells them. The distribution over a span's first token, times the probabilities of the
tokens that followed it in the text, is the *merged* measure of the span: exact for the text itself,
an approximation for what was not written, and not normalised.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from distill.algebra import Divergence
from distill.spans import MatchedVocabulary, SpanAlignment
from distill.types import HiddenTargets
from distill.views import log_softmax
from moe.errors import InputError

Pair = tuple[Float[Array, ''], Float[Array, '']]


@dataclasses.dataclass(frozen=True)
class SpanLoss:
    """How merged measures of a span are compared.

    Attributes:
        vocabulary: ids that both sides share, compared one to one by `divergence`; the rest is
            compared by rank. None compares everything by rank (ULD).
        divergence: of the shared ids: 'forward_kl', 'reverse_kl' or 'jsd'.
        matched_weight: of the shared ids; None for their share of the teacher's vocabulary.
        unmatched_weight: of the rest; None for one less that share.
        temperature: divides the logits of both sides, positive.
        chunk_size: spans whose measures exist at one time.

    Source: ULD arXiv 2402.12030, equation 5; the hybrid and the merge: GOLD (Hugging Face, 2025).
        Divergences of measures that do not sum to one are in their generalised form,
        `a log(a / b) - a + b`, which GOLD's are at beta strictly between 0 and 1 alone.
    """

    vocabulary: MatchedVocabulary | None = None
    divergence: Divergence = Divergence('jsd', 0.5)  # noqa: RUF009  frozen
    matched_weight: float | None = None
    unmatched_weight: float | None = None
    temperature: float = 1.0
    chunk_size: int = 256

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise InputError(f'The temperature must be positive; received {self.temperature!r}.')
        if self.divergence.name not in ('forward_kl', 'reverse_kl', 'jsd'):
            raise InputError(
                "Shared ids are compared by 'forward_kl', 'reverse_kl' or 'jsd'; received "
                f'{self.divergence.name!r}, which is not defined for measures.'
            )

    def weights(self, teacher_vocab: int) -> tuple[float, float]:
        """Returns the weights of the matched and of the unmatched part."""
        assert self.vocabulary is not None
        share = len(self.vocabulary.teacher) / teacher_vocab
        matched = share if self.matched_weight is None else self.matched_weight
        rest = 1 - share if self.unmatched_weight is None else self.unmatched_weight
        return matched, rest


def span_log_probs(
    label_log_probs: Float[Array, 'B T'], spans: Int[Array, 'B T'], num_spans: int
) -> Float[Array, 'B G']:
    """Sums the log-probabilities of each span's tokens: the log-probability of its bytes.

    Args:
        label_log_probs: of the predicted token at each position, nats.
        spans: of `SpanAlignment`; -1 is left out.
        num_spans: `G`, at least the number of spans in any row.

    Returns:
        Nats; 0 for spans that a row does not have.
    """
    return jax.vmap(functools.partial(_segment_sum, num_spans=num_spans))(label_log_probs, spans)


def span_loss(
    hidden: Float[Array, 'B T D'],
    head: Float[Array, 'D V'],
    labels: Int[Array, 'B T'],
    targets: HiddenTargets,
    teacher_labels: Int[Array, 'B Tt'],
    alignment: SpanAlignment,
    loss: SpanLoss,
) -> Pair:
    """Compares a student with a teacher of another tokenizer on the spans that they share.

    By rank: the sum over r of |r-th largest of the student's measure - r-th largest of the
    teacher's|, the shorter vocabulary filled up with zeros. Measures of the width of a vocabulary
    exist for `chunk_size` spans at a time and are made again for the gradient, which flows to
    `hidden` and `head` alone.

    Args:
        hidden: the student's last hidden states.
        head: its output head.
        labels: its next tokens; arbitrary where its span is -1.
        targets: the teacher's hidden states on its own tokens, `[B, Tt, Dt]`, and head `[Dt, Vt]`.
        teacher_labels: the teacher's next tokens.
        alignment: the spans.
        loss: how they are compared.

    Returns:
        `(sum over spans, number of spans)`; their quotient is the loss per span.
    """
    targets = jax.lax.stop_gradient(targets)
    sides = (
        _Side(hidden, head, labels, alignment.student, loss.temperature),
        _Side(targets.hidden, targets.head, teacher_labels, alignment.teacher, loss.temperature),
    )
    # A span has a token of both sides at least.
    num_spans = min(labels.shape[1], teacher_labels.shape[1])
    firsts = [_first_positions(side.spans, num_spans) for side in sides]
    valid = (firsts[0] < labels.shape[1]) & (firsts[1] < teacher_labels.shape[1])
    following = [
        _following(side, first, num_spans, loss.chunk_size)
        for side, first in zip(sides, firsts, strict=True)
    ]
    width = min(num_spans, max(1, loss.chunk_size // labels.shape[0]))
    padding = -num_spans % width
    *firsts, valid = (_padded(x, padding) for x in (*firsts, valid))
    following = [_padded(x, padding) for x in following]

    @jax.checkpoint
    def chunk(start: Array) -> Array:
        def take(x: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(x, start, width, axis=1)

        student, teacher = (
            _merged(side, take(first), take(later))
            for side, first, later in zip(sides, firsts, following, strict=True)
        )
        return jnp.where(take(valid), compare(student, teacher, loss), 0).sum()

    def add(total: Array, start: Array) -> tuple[Array, None]:
        return total + chunk(start), None

    starts = jnp.arange(0, num_spans + padding, width)
    total, _ = jax.lax.scan(add, jnp.zeros((), jnp.float32), starts)
    return total, valid.sum().astype(jnp.float32)


def compare(
    student: Float[Array, '... Vs'], teacher: Float[Array, '... Vt'], loss: SpanLoss
) -> Float[Array, '...']:
    """Compares the logs of two merged measures.

    Args:
        student: log measure over the student's vocabulary.
        teacher: over the teacher's.
        loss: what is compared one to one, and what by rank.

    Returns:
        Non-negative, one number a span.
    """
    if loss.vocabulary is None:
        return ranked_difference(jnp.exp(student), jnp.exp(teacher))
    shared = loss.vocabulary
    matched, rest = loss.weights(teacher.shape[-1])
    together = _divergence(
        loss.divergence, student[..., shared.student], teacher[..., shared.teacher]
    )
    apart = ranked_difference(
        jnp.exp(student[..., shared.student_rest]), jnp.exp(teacher[..., shared.teacher_rest])
    )
    return matched * together + rest * apart


def ranked_difference(
    student: Float[Array, '... Vs'], teacher: Float[Array, '... Vt']
) -> Float[Array, '...']:
    """Sums |difference| of two measures, each sorted from its largest entry down.

    The shorter one is filled up with zeros: the distance of optimal transport where moving mass
    between any two ids costs the same. 0 where one side has no entries.

    Source: ULD, arXiv 2402.12030, equation 5.
    """
    if 0 in (student.shape[-1], teacher.shape[-1]):
        return jnp.zeros(student.shape[:-1], student.dtype)
    width = max(student.shape[-1], teacher.shape[-1])
    ranked = []
    for measure in (student, teacher):
        filled = [(0, 0)] * (measure.ndim - 1) + [(0, width - measure.shape[-1])]
        ranked.append(jnp.pad(jnp.sort(measure, axis=-1, descending=True), filled))
    return jnp.abs(ranked[0] - ranked[1]).sum(axis=-1)


@dataclasses.dataclass(frozen=True)
class _Side:
    """One model's view of the rows."""

    hidden: Float[Array, 'B T D']
    head: Float[Array, 'D V']
    labels: Int[Array, 'B T']
    spans: Int[Array, 'B T']
    temperature: float

    def log_probs(self, hidden: Float[Array, 'B t D']) -> Float[Array, 'B t V']:
        head = self.head.astype(hidden.dtype)
        logits = jnp.einsum('btd,dv->btv', hidden, head, preferred_element_type=jnp.float32)
        return log_softmax(logits / self.temperature)


def _segment_sum(values: Array, spans: Array, num_spans: int) -> Array:
    return jax.ops.segment_sum(jnp.where(spans >= 0, values, 0), spans, num_spans)


def _first_positions(spans: Int[Array, 'B T'], num_spans: int) -> Int[Array, 'B G']:
    """The first position of each span; `T` where there is none."""
    length = spans.shape[1]
    positions = jnp.broadcast_to(jnp.arange(length), spans.shape)
    first = jax.vmap(functools.partial(jax.ops.segment_min, num_segments=num_spans))(
        positions, jnp.where(spans >= 0, spans, num_spans)
    )
    return jnp.minimum(first, length)


def _following(
    side: _Side, first: Int[Array, 'B G'], num_spans: int, chunk_size: int
) -> Float[Array, 'B G']:
    """Sums over each span the log-probabilities of its tokens but the first."""
    log_probs = _label_log_probs(side, chunk_size)
    position = jnp.arange(side.spans.shape[1])
    starts = jnp.take_along_axis(first, jnp.maximum(side.spans, 0), axis=1)
    later = jnp.where((side.spans >= 0) & (position > starts), log_probs, 0)
    return span_log_probs(later, side.spans, num_spans)


def _label_log_probs(side: _Side, chunk_size: int) -> Float[Array, 'B T']:
    """The log-probability of each label, with logits of one chunk at a time."""
    batch, length, _ = side.hidden.shape
    width = min(length, max(1, chunk_size // batch))
    padding = -length % width

    @jax.checkpoint
    def chunk(hidden: Array, labels: Array) -> Array:
        log_probs = side.log_probs(hidden)
        return jnp.take_along_axis(log_probs, labels[..., None], axis=-1)[..., 0]

    def parts(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, -1, width, *x.shape[2:]), 1, 0)

    labels = jnp.where(side.spans >= 0, side.labels, 0)
    _, values = jax.lax.scan(
        lambda carry, part: (carry, chunk(*part)), None, (parts(side.hidden), parts(labels))
    )
    return jnp.moveaxis(values, 0, 1).reshape(batch, -1)[:, :length]


def _merged(
    side: _Side, first: Int[Array, 'B g'], following: Float[Array, 'B g']
) -> Float[Array, 'B g V']:
    index = jnp.minimum(first, side.hidden.shape[1] - 1)
    hidden = jnp.take_along_axis(side.hidden, index[..., None], axis=1)
    return side.log_probs(hidden) + following[..., None]


def _padded(x: Array, padding: int) -> Array:
    return jnp.pad(x, [(0, 0), (0, padding)])


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _divergence(divergence: Divergence, log_p: Array, log_q: Array) -> Array:
    return divergence.integrand(log_p, log_q)[0].sum(axis=-1)


@_divergence.defjvp
def _divergence_jvp(divergence, primals, tangents):
    value, h = divergence.integrand(*primals)
    return value.sum(axis=-1), (h * tangents[0]).sum(axis=-1)
