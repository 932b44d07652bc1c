"""One turn of the kernel of `moe.tpu_mlp_backward`: a window with a part of the hidden columns."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from moe.config import Activation
from moe.expert_mlp import weighted_hidden
from moe.tpu_windows import (
    CHUNK,
    TILE,
    Windows,
    column,
    copy_rows,
    line,
    merge_edge,
    over_chunks,
    own,
    round_sum,
)


def turn(*refs: Any, activation: Activation, groups: int) -> None:
    """Takes one window with one part of its group's hidden columns."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    turns, refs = Windows(*refs[: len(Windows._fields)]), refs[len(Windows._fields) :]
    rows, weights, gate_up, down, both, cotangent, d_rows, d_weights, d_gate_up, d_down = refs[:10]
    window, by, total, edge, kept, to_gate_up, to_down, narrow_gate_up, narrow_down = refs[10:19]
    moving, fetching, writing = refs[19:]
    number, f, last = pl.program_id(0), pl.program_id(1), pl.num_programs(1) - 1
    low, high, group = turns.low[number], turns.high[number], turns.group[number]
    base = pl.multiple_of(turns.tile[number] * TILE, TILE)
    real = (group < groups) & (high > 0)
    part, hidden = down.shape[0], down.shape[0] * pl.num_programs(1)

    def at(first: Any, size: int) -> Any:
        return pl.ds(pl.multiple_of(base + first, TILE), size)

    def loading(act: Any) -> None:
        for source, to in ((rows, window), (cotangent, by)):

            def move(first: Any, size: int, source: Any = source, to: Any = to) -> Any:
                here = to.at[pl.ds(first, size)]
                return pltpu.make_async_copy(source.at[at(first, size)], here, moving)

            copy_rows(move, high, act)

    def storing(act: Any) -> None:
        def move(first: Any, size: int) -> Any:
            here = window.at[pl.ds(first, size)]
            return pltpu.make_async_copy(here, d_rows.at[at(first, size)], moving)

        copy_rows(move, high, act)

    def fetching_kept(f: Any, act: Any) -> None:
        for side in range(2):

            def move(first: Any, size: int, side: int = side) -> Any:
                columns = pl.ds(pl.multiple_of(side * hidden + f * part, CHUNK), part)
                to = kept.at[jax.lax.rem(f, 2), side, pl.ds(first, size)]
                source = both.at[at(first, size), columns]
                return pltpu.make_async_copy(source, to, fetching.at[jax.lax.rem(f, 2)])

            copy_rows(move, high, act)

    def gradients(group: Any, f: Any) -> list[tuple[Any, Any]]:
        columns = pl.ds(pl.multiple_of(f * part, CHUNK), part)
        return [
            (narrow_gate_up, d_gate_up.at[group, :, :, columns]),
            (narrow_down, d_down.at[group, columns]),
        ]

    @pl.when(f == 0)
    def _clear() -> None:
        d_weights[...] = jnp.zeros_like(d_weights)

    @pl.when(real & (f == 0))
    def _begin() -> None:
        loading(lambda copy: copy.start())
        fetching_kept(f, lambda copy: copy.start())
        loading(lambda copy: copy.wait())

        # Rows of others are zero from here on, and so is all that they add to the sums below.
        def clear(first: Any) -> None:
            here = pl.ds(first, CHUNK)
            mine = own(first, CHUNK, low, high)
            for rows in (window, by):
                rows[here] = jnp.where(mine, rows[here], jnp.zeros_like(rows[here]))
            total[here] = jnp.zeros((CHUNK, total.shape[1]), total.dtype)

        over_chunks(high, clear)

    @pl.when(group < groups)
    def _reset() -> None:
        to_gate_up[...] = jnp.zeros_like(to_gate_up)
        to_down[...] = jnp.zeros_like(to_down)

    @pl.when(real)
    def _add() -> None:
        pl.when(f < last)(lambda: fetching_kept(f + 1, lambda copy: copy.start()))
        fetching_kept(f, lambda copy: copy.wait())

        def chunk(first: Any) -> None:
            here = pl.ds(first, CHUNK)
            mine = own(first, CHUNK, low, high)
            before = jnp.concatenate(
                [kept[jax.lax.rem(f, 2), side, here] for side in range(2)], axis=-1
            )
            before = jnp.where(mine, before, jnp.zeros_like(before))
            d_hidden = _dot(by[here], down[...], 1, 1)
            line_of = pl.ds(jax.lax.div(first, CHUNK), 1)
            compute = functools.partial(weighted_hidden, activation=activation)
            middle, vjp = jax.vjp(compute, before, column(weights[line_of]))
            d_before, d_by = vjp(d_hidden.astype(middle.dtype))
            d_weights[line_of] += line(d_by)
            to_down[...] += _dot(middle, by[here], 0, 0)
            for side in range(2):
                d_side = d_before[:, side * part : (side + 1) * part]
                total[here] += _dot(d_side, gate_up[side], 1, 1)
                to_gate_up[side] += _dot(window[here], d_side, 0, 0)

        over_chunks(high, chunk)

    @pl.when(group < groups)
    def _write() -> None:
        # The copies of the turn before are done before theirs are overwritten or read back.
        @pl.when((number > 0) | (f > 0))
        def _await() -> None:
            for narrow, to in gradients(0, 0):
                pltpu.make_async_copy(narrow, to, writing).wait()

        @pl.when(turns.begins[number] == 0)
        def _continue() -> None:
            for narrow, written in gradients(group, f):
                copy = pltpu.make_async_copy(written, narrow, moving)
                copy.start()
                copy.wait()
            to_gate_up[...] += narrow_gate_up[...].astype(to_gate_up.dtype)
            to_down[...] += narrow_down[...].astype(to_down.dtype)

        narrow_gate_up[...] = to_gate_up[...].astype(narrow_gate_up.dtype)
        narrow_down[...] = to_down[...].astype(narrow_down.dtype)
        for narrow, to in gradients(group, f):
            pltpu.make_async_copy(narrow, to, writing).start()

    @pl.when((number == pl.num_programs(0) - 1) & (f == last))
    def _await_last() -> None:
        for narrow, to in gradients(0, 0):
            pltpu.make_async_copy(narrow, to, writing).wait()

    @pl.when((group <= groups) & (high > 0) & (f == last))
    def _end() -> None:
        round_sum(window, total, high, real)
        merge_edge(window, edge, low, high)
        storing(lambda copy: copy.start())
        storing(lambda copy: copy.wait())


def _dot(left: Array, right: Array, left_axis: int, right_axis: int) -> Array:
    dimensions = (((left_axis,), (right_axis,)), ((), ()))
    return jax.lax.dot_general(left, right, dimensions, preferred_element_type=jnp.float32)
