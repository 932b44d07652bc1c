"""Rows gathered and summed on TPUs, as a Pallas kernel: each is read by a copy of its own.

XLA's gather reads the whole tile of rows around each. A row of bfloat16 shares its 32-bit words
with a neighbour, so two rows are read for it; of float32 one is.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe.tpu_windows import CHUNK, FAST_BYTES, TILE, column, like

# Of the rows that one turn gathers, of which there are two.
GATHERED_BYTES = 12 * 2**20


def turn_rows(dim: int, terms: int) -> int:
    """Returns how many sums a turn makes; 0 where not even a tile of them fits."""
    sizes = (size for size in (128, 64, 32, TILE) if 4 * dim * terms * size <= GATHERED_BYTES)
    return next(sizes, 0)


def fits(source: Array, terms: int) -> bool:
    """Whether there is a kernel for these rows: of a dtype and a width it can copy."""
    return (
        source.dtype in (jnp.bfloat16, jnp.float32)
        and source.shape[1] % CHUNK == 0
        and turn_rows(source.shape[1], terms) > 0
    )


def sum_rows(
    source: Float[Array, 'S D'], index: Int[Array, 'R K'], *, interpret: Any = False
) -> Float[Array, 'R D']:
    """Sums `source[index[r, k]]` over k, in float32; an index of `S` or more adds zero.

    What it says it moves is every row it copies, with the neighbour it comes with, and the result.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    (found, dim), (count, terms) = source.shape, index.shape
    size = turn_rows(dim, terms)
    packed = 4 // source.dtype.itemsize
    # Whole turns, and whole tiles to copy from.
    index = jnp.pad(index.astype(jnp.int32), ((0, -count % size), (0, 0)), constant_values=found)
    source = jnp.pad(source, ((0, -found % TILE), (0, 0))) if found % TILE else source
    by_turn = index.reshape(-1, size, terms).swapaxes(1, 2)
    turns = by_turn.shape[0]
    # 0 for nothing, and else one more than the row's place in its words.
    place = jnp.where(by_turn < found, by_turn % packed + 1, 0).astype(jnp.float32)
    place = jnp.pad(place, ((0, 0), (0, 0), (0, CHUNK - size)))
    word = jnp.where(by_turn < found, by_turn // packed, -1).reshape(turns, 1, -1)
    words = functools.partial(pl.BlockSpec, (None, 1, size * terms), memory_space=pltpu.SMEM)
    out = pl.pallas_call(
        functools.partial(_kernel, terms=terms),
        out_shape=like(source, (turns * size, dim)),
        grid=(turns,),
        in_specs=[
            words(lambda i: (i, 0, 0)),
            words(lambda i: (jnp.minimum(i + 1, turns - 1), 0, 0)),
            pl.BlockSpec((None, terms, CHUNK), lambda i: (i, 0, 0)),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=pl.BlockSpec((size, dim), lambda i: (i, 0)),
        scratch_shapes=[
            pltpu.VMEM((2, size * terms, dim), jnp.uint32 if packed == 2 else source.dtype),
            pltpu.SemaphoreType.DMA((2,)),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=('arbitrary',), vmem_limit_bytes=FAST_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=count * (terms - 1) * dim,
            bytes_accessed=4 * count * terms * dim + count * dim * source.dtype.itemsize,
            transcendentals=0,
        ),
        interpret=interpret,
    )(word, word, place, source)
    return out[:count]


def _kernel(here, ahead, place, source, out, gathered, arriving, *, terms: int) -> None:
    """Sums the rows of one turn while those of the next arrive."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    turn = pl.program_id(0)
    words = source.bitcast(jnp.uint32) if gathered.dtype == jnp.uint32 else source
    size, slot = out.shape[0], jax.lax.rem(turn, 2)

    def copies(of: Any, slot: Any, act: Any) -> None:
        def row(i: Any, _: None) -> None:
            @pl.when(of[0, i] >= 0)
            def _one() -> None:
                to = gathered.at[slot, pl.ds(i, 1)]
                act(pltpu.make_async_copy(words.at[pl.ds(of[0, i], 1)], to, arriving.at[slot]))

        jax.lax.fori_loop(0, size * terms, row, None)

    pl.when(turn == 0)(lambda: copies(here, slot, lambda copy: copy.start()))

    @pl.when(turn + 1 < pl.num_programs(0))
    def _next() -> None:
        copies(ahead, 1 - slot, lambda copy: copy.start())

    copies(here, slot, lambda copy: copy.wait())
    total = jnp.zeros(out.shape, jnp.float32)
    for k in range(terms):
        total += _rows(gathered[slot, pl.ds(k * size, size)], column(place[pl.ds(k, 1)])[:size])
    out[...] = total.astype(out.dtype)


def _rows(words: Array, place: Float[Array, 'size 1']) -> Array:
    """Takes from each row of words the one at its place, or zero, in float32."""
    if words.dtype == jnp.uint32:
        low = jax.lax.shift_left(words, jnp.uint32(16))
        high = jax.lax.bitwise_and(words, jnp.uint32(0xFFFF0000))
        words = jax.lax.bitcast_convert_type(jnp.where(place == 2, high, low), jnp.float32)
    return jnp.where(place > 0, words, 0)
