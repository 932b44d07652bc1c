"""Divergences between a student and its targets, per token and reduced, from plain logits.

`fused.py` computes the same without ever holding logits of [tokens, vocab]; these are the
definitions that it is held to, and what to use where logits exist anyway. Each is in nats, exact
with logits of -inf (a probability of zero; 0 log 0 = 0; +inf where the divergence is infinite, with
a finite gradient), computed in float32 or wider whatever the dtype of the logits, and
differentiable in `student_logits` alone: no gradient flows to the targets.

Arguments that they share:
    student_logits: before the temperature.
    targets: the teacher, with a vocabulary of the same width; pad a smaller one with logits of
        -inf. On `TopKTargets` a divergence is that of distributions over the kept ids and, as one
        more, all others together; on `SampledTargets` most are refused (`distill.pairs` says which
        and why).
    mask: True where the token counts; elsewhere the value and the gradient are 0, whatever the
        logits hold, NaN included. None counts every token.
    temperature: divides both sides' logits; positive. Top ids and samples must have been recorded
        at it.
    scale_by_temperature_squared: whether T^2 multiplies the result (Hinton et al. 2015 do, so that
        the gradient keeps its size; GKD does not).
    standardize: whether both sides' logits are first brought to mean 0 and deviation 1.

`X_per_token` returns [B, T] and `X` its mean over the unmasked tokens (0 where there are none).
"""

import functools
from typing import Unpack

import jax.numpy as jnp

from distill.pairs import Targets
from distill.per_token import Labels, Logits, Number, Options, PerToken, Scalar, per_token_values


def forward_kl_per_token(
    student_logits: Logits, targets: Targets, **options: Unpack[Options]
) -> PerToken:
    """Returns KL(teacher || student) of each token.

    On samples, an unbiased estimate of the cross-entropy instead: the gradient is the same, the
    value is larger by the teacher's entropy, which samples alone do not tell.

    Source: of sampling: arXiv 2503.16870.
    """
    return per_token_values('forward_kl', student_logits, targets, **options)


def reverse_kl_per_token(
    student_logits: Logits, targets: Targets, **options: Unpack[Options]
) -> PerToken:
    """Returns KL(student || teacher) of each token."""
    return per_token_values('reverse_kl', student_logits, targets, **options)


def jeffreys_per_token(
    student_logits: Logits, targets: Targets, **options: Unpack[Options]
) -> PerToken:
    """Returns KL(teacher || student) + KL(student || teacher) of each token.

    Source: Jeffreys 1946, invariant J (the sum, not its half).
    """
    return per_token_values('jeffreys', student_logits, targets, **options)


def jsd_per_token(
    student_logits: Logits, targets: Targets, *, beta: Number = 0.5, **options: Unpack[Options]
) -> PerToken:
    """Returns the generalised Jensen-Shannon divergence of each token.

    beta KL(teacher || m) + (1 - beta) KL(student || m), with m = beta teacher + (1 - beta) student.

    Args:
        beta: in [0, 1]. Both terms vanish towards the ends, so 0 is forward KL and 1 reverse KL.

    Source: GKD, arXiv 2306.13649, equation 1.
    """
    return per_token_values('jsd', student_logits, targets, beta=beta, **options)


def skew_forward_kl_per_token(
    student_logits: Logits, targets: Targets, *, lam: Number = 0.1, **options: Unpack[Options]
) -> PerToken:
    """Returns KL(teacher || lam teacher + (1 - lam) student) of each token.

    Args:
        lam: in [0, 1); 0 is forward KL.

    Source: DistiLLM, arXiv 2402.03898, section 3.1.
    """
    return per_token_values('skew_forward_kl', student_logits, targets, lam=lam, **options)


def skew_reverse_kl_per_token(
    student_logits: Logits, targets: Targets, *, lam: Number = 0.1, **options: Unpack[Options]
) -> PerToken:
    """Returns KL(student || lam student + (1 - lam) teacher) of each token.

    Args:
        lam: in [0, 1); 0 is reverse KL.

    Source: DistiLLM, arXiv 2402.03898, section 3.1.
    """
    return per_token_values('skew_reverse_kl', student_logits, targets, lam=lam, **options)


def alpha_divergence_per_token(
    student_logits: Logits, targets: Targets, *, alpha: Number = 0.5, **options: Unpack[Options]
) -> PerToken:
    """Returns the alpha-divergence of each token.

    (1 - sum teacher^alpha student^(1 - alpha)) / (alpha (1 - alpha)), whose limits are reverse KL
    at 0 and forward KL at 1.

    Args:
        alpha: in [0, 1]; 0.5 is 4 times the squared Hellinger distance.

    Source: Amari, IEEE Transactions on Information Theory 55(11), 2009; his alpha is 1 - 2 alpha
    here.
    """
    return per_token_values('alpha_divergence', student_logits, targets, alpha=alpha, **options)


def adaptive_kl_per_token(
    student_logits: Logits, targets: Targets, *, mu: Number = 0.5, **options: Unpack[Options]
) -> PerToken:
    """Returns w KL(teacher || student) + (1 - w) KL(student || teacher) of each token.

    w is the share of sum |teacher - student| that lies on the teacher's head: its most probable
    words, as many as hold at most `mu` together, and the first in any case. It is a constant to the
    gradient. On top ids all others together are one word.

    Args:
        mu: in (0, 1).

    Source: AKL, arXiv 2404.02657; see `distill.adaptive` for ties.
    """
    return per_token_values('adaptive_kl', student_logits, targets, mu=mu, **options)


def total_variation_per_token(
    student_logits: Logits, targets: Targets, **options: Unpack[Options]
) -> PerToken:
    """Returns half the sum of |teacher - student| of each token: a probability, not nats."""
    return per_token_values('total_variation', student_logits, targets, **options)


def hinge_per_token(
    student_logits: Logits, targets: Targets, *, k: int = 16, **options: Unpack[Options]
) -> PerToken:
    """Returns by how much gaps between the student's logits fall short of the teacher's.

    The mean of max(0, teacher's gap - student's gap) over the pairs of the teacher's k first words
    of each token, larger first.

    Args:
        k: 2 or more; at most the vocabulary, or the ids kept.

    Source: see `distill.order`.
    """
    return per_token_values('hinge', student_logits, targets, k=k, **options)


def ranking_per_token(
    student_logits: Logits, targets: Targets, *, k: int = 16, **options: Unpack[Options]
) -> PerToken:
    """Returns how unlikely the student's logits hold the teacher's order, in nats a pair.

    The mean of log(1 + exp(-student's gap)) over the pairs of the teacher's k first words of each
    token, larger first.

    Args:
        k: 2 or more; at most the vocabulary, or the ids kept.

    Source: RankNet, Burges et al. 2005.
    """
    return per_token_values('ranking', student_logits, targets, k=k, **options)


def cross_entropy_per_token(
    student_logits: Logits, targets: Targets | Labels, **options: Unpack[Options]
) -> PerToken:
    """Returns -log student(label), or -sum teacher log student, of each token.

    Args:
        targets: ids of labels (arbitrary where masked), or a teacher, whose entropy is then the
            only difference to `forward_kl`.
    """
    return per_token_values('cross_entropy', student_logits, targets, **options)


def _reduced(per_token):
    """Returns the mean over unmasked tokens of a per-token divergence, named without suffix."""

    @functools.wraps(per_token)
    def mean(student_logits: Logits, targets: Targets, *, mask=None, **options) -> Scalar:
        values = per_token(student_logits, targets, mask=mask, **options)
        count = values.size if mask is None else jnp.sum(mask, dtype=values.dtype)
        return jnp.sum(values) / jnp.maximum(count, 1)

    mean.__name__ = mean.__qualname__ = per_token.__name__.removesuffix('_per_token')
    mean.__doc__ = per_token.__doc__.replace('of each token', 'per unmasked token')
    return mean


forward_kl = _reduced(forward_kl_per_token)
reverse_kl = _reduced(reverse_kl_per_token)
jeffreys = _reduced(jeffreys_per_token)
jsd = _reduced(jsd_per_token)
skew_forward_kl = _reduced(skew_forward_kl_per_token)
skew_reverse_kl = _reduced(skew_reverse_kl_per_token)
alpha_divergence = _reduced(alpha_divergence_per_token)
adaptive_kl = _reduced(adaptive_kl_per_token)
total_variation = _reduced(total_variation_per_token)
hinge = _reduced(hinge_per_token)
ranking = _reduced(ranking_per_token)
cross_entropy = _reduced(cross_entropy_per_token)
