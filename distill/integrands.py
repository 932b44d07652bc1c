"""What each divergence sums over the vocabulary, with its derivative: one elementwise algebra.

A divergence between the student's distribution `p = softmax(s)` and the teacher's `q` is a sum over
the vocabulary of `f(log p, log q)`. With `h = df / d log p`, the chain rule through the softmax
gives

    d/ds_v  sum_u f_u  =  h_v - p_v sum_u h_u,

so a pair `(f, h)` is all that the plain and the fused loss, whole or split vocabularies, need to
know of a divergence. A KL divergence is summed in its generalised form `a log(a / b) - a + b`: the
extra `b - a` sums to zero, makes every entry non-negative, and turns rounding errors of the two
log-sum-exps into second-order ones, which matters at high temperatures, where the divergence is
almost zero.

Parameters are numbers, or scalars traced by jit: a schedule's values. All functions are in nats per
entry, with log-probabilities of -inf for probabilities of zero; where f is infinite, h is finite:
an entry without a finite pull has none.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Integrand = tuple[Float[Array, '... V'], Float[Array, '... V']]
Parameter = float | Float[Array, '']


def relative_entropy(log_a: Array, log_b: Array) -> Array:
    """`a log(a / b) - a + b` for each entry, 0 log 0 = 0; by its series where a is close to b."""
    a, b = jnp.exp(log_a), jnp.exp(log_b)
    d = log_a - log_b
    far = jnp.where(a > 0, a * d, 0) - a + b
    # a (exp(-d) - 1 + d) = a d^2 / 2 (1 - d/3 + d^2/12 - ...), where the direct form cancels.
    near = a * d * d / 2 * (1 - d / 3 * (1 - d / 4 * (1 - d / 5 * (1 - d / 6 * (1 - d / 7)))))
    return jnp.where(jnp.abs(d) < 0.25, near, far)


def cross_entropy(log_p: Array, log_q: Array) -> Integrand:
    """f = -q log p, h = -q."""
    q = jnp.exp(log_q)
    return jnp.where(q > 0, -q * log_p, 0), -q


def forward_kl(log_p: Array, log_q: Array) -> Integrand:
    """f = q log(q / p) - q + p, h = p - q."""
    return relative_entropy(log_q, log_p), jnp.exp(log_p) - jnp.exp(log_q)


def reverse_kl(log_p: Array, log_q: Array) -> Integrand:
    """f = p log(p / q) - p + q, h = p log(p / q)."""
    return relative_entropy(log_p, log_q), _times(jnp.exp(log_p), log_p - log_q)


def jeffreys(log_p: Array, log_q: Array) -> Integrand:
    """f = (p - q) log(p / q): the sum of both KL divergences."""
    (there, pull), (back, pull_back) = forward_kl(log_p, log_q), reverse_kl(log_p, log_q)
    return there + back, pull + pull_back


def jsd(log_p: Array, log_q: Array, beta: Parameter) -> Integrand:
    """f = beta KL(q, m) + (1 - beta) KL(p, m) with m = beta q + (1 - beta) p.

    dm/dlog p = (1 - beta) p, so what m contributes to h, (1 - beta) p (1 - (beta q + (1 - beta) p)
    / m), vanishes, and h = (1 - beta) p log(p / m).
    """

    def between(log_p: Array, log_q: Array) -> Integrand:
        log_m = _log_mixture(log_q, log_p, beta)
        value = beta * relative_entropy(log_q, log_m) + (1 - beta) * relative_entropy(log_p, log_m)
        return value, (1 - beta) * _times(jnp.exp(log_p), log_p - log_m)

    return _with_ends({0: forward_kl, 1: reverse_kl}, between, beta, log_p, log_q)


def skew_forward_kl(log_p: Array, log_q: Array, lam: Parameter) -> Integrand:
    """f = KL(q, m) with m = lam q + (1 - lam) p; h = (1 - lam) p (1 - q / m)."""

    def between(log_p: Array, log_q: Array) -> Integrand:
        log_m = _log_mixture(log_q, log_p, lam)
        pull = _times(jnp.exp(log_p), -jnp.expm1(log_q - log_m))
        return relative_entropy(log_q, log_m), (1 - lam) * pull

    return _with_ends({0: forward_kl}, between, lam, log_p, log_q)


def skew_reverse_kl(log_p: Array, log_q: Array, lam: Parameter) -> Integrand:
    """f = KL(p, m) with m = lam p + (1 - lam) q; h = p log(p / m) + lam p (1 - p / m)."""

    def between(log_p: Array, log_q: Array) -> Integrand:
        log_m = _log_mixture(log_p, log_q, lam)
        d = log_p - log_m
        return relative_entropy(log_p, log_m), _times(jnp.exp(log_p), d - lam * jnp.expm1(d))

    return _with_ends({0: reverse_kl}, between, lam, log_p, log_q)


def alpha_divergence(log_p: Array, log_q: Array, alpha: Parameter) -> Integrand:
    """f = (alpha q + (1 - alpha) p - q^alpha p^(1 - alpha)) / (alpha (1 - alpha)).

    h = (p - q^alpha p^(1 - alpha)) / alpha. Near p = q, with d = log(q / p), f and h are p times
    the series of d^n / n! with the coefficients 1 + alpha + ... + alpha^(n - 2) from n = 2, and
    -alpha^(n - 1) from n = 1.
    """

    def between(log_p: Array, log_q: Array) -> Integrand:
        p, q, d = jnp.exp(log_p), jnp.exp(log_q), log_q - log_p
        log_mean = alpha * log_q + (1 - alpha) * log_p
        mean = jnp.where((p > 0) & (q > 0), jnp.exp(log_mean), 0)
        far = (alpha * q + (1 - alpha) * p - mean) / (alpha * (1 - alpha))
        value = slope = jnp.zeros_like(p)
        for n in range(8, 1, -1):
            value = (value + sum(alpha**i for i in range(n - 1))) * d / n
            slope = (slope + alpha ** (n - 1)) * d / n
        near = jnp.abs(d) < 0.25
        pull = jnp.where(near, -p * d * (1 + slope), (p - mean) / alpha)
        return jnp.where(near, p * value * d, far), pull

    return _with_ends({0: reverse_kl, 1: forward_kl}, between, alpha, log_p, log_q)


def total_variation(log_p: Array, log_q: Array) -> Integrand:
    """f = |p - q| / 2, h = p sign(p - q) / 2; the subgradient 0 where they are equal."""
    p = jnp.exp(log_p)
    difference = p - jnp.exp(log_q)
    return jnp.abs(difference) / 2, p * jnp.sign(difference) / 2


def label_integrand(log_p: Float[Array, '... V'], is_label: Array) -> Integrand:
    """Returns `(f, h)` of the cross-entropy against one label a token, where `is_label`."""
    return jnp.where(is_label, -log_p, 0), -is_label.astype(log_p.dtype)


def _with_ends(
    ends: dict[int, Callable[..., Integrand]],
    between: Callable[..., Integrand],
    parameter: Parameter,
    log_p: Array,
    log_q: Array,
) -> Integrand:
    """Takes what is defined apart at the ends of a parameter's range; computes the one needed."""
    if isinstance(parameter, (int, float)):
        return ends.get(parameter, between)(log_p, log_q)  # type: ignore
    index = sum((parameter == end) * (i + 1) for i, end in enumerate(ends))
    return jax.lax.switch(index, (between, *ends.values()), log_p, log_q)


def _log_mixture(log_a: Array, log_b: Array, share: Parameter) -> Array:
    """`log(share a + (1 - share) b)`."""
    return jnp.logaddexp(log_a + jnp.log(share), log_b + jnp.log1p(-share))


def _times(p: Array, factor: Array) -> Array:
    """`p factor`, and 0 where p is 0 or the factor is infinite: no pull that is not finite."""
    return jnp.where((p > 0) & jnp.isfinite(factor), p * factor, 0)
