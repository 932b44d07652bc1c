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
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe.errors import InputError

Integrand = tuple[Float[Array, '... V'], Float[Array, '... V']]


def _relative_entropy(log_a: Array, log_b: Array) -> Array:
    """`a log(a / b) - a + b` for each entry, 0 log 0 = 0; by its series where a is close to b."""
    a, b = jnp.exp(log_a), jnp.exp(log_b)
    d = log_a - log_b
    far = jnp.where(a > 0, a * d, 0) - a + b
    # a (exp(-d) - 1 + d) = a d^2 / 2 (1 - d/3 + d^2/12 - ...), where the direct form cancels.
    near = a * d * d / 2 * (1 - d / 3 * (1 - d / 4 * (1 - d / 5 * (1 - d / 6 * (1 - d / 7)))))
    return jnp.where(jnp.abs(d) < 0.25, near, far)


def _log_mixture(log_a: Array, log_b: Array, share: float) -> Array:
    """`log(share a + (1 - share) b)`."""
    return jnp.logaddexp(log_a + math.log(share), log_b + math.log1p(-share))


def _times(p: Array, factor: Array) -> Array:
    """`p factor`, and 0 where p is 0 or the factor is infinite: no pull that is not finite."""
    return jnp.where((p > 0) & jnp.isfinite(factor), p * factor, 0)


def _cross_entropy(log_p: Array, log_q: Array) -> Integrand:
    """f = -q log p, h = -q."""
    q = jnp.exp(log_q)
    return jnp.where(q > 0, -q * log_p, 0), -q


def _forward_kl(log_p: Array, log_q: Array) -> Integrand:
    """f = q log(q / p) - q + p, h = p - q."""
    return _relative_entropy(log_q, log_p), jnp.exp(log_p) - jnp.exp(log_q)


def _reverse_kl(log_p: Array, log_q: Array) -> Integrand:
    """f = p log(p / q) - p + q, h = p log(p / q)."""
    return _relative_entropy(log_p, log_q), _times(jnp.exp(log_p), log_p - log_q)


def _jsd(log_p: Array, log_q: Array, beta: float) -> Integrand:
    """f = beta KL(q, m) + (1 - beta) KL(p, m) with m = beta q + (1 - beta) p.

    dm/dlog p = (1 - beta) p, so what m contributes to h, (1 - beta) p (1 - (beta q + (1 - beta) p)
    / m), vanishes, and h = (1 - beta) p log(p / m).
    """
    if beta == 0:
        return _forward_kl(log_p, log_q)
    if beta == 1:
        return _reverse_kl(log_p, log_q)
    log_m = _log_mixture(log_q, log_p, beta)
    value = beta * _relative_entropy(log_q, log_m) + (1 - beta) * _relative_entropy(log_p, log_m)
    return value, (1 - beta) * _times(jnp.exp(log_p), log_p - log_m)


def _skew_forward_kl(log_p: Array, log_q: Array, lam: float) -> Integrand:
    """f = KL(q, m) with m = lam q + (1 - lam) p; h = (1 - lam) p (1 - q / m)."""
    if lam == 0:
        return _forward_kl(log_p, log_q)
    log_m = _log_mixture(log_q, log_p, lam)
    pull = _times(jnp.exp(log_p), -jnp.expm1(log_q - log_m))
    return _relative_entropy(log_q, log_m), (1 - lam) * pull


def _skew_reverse_kl(log_p: Array, log_q: Array, lam: float) -> Integrand:
    """f = KL(p, m) with m = lam p + (1 - lam) q; h = p log(p / m) + lam p (1 - p / m)."""
    if lam == 0:
        return _reverse_kl(log_p, log_q)
    log_m = _log_mixture(log_p, log_q, lam)
    d = log_p - log_m
    return _relative_entropy(log_p, log_m), _times(jnp.exp(log_p), d - lam * jnp.expm1(d))


def _total_variation(log_p: Array, log_q: Array) -> Integrand:
    """f = |p - q| / 2, h = p sign(p - q) / 2; the subgradient 0 where they are equal."""
    p = jnp.exp(log_p)
    difference = p - jnp.exp(log_q)
    return jnp.abs(difference) / 2, p * jnp.sign(difference) / 2


_INTEGRANDS: dict[str, Callable[..., Integrand]] = {
    'cross_entropy': _cross_entropy,
    'forward_kl': _forward_kl,
    'reverse_kl': _reverse_kl,
    'jsd': _jsd,
    'skew_forward_kl': _skew_forward_kl,
    'skew_reverse_kl': _skew_reverse_kl,
    'total_variation': _total_variation,
}
DIVERGENCES = tuple(_INTEGRANDS)


@dataclasses.dataclass(frozen=True)
class Divergence:
    """A divergence by name, with the parameters it takes and no others.

    Attributes:
        name: one of `DIVERGENCES`.
        beta: of 'jsd', in [0, 1]: 0 is forward KL, 1 reverse KL.
        lam: of the skew divergences, in [0, 1): the share of the first distribution in the second.
    """

    name: str
    beta: float | None = None
    lam: float | None = None

    def __post_init__(self) -> None:
        if self.name not in _INTEGRANDS:
            known = ', '.join(DIVERGENCES)
            raise InputError(f'The divergence must be one of {known}; received {self.name!r}.')
        takes_beta, takes_lam = self.name == 'jsd', self.name.startswith('skew_')
        for parameter, taken in (('beta', takes_beta), ('lam', takes_lam)):
            value = getattr(self, parameter)
            if not taken and value is not None:
                raise InputError(
                    f'{self.name} takes no {parameter}; received {value!r}: leave it out.'
                )
        if takes_beta and not (isinstance(self.beta, (int, float)) and 0 <= self.beta <= 1):
            raise InputError(f'The beta of {self.name} must be in [0, 1]; received {self.beta!r}.')
        if takes_lam and not (isinstance(self.lam, (int, float)) and 0 <= self.lam < 1):
            raise InputError(f'The lam of {self.name} must be in [0, 1); received {self.lam!r}.')

    def integrand(
        self, log_p: Float[Array, '... V'], log_q: Float[Array, '... V'] | Int[Array, '...']
    ) -> Integrand:
        """Returns `(f, h)`: what is summed over the vocabulary, and its derivative in `log_p`.

        Args:
            log_p: the student's log-probabilities; -inf is a probability of zero.
            log_q: the teacher's.

        Returns:
            Both in nats per entry. Where f is infinite (mass on what the other side holds
            impossible), h is finite: an entry without a finite pull has none.
        """
        parameter = self.beta if self.name == 'jsd' else self.lam
        extra = () if parameter is None else (parameter,)
        return _INTEGRANDS[self.name](log_p, log_q, *extra)


def label_integrand(log_p: Float[Array, '... V'], is_label: Array) -> Integrand:
    """Returns `(f, h)` of the cross-entropy against one label a token, where `is_label`."""
    return jnp.where(is_label, -log_p, 0), -is_label.astype(log_p.dtype)


def log_softmax(logits: Float[Array, '... V'], axis_name: str | None = None) -> Array:
    """Normalises logits to log-probabilities, over a vocabulary split on `axis_name` if given."""
    peak = jnp.max(logits, axis=-1, keepdims=True)
    if axis_name is not None:
        peak = jax.lax.pmax(peak, axis_name)
    shifted = logits - peak
    return shifted - jnp.log(vocabulary_sum(jnp.exp(shifted), axis_name))


def vocabulary_sum(values: Float[Array, '... V'], axis_name: str | None = None) -> Array:
    """Sums over the vocabulary, split on `axis_name` if given; keeps the dimension."""
    total = jnp.sum(values, axis=-1, keepdims=True)
    return total if axis_name is None else jax.lax.psum(total, axis_name)


def logits_gradient(log_p: Array, h: Array, axis_name: str | None = None) -> Array:
    """Returns `h - p sum(h)`: the gradient in the logits of a sum with derivative h in log p."""
    return h - jnp.exp(log_p) * vocabulary_sum(h, axis_name)
