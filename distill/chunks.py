"""The loop over chunks of tokens behind `fused.py`, on one device and on a mesh.

Nothing of [tokens, vocab] outlives a chunk. Over a mesh the loop runs inside `shard_map`: tokens
stay where they are, the head is gathered over `fsdp` once and stays split on `tensor`, where maxima
and sums over the vocabulary are taken by collectives of one number a token; gradients are summed
over the mesh once, after the last chunk.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from distill.algebra import Divergence, Teacher, Weighed, values_and_gradient
from distill.pairs import Targets
from distill.types import DenseTargets, HiddenTargets
from distill.views import standardized

TOKENS = ('data', 'fsdp', 'expert')
VOCAB = 'tensor'


class Operands(NamedTuple):
    """What the loss depends on and is not differentiated in."""

    targets: Targets | None
    labels: Int[Array, 'B T'] | None
    mask: Bool[Array, 'B T']
    token_weights: Float[Array, 'B T terms'] | None
    temperatures: Float[Array, 'groups']
    weights: Float[Array, 'terms']
    parameters: Float[Array, 'terms']


@dataclasses.dataclass(frozen=True)
class Group:
    """Terms, by index, that share the scale of the logits and so their softmax."""

    terms: tuple[tuple[int, Divergence], ...]
    standardize: bool


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known when traced."""

    groups: tuple[Group, ...]
    chunk_size: int
    mesh: Mesh | None


def over_mesh(
    plan: Plan, differentiate: bool, hidden: Array, head: Array, operands: Operands
) -> tuple[Array, ...]:
    """Returns the sums by term and, if `differentiate`, the gradients in hidden and head."""
    if plan.mesh is None:
        return _over_chunks(plan, differentiate, hidden, head, operands)
    rows, vocab = P(TOKENS), P(None, VOCAB)
    targets: Any = jax.tree.map(lambda _: rows, operands.targets)
    if isinstance(operands.targets, HiddenTargets):
        targets = HiddenTargets(hidden=rows, head=vocab)  # type: ignore
    elif isinstance(operands.targets, DenseTargets):
        targets = DenseTargets(logits=P(TOKENS, None, VOCAB))  # type: ignore
    labels: Any = None if operands.labels is None else rows
    by_token: Any = None if operands.token_weights is None else rows
    specs: Any = Operands(targets, labels, rows, by_token, P(), P(), P())  # type: ignore
    return jax.shard_map(
        functools.partial(_on_device, plan, differentiate),
        mesh=plan.mesh,
        in_specs=(rows, vocab, specs),
        out_specs=(P(), rows, P('fsdp', VOCAB)) if differentiate else (P(),),
    )(hidden, head, operands)


def _on_device(
    plan: Plan, differentiate: bool, hidden: Array, head: Array, operands: Operands
) -> tuple[Array, ...]:
    """Runs one device's chunks, then sums over the mesh what the devices hold parts of."""
    sums, *gradients = _over_chunks(plan, differentiate, hidden, head, operands)
    sums = jax.lax.psum(sums, TOKENS)
    if not differentiate:
        return (sums,)
    d_hidden, d_head = gradients
    d_hidden = jax.lax.psum(d_hidden, VOCAB)
    d_head = jax.lax.psum_scatter(d_head, 'fsdp', scatter_dimension=0, tiled=True)
    return sums, d_hidden, jax.lax.psum(d_head, ('data', 'expert'))


def _over_chunks(
    plan: Plan, differentiate: bool, hidden: Array, head: Array, operands: Operands
) -> tuple[Array, ...]:
    """Scans over chunks of one device's positions, adding up in place."""
    B, T, _ = hidden.shape
    chunks = -(-T // max(1, plan.chunk_size // B))
    length = -(-T // chunks)
    dtype = jnp.promote_types(jnp.result_type(hidden, head), jnp.float32)

    def step(carry: tuple[Array, ...], index: Array) -> tuple[tuple[Array, ...], None]:
        # The last chunk starts early enough to end at T; what it would count twice is masked.
        start = jnp.minimum(index * length, T - length)
        x, chunk = _take((hidden, operands), start, length)
        fresh = start + jnp.arange(length) >= index * length
        chunk = chunk._replace(mask=chunk.mask & fresh)
        x = jnp.where(chunk.mask[..., None], x, 0)
        sums, d_logits = _chunk(plan, _product(x, head, dtype), chunk)
        if not differentiate:
            return (carry[0] + sums,), None
        d_logits = d_logits.astype(jnp.result_type(hidden, head))
        d_x = jnp.einsum('btv,dv->btd', d_logits, head, preferred_element_type=dtype)
        d_x = d_x + jax.lax.dynamic_slice_in_dim(carry[1], start, length, axis=1)
        d_hidden = jax.lax.dynamic_update_slice_in_dim(carry[1], d_x, start, axis=1)
        return (carry[0] + sums, d_hidden, _add_product(carry[2], x, d_logits)), None

    zeros = [_zeros(plan, operands.weights.shape, dtype, TOKENS)]
    if differentiate:
        everywhere = (*TOKENS, VOCAB)
        zeros += [_zeros(plan, x.shape, dtype, everywhere) for x in (hidden, head)]
    return jax.lax.scan(step, tuple(zeros), jnp.arange(chunks))[0]


def _add_product(
    total: Float[Array, 'D V'], x: Float[Array, 'B t D'], d_logits: Float[Array, 'B t V']
) -> Float[Array, 'D V']:
    """Adds `x^T d_logits` in place, in parts that are no larger than the chunk's logits."""
    D, tokens = x.shape[-1], x.shape[0] * x.shape[1]
    rows = max(size for size in range(1, min(D, tokens) + 1) if D % size == 0)

    def add(total: Array, part: Array) -> tuple[Array, None]:
        start = part * rows
        columns = jax.lax.dynamic_slice_in_dim(x, start, rows, axis=-1)
        product = jnp.einsum('btd,btv->dv', columns, d_logits, preferred_element_type=total.dtype)
        product = product + jax.lax.dynamic_slice_in_dim(total, start, rows)
        return jax.lax.dynamic_update_slice_in_dim(total, product, start, axis=0), None

    if rows == D:
        product = jnp.einsum('btd,btv->dv', x, d_logits, preferred_element_type=total.dtype)
        return total + product
    return jax.lax.scan(add, total, jnp.arange(D // rows))[0]


def _take(arrays: tuple[Array, Operands], start: Array, length: int) -> tuple[Array, Operands]:
    """Slices positions out of everything that has them."""
    slice_ = functools.partial(
        jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=length, axis=1
    )
    hidden, operands = arrays
    targets = operands.targets
    if isinstance(targets, HiddenTargets):
        targets = dataclasses.replace(targets, hidden=slice_(targets.hidden))
    else:
        targets = jax.tree.map(slice_, targets)
    labels, mask, by_token = jax.tree.map(
        slice_, (operands.labels, operands.mask, operands.token_weights)
    )
    operands = operands._replace(targets=targets, labels=labels, mask=mask, token_weights=by_token)
    return slice_(hidden), operands


def _zeros(plan: Plan, shape: tuple[int, ...], dtype: Any, axes: tuple[str, ...]) -> Array:
    """Zeros to add to, marked as differing between devices along `axes` inside `shard_map`."""
    zeros = jnp.zeros(shape, dtype)
    return zeros if plan.mesh is None else jax.lax.pcast(zeros, axes, to='varying')


def _product(hidden: Array, head: Array, dtype: Any) -> Array:
    return jnp.einsum('btd,dv->btv', hidden, head, preferred_element_type=dtype)


def _chunk(plan: Plan, student: Float[Array, 'B t V'], chunk: Operands) -> tuple[Array, Array]:
    """Returns each term's sum over a chunk's tokens, and the weighted sum's gradient in the logits.

    With `s = z / T`, the gradient in the logits `z` of `sum_i w_i D_i(s)` is that in `s`, over T:
    one softmax and one correction for all terms of a temperature.
    """
    axis = None if plan.mesh is None else VOCAB
    teacher = _teacher(chunk, student.dtype)
    is_label = None if chunk.labels is None else _is_label(chunk.labels, student.shape[-1], axis)
    sums = [jnp.zeros((), student.dtype)] * len(chunk.weights)
    gradient = jnp.zeros((), student.dtype)
    for temperature, group in zip(chunk.temperatures, plan.groups, strict=True):
        terms = [Weighed(d, chunk.parameters[i], _weight(chunk, i)) for i, d in group.terms]
        logits, theirs, pull = _scaled(student, teacher, temperature, group.standardize, axis)
        values, slope = values_and_gradient(terms, logits, theirs, is_label, axis)
        for (index, _), value in zip(group.terms, values, strict=True):
            sums[index] = _sum(chunk, index, value)
        gradient = gradient + pull(slope)
    return jnp.stack(sums), jnp.where(chunk.mask[..., None], gradient, 0)


def _weight(chunk: Operands, index: int) -> Array:
    """A term's weight, or that of each token's entries."""
    weight = chunk.weights[index]
    return weight if chunk.token_weights is None else weight * chunk.token_weights[..., index, None]


def _sum(chunk: Operands, index: int, values: Float[Array, 'B t']) -> Array:
    """Adds up a term's values; a token without weight adds nothing, even where it is infinite."""
    if chunk.token_weights is not None:
        weights = chunk.token_weights[..., index]
        values = jnp.where(weights == 0, 0, weights * values)
    return jnp.sum(jnp.where(chunk.mask, values, 0))


def _scaled(
    student: Array, teacher: Teacher, temperature: Array, standardize: bool, axis: str | None
) -> tuple[Array, Teacher, Callable[[Array], Array]]:
    """Returns logits as the terms compare them, and how a gradient in the student's goes back."""
    if not standardize:
        pull = lambda slope: slope / temperature  # noqa: E731
    else:
        view = standardized(student, axis)
        student, pull = view.entries, lambda slope: view.pull(slope / temperature)
    if isinstance(teacher, DenseTargets):
        logits = standardized(teacher.logits, axis).entries if standardize else teacher.logits
        teacher = DenseTargets(logits / temperature)
    return student / temperature, teacher, pull


def _teacher(chunk: Operands, dtype: Any) -> Teacher:
    """The teacher as logits, top ids or samples; zeros where masked, whatever stood there."""
    targets: Any = chunk.targets
    if isinstance(targets, HiddenTargets):
        hidden = jnp.where(chunk.mask[..., None], targets.hidden, 0)
        return DenseTargets(_product(hidden, targets.head, dtype))

    def kept(x: Array) -> Array:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        mask = chunk.mask if x.ndim == 2 else chunk.mask[..., None]
        return jnp.where(mask, x.astype(dtype), 0)

    return jax.tree.map(kept, targets)


def _is_label(labels: Array, width: int, axis: str | None) -> Bool[Array, 'B t V']:
    """Marks the labels among the `width` entries of the vocabulary that are here."""
    first = 0 if axis is None else jax.lax.axis_index(axis) * width
    return first + jnp.arange(width) == labels[..., None]
