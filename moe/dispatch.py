"""Tokens to experts and back, three ways with one signature.

    y[n] = sum_k weights[n, k] * expert[ids[n, k]](x[n])

where an id of `E` stands for no expert.

'dense' computes every expert on every token: the oracle. 'capacity' gives each expert `C` slots in
each sequence and drops what finds none. 'grouped' sorts assignments by expert and drops nothing.

An assignment is one (token, choice) pair; `n * K + k` is its number. A `Plan` lays assignments out
as rows. A down projection's bias counts times the assignment's weight, like all the expert returns.
"""

import functools
import math

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe.config import Activation, Dispatch
from moe.expert_mlp import ExpertBiases, weighted_hidden
from moe.few_tokens import FEW_TOKENS, chosen_experts
from moe.grouped_mlp import grouped_mlp
from moe.quantised import Kernel, dequantised
from moe.row_gather import gathered, gathered_sum, sorted_weights


@flax.struct.dataclass
class Plan:
    """Which assignment each row holds, and which row holds each assignment.

    Attributes:
        source: the assignment's number; `N * K` for a row that holds none.
        row: of each assignment; `M` for one that is masked or dropped.
    """

    source: Int[Array, 'M']
    row: Int[Array, 'N K']


@jax.custom_vjp
def spread(x: Float[Array, 'N D'], plan: Plan) -> Float[Array, 'M D']:
    """Copies each token to the rows of its assignments; rows without one are zero.

    Rows of slots, which are not as many as assignments, are left to XLA on every platform.

    Its transpose is `collect`: a gather too, where autodiff would make a scatter-add.
    """
    token = plan.source // plan.row.shape[1]
    if plan.source.size == plan.row.size:
        return gathered(x, token)
    return x.at[token].get(mode='fill', fill_value=0)


@jax.custom_vjp
def collect(rows: Float[Array, 'M D'], plan: Plan) -> Float[Array, 'N D']:
    """Sums the rows of each token's assignments, in float32; its transpose is `spread`."""
    if plan.source.size == plan.row.size:
        return gathered_sum(rows, plan.row)
    found = rows.at[plan.row].get(mode='fill', fill_value=0)
    return found.sum(axis=1, dtype=jnp.float32).astype(rows.dtype)


spread.defvjp(lambda x, plan: (spread(x, plan), plan), lambda plan, g: (collect(g, plan), None))
collect.defvjp(lambda y, plan: (collect(y, plan), plan), lambda plan, g: (spread(g, plan), None))


def spread_weights(weights: Float[Array, 'N K'], plan: Plan) -> Float[Array, 'M 1']:
    """Copies each assignment's weight to its row; rows without one are zero."""
    assignments = Plan(plan.source, plan.row.reshape(-1, 1))
    return spread(weights.reshape(-1, 1), assignments)


def sort_by_group(
    groups: Int[Array, 'N K'], num_groups: int
) -> tuple[Plan, Int[Array, 'num_groups']]:
    """Orders assignments by group, and within a group by token, then by choice.

    Args:
        groups: of each assignment; `num_groups` for one that takes no part.
        num_groups: how many there are.

    Returns:
        The plan of `M = N * K` rows, and the rows of each group. Rows past the last group hold
        nothing.
    """
    flat = groups.reshape(-1)
    number = jnp.arange(flat.size, dtype=jnp.int32)
    ordered, order = jax.lax.sort((flat, number), num_keys=1, is_stable=True)
    ends = jnp.searchsorted(ordered, jnp.arange(num_groups), side='right', method='compare_all')
    sizes = jnp.diff(ends, prepend=0).astype(jnp.int32)
    row = jnp.zeros_like(order).at[order].set(number, unique_indices=True)
    source = jnp.where(number < ends[-1], order, flat.size)
    row = jnp.where(flat < num_groups, row, flat.size)
    return Plan(source, row.reshape(groups.shape)), sizes


def sequence_capacity(length: int, k: int, num_experts: int, factor: float) -> int:
    """Slots of each expert in one sequence: `C = ceil(T * K / E * factor)`, at most `T`."""
    return min(length, math.ceil(length * k / num_experts * factor))


def slot_plan(
    ids: Int[Array, 'B T K'], mask: Bool[Array, 'B T'], num_experts: int, capacity: int
) -> tuple[Plan, Float[Array, '']]:
    """Gives each expert's first `capacity` assignments of each sequence a slot.

    First come, first served: by position in the sequence, then by choice. Sequences do not compete,
    so nothing depends on how the batch is split over devices or micro-batches.

    Args:
        ids: chosen experts.
        mask: False takes no slot.
        num_experts: `E`.
        capacity: `C`.

    Returns:
        The plan, whose row `(e * B + b) * C + c` is slot c of expert e in sequence b, and how many
        unmasked assignments found no slot.
    """
    batch, length, k = ids.shape
    groups = jnp.where(mask[..., None], ids, num_experts)
    ordered, sizes = jax.vmap(functools.partial(sort_by_group, num_groups=num_experts))(groups)
    starts = jnp.cumsum(sizes, axis=1) - sizes
    sequence = jnp.arange(batch)[:, None]

    slot = jnp.arange(capacity)
    position = jnp.minimum(starts[..., None] + slot, length * k - 1).reshape(batch, -1)
    source = jnp.take_along_axis(ordered.source, position, axis=1) + sequence * length * k
    taken = (slot < sizes[..., None]).reshape(batch, -1)
    source = jnp.where(taken, source, batch * length * k)
    source = source.reshape(batch, num_experts, capacity).swapaxes(0, 1).reshape(-1)

    expert = groups.reshape(batch, -1)
    clipped = jnp.minimum(expert, num_experts - 1)
    rank = ordered.row.reshape(batch, -1) - jnp.take_along_axis(starts, clipped, axis=1)
    row = (expert * batch + sequence) * capacity + rank
    row = jnp.where((expert < num_experts) & (rank < capacity), row, source.size)
    dropped = jnp.maximum(sizes - capacity, 0).sum().astype(jnp.float32)
    return Plan(source, row.reshape(-1, k)), dropped


def slotted_mlp(
    rows: Float[Array, 'E S D'],
    weights: Float[Array, 'E S 1'],
    gate_up: Float[Array, 'E D 2 F'],
    down: Float[Array, 'E F D'],
    activation: Activation,
    biases: ExpertBiases | None = None,
) -> Float[Array, 'E S D']:
    """Computes every expert on its own `S` slots, times each slot's weight; as `grouped_mlp`."""
    both = jnp.einsum('esd,edf->esf', rows, gate_up.reshape(*gate_up.shape[:2], -1))
    if biases is None:
        return jnp.einsum('esf,efd->esd', weighted_hidden(both, weights, activation), down)
    both += biases.gate_up.reshape(both.shape[0], 1, -1)
    out = jnp.einsum('esf,efd->esd', weighted_hidden(both, weights, activation), down)
    return out + weights.astype(out.dtype) * biases.down[:, None]


def _dense(
    x: Array,
    ids: Array,
    weights: Array,
    mask: Array,
    gate_up: Array,
    down: Array,
    activation: Activation,
    biases: ExpertBiases | None,
) -> Array:
    chosen = ids[..., None] == jnp.arange(gate_up.shape[0])
    per_expert = jnp.where(chosen, weights[..., None], 0.0).sum(axis=2)
    per_expert = jnp.where(mask[..., None], per_expert, 0.0)
    x = jnp.where(mask[..., None], x, 0)
    both = jnp.einsum('btd,edgf->btegf', x, gate_up)
    if biases is not None:
        both += biases.gate_up
    both = both.reshape(*both.shape[:3], -1)
    hidden = weighted_hidden(both, per_expert[..., None], activation)
    y = jnp.einsum('btef,efd->btd', hidden, down)
    if biases is not None:
        y += jnp.einsum('bte,ed->btd', per_expert.astype(y.dtype), biases.down)
    return y


def dispatch(
    x: Float[Array, 'B T D'],
    ids: Int[Array, 'B T K'],
    weights: Float[Array, 'B T K'],
    mask: Bool[Array, 'B T'],
    gate_up: Kernel,
    down: Kernel,
    *,
    method: Dispatch,
    activation: Activation,
    capacity_factor: float = 1.25,
    biases: ExpertBiases | None = None,
) -> tuple[Float[Array, 'B T D'], Float[Array, '']]:
    """Sends each unmasked token through its experts and sums their weighted outputs.

    Args:
        x: tokens, in the dtype of the products.
        ids: chosen experts, distinct for each token; `E` for none.
        weights: of the chosen experts, float32; differentiable.
        mask: False uses no slot and costs no product; its output and every gradient are zero.
        gate_up: gate (index 0) and up projections of every expert, [E, D, 2, F]; or quantised.
        down: down projections of every expert, [E, F, D]; or quantised.
        method: 'dense', 'capacity' or 'grouped'.
        activation: of the gate.
        capacity_factor: `C = ceil(T * K / E * capacity_factor)`, at most `T`, slots for each expert
            and sequence; used by 'capacity' alone. Earlier positions come first, then better
            choices. The output of a token is off by what it lost, so by at most

                (sum of its dropped weights) * max over its dropped experts of |expert(x)|,

            and not at all where nothing of it was dropped.
        biases: of the experts' projections; None for none.

    Returns:
        `(y, dropped)`: the outputs, in the dtype of `x`, and how many unmasked assignments found no
        slot (float32; 0 for 'dense' and 'grouped').
    """
    num_experts = gate_up.shape[0]
    tokens, flat_weights = x.reshape(-1, x.shape[-1]), weights.reshape(-1, weights.shape[-1])
    if method == 'grouped':
        groups = jnp.where(mask[..., None], ids, num_experts).reshape(flat_weights.shape)
        if len(tokens) <= FEW_TOKENS:
            operands = (tokens, groups, flat_weights, gate_up, down)
            y = chosen_experts(*operands, activation, biases).reshape(x.shape)
            return y, jnp.zeros((), jnp.float32)
        plan, sizes = sort_by_group(groups, num_experts)
        rows = spread(tokens, plan)
        row_weights = sorted_weights(flat_weights, plan.source, plan.row)
        out = grouped_mlp(rows, row_weights, gate_up, down, sizes, activation, biases)
        return collect(out, plan).reshape(x.shape), jnp.zeros((), jnp.float32)
    into, out_of = (dequantised(each, x.dtype) for each in (gate_up, down))
    if method == 'dense':
        y = _dense(x, ids, weights, mask, into, out_of, activation, biases)
        return y, jnp.zeros((), jnp.float32)
    capacity = sequence_capacity(x.shape[1], ids.shape[-1], num_experts, capacity_factor)
    plan, dropped = slot_plan(ids, mask, num_experts, capacity)
    rows = spread(tokens, plan).reshape(num_experts, -1, x.shape[-1])
    row_weights = spread_weights(flat_weights, plan).reshape(num_experts, -1, 1)
    out = slotted_mlp(rows, row_weights, into, out_of, activation, biases)
    return collect(out.reshape(-1, x.shape[-1]), plan).reshape(x.shape), dropped
