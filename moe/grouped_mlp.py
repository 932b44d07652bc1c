"""The experts' gated MLPs over rows sorted by expert, forward and backward as one.

Of the hidden layer only the two projections before the activation are kept for the backward pass.
On TPU one kernel each way computes the whole MLP of a window of rows, see `moe.tpu_mlp`: weights
are read once. On GPU, and of operands that the kernels are not for (`moe.tpu_grouped.fits`), each
product is a grouped one. On CPU one loop over the experts computes the whole MLP of a tile, see
`moe.row_tiles`: what lies between the products stays in the caches, and each expert's gradient is
written once. Fresh memory is dear there: its pages cost more than their contents. Where experts
have few rows and no gradient is asked for, see `moe.few_rows` and `moe.compiled_rows`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe import compiled_rows, tpu_grouped
from moe.config import Activation
from moe.expert_mlp import ExpertBiases, weighted_hidden
from moe.few_rows import few_rows_mlp, tile_size
from moe.grouped_matmul import (
    accumulator,
    dot,
    dot_rows,
    dot_transposed,
    grouped_matmul,
    grouped_outer,
    ragged,
    ragged_transposed,
)
from moe.quantised import Kernel, Quantised, dequantised, joined
from moe.row_tiles import over_tiles, put_rows, rows_at

Gradients = tuple[Array, Array, Array, Array]
Kept = tuple[Array, Array | None]


def grouped_mlp(
    rows: Float[Array, 'M D'],
    weights: Float[Array, 'M 1'],
    gate_up: Kernel,
    down: Kernel,
    group_sizes: Int[Array, 'E'],
    activation: Activation,
    biases: ExpertBiases | None = None,
) -> Float[Array, 'M D']:
    """Computes each row's expert, times the row's weight.

    The weight multiplies the hidden activations: linear, so the same, and its gradient needs no
    expert output. Under `shard_map` all arrays must vary over the same mesh axes.

    Args:
        rows: sorted by expert.
        weights: of each row.
        gate_up: gate (index 0) and up projections, [E, D, 2, F]; or quantised, without a gradient.
        down: down projections, [E, F, D]; or quantised.
        group_sizes: rows of each expert.
        activation: of the gate.
        biases: of the projections; None for none.

    Returns:
        Weighted expert outputs; zero for rows past the last group.
    """
    both = joined(gate_up)
    if biases is not None:
        both, down = (dequantised(each, rows.dtype) for each in (both, down))
        return _biased_mlp(activation, rows, weights, both, down, group_sizes, biases)
    if isinstance(both, Quantised):
        return _output(activation, False, rows, weights, both, down, group_sizes)[0]
    return _mlp(activation, rows, weights, both, down, group_sizes)


def _biased_mlp(
    activation: Activation,
    rows: Array,
    weights: Array,
    gate_up: Array,
    down: Array,
    group_sizes: Array,
    biases: ExpertBiases,
) -> Array:
    # A grouped product with one column: its transpose sums each group, where that of a gather of
    # the groups' biases would be a scatter-add.
    column = weights.astype(rows.dtype)
    both = grouped_matmul(rows, gate_up, group_sizes)
    both += grouped_matmul(
        jnp.ones_like(column), biases.gate_up.reshape(down.shape[0], 1, -1), group_sizes
    )
    out = grouped_matmul(weighted_hidden(both, weights, activation), down, group_sizes)
    return out + grouped_matmul(column, biases.down[:, None], group_sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mlp(activation: Activation, *operands: Array) -> Array:
    """Computes the MLP of (rows, weights, gate_up [E, D, 2 F], down, group sizes)."""
    return _output(activation, False, *operands)[0]


def _output(activation: Activation, keep: bool, *operands: Kernel) -> tuple[Array, Array | None]:
    """Returns the output, and where it is to be kept what the activation is computed from."""
    rows: Any = operands[0]
    gate_up, down = operands[2:4]
    size = tile_size(rows.shape[0], down.shape[0])
    compiled = compiled_rows.fits(rows, gate_up, down)

    def few_rows(*operands: Any) -> tuple[Array, None]:
        assert size is not None
        if compiled:
            return compiled_rows.compiled_rows_mlp(activation, *operands), None
        return few_rows_mlp(activation, *operands, size=size), None

    many_rows = functools.partial(_looped, activation, keep)
    on_tpu = tpu_grouped.forward if tpu_grouped.fits(rows, gate_up, down) else _ragged
    return jax.lax.platform_dependent(
        *operands,
        cpu=many_rows if keep or size is None else few_rows,
        tpu=functools.partial(on_tpu, activation, keep),
        default=functools.partial(_ragged, activation, keep),
    )


def _forward(activation: Activation, *operands: Array) -> tuple[Array, tuple[Array | None, ...]]:
    out, both = _output(activation, True, *operands)
    return out, (*operands, both)


def _backward(
    activation: Activation, residuals: tuple[Array, ...], cotangent: Array
) -> tuple[Array | None, ...]:
    rows, _, gate_up, down, *_ = residuals
    on_tpu = tpu_grouped.backward if tpu_grouped.fits(rows, gate_up, down) else _ragged_backward
    gradients = jax.lax.platform_dependent(
        *residuals,
        cotangent,
        cpu=functools.partial(_looped_backward, activation),
        tpu=functools.partial(on_tpu, activation),
        default=functools.partial(_ragged_backward, activation),
    )
    return *(g.astype(of.dtype) for g, of in zip(gradients, residuals, strict=False)), None


_mlp.defvjp(_forward, _backward)


def _ragged(
    activation: Activation,
    keep: bool,
    rows: Array,
    weights: Array,
    gate_up: Kernel,
    down: Kernel,
    group_sizes: Array,
) -> tuple[Array, Array | None]:
    gate_up, down = (dequantised(each, rows.dtype) for each in (gate_up, down))
    both = ragged(rows, gate_up, group_sizes)
    out = ragged(weighted_hidden(both, weights, activation), down, group_sizes)
    return out, both if keep else None


def _ragged_backward(
    activation: Activation,
    rows: Array,
    weights: Array,
    gate_up: Array,
    down: Array,
    group_sizes: Array,
    both: Array,
    cotangent: Array,
) -> Gradients:
    d_hidden = ragged_transposed(cotangent, down, group_sizes)
    hidden, d_both, d_weights = _hidden_gradients(activation, both, weights, d_hidden)
    return (
        ragged_transposed(d_both, gate_up, group_sizes),
        d_weights,
        grouped_outer(rows, d_both, group_sizes, gate_up.dtype),
        grouped_outer(hidden, cotangent, group_sizes, down.dtype),
    )


def _hidden_gradients(
    activation: Activation, both: Array, weights: Array, d_hidden: Array
) -> tuple[Array, Array, Array]:
    """Returns the hidden activations and the gradients of what they are computed from."""
    compute = functools.partial(weighted_hidden, activation=activation)
    hidden, vjp = jax.vjp(compute, both, weights)
    return hidden, *vjp(d_hidden.astype(hidden.dtype))


def _looped(
    activation: Activation,
    keep: bool,
    rows: Array,
    weights: Array,
    gate_up: Kernel,
    down: Kernel,
    group_sizes: Array,
) -> tuple[Array, Array | None]:
    num_rows, num_groups = rows.shape[0], group_sizes.shape[0]

    def expert(carry: Kept, inputs: tuple[Kernel, ...]) -> tuple[Kept, None]:
        *matrices, start, end = inputs
        # Of quantised ones one expert at a time becomes floats.
        expert_gate_up, expert_down = (dequantised(each, rows.dtype) for each in matrices)

        def tile(carry: Kept, first: Array, size: int, valid: Array, is_first: bool) -> Kept:
            out, both = carry
            before = dot(rows_at(rows, first, size), expert_gate_up).astype(rows.dtype)
            hidden = weighted_hidden(before, rows_at(weights, first, size), activation)
            after = dot(hidden, expert_down)
            both = None if both is None else put_rows(both, before, first, valid)
            return put_rows(out, after, first, valid), both

        bounds = {'start': start, 'end': end, 'num_rows': num_rows, 'num_groups': num_groups}
        return over_tiles(tile, carry, **bounds), None

    both = jnp.zeros_like(rows, shape=(num_rows, gate_up.shape[2])) if keep else None
    carry = (jnp.zeros_like(rows), both)
    ends = jnp.cumsum(group_sizes)
    return jax.lax.scan(expert, carry, (gate_up, down, ends - group_sizes, ends))[0]


def _looped_backward(
    activation: Activation,
    rows: Array,
    weights: Array,
    gate_up: Array,
    down: Array,
    group_sizes: Array,
    both: Array,
    cotangent: Array,
) -> Gradients:
    num_rows, num_groups = rows.shape[0], group_sizes.shape[0]

    def expert(carry: Gradients, inputs: tuple[Array, ...]) -> tuple[Gradients, tuple]:
        expert_gate_up, expert_down, start, end = inputs

        def tile(
            carry: Gradients, first: Array, size: int, valid: Array, is_first: bool
        ) -> Gradients:
            d_rows, d_weights, d_gate_up, d_down = carry
            # Rows of others are zero from here on, and so is all that they add to the sums below.
            by = jnp.where(valid, rows_at(d_rows, first, size), 0)
            hidden, d_both, d_row_weights = _hidden_gradients(
                activation,
                rows_at(both, first, size),
                rows_at(weights, first, size),
                dot_transposed(by, expert_down),
            )
            to_gate_up, to_down = dot_rows(rows_at(rows, first, size), d_both), dot_rows(hidden, by)
            return (
                put_rows(d_rows, dot_transposed(d_both, expert_gate_up), first, valid),
                put_rows(d_weights, d_row_weights, first, valid),
                to_gate_up if is_first else d_gate_up + to_gate_up,
                to_down if is_first else d_down + to_down,
            )

        bounds = {'start': start, 'end': end, 'num_rows': num_rows, 'num_groups': num_groups}
        carry = over_tiles(tile, carry, **bounds)
        return carry, (carry[2].astype(gate_up.dtype), carry[3].astype(down.dtype))

    # A tile's gradients take the place of its cotangents, which no other tile reads: fresh memory
    # would cost more. The first tile of each expert overwrites what the one before left in the
    # last two.
    wide = accumulator(rows.dtype)
    ends = jnp.cumsum(group_sizes)
    held = jnp.arange(num_rows)[:, None] < ends[-1]
    carry = (
        jnp.where(held, cotangent, 0),
        jnp.zeros_like(weights),
        jnp.zeros_like(gate_up, wide, gate_up.shape[1:]),
        jnp.zeros_like(down, wide, down.shape[1:]),
    )
    (d_rows, d_weights, *_), (d_gate_up, d_down) = jax.lax.scan(
        expert, carry, (gate_up, down, ends - group_sizes, ends)
    )
    return d_rows, d_weights, d_gate_up, d_down
