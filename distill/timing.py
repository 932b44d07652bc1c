"""Times functions against each other in one run, so that a ratio outlives the machine's mood."""

import statistics
import time
from collections.abc import Callable, Mapping

import jax


def interleaved_medians(
    functions: Mapping[str, Callable[[], object]], *, repeats: int
) -> dict[str, float]:
    """Runs all the functions in turn, `repeats` times, after one round that compiles them.

    Args:
        functions: by name; each returns arrays, which are waited for.
        repeats: rounds, at least 1.

    Returns:
        The median wall time of each, in seconds.
    """
    for function in functions.values():
        jax.block_until_ready(function())
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}
