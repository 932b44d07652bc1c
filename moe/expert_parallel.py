"""Experts on a mesh: tokens travel to the shard that holds their experts and back.

The batch is split over `data`, `fsdp` and `expert`; the experts over `expert`, their embed axis
over `fsdp` (gathered where used), their hidden axis over `tensor` (partial outputs are summed).
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from moe.config import Activation, Dispatch
from moe.dispatch import (
    ExpertBiases,
    Plan,
    collect,
    dispatch,
    grouped_mlp,
    sequence_capacity,
    slot_plan,
    slotted_mlp,
    sort_by_group,
    spread,
    spread_weights,
)
from moe.errors import InputError

BATCH_AXES = ('data', 'fsdp', 'expert')
BIAS_SPECS: Any = (P('expert', None, 'tensor'), P('expert', 'fsdp'))
_varying = functools.partial(jax.lax.pcast, to='varying')


def expert_parallel_dispatch(
    x: Float[Array, 'B T D'],
    ids: Int[Array, 'B T K'],
    weights: Float[Array, 'B T K'],
    mask: Bool[Array, 'B T'],
    gate_up: Float[Array, 'E D 2 F'],
    down: Float[Array, 'E F D'],
    *,
    mesh: Mesh,
    method: Dispatch,
    activation: Activation,
    capacity_factor: float = 1.25,
    biases: ExpertBiases | None = None,
) -> tuple[Float[Array, 'B T D'], Float[Array, '']]:
    """Computes `moe.dispatch.dispatch` on a mesh, with the same arguments and the same results.

    'capacity' exchanges every slot: [E, C] for each sequence. 'grouped' exchanges buffers for the
    worst case: a token chooses distinct experts, so at most `N * min(K, E / shards)` rows of a
    shard's `N` tokens go to one other shard; nothing can overflow. 'dense' computes under plain jit
    and exchanges nothing.

    Args:
        x, ids, weights, mask, gate_up, down, method, activation, capacity_factor, biases: as
            `dispatch`, global arrays.
        mesh: with the axes `data`, `fsdp`, `expert` and `tensor`, of any sizes.

    Returns:
        `(y, dropped)`, `dropped` summed over all shards.

    Raises:
        InputError: where a mesh axis does not divide the batch, the experts, `D` or `F`.
    """
    check_divisible(
        mesh, batch=x.shape[0], experts=down.shape[0], embed=down.shape[2], mlp=down.shape[1]
    )
    settings = {'method': method, 'activation': activation, 'capacity_factor': capacity_factor}
    if method == 'dense':
        return dispatch(x, ids, weights, mask, gate_up, down, biases=biases, **settings)
    tokens = P(BATCH_AXES)
    sharded = jax.shard_map(
        functools.partial(_local_dispatch, shards=mesh.shape['expert'], **settings),
        mesh=mesh,
        in_specs=(
            *(tokens,) * 4,
            P('expert', 'fsdp', None, 'tensor'),
            P('expert', 'tensor', 'fsdp'),
            None if biases is None else ExpertBiases(*BIAS_SPECS),
        ),
        out_specs=(tokens, P()),
    )
    return sharded(x, ids, weights, mask, gate_up, down, biases)


def check_divisible(mesh: Mesh, *, batch: int, experts: int, embed: int, mlp: int) -> None:
    """Raises an `InputError` where a mesh axis does not divide what it splits."""
    for name, size, axes in (
        ('the batch', batch, BATCH_AXES),
        ('the number of experts', experts, ('expert',)),
        ('the model width', embed, ('fsdp',)),
        ('the expert width', mlp, ('tensor',)),
    ):
        shards = math.prod(mesh.shape[axis] for axis in axes)
        if size % shards:
            raise InputError(
                f'{name} must be a multiple of {shards}, the devices along {" x ".join(axes)}; '
                f'received {size}. Change it, or choose another mesh.'
            )


def _local_dispatch(
    x: Array,
    ids: Array,
    weights: Array,
    mask: Array,
    gate_up: Array,
    down: Array,
    biases: ExpertBiases | None,
    *,
    shards: int,
    method: Dispatch,
    activation: Activation,
    capacity_factor: float,
) -> tuple[Array, Array]:
    """One device's part: its tokens, its experts."""
    gate_up = jax.lax.all_gather(gate_up, 'fsdp', axis=1, tiled=True)
    down = jax.lax.all_gather(down, 'fsdp', axis=2, tiled=True)
    # A custom VJP returns what this device contributed; the transpose of the mark sums it over the
    # axis.
    x, weights = _varying((x, weights), 'tensor')
    gate_up, down = _varying((gate_up, down), 'data')
    biases = None if biases is None else _local_biases(biases)
    num_experts = gate_up.shape[0] * shards
    tokens, flat_weights = x.reshape(-1, x.shape[-1]), weights.reshape(-1, weights.shape[-1])
    if method == 'capacity':
        capacity = sequence_capacity(x.shape[1], ids.shape[-1], num_experts, capacity_factor)
        plan, dropped = slot_plan(ids, mask, num_experts, capacity)
        compute = functools.partial(_remote_slots, shards=shards)
    else:
        groups = jnp.where(mask[..., None], ids, num_experts).reshape(flat_weights.shape)
        plan, sizes = peer_plan(groups, num_experts, shards)
        dropped = jnp.zeros((), jnp.float32)
        compute = functools.partial(_remote_groups, sizes=sizes, shards=shards)
    rows, row_weights = spread(tokens, plan), spread_weights(flat_weights, plan)
    out = compute(rows, row_weights, gate_up, down, biases, activation=activation)
    out = collect(out, plan)
    y = jax.lax.psum(out, 'tensor').reshape(x.shape)
    return y, jax.lax.psum(dropped, BATCH_AXES)


def _local_biases(biases: ExpertBiases) -> ExpertBiases:
    """Gathers over `fsdp`; outputs sum over `tensor`, so one shard of it has their biases."""
    down = jax.lax.all_gather(biases.down, 'fsdp', axis=1, tiled=True)
    down = jnp.where(jax.lax.axis_index('tensor') == 0, _varying(down, 'tensor'), 0)
    return ExpertBiases(_varying(biases.gate_up, ('data', 'fsdp')), _varying(down, 'data'))


def _remote_slots(
    rows: Array,
    weights: Array,
    gate_up: Array,
    down: Array,
    biases: ExpertBiases | None,
    *,
    activation: Activation,
    shards: int,
) -> Array:
    """Computes every slot on the shard that holds its expert: [E * S, D] -> [E * S, D]."""
    experts, dim = gate_up.shape[:2]

    def to_experts(rows: Array) -> Array:
        slots = exchange(rows.reshape(shards, experts, -1, rows.shape[-1]))
        return slots.swapaxes(0, 1).reshape(experts, -1, rows.shape[-1])

    out = slotted_mlp(to_experts(rows), to_experts(weights), gate_up, down, activation, biases)
    return exchange(out.reshape(experts, shards, -1, dim).swapaxes(0, 1)).reshape(-1, dim)


def peer_plan(
    groups: Int[Array, 'N K'], num_experts: int, shards: int
) -> tuple[Plan, Int[Array, 'shards local']]:
    """Lays assignments out as a buffer for each shard, each sorted by expert.

    Args:
        groups: the expert of each assignment; `num_experts` for one that takes no part.
        num_experts: `E`, over all shards.
        shards: how many hold `E / shards` experts each.

    Returns:
        The plan of `shards * R` rows, `R = N * min(K, E / shards)`, of which shard s receives rows
        `s * R` on, and the rows for each of its experts.
    """
    ordered, sizes = sort_by_group(groups, num_experts)
    tokens, k = groups.shape
    local = num_experts // shards
    bound = tokens * min(k, local)
    sizes = sizes.reshape(shards, local)
    totals = sizes.sum(axis=1)
    starts = jnp.cumsum(totals) - totals

    offset = jnp.arange(bound)
    position = jnp.minimum(starts[:, None] + offset, tokens * k - 1)
    source = jnp.where(offset < totals[:, None], ordered.source[position], tokens * k)
    peer = jnp.minimum(groups // local, shards - 1)
    row = ordered.row - starts[peer] + peer * bound
    row = jnp.where(groups < num_experts, row, shards * bound)
    return Plan(source.reshape(-1), row), sizes


def _remote_groups(
    rows: Array,
    weights: Array,
    gate_up: Array,
    down: Array,
    biases: ExpertBiases | None,
    *,
    activation: Activation,
    sizes: Array,
    shards: int,
) -> Array:
    """Computes every row on the shard that holds its expert: [shards * R, D] -> the same."""
    if shards == 1:
        return grouped_mlp(rows, weights, gate_up, down, sizes[0], activation, biases)
    num_local = gate_up.shape[0]

    def swap(rows: Array) -> Array:
        return exchange(rows.reshape(shards, -1, rows.shape[-1])).reshape(rows.shape)

    ends = jnp.cumsum(exchange(sizes), axis=1)
    offset = jnp.arange(rows.shape[0] // shards)
    groups = (offset[None, :, None] >= ends[:, None, :]).sum(axis=-1)
    plan, local_sizes = sort_by_group(groups.reshape(-1, 1), num_local)
    out = grouped_mlp(
        spread(swap(rows), plan),
        spread(swap(weights), plan),
        gate_up,
        down,
        local_sizes,
        activation,
        biases,
    )
    return swap(collect(out, plan))


def exchange(buffers: Array) -> Array:
    """Sends buffer i to shard i of the `expert` axis; the result's buffer i came from shard i."""
    return jax.lax.all_to_all(buffers, 'expert', split_axis=0, concat_axis=0, tiled=True)
