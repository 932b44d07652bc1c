"""What is kept of a teacher: its likeliest ids with the mass of the rest, or ids drawn from it.

Both are computed from hidden states and head, a chunk of positions at a time: logits of a whole
batch never exist.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from distill.draws import draw_sorted, row_keys, run_lengths, sorted_uniforms
from distill.types import Batch, HiddenTargets, SampledTargets, TopKTargets
from moe.errors import InputError
from moe.validation import require

CHUNK_SIZE = 512
MOST_DRAWS = 4096


@dataclasses.dataclass(frozen=True)
class TopKEstimator:
    """The `k` likeliest ids of each token, exactly, and the mass of all others as one.

    Attributes:
        k: ids, `Vk`; at most `V`.
        temperature: divides the teacher's logits.
    """

    k: int = 64
    temperature: float = 1.0

    def __post_init__(self) -> None:
        require(self.k >= 1, 'targets.k', 'at least 1', self.k)
        require(self.temperature > 0, 'targets.temperature', 'positive', self.temperature)

    def estimate(
        self, teacher: HiddenTargets, batch: Batch, *, chunk_size: int = CHUNK_SIZE
    ) -> TopKTargets:
        """Takes the likeliest ids, in falling order of probability.

        Args:
            teacher: last hidden states and head.
            batch: that they are of; not looked at.
            chunk_size: tokens whose logits exist at one time.

        Returns:
            Log-probabilities, in nats, normalised over the vocabulary; the tail is summed from its
            own entries, not as what is missing from 1, so it keeps its digits where it is tiny.
        """
        V = teacher.head.shape[-1]
        if self.k > V:
            raise InputError(f'targets.k must be at most the vocabulary, {V}; received {self.k}.')
        ids, log_probs, tail = _over_chunks(
            functools.partial(_top_k, k=self.k),
            teacher,
            self.temperature,
            (),
            chunk_size,
        )
        return TopKTargets(ids, log_probs, tail, temperature=self.temperature)


@dataclasses.dataclass(frozen=True)
class TruncatedEstimator:
    """The `k` likeliest ids alone, their probabilities scaled up to a sum of 1.

    Biased: the student is asked for more mass on those ids than the teacher gives them, and for
    none on the others. It is here to be compared with; `TopKEstimator` keeps the tail instead.

    Attributes:
        k: ids, `Vk`; at most `V`.
        temperature: divides the teacher's logits.

    Source: the bias is that of arXiv 2503.16870, section 3.
    """

    k: int = 64
    temperature: float = 1.0

    def estimate(
        self, teacher: HiddenTargets, batch: Batch, *, chunk_size: int = CHUNK_SIZE
    ) -> TopKTargets:
        """Takes the likeliest ids, see `TopKEstimator.estimate`; the log of their tail is -inf."""
        whole = TopKEstimator(self.k, self.temperature)
        top = whole.estimate(teacher, batch, chunk_size=chunk_size)
        return top.replace(  # type: ignore
            log_probs=jax.nn.log_softmax(top.log_probs),
            tail_log_prob=jnp.full_like(top.tail_log_prob, -jnp.inf),
        )


@dataclasses.dataclass(frozen=True)
class SampledEstimator:
    """Independent draws from each token's distribution: unbiased for the forward KL's gradient.

    Draws follow from the seed and a row's own tokens and segments: a row has the same ones in any
    batch, on any mesh, in any order.

    Attributes:
        draws: of each token.
        temperature: divides the teacher's logits.
        proposal_temperature: divides them once more for drawing; where it is not 1, each draw is
            weighed by (teacher's probability / proposal's), and weights are normalised over a
            token's draws, which is unbiased only as draws grow.
        seed: of the draws, in [0, 2^31).

    Source: random-sampling knowledge distillation, arXiv 2503.16870, section 4.
    """

    draws: int
    temperature: float = 1.0
    proposal_temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        valid = 1 <= self.draws <= MOST_DRAWS
        require(valid, 'targets.draws', f'between 1 and {MOST_DRAWS}', self.draws)
        for name in ('temperature', 'proposal_temperature'):
            value = getattr(self, name)
            require(value > 0, f'targets.{name}', 'positive', value)

    @property
    def weighted(self) -> bool:
        """Whether draws carry weights."""
        return self.proposal_temperature != 1

    def estimate(
        self, teacher: HiddenTargets, batch: Batch, *, chunk_size: int = CHUNK_SIZE
    ) -> SampledTargets:
        """Draws ids.

        Args:
            teacher: last hidden states and head.
            batch: that they are of.
            chunk_size: tokens whose logits exist at one time.

        Returns:
            `draws` slots a token, ids in rising order; a repeated id has its count in the first of
            its slots and 0 in the others. Counts are whole numbers, as floats; with a proposal,
            they are multiplied by the weight, relative to the token's largest.
        """
        keys = row_keys(batch.tokens, batch.segment_ids, self.seed)
        uniforms = sorted_uniforms(keys, batch.tokens.shape[1], self.draws)
        ids, log_weights = _over_chunks(
            functools.partial(_draw, proposal_temperature=self.proposal_temperature),
            teacher,
            self.temperature,
            (uniforms,),
            chunk_size,
        )
        counts = run_lengths(ids).astype(jnp.float32)
        if self.weighted:
            counts *= jnp.exp(log_weights)
        return SampledTargets(ids, counts, temperature=self.temperature)  # type: ignore


Estimator = TopKEstimator | SampledEstimator


def draws_for(
    distinct: float,
    teacher: HiddenTargets,
    batch: Batch,
    *,
    temperature: float = 1.0,
    chunk_size: int = CHUNK_SIZE,
) -> int:
    """Finds how many draws give this many distinct ids, as the mean over a batch's tokens.

    A token of probabilities q is expected to give `sum over v of 1 - (1 - q_v)^n` ids in n draws.

    Args:
        distinct: ids wanted, at least 1.
        teacher: last hidden states and head.
        batch: that they are of; its mask says which tokens count.
        temperature: of the draws: the teacher's times the proposal's.
        chunk_size: tokens whose logits exist at one time.

    Returns:
        The fewest draws that give as many, at most 4096.
    """

    @jax.jit
    def expected(count: Array, teacher: HiddenTargets) -> Array:
        def of(logits: Array) -> tuple[Array]:
            missed = jnp.log1p(-jnp.minimum(jax.nn.softmax(logits), 1 - 1e-7))
            return (-jnp.expm1(count * missed).sum(-1),)

        (found,) = _over_chunks(of, teacher, temperature, (), chunk_size)
        return jnp.where(batch.mask, found, 0).sum() / jnp.maximum(batch.mask.sum(), 1)

    low, high = 1, MOST_DRAWS
    while low < high:
        middle = (low + high) // 2
        if expected(jnp.float32(middle), teacher) < distinct:
            low = middle + 1
        else:
            high = middle
    return low


def _over_chunks(
    function: Callable[..., Any],
    teacher: HiddenTargets,
    temperature: float,
    extra: tuple[Array, ...],
    chunk_size: int,
) -> Any:
    """Applies `function(logits, *extra)` to chunks of positions; arrays are [B, T, ...]."""
    B, T, _ = teacher.hidden.shape
    length = min(T, max(1, chunk_size // B))
    count = -(-T // length)

    def split(x: Array) -> Array:
        padding = [(0, 0), (0, count * length - T)] + [(0, 0)] * (x.ndim - 2)
        return jnp.moveaxis(jnp.pad(x, padding).reshape(B, count, length, *x.shape[2:]), 1, 0)

    def join(x: Array) -> Array:
        return jnp.moveaxis(x, 0, 1).reshape(B, count * length, *x.shape[3:])[:, :T]

    def chunk(arrays: tuple[Array, ...]) -> Any:
        hidden, *rest = arrays
        logits = jnp.matmul(hidden, teacher.head, preferred_element_type=jnp.float32)
        return function(logits / temperature, *rest)

    return jax.tree.map(join, jax.lax.map(chunk, jax.tree.map(split, (teacher.hidden, *extra))))


def _top_k(
    logits: Float[Array, 'B t V'], k: int
) -> tuple[Int[Array, 'B t k'], Float[Array, 'B t k'], Float[Array, 'B t']]:
    """Returns ids, log-probabilities and the log of the tail."""
    values, ids = jax.lax.top_k(logits, k)
    peak = values[..., :1]
    rest = jnp.put_along_axis(logits, ids, -jnp.inf, axis=-1, inplace=False)
    top, tail = (jnp.exp(x - peak).sum(-1) for x in (values, rest))
    log_total = jnp.log(top + tail)
    return ids, values - peak - log_total[..., None], jnp.log(tail) - log_total


def _draw(
    logits: Float[Array, 'B t V'], uniforms: Float[Array, 'B t n'], proposal_temperature: float
) -> tuple[Int[Array, 'B t n'], Float[Array, 'B t n']]:
    """Returns sorted draws and the logs of their weights, the largest of a token being 0."""
    proposal = logits / proposal_temperature
    ids = draw_sorted(proposal, uniforms)
    log_weights = jnp.take_along_axis(logits - proposal, ids, axis=-1)
    return ids, log_weights - log_weights.max(-1, keepdims=True)
