"""Divergences by name, and their values and gradients over every form of target.

A form of target decides what a divergence sees of the student (`views.py`); the divergence decides
what it makes of that (`integrands.py`, `adaptive.py`, `ranking.py`). Nothing else knows both.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from distill import integrands, order
from distill.adaptive import adaptive_kl
from distill.integrands import Integrand, Parameter
from distill.types import DenseTargets, SampledTargets, TopKTargets
from distill.views import View, buckets, chosen, drawn, log_softmax, top_ids, vocabulary_sum, whole
from moe.errors import InputError


@dataclasses.dataclass(frozen=True)
class Spec:
    """How a divergence is computed, and the one parameter it may have.

    Attributes:
        function: `(log_p, log_q[, parameter]) -> (f, h)`; of the ranking losses, of logits.
        parameter: its name; None where it has none.
        default: its value where none is given.
        required: its range, in words.
        valid: whether a number is in the range.
    """

    function: Callable[..., Integrand]
    parameter: str | None = None
    default: float | None = None
    required: str = ''
    valid: Callable[[Any], bool] = lambda _: True


def _whole_number(k: Any) -> bool:
    return isinstance(k, int) and not isinstance(k, bool) and k >= 2


_SHARE = {'required': 'in [0, 1)', 'valid': lambda x: 0 <= x < 1}
_ENDS = {'required': 'in [0, 1]', 'valid': lambda x: 0 <= x <= 1}
_FIRST = {'required': 'a whole number, 2 or more', 'valid': _whole_number}

SPECS: dict[str, Spec] = {
    'cross_entropy': Spec(integrands.cross_entropy),
    'forward_kl': Spec(integrands.forward_kl),
    'reverse_kl': Spec(integrands.reverse_kl),
    'jsd': Spec(integrands.jsd, 'beta', 0.5, **_ENDS),
    'skew_forward_kl': Spec(integrands.skew_forward_kl, 'lam', 0.1, **_SHARE),
    'skew_reverse_kl': Spec(integrands.skew_reverse_kl, 'lam', 0.1, **_SHARE),
    'jeffreys': Spec(integrands.jeffreys),
    'alpha_divergence': Spec(integrands.alpha_divergence, 'alpha', 0.5, **_ENDS),
    'adaptive_kl': Spec(adaptive_kl, 'mu', 0.5, 'in (0, 1)', lambda x: 0 < x < 1),
    'total_variation': Spec(integrands.total_variation),
    'hinge': Spec(order.hinge, 'k', 16, **_FIRST),
    'ranking': Spec(order.ranking, 'k', 16, **_FIRST),
}
DIVERGENCES = tuple(SPECS)
PARAMETERS = tuple(dict.fromkeys(s.parameter for s in SPECS.values() if s.parameter))


@dataclasses.dataclass(frozen=True)
class Divergence:
    """A divergence by name, with the parameter it takes.

    Attributes:
        name: one of `DIVERGENCES`.
        parameter: a number in its range; None where it takes none, and for its default.
    """

    name: str
    parameter: float | None = None

    def __post_init__(self) -> None:
        if self.name not in SPECS:
            known = ', '.join(DIVERGENCES)
            raise InputError(f'The divergence must be one of {known}; received {self.name!r}.')
        spec, number = SPECS[self.name], self.parameter
        if number is not None and spec.parameter is None:
            raise InputError(f'{self.name} takes no parameter; received {number!r}: leave it out.')
        if number is not None and not spec.valid(number):
            raise InputError(
                f'The {spec.parameter} of {self.name} must be {spec.required}; received {number!r}.'
            )

    def integrand(
        self,
        log_p: Float[Array, '... n'],
        log_q: Float[Array, '... n'],
        *,
        parameter: Parameter | None = None,
        axis_name: str | None = None,
    ) -> Integrand:
        """Returns `(f, h)`: what is summed over the entries, and its derivative in `log_p`.

        Args:
            log_p: the student's log-probabilities, or logits where `orders`; -inf is a probability
                of zero.
            log_q: the teacher's.
            parameter: takes the place of the divergence's own; may be traced.
            axis_name: that the entries are split on; None for whole.
        """
        spec = SPECS[self.name]
        arguments: list[Any] = [log_p, log_q]
        if spec.parameter is not None and not self.orders:
            own = spec.default if self.parameter is None else self.parameter
            arguments.append(own if parameter is None else parameter)
        if spec.function is adaptive_kl:
            arguments.append(axis_name)
        return spec.function(*arguments)

    @property
    def orders(self) -> bool:
        """Whether it compares the order of a few logits, rather than distributions."""
        return self.name in ('hinge', 'ranking')


class Weighed(NamedTuple):
    """A divergence with what may be traced: its parameter and its weight in the gradient.

    The weight may differ from token to token, with a last dimension of 1 for the entries.
    """

    divergence: Divergence
    parameter: Parameter | None
    weight: Float[Array, '...'] | float


# What a chunk of tokens is compared with, at the temperature of the comparison. Labels are marked
# among the entries of the vocabulary that are here.
Teacher = DenseTargets | TopKTargets | SampledTargets | None


def values_and_gradient(
    terms: Sequence[Weighed],
    student: Float[Array, '... V'],
    teacher: Teacher,
    is_label: Bool[Array, '... V'] | None = None,
    axis_name: str | None = None,
) -> tuple[list[Float[Array, '...']], Float[Array, '... V']]:
    """Computes each term's value of every token, and the weighted sum's gradient in the logits.

    Terms that see the same of the student share one softmax and one pull-back.

    Args:
        terms: a cross-entropy among them is against labels where `is_label` is given.
        student: logits, over the temperature.
        teacher: logits over the temperature; top ids or samples as they were recorded at it.
        is_label: marks each token's label.
        axis_name: that the vocabulary is split on; None for whole.

    Returns:
        Values, one array for each term; the gradient of their weighted sum.
    """
    values, slopes, views = [], {}, {}
    sights = _Sights(student, teacher, axis_name)
    for term in terms:
        marks = is_label if term.divergence.name == 'cross_entropy' else None
        name, see = sights.of(term.divergence, labelled=marks is not None)
        if name not in views:
            views[name] = see()
        view, theirs = views[name]
        if marks is not None:
            value, slope = integrands.label_integrand(view.entries, marks)
        else:
            value, slope = _integrand(term, view.entries, theirs, name, axis_name)
        split = axis_name if name == 'whole' else None
        values.append(vocabulary_sum(value, split)[..., 0])
        slopes[name] = slopes.get(name, 0) + term.weight * slope
    gradients = [views[name][0].pull(slope) for name, slope in slopes.items()]
    return values, sum(gradients[1:], gradients[0])


class _Sights(NamedTuple):
    """Which view of the student each divergence takes, and the teacher's side of it."""

    student: Array
    teacher: Teacher
    axis: str | None

    def of(
        self, divergence: Divergence, labelled: bool
    ) -> tuple[str, Callable[[], tuple[View, Any]]]:
        if divergence.orders:
            k = divergence.parameter
            return f'first {k}', lambda: self.first(int(k or 0))
        if labelled or isinstance(self.teacher, DenseTargets):
            return 'whole', self.whole
        if isinstance(self.teacher, TopKTargets):
            return 'buckets', self.buckets
        return 'drawn', self.drawn

    def whole(self) -> tuple[View, Any]:
        theirs = None
        if isinstance(self.teacher, DenseTargets):
            theirs = log_softmax(self.teacher.logits, self.axis)
        return whole(self.student, self.axis), theirs

    def buckets(self) -> tuple[View, Any]:
        top: Any = self.teacher
        used = top.log_probs > -jnp.inf
        # Rounding on disk leaves their sum near 1, not at it.
        theirs = jnp.concatenate([top.log_probs, top.tail_log_prob[..., None]], -1)
        return buckets(self.student, top.ids, used, self.axis), log_softmax(theirs)

    def drawn(self) -> tuple[View, Any]:
        samples: Any = self.teacher
        draws = jnp.sum(samples.counts, -1, keepdims=True)
        share = samples.counts / jnp.maximum(draws, 1).astype(self.student.dtype)
        return drawn(self.student, samples.ids, self.axis), share

    def first(self, k: int) -> tuple[View, Any]:
        if isinstance(self.teacher, TopKTargets):
            theirs, order = top_ids(self.teacher.log_probs, k, None)
            ids = jnp.take_along_axis(self.teacher.ids, order, -1)
        else:
            dense: Any = self.teacher
            theirs, ids = top_ids(dense.logits, k, self.axis)
        return chosen(self.student, ids, self.axis), theirs


def _integrand(
    term: Weighed, entries: Array, theirs: Array, sight: str, axis_name: str | None
) -> Integrand:
    if sight == 'drawn':
        return jnp.where(theirs > 0, -theirs * entries, 0), -theirs
    traced = term.parameter if term.divergence.parameter is None else None
    split = axis_name if sight == 'whole' else None
    return term.divergence.integrand(entries, theirs, parameter=traced, axis_name=split)
