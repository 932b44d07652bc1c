"""Any term's value of each token from plain logits, differentiable in both modes."""

import functools
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from distill.algebra import Divergence, Teacher, Weighed, values_and_gradient
from distill.objective import Term
from distill.pairs import FORMS, Targets, require_sound_pair
from distill.types import DenseTargets, HiddenTargets, SampledTargets, TopKTargets
from distill.views import standardized
from moe.errors import InputError

Logits = Float[Array, 'B T V']
Labels = Int[Array, 'B T']
PerToken = Float[Array, 'B T']
Scalar = Float[Array, '']
Number = float | Float[Array, '']


class Options(TypedDict, total=False):
    """The arguments that all divergences share; `distill.divergences` tells their meaning."""

    mask: Bool[Array, 'B T'] | None
    temperature: Number
    scale_by_temperature_squared: bool
    standardize: bool


def per_token_values(
    name: str,
    student_logits: Logits,
    targets: Targets | Labels,
    *,
    mask: Bool[Array, 'B T'] | None = None,
    **fields: Any,
) -> PerToken:
    """Returns a divergence's value of each token.

    Args:
        name: of the divergence.
        student_logits: before the temperature.
        targets: the teacher, or labels of a cross-entropy.
        mask: True where the token counts.
        fields: of the `Term`: its parameter, temperature and the rest; no weight.

    Raises:
        InputError: for shapes that do not match, fields out of range, and pairs that are refused.
    """
    term = Term(name, **fields)
    _check(term, student_logits, targets, mask)
    temperature: Any = jax.lax.stop_gradient(term.temperature)
    student = _wide(student_logits)
    if mask is not None:
        student = jnp.where(mask[..., None], student, 0)
    teacher, labels = _operands(targets, mask)
    if term.standardize:
        student = _standardized(student)
        teacher = jax.tree.map(_standardized, teacher)
    if isinstance(teacher, DenseTargets):
        teacher = DenseTargets(teacher.logits / temperature)
    operands = jax.lax.stop_gradient((teacher, labels, term.parameter))
    values = _values(term.divergence, student / temperature, operands)
    if mask is not None:
        values = jnp.where(mask, values, 0)
    return values * temperature**2 if term.scale_by_temperature_squared else values


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _values(divergence: Divergence, student: Logits, operands: Any) -> PerToken:
    return _values_and_gradient(divergence, student, operands)[0]


@_values.defjvp
def _values_jvp(divergence: Divergence, primals: Any, tangents: Any) -> tuple[Array, Array]:
    values, gradient = _values_and_gradient(divergence, *primals)
    return values, jnp.sum(gradient * tangents[0], -1)


def _values_and_gradient(
    divergence: Divergence, student: Logits, operands: Any
) -> tuple[Array, Array]:
    teacher, labels, parameter = operands
    is_label = None if labels is None else jnp.arange(student.shape[-1]) == labels[..., None]
    terms = [Weighed(divergence, parameter, 1.0)]
    (values,), gradient = values_and_gradient(terms, student, teacher, is_label)
    return values, gradient


@jax.custom_jvp
def _standardized(logits: Logits) -> Logits:
    return standardized(logits).entries


@_standardized.defjvp
def _standardized_jvp(primals: tuple[Logits], tangents: tuple[Logits]) -> tuple[Logits, Logits]:
    # The Jacobian of a z-score is symmetric in each token: it carries tangents as it does slopes.
    view = standardized(*primals)
    return view.entries, view.pull(*tangents)


def _operands(
    targets: Targets | Labels, mask: Bool[Array, 'B T'] | None
) -> tuple[Teacher, Labels | None]:
    """The teacher as logits, top ids or samples, or else the labels; whole numbers where masked."""
    if not isinstance(targets, tuple(FORMS)):
        return None, targets  # type: ignore
    teacher: Any = targets
    if isinstance(targets, HiddenTargets):
        dtype = jnp.promote_types(jnp.result_type(targets.hidden, targets.head), jnp.float32)
        product = functools.partial(jnp.einsum, 'btd,dv->btv', preferred_element_type=dtype)
        teacher = DenseTargets(product(targets.hidden, targets.head))

    def kept(x: Array) -> Array:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        x = _wide(x)
        return x if mask is None else jnp.where(mask if x.ndim == 2 else mask[..., None], x, 0)

    return jax.tree.map(kept, teacher), None


def _wide(x: Array) -> Array:
    return jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32))


def require_targets(targets: Targets | Labels, shape: tuple[int, int, int]) -> None:
    """Refuses targets that do not match [B, T, V]."""
    if isinstance(targets, TopKTargets | SampledTargets):
        leaves = {name: x for name, x in vars(targets).items() if hasattr(x, 'shape')}
        kept = targets.ids.shape[-1:]
        for name, leaf in leaves.items():
            required = shape[:2] + (kept if name != 'tail_log_prob' else ())
            if leaf.shape != required:
                raise InputError(
                    f'The {name} of the targets must match the student, with shape {required}; '
                    f'received {leaf.shape}.'
                )
        return
    if isinstance(targets, HiddenTargets):
        received = (*targets.hidden.shape[:2], targets.head.shape[-1])
    elif isinstance(targets, DenseTargets):
        received = targets.logits.shape
    else:
        received = (*targets.shape, shape[-1])
    if received != shape:
        raise InputError(
            f'The targets must match the student logits, [B, T, V] = {shape}; received {received}. '
            'Where one vocabulary is a prefix of the other, pad the smaller with logits of -inf.'
        )


def _check(
    term: Term, student_logits: Logits, targets: Targets | Labels, mask: Array | None
) -> None:
    shape: Any = student_logits.shape
    require_targets(targets, shape)
    if mask is not None and mask.shape != shape[:2]:
        raise InputError(f'The mask must have shape [B, T] = {shape[:2]}; received {mask.shape}.')
    form = FORMS.get(type(targets))
    if form is not None:
        temperature = getattr(targets, 'temperature', 1.0)
        kept = targets.ids.shape[-1] if isinstance(targets, TopKTargets) else shape[-1]
        require_sound_pair(term, form, temperature=temperature, kept=kept)
