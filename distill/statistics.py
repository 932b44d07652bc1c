"""Intervals for corpus-level ratios, by resampling whole documents.

A language model's quality on a corpus is a ratio of sums (nats over tokens, nats over bytes). The
tokens of one document are far from independent, so the bootstrap draws documents, not tokens. Every
function draws the same resamples for the same seed and document count, so comparisons of models on
the same documents are paired.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

Statistic = Callable[[np.ndarray], np.ndarray]

# Counts of one block of resamples stay below about 32 MB.
_BLOCK_ELEMENTS = 4_000_000


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A value and its percentile interval.

    Attributes:
        value: the statistic of all documents.
        low: lower end of the interval; None where it could not be measured (fewer than two
            documents, or a resample on which the statistic is undefined).
        high: upper end, likewise.
    """

    value: float
    low: float | None = None
    high: float | None = None

    def to_dict(self) -> dict[str, float]:
        """Returns `{'value', 'low', 'high'}`, without the ends that were not measured."""
        ends = {'value': self.value, 'low': self.low, 'high': self.high}
        return {name: number for name, number in ends.items() if number is not None}


def bootstrap(
    statistic: Statistic,
    totals: np.ndarray,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Estimates a function of corpus totals with a percentile bootstrap over documents.

    Args:
        statistic: maps totals `[R, M]` to one number for each row `[R]`.
        totals: per-document sums `[n, M]`, float64.
        level: coverage of the interval, in (0, 1).
        resamples: how often `n` documents are drawn with replacement.
        seed: of the draws.

    Returns:
        The statistic of the summed totals and the `(1 - level) / 2` quantiles on either side of it,
        in the unit of the statistic.

    Raises:
        ValueError: where there is no document, or the value is not finite.

    Source: Efron, 'Bootstrap methods: another look at the jackknife' (1979); percentile interval.
    """
    totals = np.asarray(totals, np.float64)
    if totals.ndim != 2 or not len(totals):
        raise ValueError(f'totals must be [documents, sums], one or more; received {totals.shape}')
    if not 0 < level < 1:
        raise ValueError(f'level must lie in (0, 1); received {level}')
    # Undefined ratios are caught as non-finite values below, so NumPy need not warn of them.
    with np.errstate(divide='ignore', invalid='ignore'):
        value = float(statistic(totals.sum(0)[None])[0])
        if not np.isfinite(value):
            raise ValueError(f'the statistic of all documents is {value}')
        if len(totals) == 1:
            return Estimate(value)
        draws = statistic(_resampled_totals(totals, resamples, seed))
    if not np.isfinite(draws).all():
        return Estimate(value)
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(value, float(low), float(high))


def ratio(sums: np.ndarray, weights: np.ndarray, *, level: float = 0.95, seed: int = 0) -> Estimate:
    """Estimates `sum(sums) / sum(weights)` with an interval.

    Args:
        sums: per document, e.g. nats.
        weights: per document, e.g. tokens or bytes.
        level: coverage of the interval, in (0, 1).
        seed: of the resampling.

    Returns:
        The estimate, in the unit of `sums` over that of `weights`.

    Raises:
        ValueError: where the arrays differ in shape, or the weights sum to zero.
    """
    totals = _columns(sums, weights)
    return bootstrap(lambda t: t[:, 0] / t[:, 1], totals, level=level, seed=seed)


def paired_difference(
    first: np.ndarray,
    second: np.ndarray,
    weights: np.ndarray,
    *,
    level: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Estimates `(sum(first) - sum(second)) / sum(weights)` of two models on the same documents.

    Args:
        first: per document, of one model.
        second: per document, of the other, in the same order.
        weights: per document, shared by both.
        level: coverage of the interval, in (0, 1).
        seed: of the resampling.

    Returns:
        The estimate; positive where the first model's ratio is the larger.

    Raises:
        ValueError: where the arrays differ in shape, or the weights sum to zero.
    """
    totals = _columns(first, second, weights)
    return bootstrap(lambda t: (t[:, 0] - t[:, 1]) / t[:, 2], totals, level=level, seed=seed)


def paired_quotient(
    first: np.ndarray,
    second: np.ndarray,
    weights: np.ndarray,
    *,
    level: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Estimates `sum(first) / sum(second)` of two models on the same documents.

    Args:
        first: per document, of one model.
        second: per document, of the other, in the same order; its sum is not zero.
        weights: per document; says which documents take part, those where it is not zero.
        level: coverage of the interval, in (0, 1).
        seed: of the resampling.

    Returns:
        The estimate, without unit.

    Raises:
        ValueError: where the arrays differ in shape, or `second` sums to zero.
    """
    totals = _columns(first, second, weights)
    return bootstrap(lambda t: t[:, 0] / t[:, 1], totals, level=level, seed=seed)


def t_interval(values: Sequence[float], *, level: float = 0.95) -> Estimate:
    """Estimates a mean over runs, such as those of several seeds.

        mean +- t s / sqrt(n)

    with the sample standard deviation `s` and Student's `t` of `n - 1` degrees of freedom. It holds
    for values that scatter about normally; with three runs `t` is 4.3.

    Args:
        values: one of each run.
        level: coverage of the interval, in (0, 1).

    Returns:
        The mean and its interval, in the unit of `values`; a single run has no interval.

    Raises:
        ValueError: where there is no run.

    Source: Student, 'The probable error of a mean' (1908).
    """
    from scipy.stats import t

    numbers = np.asarray(values, np.float64)
    if numbers.ndim != 1 or not len(numbers):
        raise ValueError(f'values must be numbers, one or more; received {values!r}')
    mean = float(numbers.mean())
    if len(numbers) == 1:
        return Estimate(mean)
    error = numbers.std(ddof=1) / np.sqrt(len(numbers))
    reach = float(t.ppf((1 + level) / 2, len(numbers) - 1) * error)
    return Estimate(mean, mean - reach, mean + reach)


def _columns(*columns: np.ndarray) -> np.ndarray:
    """Stacks per-document arrays as `[n, M]`, without the documents where all are zero."""
    shapes = {np.shape(column) for column in columns}
    if len(shapes) > 1 or len(shapes.pop()) != 1:
        raise ValueError('sums and weights must be one-dimensional, one number for each document')
    totals = np.stack([np.asarray(column, np.float64) for column in columns], 1)
    return totals[totals.any(1)]


def _resampled_totals(totals: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Draws `[R, M]` totals, each of `n` documents taken with replacement."""
    n = len(totals)
    generator = np.random.default_rng(seed)
    block = max(1, _BLOCK_ELEMENTS // n)
    sizes = [min(block, resamples - start) for start in range(0, resamples, block)]
    draws = [generator.multinomial(n, np.full(n, 1 / n), size=size) @ totals for size in sizes]
    return np.concatenate(draws)
