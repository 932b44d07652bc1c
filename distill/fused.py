"""Head and divergences in one pass over chunks of tokens: no [tokens, vocab] array ever exists.

Each chunk of positions makes its student and teacher logits from the hidden states, every term's
value from them, and, where a gradient is wanted, at once the gradients in the hidden states and the
head: five matrix products a chunk with a teacher, and nothing of the width of the vocabulary
outlives it.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from distill.chunks import TOKENS, VOCAB, Group, Operands, Plan, over_mesh
from distill.objective import Number, Term, metric_names
from distill.pairs import FORMS, Targets, require_sound
from distill.per_token import require_targets
from distill.schedules import Schedule
from distill.types import SampledTargets, TopKTargets
from moe.errors import InputError

DEFAULT_CHUNK_SIZE = 512

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
    token_weights: Float[Array, 'B T terms'] | None = None,
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
        token_weights: multiplies each term's value of each token, in the loss and in the sums; None
            for 1. Not differentiated in.
        chunk_size: tokens a chunk, and a device where a mesh is given. A chunk takes
            max(1, chunk_size // B) positions of all B rows, so the batch stays sharded.
        mesh: axes 'data', 'fsdp', 'expert' split B, 'tensor' splits V and 'fsdp' splits D of the
            head.

    Returns:
        The loss, in nats per token counted by `normalizer`; and for each term its unweighted
        `(sum over unmasked tokens, count of unmasked tokens)`, T^2 included where the term asks for
        it, by its name (numbered from the second of a name on). With token weights the sum is of
        weighted values, and the count that of the weights.

    Raises:
        InputError: for shapes that do not match, what a term needs and is not given, unresolved
            schedules, and dimensions that the mesh does not divide.

    Source: chunked head and loss with gradients in the forward pass: Liger kernel, arXiv
    2410.10989, section 3.2; vocabulary-parallel softmax: Megatron-LM, arXiv 1909.08053, section 3.
    """
    _check(hidden, head, targets, terms, labels, mask, chunk_size)
    if token_weights is not None:
        required = (*hidden.shape[:2], len(terms))
        _require(
            token_weights.shape == required,
            f'token_weights of [B, T, terms] = {required}',
            token_weights.shape,
        )
    if mesh is not None:
        _check_mesh(mesh, hidden.shape[0], head.shape[0], head.shape[1])
    if mask is None:
        mask = jnp.ones(hidden.shape[:2], bool)
    dtype = jnp.promote_types(jnp.result_type(hidden, head), jnp.float32)
    groups, temperatures = _by_scale(terms)
    squares = _stack(
        [_resolved(t.temperature) ** 2 if t.scale_by_temperature_squared else 1.0 for t in terms],
        dtype,
    )
    count = jnp.sum(mask, dtype=jnp.float32)
    share = 1 / (jnp.maximum(count, 1) if normalizer is None else normalizer)
    weights = _stack([_resolved(term.weight) for term in terms], dtype) * squares
    parameters = [_resolved(term.parameter) for term in terms]
    operands = Operands(
        targets,
        labels,
        mask,
        token_weights,
        temperatures=_stack(temperatures, dtype),
        # The mean is taken in the weights: scaling the gradients afterwards would copy the head's.
        weights=weights * share,
        parameters=_stack([0.0 if number is None else number for number in parameters], dtype),
    )
    results: Any = _weighted_sum(Plan(groups, chunk_size, mesh), hidden, head, operands)
    loss, sums = results
    sums = jax.lax.stop_gradient(sums * squares)
    names = metric_names(terms, sampled=isinstance(targets, SampledTargets))
    counts = jnp.broadcast_to(count, (len(terms),))
    if token_weights is not None:
        counts = jnp.sum(jnp.where(mask[..., None], token_weights, 0), axis=(0, 1))
    return loss, {name: (sums[i], counts[i]) for i, name in enumerate(names)}


def _resolved(number: Number) -> Any:
    resolved = not isinstance(number, Schedule)
    _require(resolved, 'terms at a step (Objective.at resolves schedules)', number)
    return number


def _stack(numbers: list[Any], dtype: Any) -> Array:
    return jnp.stack([jnp.asarray(number, dtype) for number in numbers])


def _by_scale(terms: tuple[Term, ...]) -> tuple[tuple[Group, ...], list[Any]]:
    """Groups the terms, by index, whose logits are known to be scaled alike."""
    groups: list[Group] = []
    temperatures: list[Any] = []
    for index, term in enumerate(terms):
        of = _resolved(term.temperature)
        known = [
            i
            for i, (group, temperature) in enumerate(zip(groups, temperatures, strict=True))
            if _same(temperature, of) and group.standardize == term.standardize
        ]
        if not known:
            groups.append(Group((), term.standardize))
            temperatures.append(of)
        at = known[0] if known else -1
        member = (index, term.divergence)
        groups[at] = dataclasses.replace(groups[at], terms=(*groups[at].terms, member))
    return tuple(groups), temperatures


def _same(a: object, b: object) -> bool:
    plain = isinstance(a, (int, float)) and isinstance(b, (int, float))
    return a is b or (plain and a == b)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted_sum(
    plan: Plan, hidden: Array, head: Array, operands: Operands
) -> tuple[Array, Array]:
    """Returns the weighted sum over terms and tokens, and each term's own sum over tokens."""
    sums, *_ = over_mesh(plan, False, hidden, head, operands)
    return _total(operands.weights, sums), sums


def _total(weights: Array, sums: Array) -> Array:
    """A term without weight adds nothing, even where it is infinite."""
    return jnp.sum(jnp.where(weights == 0, 0, weights * sums))


def _weighted_sum_fwd(
    plan: Plan, hidden: Array, head: Array, operands: Operands
) -> tuple[tuple[Array, Array], Any]:
    sums, d_hidden, d_head = over_mesh(plan, True, hidden, head, operands)
    # Arrays of size 0 carry the dtypes that the gradients must come back in.
    dtypes = jnp.zeros(0, hidden.dtype), jnp.zeros(0, head.dtype)
    return (_total(operands.weights, sums), sums), (d_hidden, d_head, dtypes)


def _weighted_sum_bwd(
    plan: Plan, residuals: Any, cotangents: tuple[Array, Array]
) -> tuple[Array, Array, None]:
    d_hidden, d_head, (hidden_like, head_like) = residuals
    scale, _ = cotangents
    return (
        (scale * d_hidden).astype(hidden_like.dtype),
        (scale * d_head).astype(head_like.dtype),
        None,
    )


_weighted_sum.defvjp(_weighted_sum_fwd, _weighted_sum_bwd)


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
    if targets is not None:
        require_targets(targets, (B, T, V))
        kept = targets.ids.shape[-1] if isinstance(targets, TopKTargets) else V
        temperature = getattr(targets, 'temperature', 1.0)
        require_sound(terms, FORMS[type(targets)], temperature=temperature, kept=kept)


def _check_mesh(mesh: Mesh, B: int, D: int, V: int) -> None:
    axes = (*TOKENS, VOCAB)
    _require(set(axes) <= set(mesh.axis_names), f'a mesh with axes {axes}', mesh.axis_names)
    rows = mesh.shape['data'] * mesh.shape['fsdp'] * mesh.shape['expert']
    divided = (('B', B, rows), ('D', D, mesh.shape['fsdp']), ('V', V, mesh.shape[VOCAB]))
    for name, size, parts in divided:
        _require(size % parts == 0, f'{name} to be a multiple of {parts} on this mesh', size)


def _require(condition: bool, required: str, received: object, hint: str = '') -> None:
    if not condition:
        raise InputError(f'The fused loss needs {required}; received {received}{hint}.')
