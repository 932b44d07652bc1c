"""Whether a model is right as often as it is sure, and where in a text it agrees with its teacher.

On the device tokens are counted into bins, row by row; on the host the bins of documents add up, so
that each figure has an interval over documents.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from distill.statistics import Estimate, bootstrap, ratio

RELIABILITY_BINS = 15


def confidence_bins(confidence: Float[Array, '*N']) -> Int[Array, '*N']:
    """Returns the bin of each probability, `m` for `(m / M, (m + 1) / M]`, `M = RELIABILITY_BINS`.

    Source: Guo et al., 'On calibration of modern neural networks', arXiv 1706.04599, section 2: of
        equal width, and 15 of them as in their experiments.
    """
    bins = jnp.ceil(confidence * RELIABILITY_BINS).astype(jnp.int32) - 1
    return jnp.clip(bins, 0, RELIABILITY_BINS - 1)


def position_buckets(positions: Int[Array, '*N']) -> Int[Array, '*N']:
    """Returns the bucket of each position: 0, 1, 2 to 3, 4 to 7, and so on by powers of two."""
    return 32 - jax.lax.clz(positions.astype(jnp.int32))


def bucket_range(bucket: int) -> tuple[int, int]:
    """Returns the first and the last position of a bucket."""
    return (0, 0) if bucket == 0 else (2 ** (bucket - 1), 2**bucket - 1)


def binned_sums(
    bins: Int[Array, 'B C'],
    values: Sequence[Array],
    mask: Bool[Array, 'B C'],
    count: int,
) -> Float[Array, 'B M W']:
    """Sums values of each row over the unmasked positions of each bin.

    Args:
        bins: of each position, in [0, count).
        values: `W` arrays [B, C]; what is masked may be no number.
        mask: True counts.
        count: `M`, the number of bins.
    """
    member = (bins[..., None] == jnp.arange(count)) & mask[..., None]
    sums = [jnp.where(member, x[..., None], 0).sum(1, dtype=jnp.float32) for x in values]
    return jnp.stack(sums, -1)


def calibration_error(reliability: np.ndarray, *, seed: int = 0) -> Estimate:
    """Estimates the expected calibration error of the most probable next token.

        ECE = sum_m (n_m / n) |accuracy_m - confidence_m|

    over bins of equal width of the largest probability. Every resampled gap has the noise of the
    draw added before its absolute value is taken, so the interval lies a little high where
    documents are few.

    Args:
        reliability: for each document and bin its tokens, the sum of their largest probabilities,
            and how many were correct, `[n, M, 3]`.
        seed: of the resampling.

    Returns:
        A share in [0, 1], with its 95 % bootstrap interval over documents.

    Source: Guo et al., arXiv 1706.04599, equation 3.
    """
    tokens, confidence, correct = np.moveaxis(np.asarray(reliability, np.float64), -1, 0)
    totals = np.concatenate([correct - confidence, tokens.sum(1, keepdims=True)], 1)
    totals = totals[totals[:, -1] > 0]
    return bootstrap(lambda t: np.abs(t[:, :-1]).sum(1) / t[:, -1], totals, seed=seed)


def reliability_rows(reliability: np.ndarray, *, seed: int = 0) -> list[dict[str, Any]]:
    """Describes each bin that has tokens.

    Args:
        reliability: as of `calibration_error`.
        seed: of the resampling.

    Returns:
        For each bin its mean `confidence`, its `accuracy` as `{'value', 'low', 'high'}` and its
        `tokens`, in the order of confidence.
    """
    tokens, confidence, correct = np.moveaxis(np.asarray(reliability, np.float64), -1, 0)
    return [
        {
            'confidence': float(confidence[:, m].sum() / tokens[:, m].sum()),
            'accuracy': ratio(correct[:, m], tokens[:, m], seed=seed).to_dict(),
            'tokens': int(tokens[:, m].sum()),
        }
        for m in np.flatnonzero(tokens.sum(0))
    ]


def agreement_rows(agree_at: np.ndarray, *, seed: int = 0) -> list[dict[str, Any]]:
    """Describes how often teacher and student agree at each depth of a row.

    Args:
        agree_at: for each document and bucket of positions its tokens, and at how many of them the
            most probable next tokens are the same, `[n, P, 2]`.
        seed: of the resampling.

    Returns:
        For each bucket that has tokens its first and last position, `from` and `to`, counted from
        0, its `tokens`, and the `agreement` as `{'value', 'low', 'high'}`.
    """
    tokens, agree = np.moveaxis(np.asarray(agree_at, np.float64), -1, 0)
    rows = []
    for bucket in np.flatnonzero(tokens.sum(0)):
        first, last = bucket_range(int(bucket))
        agreement = ratio(agree[:, bucket], tokens[:, bucket], seed=seed).to_dict()
        count = int(tokens[:, bucket].sum())
        rows.append({'from': first, 'to': last, 'tokens': count, 'agreement': agreement})
    return rows
