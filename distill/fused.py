"""Head and divergences in one pass over chunks of tokens: no [tokens, vocab] array ever exists.

Each chunk of positions makes its student and teacher logits from the hidden states, every term's
value from them, and, where a gradient is wanted, at once the gradients in the hidden states and the
head: five matrix products a chunk with a teacher, and nothing of the width of the vocabulary
outlives it.

Over a mesh the loop runs inside `shard_map`: tokens stay where they are, the head is gathered over
`fsdp` once and stays split on `tensor`, where maxima and sums over the vocabulary are taken by
collectives of one number a token; gradients are summed over the mesh once, after the last chunk.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from distill.divergences import Targets
from distill.integrands import (
    Divergence,
    label_integrand,
    log_softmax,
    logits_gradient,
    vocabulary_sum,
)
from distill.objective import Term, metric_names
from distill.schedules import Schedule
from distill.types import DenseTargets, HiddenTargets
from moe.errors import InputError

DEFAULT_CHUNK_SIZE = 512
_TOKENS = ('data', 'fsdp', 'expert')
_VOCAB = 'tensor'

Metrics = dict[str, tuple[Float[Array, ''], Float[Array, '']]]


def fused_distillation_loss(
    hidden: Float[Array, 'B T D'],
    head: Float[Array, 'D V'],
    targets: Targets | None,
    terms: tuple[Term, ...],
    *,
    labels: Int[Array, 'B T'] | None = None,
    mask: Bool[Array, 'B T'] | None = None,
    normalizer: Float[Array, ''] | float | None = None,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, ''], Metrics]:
    """Computes `sum of weight * divergence` of the student `hidden @ head`, chunk by chunk.

    Differentiable in `hidden` and `head` alone: no gradient flows to the targets (the teacher is
    frozen), to weights or temperatures, nor from the metrics. The gradients are computed together
    with the loss when it is differentiated, and not at all when it is not. Forward-mode
    differentiation is not defined. Products run in the promoted dtype of their inputs and
    accumulate in float32.

    Args:
        hidden: the student's last hidden states; positions that are masked may hold anything.
        head: the student's output head.
        targets: the teacher; None where all terms are cross-entropy. The logits of `HiddenTargets`
            are made chunk by chunk too. Same vocabulary width as `head`.
        terms: with schedules resolved (`Objective.at`); weight and temperature may be traced
            scalars.
        labels: the next tokens, for cross-entropy; arbitrary where masked.
        mask: True where the token counts; None counts all.
        normalizer: divides the sum over tokens; this mask's count if None. Micro-batches pass the
            global count, so that their losses and gradients add up to those of the whole batch.
        chunk_size: tokens a chunk, and a device where a mesh is given. A chunk takes
            max(1, chunk_size // B) positions of all B rows, so the batch stays sharded.
        mesh: axes 'data', 'fsdp', 'expert' split B, 'tensor' splits V and 'fsdp' splits D of the
            head.

    Returns:
        The loss, in nats per token counted by `normalizer`; and for each term its unweighted
        `(sum over unmasked tokens, count of unmasked tokens)`, T^2 included where the term asks for
        it, by its name (numbered from the second of a name on).

    Raises:
        InputError: for shapes that do not match, what a term needs and is not given, unresolved
            schedules, and dimensions that the mesh does not divide.

    Source: chunked head and loss with gradients in the forward pass: Liger kernel, arXiv
    2410.10989, section 3.2; vocabulary-parallel softmax: Megatron-LM, arXiv 1909.08053, section 3.
    """
    _check(hidden, head, targets, terms, labels, mask, chunk_size)
    if mesh is not None:
        _check_mesh(mesh, hidden.shape[0], *head.shape)
    if mask is None:
        mask = jnp.ones(hidden.shape[:2], bool)
    groups, temperatures = _by_temperature(terms)
    squares = [jnp.square(t.temperature) if t.scale_by_temperature_squared else 1.0 for t in terms]
    weights = [t.weight * square for t, square in zip(terms, squares, strict=True)]
    operands = _Operands(
        targets, labels, mask, jnp.stack(temperatures), jnp.stack([jnp.float32(w) for w in weights])
    )
    total, sums = _weighted_sum(_Plan(groups, chunk_size, mesh), hidden, head, operands)
    count = jnp.sum(mask, dtype=jnp.float32)
    sums = jax.lax.stop_gradient(sums)
    metrics = {name: (sums[i] * squares[i], count) for i, name in enumerate(metric_names(terms))}
    return total / (jnp.maximum(count, 1) if normalizer is None else normalizer), metrics


class _Operands(NamedTuple):
    """What the loss depends on and is not differentiated in."""

    targets: Targets | None
    labels: Int[Array, 'B T'] | None
    mask: Bool[Array, 'B T']
    temperatures: Float[Array, 'groups']
    weights: Float[Array, 'terms']


_Group = tuple[tuple[int, Divergence], ...]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is known when traced; terms of one group share a temperature and its softmax."""

    groups: tuple[_Group, ...]
    chunk_size: int
    mesh: Mesh | None


def _by_temperature(terms: tuple[Term, ...]) -> tuple[tuple[_Group, ...], list[Array]]:
    groups: list[list[tuple[int, Divergence]]] = []
    temperatures: list = []
    for index, term in enumerate(terms):
        for group, temperature in zip(groups, temperatures, strict=True):
            if _same(temperature, term.temperature):
                group.append((index, term.divergence))
                break
        else:
            groups.append([(index, term.divergence)])
            temperatures.append(term.temperature)
    return tuple(map(tuple, groups)), [jnp.float32(t) for t in temperatures]


def _same(a: object, b: object) -> bool:
    """Whether two temperatures are known to be equal when traced."""
    plain = isinstance(a, (int, float)) and isinstance(b, (int, float))
    return a is b or (plain and a == b)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted_sum(plan: _Plan, hidden: Array, head: Array, operands: _Operands):
    """Returns the weighted sum over terms and tokens, and each term's own sum over tokens."""
    sums, *_ = _over_mesh(plan, False, hidden, head, operands)
    return jnp.dot(operands.weights, sums), sums


def _weighted_sum_fwd(plan: _Plan, hidden: Array, head: Array, operands: _Operands):
    sums, d_hidden, d_head = _over_mesh(plan, True, hidden, head, operands)
    # Arrays of size 0 carry the dtypes that the gradients must come back in.
    dtypes = jnp.zeros(0, hidden.dtype), jnp.zeros(0, head.dtype)
    return (jnp.dot(operands.weights, sums), sums), (d_hidden, d_head, dtypes)


def _weighted_sum_bwd(plan: _Plan, residuals, cotangents):
    d_hidden, d_head, (hidden_like, head_like) = residuals
    scale, _ = cotangents
    return (
        (scale * d_hidden).astype(hidden_like.dtype),
        (scale * d_head).astype(head_like.dtype),
        None,
    )


_weighted_sum.defvjp(_weighted_sum_fwd, _weighted_sum_bwd)


def _over_mesh(
    plan: _Plan, differentiate: bool, hidden: Array, head: Array, operands: _Operands
) -> tuple[Array, ...]:
    """Returns the sums by term and, if `differentiate`, the gradients in hidden and head."""
    if plan.mesh is None:
        return _over_chunks(plan, differentiate, hidden, head, operands)
    rows, vocab = P(_TOKENS), P(None, _VOCAB)
    targets = operands.targets
    if isinstance(targets, HiddenTargets):
        targets = HiddenTargets(hidden=rows, head=vocab)  # type: ignore[arg-type]
    elif targets is not None:
        targets = DenseTargets(logits=P(_TOKENS, None, _VOCAB))  # type: ignore[arg-type]
    labels = None if operands.labels is None else rows
    return jax.shard_map(
        functools.partial(_on_device, plan, differentiate),
        mesh=plan.mesh,
        in_specs=(rows, vocab, _Operands(targets, labels, rows, P(), P())),  # type:
        ignore[arg-type] out_specs=(P(), rows, P('fsdp', _VOCAB)) if differentiate else (P(),),
    )(hidden, head, operands)


def _on_device(
    plan: _Plan, differentiate: bool, hidden: Array, head: Array, operands: _Operands
) -> tuple[Array, ...]:
    """Runs one device's chunks, then sums over the mesh what the devices hold parts of."""
    sums, *gradients = _over_chunks(plan, differentiate, hidden, head, operands)
    sums = jax.lax.psum(sums, _TOKENS)
    if not differentiate:
        return (sums,)
    d_hidden, d_head = gradients
    d_hidden = jax.lax.psum(d_hidden, _VOCAB)
    d_head = jax.lax.psum_scatter(d_head, 'fsdp', scatter_dimension=0, tiled=True)
    return sums, d_hidden, jax.lax.psum(d_head, ('data', 'expert'))


def _over_chunks(
    plan: _Plan, differentiate: bool, hidden: Array, head: Array, operands: _Operands
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
        d_head = jnp.einsum('btd,btv->dv', x, d_logits, preferred_element_type=dtype)
        return (carry[0] + sums, d_hidden, carry[2] + d_head), None

    zeros = [_zeros(plan, operands.weights.shape, dtype, _TOKENS)]
    if differentiate:
        everywhere = (*_TOKENS, _VOCAB)
        zeros += [_zeros(plan, x.shape, dtype, everywhere) for x in (hidden, head)]
    return jax.lax.scan(step, tuple(zeros), jnp.arange(chunks))[0]


def _take(arrays: tuple[Array, _Operands], start: Array, length: int) -> tuple[Array, _Operands]:
    """Slices positions out of everything that has them."""
    slice_ = functools.partial(
        jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=length, axis=1
    )
    hidden, operands = arrays
    targets = operands.targets
    if isinstance(targets, HiddenTargets):
        targets = targets.replace(hidden=slice_(targets.hidden))
    labels, mask = jax.tree.map(slice_, (operands.labels, operands.mask))
    return slice_(hidden), operands._replace(
        targets=jax.tree.map(slice_, targets) if isinstance(targets, DenseTargets) else targets,
        labels=labels,
        mask=mask,
    )


def _zeros(plan: _Plan, shape: tuple[int, ...], dtype: Any, axes: tuple[str, ...]) -> Array:
    """Zeros to add to, marked as differing between devices along `axes` inside `shard_map`."""
    zeros = jnp.zeros(shape, dtype)
    return zeros if plan.mesh is None else jax.lax.pcast(zeros, axes, to='varying')


def _product(hidden: Array, head: Array, dtype: Any) -> Array:
    return jnp.einsum('btd,dv->btv', hidden, head, preferred_element_type=dtype)


def _chunk(plan: _Plan, student: Float[Array, 'B t V'], chunk: _Operands) -> tuple[Array, Array]:
    """Returns each term's sum over a chunk's tokens, and the weighted sum's gradient in the logits.

    With `s = z / T`, the gradient in the logits `z` of `sum_i w_i D_i(s)` is, for terms of one
    temperature, `(h - p sum h) / T` with `h = sum_i w_i h_i`: one softmax and one correction a
    group.
    """
    axis = None if plan.mesh is None else _VOCAB
    teacher = _teacher_logits(chunk, student.dtype)
    sums = [jnp.zeros((), student.dtype)] * len(chunk.weights)
    gradient = jnp.zeros((), student.dtype)
    for temperature, group in zip(chunk.temperatures, plan.groups, strict=True):
        log_p = log_softmax(student / temperature, axis)
        h = jnp.zeros((), student.dtype)
        for index, divergence in group:
            if divergence.name == 'cross_entropy':
                value, slope = label_integrand(
                    log_p, _is_label(chunk.labels, log_p.shape[-1], axis)
                )
            else:
                log_q = log_softmax(teacher / temperature, axis)
                value, slope = divergence.integrand(log_p, log_q)
            tokens = vocabulary_sum(value, axis)[..., 0]
            sums[index] = jnp.sum(jnp.where(chunk.mask, tokens, 0))
            h = h + chunk.weights[index] * slope
        gradient = gradient + logits_gradient(log_p, h, axis) / temperature
    return jnp.stack(sums), jnp.where(chunk.mask[..., None], gradient, 0)


def _teacher_logits(chunk: _Operands, dtype: Any) -> Array | None:
    if isinstance(chunk.targets, HiddenTargets):
        hidden = jnp.where(chunk.mask[..., None], chunk.targets.hidden, 0)
        return _product(hidden, chunk.targets.head, dtype)
    if isinstance(chunk.targets, DenseTargets):
        return jnp.where(chunk.mask[..., None], chunk.targets.logits.astype(dtype), 0)
    return None


def _is_label(labels: Array, width: int, axis: str | None) -> Bool[Array, 'B t V']:
    """Marks the labels among the `width` entries of the vocabulary that are here."""
    first = 0 if axis is None else jax.lax.axis_index(axis) * width
    return first + jnp.arange(width) == labels[..., None]


def _check(
    hidden: Array,
    head: Array,
    targets: Targets | None,
    terms: tuple[Term, ...],
    labels: Array | None,
    mask: Array | None,
    chunk_size: int,
) -> None:
    B, T, D = hidden.shape
    V = head.shape[-1]
    _require(
        len(head.shape) == 2 and head.shape[0] == D, f'a head of [D, V] with D={D}', head.shape
    )
    for name, tokens in (('labels', labels), ('a mask', mask)):
        if tokens is not None:
            _require(tokens.shape == (B, T), f'{name} of [B, T] = {(B, T)}', tokens.shape)
    _require(chunk_size >= 1, 'a chunk_size of 1 or more', chunk_size)
    for term in terms:
        if term.needs_teacher:
            _require(targets is not None, f'targets for {term.name}', None)
        else:
            _require(labels is not None, f'labels for {term.name}', None)
        unresolved = isinstance(term.weight, Schedule) or isinstance(term.temperature, Schedule)
        _require(not unresolved, 'terms at a step (Objective.at resolves schedules)', term)
    if targets is not None:
        if isinstance(targets, HiddenTargets):
            received = (*targets.hidden.shape[:2], targets.head.shape[-1])
        else:
            received = targets.logits.shape
        hint = '; pad a smaller vocabulary with -inf logits (or leave the student its width)'
        _require(received == (B, T, V), f'targets of [B, T, V] = {(B, T, V)}', received, hint)


def _check_mesh(mesh: Mesh, B: int, D: int, V: int) -> None:
    axes = (*_TOKENS, _VOCAB)
    _require(set(axes) <= set(mesh.axis_names), f'a mesh with axes {axes}', mesh.axis_names)
    rows = mesh.shape['data'] * mesh.shape['fsdp'] * mesh.shape['expert']
    divided = (('B', B, rows), ('D', D, mesh.shape['fsdp']), ('V', V, mesh.shape[_VOCAB]))
    for name, size, parts in divided:
        _require(size % parts == 0, f'{name} to be a multiple of {parts} on this mesh', size)


def _require(condition: bool, required: str, received: object, hint: str = '') -> None:
    if not condition:
        raise InputError(f'The fused loss needs {required}; received {received}{hint}.')
