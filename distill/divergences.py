"""Divergences between a student and its targets, per token and reduced, from plain logits.

`fused.py` computes the same without ever holding logits of [tokens, vocab]; these are the
definitions that it is held to, and what to use where logits exist anyway. Each is in nats, exact
with logits of -inf (a probability of zero; 0 log 0 = 0; +inf where the divergence is infinite, with
a finite gradient), computed in float32 or wider whatever the dtype of the logits, and
differentiable in `student_logits` alone: no gradient flows to the targets.

Arguments that they share:
    student_logits: before the temperature.
    targets: the teacher, with a vocabulary of the same width; pad a smaller one with logits of
        -inf.
    mask: True where the token counts; elsewhere the value and the gradient are 0, whatever the
        logits hold, NaN included. None counts every token.
    temperature: divides both sides' logits; positive.
    scale_by_temperature_squared: whether T^2 multiplies the result (Hinton et al. 2015 do, so that
        the gradient keeps its size; GKD does not).

`X_per_token` returns [B, T] and `X` its mean over the unmasked tokens (0 where there are none).
"""

import functools
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from distill.integrands import (
    Divergence,
    Integrand,
    label_integrand,
    log_softmax,
    logits_gradient,
    vocabulary_sum,
)
from distill.types import DenseTargets, HiddenTargets
from moe.errors import InputError

Logits: TypeAlias = Float[Array, 'B T V']
Targets: TypeAlias = DenseTargets | HiddenTargets
Labels: TypeAlias = Int[Array, 'B T']
Mask: TypeAlias = Bool[Array, 'B T'] | None
PerToken: TypeAlias = Float[Array, 'B T']
Scalar: TypeAlias = Float[Array, '']
Temperature: TypeAlias = float | Float[Array, '']


def forward_kl_per_token(
    student_logits: Logits,
    targets: Targets,
    *,
    mask: Mask = None,
    temperature: Temperature = 1.0,
    scale_by_temperature_squared: bool = False,
) -> PerToken:
    """Returns KL(teacher || student) of each token."""
    divergence = Divergence('forward_kl')
    return _per_token(
        divergence, student_logits, targets, mask, temperature, scale_by_temperature_squared
    )


def reverse_kl_per_token(
    student_logits: Logits,
    targets: Targets,
    *,
    mask: Mask = None,
    temperature: Temperature = 1.0,
    scale_by_temperature_squared: bool = False,
) -> PerToken:
    """Returns KL(student || teacher) of each token."""
    divergence = Divergence('reverse_kl')
    return _per_token(
        divergence, student_logits, targets, mask, temperature, scale_by_temperature_squared
    )


def jsd_per_token(
    student_logits: Logits,
    targets: Targets,
    *,
    beta: float = 0.5,
    mask: Mask = None,
    temperature: Temperature = 1.0,
    scale_by_temperature_squared: bool = False,
) -> PerToken:
    """Returns the generalised Jensen-Shannon divergence of each token.

    beta KL(teacher || m) + (1 - beta) KL(student || m), with m = beta teacher + (1 - beta) student.

    Args:
        beta: in [0, 1]. Both terms vanish towards the ends, so 0 is forward KL and 1 reverse KL.

    Source: GKD, arXiv 2306.13649, equation 1.
    """
    divergence = Divergence('jsd', beta=beta)
    return _per_token(
        divergence, student_logits, targets, mask, temperature, scale_by_temperature_squared
    )


def skew_forward_kl_per_token(
    student_logits: Logits,
    targets: Targets,
    *,
    lam: float = 0.1,
    mask: Mask = None,
    temperature: Temperature = 1.0,
    scale_by_temperature_squared: bool = False,
) -> PerToken:
    """Returns KL(teacher || lam teacher + (1 - lam) student) of each token.

    Args:
        lam: in [0, 1); 0 is forward KL.

    Source: DistiLLM, arXiv 2402.03898, section 3.1.
    """
    divergence = Divergence('skew_forward_kl', lam=lam)
    return _per_token(
        divergence, student_logits, targets, mask, temperature, scale_by_temperature_squared
    )


def skew_reverse_kl_per_token(
    student_logits: Logits,
    targets: Targets,
    *,
    lam: float = 0.1,
    mask: Mask = None,
    temperature: Temperature = 1.0,
    scale_by_temperature_squared: bool = False,
) -> PerToken:
    """Returns KL(student || lam student + (1 - lam) teacher) of each token.

    Args:
        lam: in [0, 1); 0 is reverse KL.

    Source: DistiLLM, arXiv 2402.03898, section 3.1.
    """
    divergence = Divergence('skew_reverse_kl', lam=lam)
    return _per_token(
        divergence, student_logits, targets, mask, temperature, scale_by_temperature_squared
    )


def total_variation_per_token(
    student_logits: Logits,
    targets: Targets,
    *,
    mask: Mask = None,
    temperature: Temperature = 1.0,
    scale_by_temperature_squared: bool = False,
) -> PerToken:
    """Returns half the sum of |teacher - student| of each token: a probability, not nats."""
    divergence = Divergence('total_variation')
    return _per_token(
        divergence, student_logits, targets, mask, temperature, scale_by_temperature_squared
    )


def cross_entropy_per_token(
    student_logits: Logits,
    targets: Targets | Labels,
    *,
    mask: Mask = None,
    temperature: Temperature = 1.0,
    scale_by_temperature_squared: bool = False,
) -> PerToken:
    """Returns -log student(label), or -sum teacher log student, of each token.

    Args:
        targets: ids of labels (arbitrary where masked), or a teacher, whose entropy is then the
            only difference to `forward_kl`.
    """
    divergence = Divergence('cross_entropy')
    return _per_token(
        divergence, student_logits, targets, mask, temperature, scale_by_temperature_squared
    )


def _reduced(per_token):
    """Returns the mean over unmasked tokens of a per-token divergence, named without suffix."""

    @functools.wraps(per_token)
    def mean(student_logits: Logits, targets: Targets, *, mask: Mask = None, **options) -> Scalar:
        values = per_token(student_logits, targets, mask=mask, **options)
        count = values.size if mask is None else jnp.sum(mask, dtype=values.dtype)
        return jnp.sum(values) / jnp.maximum(count, 1)

    mean.__name__ = mean.__qualname__ = per_token.__name__.removesuffix('_per_token')
    mean.__doc__ = per_token.__doc__.replace('of each token', 'per unmasked token')
    return mean


forward_kl = _reduced(forward_kl_per_token)
reverse_kl = _reduced(reverse_kl_per_token)
jsd = _reduced(jsd_per_token)
skew_forward_kl = _reduced(skew_forward_kl_per_token)
skew_reverse_kl = _reduced(skew_reverse_kl_per_token)
total_variation = _reduced(total_variation_per_token)
cross_entropy = _reduced(cross_entropy_per_token)


def _per_token(
    divergence: Divergence,
    student_logits: Logits,
    targets: Targets | Labels,
    mask: Mask,
    temperature: Temperature,
    scale_by_temperature_squared: bool,
) -> PerToken:
    _check(student_logits, targets, mask, temperature)
    temperature = jax.lax.stop_gradient(temperature)
    student = _wide(student_logits)
    teacher = _target_logits(targets)
    if mask is not None:
        student = jnp.where(mask[..., None], student, 0)
        teacher = jnp.where(mask[..., None] if teacher.ndim == 3 else mask, teacher, 0)
    if teacher.ndim == 3:
        teacher = teacher / temperature
    values = _over_vocabulary(divergence, student / temperature, jax.lax.stop_gradient(teacher))
    if mask is not None:
        values = jnp.where(mask, values, 0)
    return values * temperature**2 if scale_by_temperature_squared else values


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _over_vocabulary(divergence: Divergence, student: Logits, teacher: Array) -> PerToken:
    value, _ = _integrand(divergence, log_softmax(student), teacher)
    return vocabulary_sum(value)[..., 0]


@_over_vocabulary.defjvp
def _over_vocabulary_jvp(divergence, primals, tangents):
    student, teacher = primals
    log_p = log_softmax(student)
    value, h = _integrand(divergence, log_p, teacher)
    tangent = vocabulary_sum(logits_gradient(log_p, h) * tangents[0])
    return vocabulary_sum(value)[..., 0], tangent[..., 0]


def _integrand(divergence: Divergence, log_p: Logits, teacher: Array) -> Integrand:
    if teacher.ndim == 3:
        return divergence.integrand(log_p, log_softmax(teacher))
    return label_integrand(log_p, jnp.arange(log_p.shape[-1]) == teacher[..., None])


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _target_logits(targets: Targets | Labels) -> Array:
    """The teacher's logits, in float32 or wider; labels stay as they are."""
    if isinstance(targets, HiddenTargets):
        dtype = jnp.promote_types(jnp.result_type(targets.hidden, targets.head), jnp.float32)
        return jnp.einsum('btd,dv->btv', targets.hidden, targets.head, preferred_element_type=dtype)
    return _wide(targets.logits) if isinstance(targets, DenseTargets) else targets


def _check(
    student_logits: Logits, targets: Targets | Labels, mask: Mask, temperature: Temperature
) -> None:
    shape = student_logits.shape
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
    if mask is not None and mask.shape != shape[:2]:
        raise InputError(f'The mask must have shape [B, T] = {shape[:2]}; received {mask.shape}.')
    if isinstance(temperature, (int, float)) and not temperature > 0:
        raise InputError(f'The temperature must be positive; received {temperature!r}.')
