"""Experts on a mesh: tokens travel to the shard that holds their experts and back.

The batch is split over `data`, `fsdp` and `expert`; the experts over `expert`, their embed axis
over `fsdp` (gathered where used), their hidden axis over `tensor` (partial outputs are summed).
"""

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from moe.config import Activation, Dispatch
from moe.dispatch import (
    ExpertBiases,
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
from moe.exchange import AXIS, accepted_counts, exchange_bounds, exchange_rows, segment_of
from moe.quantised import Kernel, Quantised, dequantised
from moe.row_gather import sorted_weights
from moe.sharding import MESH_AXES

BATCH_AXES = ('data', 'fsdp', 'expert')
BIAS_SPECS: Any = (P('expert', None, 'tensor'), P('expert', 'fsdp'))
_varying = functools.partial(jax.lax.pcast, to='varying')


def expert_parallel_dispatch(
    x: Float[Array, 'B T D'],
    ids: Int[Array, 'B T K'],
    weights: Float[Array, 'B T K'],
    mask: Bool[Array, 'B T'],
    gate_up: Kernel,
    down: Kernel,
    *,
    mesh: Mesh,
    method: Dispatch,
    activation: Activation,
    capacity_factor: float = 1.25,
    biases: ExpertBiases | None = None,
    exchange_factor: float | None = None,
    exchange_chunks: int = 1,
) -> tuple[Float[Array, 'B T D'], Float[Array, '']]:
    """Computes `moe.dispatch.dispatch` on a mesh, with the same arguments and the same results.

    'capacity' exchanges every slot: [E, C] for each sequence. 'grouped' exchanges the assigned
    rows alone, see `moe.exchange`, into buffers for the worst load, so that nothing can overflow,
    or for `exchange_factor` times the balanced one. Where that is too little a shard takes the rows
    of the first shards, and of each the first tokens and then choices; the rest are dropped and
    counted. 'dense' computes under plain jit and exchanges nothing.

    Args:
        x, ids, weights, mask, gate_up, down, method, activation, capacity_factor, biases: as
            `dispatch`, global arrays.
        mesh: with the axes `data`, `fsdp`, `expert` and `tensor`, of any sizes.
        exchange_factor: bounds what a shard receives, as a multiple of its balanced load; None for
            the worst, `min(shards, E / K)`. Read by 'grouped', where `expert` has several shards.
        exchange_chunks: parts, of the tokens ('grouped') or of the slots ('capacity'), that are
            exchanged and computed by themselves: the exchange of one can run under the products of
            another. The results are the same, but that each part has its own bound.

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
    specs = _kernel_specs(gate_up, down)
    sharded = jax.shard_map(
        functools.partial(
            _local_dispatch,
            specs=specs,
            shards=mesh.shape['expert'],
            factor=exchange_factor,
            chunks=exchange_chunks if mesh.shape['expert'] > 1 else 1,
            **settings,
        ),
        mesh=mesh,
        in_specs=(
            *(tokens,) * 4,
            *specs,
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


def _kernel_specs(gate_up: Kernel, down: Kernel) -> tuple[Any, Any]:
    """Returns how experts lie on a mesh; the scales of one group are whole along the inputs."""

    def spec(kernel: Kernel, inputs: str, *outputs: str | None) -> Any:
        if not isinstance(kernel, Quantised):
            return P('expert', inputs, *outputs)
        by_group = inputs if kernel.scales.shape[-1] > 1 else None
        values, scales = (P('expert', *outputs, along) for along in (inputs, by_group))
        return Quantised(values, scales, kernel.outputs)  # type: ignore

    return spec(gate_up, 'fsdp', None, 'tensor'), spec(down, 'tensor', 'fsdp')


def _gathered(array: Array, spec: P) -> Array:
    """Gathers over `fsdp`, and marks the result as varying over the whole mesh."""
    if 'fsdp' in spec:
        array = jax.lax.all_gather(array, 'fsdp', axis=spec.index('fsdp'), tiled=True)
    return _varying(array, tuple(axis for axis in MESH_AXES if axis not in spec))


def _local_dispatch(
    x: Array,
    ids: Array,
    weights: Array,
    mask: Array,
    gate_up: Kernel,
    down: Kernel,
    biases: ExpertBiases | None,
    *,
    specs: tuple[Any, Any],
    shards: int,
    factor: float | None,
    chunks: int,
    method: Dispatch,
    activation: Activation,
    capacity_factor: float,
) -> tuple[Array, Array]:
    """One device's part: its tokens, its experts."""
    # A custom VJP returns what this device contributed; the transpose of the mark sums it over the
    # axis.
    x, weights = _varying((x, weights), 'tensor')
    gate_up, down = jax.tree.map(_gathered, (gate_up, down), specs)
    biases = None if biases is None else _local_biases(biases)
    num_experts = gate_up.shape[0] * shards
    tokens, flat_weights = x.reshape(-1, x.shape[-1]), weights.reshape(-1, weights.shape[-1])
    experts = (gate_up, down, biases, activation)
    if method == 'capacity':
        capacity = sequence_capacity(x.shape[1], ids.shape[-1], num_experts, capacity_factor)
        plan, dropped = slot_plan(ids, mask, num_experts, capacity)
        rows, row_weights = spread(tokens, plan), spread_weights(flat_weights, plan)
        out = collect(
            _remote_slots(rows, row_weights, *experts, shards=shards, chunks=chunks), plan
        )
    else:
        groups = jnp.where(mask[..., None], ids, num_experts).reshape(flat_weights.shape)
        remote = functools.partial(_remote_groups, shards=shards, factor=factor)
        parts = [
            remote(tokens[part], flat_weights[part], groups[part], *experts)
            for part in _chunks(tokens.shape[0], chunks)
        ]
        out = jnp.concatenate([y for y, _ in parts])
        dropped = jnp.stack([count for _, count in parts]).sum()
    y = jax.lax.psum(out, 'tensor').reshape(x.shape)
    return y, jax.lax.psum(dropped, BATCH_AXES)


def _chunks(size: int, count: int) -> Iterator[slice]:
    """Splits `size` into `count` parts, about equal and none of them empty."""
    count = min(size, count)
    edges = [size * i // count for i in range(count + 1)]
    return itertools.starmap(slice, itertools.pairwise(edges))


def _local_biases(biases: ExpertBiases) -> ExpertBiases:
    """Gathers over `fsdp`; outputs sum over `tensor`, so one shard of it has their biases."""
    down = jax.lax.all_gather(biases.down, 'fsdp', axis=1, tiled=True)
    down = jnp.where(jax.lax.axis_index('tensor') == 0, _varying(down, 'tensor'), 0)
    return ExpertBiases(_varying(biases.gate_up, ('data', 'fsdp')), _varying(down, 'data'))


def _remote_slots(
    rows: Array,
    weights: Array,
    gate_up: Kernel,
    down: Kernel,
    biases: ExpertBiases | None,
    activation: Activation,
    *,
    shards: int,
    chunks: int,
) -> Array:
    """Computes every slot on the shard that holds its expert: [E * S, D] -> [E * S, D]."""
    gate_up, down = (dequantised(each, rows.dtype) for each in (gate_up, down))
    experts, dim = gate_up.shape[:2]

    def to_experts(slots: Array) -> Array:
        return exchange(slots).swapaxes(0, 1).reshape(experts, -1, slots.shape[-1])

    slots, slot_weights = (x.reshape(shards, experts, -1, x.shape[-1]) for x in (rows, weights))
    parts = []
    for part in _chunks(slots.shape[2], chunks):
        here, weighed = (to_experts(x[:, :, part]) for x in (slots, slot_weights))
        out = slotted_mlp(here, weighed, gate_up, down, activation, biases)
        parts.append(exchange(out.reshape(experts, shards, -1, dim).swapaxes(0, 1)))
    return jnp.concatenate(parts, axis=2).reshape(-1, dim)


def _remote_groups(
    tokens: Array,
    weights: Array,
    groups: Array,
    gate_up: Kernel,
    down: Kernel,
    biases: ExpertBiases | None,
    activation: Activation,
    *,
    shards: int,
    factor: float | None,
) -> tuple[Array, Array]:
    """Computes every assignment on the shard that holds its expert, and sums each token's."""
    local = gate_up.shape[0]
    num_experts, dropped = local * shards, jnp.zeros((), jnp.float32)
    count, k = groups.shape
    bounds = exchange_bounds(count, k, num_experts, shards, factor)
    if (
        shards > 1
        and bounds.received < exchange_bounds(count, k, num_experts, shards, None).received
    ):
        groups, dropped = limited(groups, num_experts, shards, bounds.received)
    plan, sizes = sort_by_group(groups, num_experts)
    rows, row_weights = spread(tokens, plan), sorted_weights(weights, plan.source, plan.row)
    if shards == 1:
        out = grouped_mlp(rows, row_weights, gate_up, down, sizes, activation, biases)
        return collect(out, plan), dropped
    # Of every sender, receiver and expert there.
    all_sizes = jax.lax.all_gather(sizes.reshape(shards, local), AXIS)
    counts = all_sizes.sum(axis=-1)
    here = all_sizes[:, jax.lax.axis_index(AXIS)].reshape(-1)
    segment = segment_of(jnp.arange(bounds.received), here)
    expert = jnp.where(segment < here.size, segment % local, local)
    by_expert, local_sizes = sort_by_group(expert[:, None], local)
    out = grouped_mlp(
        spread(exchange_rows(rows, counts, bounds), by_expert),
        spread(exchange_rows(row_weights, counts, bounds), by_expert),
        gate_up,
        down,
        local_sizes,
        activation,
        biases,
    )
    back = exchange_rows(collect(out, by_expert), counts.T, bounds.reversed)
    return collect(back, plan), dropped


def limited(
    groups: Int[Array, 'N K'], num_experts: int, shards: int, capacity: int
) -> tuple[Int[Array, 'N K'], Float[Array, '']]:
    """Leaves out assignments to shards that have no room for them; under `shard_map`.

    Args:
        groups: the expert of each assignment; `num_experts` for one that takes no part.
        num_experts: `E`, over all shards.
        shards: how many hold `E / shards` experts each.
        capacity: rows that each of them has room for.

    Returns:
        The groups, `num_experts` for what is left out, and how many of this shard's those are.
    """
    peers = jnp.minimum(groups // (num_experts // shards), shards)
    plan, wanted = sort_by_group(peers, shards)
    accepted = accepted_counts(jax.lax.all_gather(wanted, AXIS), capacity)
    accepted = accepted[jax.lax.axis_index(AXIS)]
    peer = jnp.minimum(peers, shards - 1)
    rank = plan.row - (jnp.cumsum(wanted) - wanted)[peer]
    kept = rank < accepted[peer]
    return jnp.where(kept, groups, num_experts), (wanted - accepted).sum().astype(jnp.float32)


def exchange(buffers: Array) -> Array:
    """Sends buffer i to shard i of the `expert` axis; the result's buffer i came from shard i."""
    return jax.lax.all_to_all(buffers, AXIS, split_axis=0, concat_axis=0, tiled=True)
