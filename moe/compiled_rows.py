"""Experts of few rows each on a CPU, by a loop that Numba compiles (the extra `cpu`).

XLA copies an expert out of its stack before it multiplies by it. This loop reads every expert that
has rows where it lies, once, on all processors that the process may use. Its calls take Python's
lock: a thread of Python that computes without a pause delays each of them by milliseconds. JAX
keeps no program that calls Python in its cache on disk: those with this loop are compiled anew in
each process.
"""

import concurrent.futures
import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.buffer_callback import buffer_callback
from jaxtyping import Array, Float, Int

from moe.config import Activation
from moe.expert_mlp import weighted_hidden
from moe.processors import processors
from moe.quantised import Kernel, Quantised

LEAST_BYTES = 1 << 24  # of the matrices; with fewer, waking threads can cost what they save
READING = 5  # rows that a column is multiplied by in the time in which it is read
LEAD = 1 << 21  # products of numbers, reading among them, in the time in which a thread wakes
BLOCK = 8  # matrix rows of an eighth that an expert's rows take in turn, out of the cache


def fits(rows: Array, gate_up: Kernel, down: Kernel) -> bool:
    """Returns whether the loop is for these operands, float32 and large, and Numba is there.

    Args:
        rows: [M, D].
        gate_up: gate and up projections, [E, D, 2 F].
        down: down projections, [E, F, D].
    """
    if isinstance(gate_up, Quantised) or isinstance(down, Quantised):
        return False
    return (
        all(each.dtype == jnp.float32 for each in (rows, gate_up, down))
        and 4 * (gate_up.size + down.size) >= LEAST_BYTES
        and _has_numba()
    )


@functools.cache
def _has_numba() -> bool:
    """Whether Numba can be imported: a NumPy that is too new for it stands in its way too."""
    try:
        import numba  # noqa: F401
    except ImportError:
        return False
    return True


def compiled_rows_mlp(
    activation: Activation,
    rows: Float[Array, 'M D'],
    weights: Float[Array, 'M 1'],
    gate_up: Float[Array, 'E D F2'],
    down: Float[Array, 'E F D'],
    group_sizes: Int[Array, 'E'],
) -> Float[Array, 'M D']:
    """Computes each row's expert, times the row's weight, in float32; there is no gradient.

    Args:
        activation: of the gate.
        rows: sorted by expert.
        weights: of each row.
        gate_up: gate and up projections, [E, D, 2 F].
        down: down projections, [E, F, D].
        group_sizes: rows of each expert.

    Returns:
        Weighted expert outputs; zero for rows past the last group.
    """
    both = grouped_product(rows, gate_up, group_sizes)
    return grouped_product(weighted_hidden(both, weights, activation), down, group_sizes)


def grouped_product(
    rows: Float[Array, 'M D'], matrices: Float[Array, 'E D N'], group_sizes: Int[Array, 'E']
) -> Float[Array, 'M N']:
    """Multiplies each row, sorted by group, by the matrix of its group; others become zero.

    All are float32, but the sizes int32. Under `shard_map` they must vary over the same mesh axes.
    """
    _loop()  # compiled here: while a program runs, a thread of XLA's would wait for it
    shape = jax.ShapeDtypeStruct((rows.shape[0], matrices.shape[2]), rows.dtype)
    call = buffer_callback(_run, shape)
    out = call(rows, matrices, group_sizes.astype(jnp.int32))
    varying = jax.typeof(rows).manual_axis_type.varying
    return jax.lax.pcast(out, tuple(varying), to='varying')


def _run(context: Any, out: Any, rows: Any, matrices: Any, sizes: Any) -> None:
    """Computes a product where XLA's own buffers lie."""
    multiply(np.asarray(rows), np.asarray(matrices), np.asarray(sizes), np.asarray(out))


def multiply(rows: np.ndarray, matrices: np.ndarray, sizes: np.ndarray, out: np.ndarray) -> None:
    """Computes `grouped_product` into `out`: a part on this thread, and one on each of the others.

    Args:
        rows: [M, D] float32.
        matrices: [E, D, N] float32.
        sizes: rows of each group, [E] int32.
        out: [M, N] float32; all of it is written.
    """
    loop, parts, lead = _loop(), processors(), LEAD // max(rows.shape[1], 1)
    others: list[concurrent.futures.Future[None]] = []
    try:
        for part in range(1, parts):
            work = loop, rows, matrices, sizes, out, part, parts, lead
            others.append(_threads(os.getpid()).submit(*work))
        loop(rows, matrices, sizes, out, 0, parts, lead)
    finally:
        # Whatever interrupts this thread: the arrays are XLA's, which takes them back after it.
        concurrent.futures.wait(others)
    for other in others:
        other.result()


@functools.cache
def _threads(process: int) -> concurrent.futures.ThreadPoolExecutor:
    """The threads of a process beside those that call: a fork has none of its parent's."""
    return concurrent.futures.ThreadPoolExecutor(max(1, processors() - 1), 'experts')


@functools.cache
def _loop() -> Callable[..., None]:
    """Compiles the loop over one of several equal parts of a product.

    The columns of all experts that have rows are laid end to end, each as long as it takes: a part
    is a stretch of them, the first longer by what its thread does while the others wake.
    """
    import numba

    # Sums may be taken in any order, but what is NaN or infinite stays so.
    fast = {'contract', 'reassoc', 'nsz'}
    floats, integers = numba.types.float32, numba.types.int32
    index = numba.types.uintp  # one with a sign could count from the end

    # The vectoriser takes a loop whose output has to be told from up to eight inputs. They lie an
    # eighth of the matrix apart, so that each is read on from where it was left, which processors
    # fetch ahead: eight neighbouring rows of 2 KB are read at three quarters of the speed.
    @numba.njit(fastmath=fast, inline='never')
    def add_eights(out, rows, matrix, row, start, end, eighth, first, last):
        for k in range(start, end):
            k1 = k + eighth
            k2 = k1 + eighth
            k3 = k2 + eighth
            k4 = k3 + eighth
            k5 = k4 + eighth
            k6 = k5 + eighth
            k7 = k6 + eighth
            a, b, c, d = rows[row, k], rows[row, k1], rows[row, k2], rows[row, k3]
            e, f, g, h = rows[row, k4], rows[row, k5], rows[row, k6], rows[row, k7]
            for n in range(first, last):
                ab = a * matrix[k, n] + b * matrix[k1, n]
                cd = c * matrix[k2, n] + d * matrix[k3, n]
                ef = e * matrix[k4, n] + f * matrix[k5, n]
                gh = g * matrix[k6, n] + h * matrix[k7, n]
                out[row, n] += (ab + cd) + (ef + gh)

    @numba.njit(fastmath=fast, inline='never')
    def add_one(out, rows, matrix, row, k, first, last):
        a = rows[row, k]
        for n in range(first, last):
            out[row, n] += a * matrix[k, n]

    def loop(rows, matrices, sizes, out, part, parts, lead):
        depth, width, length = matrices.shape[1], matrices.shape[2], 0
        for size in sizes:
            length += width * (size + READING) if size > 0 else 0
        lead = min(lead, length)
        start = lead + (length - lead) * part // parts if part > 0 else 0
        end = lead + (length - lead) * (part + 1) // parts
        eighth = index(depth // 8)
        row, done = 0, 0
        for group in range(len(sizes)):
            rows_end = min(row + sizes[group], len(rows))
            takes = sizes[group] + READING
            first, last = max(start - done, 0) // takes, min(max(end - done, 0) // takes, width)
            if row < rows_end and first < last:
                out[row:rows_end, first:last] = 0
                matrix, first, last = matrices[group], index(first), index(last)
                for k in range(0, eighth, BLOCK):
                    stop = index(min(k + BLOCK, eighth))
                    for r in range(row, rows_end):
                        add_eights(out, rows, matrix, index(r), index(k), stop, eighth, first, last)
                for k in range(8 * eighth, depth):
                    for r in range(row, rows_end):
                        add_one(out, rows, matrix, index(r), index(k), first, last)
            done += width * takes if sizes[group] > 0 else 0
            row = rows_end
        if part == parts - 1:
            out[row:] = 0

    arrays = [
        numba.types.Array(kind, rank, 'C', readonly=readonly)
        for kind, rank, readonly in (
            (floats, 2, True),
            (floats, 3, True),
            (integers, 1, True),
            (floats, 2, False),
        )
    ]
    number = numba.types.intp
    signature = numba.types.void(*arrays, number, number, number)
    return numba.njit(signature, nogil=True)(loop)
