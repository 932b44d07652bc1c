"""Targets as planes of bytes, and back: what zstd then makes small.

A plane holds one byte of one quantity for all tokens of a row, so that bytes that behave alike
stand together: the high bytes of ids are few, those of small differences are zero. Tokens are those
that are not padding, in order; a row's plane is filled up with zeros.
"""

import dataclasses
from typing import Any, Protocol

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from distill.estimators import Estimator, SampledEstimator, TopKEstimator
from distill.types import SampledTargets, TopKTargets
from moe.errors import InputError

Planes = dict[str, UInt8[np.ndarray, 'R width']]
Real = Bool[np.ndarray, 'R T']

# Nats between neighbouring log-probabilities: none is off by more than half of it.
LOG_PROB_STEP = 1 / 128
# 16 bits of steps reach down to exp(-511); beyond that, nothing is there.
_NOTHING = 2**16 - 1
_LOG_PROB_BYTES = 2


class Codec(Protocol):
    """Encodes one form of targets; `widths` are the bytes of a row in each plane."""

    @property
    def widths(self) -> dict[str, int]: ...
    def encode(self, targets: Any, real: Real) -> Planes: ...
    def decode(self, planes: Planes, real: Real, slots: int) -> Any: ...
    def slots(self, targets: Any) -> int: ...


def codec_for(estimator: Estimator, vocab_size: int, seq_len: int) -> Codec:
    """Returns the codec of an estimator's targets, over rows of `T = seq_len` tokens."""
    if isinstance(estimator, TopKEstimator):
        return TopKCodec(estimator.k, vocab_size, seq_len, estimator.temperature)
    return SampledCodec(estimator, vocab_size, seq_len)


@dataclasses.dataclass(frozen=True)
class TopKCodec:
    """Ids in falling order of probability, and what each log-probability falls by.

    Log-probabilities, the tail's too, are rounded to multiples of 1/128 nat, and normalised again
    when they are read: each probability is within 0.8 % of what it was.
    """

    k: int
    vocab_size: int
    seq_len: int
    temperature: float

    @property
    def widths(self) -> dict[str, int]:
        """Bytes of a row in each plane."""
        ids = _byte_count(self.vocab_size - 1)
        entries = self.seq_len * self.k
        return (
            dict.fromkeys(_names('ids', ids), entries)
            | dict.fromkeys(_names('falls', _LOG_PROB_BYTES), entries)
            | dict.fromkeys(_names('tail', _LOG_PROB_BYTES), self.seq_len)
        )

    def slots(self, targets: TopKTargets) -> int:
        """`Vk`."""
        return self.k

    def encode(self, targets: TopKTargets, real: Real) -> Planes:
        """Encodes targets [R, T, k]; those of padding are left out."""
        ids, log_probs, tail = (
            np.asarray(x)[real] for x in (targets.ids, targets.log_probs, targets.tail_log_prob)
        )
        _require_ids(ids, self.vocab_size)
        steps = _to_steps(log_probs)
        falls = np.diff(steps, axis=-1, prepend=0)
        if (falls < 0).any():
            order = np.argsort(steps, axis=-1, kind='stable')
            steps, ids = (np.take_along_axis(x, order, -1) for x in (steps, ids))
            falls = np.diff(steps, axis=-1, prepend=0)
        tokens = real.sum(-1)
        return (
            _packed('ids', ids.ravel(), tokens * self.k, self.widths)
            | _packed('falls', falls.ravel(), tokens * self.k, self.widths)
            | _packed('tail', _to_steps(tail), tokens, self.widths)
        )

    def decode(self, planes: Planes, real: Real, slots: int) -> TopKTargets:
        """Decodes rows; padding gets id 0, all of its mass in the tail."""
        tokens = real.sum(-1)
        ids = _unpacked(planes, 'ids', tokens * slots).reshape(-1, slots)
        falls = _unpacked(planes, 'falls', tokens * slots).reshape(-1, slots)
        steps = np.cumsum(falls, axis=-1, dtype=np.int32)
        log_probs = _from_steps(steps)
        tail = _from_steps(_unpacked(planes, 'tail', tokens))
        total = np.log(np.exp(log_probs).sum(-1) + np.exp(tail))
        shape = (*real.shape, slots)
        fields: Any = {
            'ids': np.zeros(shape, np.int32),
            'log_probs': np.full(shape, -np.inf, np.float32),
            'tail_log_prob': np.zeros(real.shape, np.float32),
        }
        fields['ids'][real] = ids
        fields['log_probs'][real] = log_probs - total[:, None]
        fields['tail_log_prob'][real] = tail - total
        return TopKTargets(**fields, temperature=self.temperature)


@dataclasses.dataclass(frozen=True)
class SampledCodec:
    """Distinct ids in rising order, as differences, and their counts.

    Counts are exact; where draws carry weights, the logs of counts are rounded to 1/128 nat.
    """

    estimator: SampledEstimator
    vocab_size: int
    seq_len: int

    @property
    def widths(self) -> dict[str, int]:
        """Bytes of a row in each plane."""
        draws = self.estimator.draws
        entries = self.seq_len * min(draws, self.vocab_size)
        amounts = _LOG_PROB_BYTES if self.estimator.weighted else _byte_count(draws - 1)
        return (
            dict.fromkeys(_names('sizes', _byte_count(draws)), self.seq_len)
            | dict.fromkeys(_names('ids', _byte_count(self.vocab_size - 1)), entries)
            | dict.fromkeys(_names('amounts', amounts), entries)
        )

    def slots(self, targets: SampledTargets) -> int:
        """The most distinct ids of a token."""
        return int((np.asarray(targets.counts) > 0).sum(-1).max(initial=0))

    def encode(self, targets: SampledTargets, real: Real) -> Planes:
        """Encodes draws [R, T, n], whose ids rise along the slots; padding is left out."""
        ids, counts = (np.asarray(x)[real] for x in (targets.ids, targets.counts))
        drawn = counts > 0
        sizes = drawn.sum(-1)
        flat = ids[drawn].astype(np.int32)
        _require_ids(flat, self.vocab_size)
        starts = np.cumsum(sizes) - sizes
        differences = np.diff(flat, prepend=0)
        differences[starts[sizes > 0]] = flat[starts[sizes > 0]]
        if (differences < 0).any():
            raise ValueError('The ids of a token must rise along its slots.')
        if self.estimator.weighted:
            amounts = _to_steps(np.log(counts[drawn] / self.estimator.draws))
        else:
            amounts = counts[drawn].astype(np.int32) - 1
        tokens = real.sum(-1)
        entries = _sums(sizes, tokens)
        return (
            _packed('sizes', sizes, tokens, self.widths)
            | _packed('ids', differences, entries, self.widths)
            | _packed('amounts', amounts, entries, self.widths)
        )

    def decode(self, planes: Planes, real: Real, slots: int) -> SampledTargets:
        """Decodes rows into `slots` slots a token; unused ones and padding have a count of 0."""
        tokens = real.sum(-1)
        sizes = _unpacked(planes, 'sizes', tokens)
        entries = _sums(sizes, tokens)
        differences = _unpacked(planes, 'ids', entries)
        starts = np.cumsum(sizes) - sizes
        rising = np.cumsum(differences, dtype=np.int64)
        first = np.repeat(starts, sizes)
        base = (rising - differences)[first] if len(first) else rising
        amounts = _unpacked(planes, 'amounts', entries)
        if self.estimator.weighted:
            counts = self.estimator.draws * np.exp(_from_steps(amounts))
        else:
            counts = amounts + 1
        token = np.repeat(np.flatnonzero(real), sizes)
        slot = np.arange(len(token)) - first
        fields: Any = {
            'ids': np.zeros((real.size, slots), np.int32),
            'counts': np.zeros((real.size, slots), np.float32),
        }
        fields['ids'][token, slot] = rising - base
        fields['counts'][token, slot] = counts
        fields = {key: value.reshape(*real.shape, slots) for key, value in fields.items()}
        return SampledTargets(**fields, temperature=self.estimator.temperature)


def _byte_count(largest: int) -> int:
    """Bytes that a number up to `largest` takes, at least one."""
    return max(1, -(-int(largest).bit_length() // 8))


def _names(name: str, count: int) -> list[str]:
    """Names the planes of a quantity, its lowest byte first."""
    return [f'{name}_{byte}' for byte in range(count)]


def _to_steps(log_probs: Float[np.ndarray, '...']) -> Int[np.ndarray, '...']:
    """Rounds log-probabilities to steps below zero; what is rarer than the last step is nothing."""
    steps = np.clip(-log_probs / LOG_PROB_STEP, 0, _NOTHING)
    return np.rint(steps).astype(np.int32)


def _from_steps(steps: Int[np.ndarray, '...']) -> Float[np.ndarray, '...']:
    log_probs = steps.astype(np.float32) * np.float32(-LOG_PROB_STEP)
    log_probs[steps == _NOTHING] = -np.inf
    return log_probs


def _require_ids(ids: Int[np.ndarray, '...'], vocab_size: int) -> None:
    if ids.size and not (ids.min() >= 0 and ids.max() < vocab_size):
        raise InputError(
            f'The ids of targets must be in [0, {vocab_size}); received {ids.min()} to '
            f'{ids.max()}. Give the vocabulary of the teacher.'
        )


def _sums(sizes: Int[np.ndarray, 'tokens'], tokens: Int[np.ndarray, 'R']) -> Int[np.ndarray, 'R']:
    """Sums the sizes of each row's tokens."""
    ends = np.concatenate([[0], np.cumsum(sizes)])
    return np.diff(ends[np.concatenate([[0], np.cumsum(tokens)])])


def _packed(
    name: str,
    values: Int[np.ndarray, 'n'],
    lengths: Int[np.ndarray, 'R'],
    widths: dict[str, int],
) -> Planes:
    """Puts the bytes of consecutive values into planes; row r holds the next `lengths[r]`."""
    planes = {}
    for byte, plane in enumerate(key for key in widths if key.startswith(f'{name}_')):
        planes[plane] = np.zeros((len(lengths), widths[plane]), np.uint8)
        planes[plane][_held(planes[plane], lengths)] = (values >> 8 * byte) & 255
    return planes


def _unpacked(planes: Planes, name: str, lengths: Int[np.ndarray, 'R']) -> Int[np.ndarray, 'n']:
    """Undoes `_packed`."""
    values = np.zeros(lengths.sum(), np.int32)
    for byte, plane in enumerate(key for key in planes if key.startswith(f'{name}_')):
        values |= planes[plane][_held(planes[plane], lengths)].astype(np.int32) << 8 * byte
    return values


def _held(plane: UInt8[np.ndarray, 'R width'], lengths: Int[np.ndarray, 'R']) -> Any:
    """Selects what each row holds, in order."""
    return np.arange(plane.shape[1]) < lengths[:, None]
