"""What a student is trained for: divergences with weights and temperatures, as data."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from jaxtyping import Array, Float, Int

from distill.across import CrossTokenizer, require_across
from distill.algebra import PARAMETERS, SPECS, Divergence
from distill.features import Feature
from distill.naming import numbered
from distill.schedules import Schedule, ever_positive, value_at
from distill.types import WRITERS
from moe.errors import InputError

Number = float | Schedule | Float[Array, '']


@dataclasses.dataclass(frozen=True)
class Term:
    """One divergence of an objective; `loss = sum of weight * divergence`.

    Attributes:
        name: 'cross_entropy' (against the labels: the one term that needs no teacher),
            'forward_kl', 'reverse_kl', 'jsd', 'skew_forward_kl', 'skew_reverse_kl', 'jeffreys',
            'alpha_divergence', 'adaptive_kl', 'total_variation', 'hinge' or 'ranking'.
        weight: zero or more; a number or a `Schedule`.
        temperature: divides the logits of both sides; positive; a number or a `Schedule`.
        scale_by_temperature_squared: whether T^2 multiplies the divergence.
        standardize: whether the logits of both sides are brought to mean 0 and deviation 1 before
            the temperature divides them, so that no student need match its teacher's scale.
        beta: of 'jsd' alone, in [0, 1]; 0.5 if not given; a number or a `Schedule`.
        lam: of the skew divergences alone, in [0, 1); 0.1 if not given; a number or a `Schedule`.
        alpha: of 'alpha_divergence' alone, in [0, 1]; 0.5 if not given; a number or a `Schedule`.
        mu: of 'adaptive_kl' alone, in (0, 1); 0.5 if not given; a number or a `Schedule`.
        k: of 'hinge' and 'ranking' alone, a whole number of 2 or more; 16 if not given.
        on: whose sequences it is averaged over: of the 'text', or written by the 'student' or the
            'teacher'; None for all of them.

    Source: standardize: arXiv 2403.01427; the divergences' are told with their functions.
    """

    name: str
    _: dataclasses.KW_ONLY
    weight: Number = 1.0
    temperature: Number = 1.0
    scale_by_temperature_squared: bool = False
    standardize: bool = False
    beta: Number | None = None
    lam: Number | None = None
    alpha: Number | None = None
    mu: Number | None = None
    k: int | None = None
    on: str | None = None

    def __post_init__(self) -> None:
        spec = SPECS[Divergence(self.name).name]
        for name in PARAMETERS:
            value = getattr(self, name)
            if name != spec.parameter and value is not None:
                raise InputError(f'{self.name} takes no {name}; received {value!r}: leave it out.')
        if spec.parameter is not None:
            what = f'The {spec.parameter} of {self.name}'
            check_number(self.parameter, spec.valid, what, spec.required)
        if self.standardize and not self.needs_teacher:
            raise InputError(
                f'{self.name} takes no standardize: labels have no scale to be freed from; leave '
                'it out.'
            )
        if self.on is not None and self.on not in WRITERS:
            known = ', '.join(map(repr, WRITERS))
            raise InputError(f'on must be one of {known}, or None; received {self.on!r}.')
        check_number(self.weight, lambda x: x >= 0, f'The weight of {self.name}', 'zero or more')
        check_number(
            self.temperature, lambda x: x > 0, f'The temperature of {self.name}', 'positive'
        )

    @property
    def divergence(self) -> Divergence:
        """The divergence alone, with its parameter where that is a number."""
        parameter = self.parameter
        return Divergence(self.name, parameter if isinstance(parameter, (int, float)) else None)

    @property
    def parameter(self) -> Any:
        """The value of the divergence's parameter, its default if not given; None without one."""
        spec = SPECS[self.name]
        given = None if spec.parameter is None else getattr(self, spec.parameter)
        return spec.default if given is None else given

    @property
    def needs_teacher(self) -> bool:
        """Whether the term compares with a teacher, rather than with labels."""
        return self.name != 'cross_entropy'

    def at(self, step: Int[Array, ''] | int) -> 'Term':
        """Returns the term with its schedules' values at a step, which may be traced."""
        scheduled = ('weight', 'temperature', *PARAMETERS)
        return dataclasses.replace(
            self, **{name: value_at(getattr(self, name), step) for name in scheduled}
        )


def check_number(value: Number, valid: Callable[[Any], bool], what: str, required: str) -> None:
    """Checks numbers and both ends of schedules; arrays, resolved inside jit, are not looked at."""
    if isinstance(value, Schedule):
        checked = value.bounds
    elif isinstance(value, (int, float)):
        checked = (value,)
    elif hasattr(value, 'dtype'):
        return
    else:
        raise InputError(f'{what} must be a number or a Schedule; received {value!r}.')
    for number in checked:
        if not (math.isfinite(number) and valid(number)):
            raise InputError(f'{what} must be {required}; received {value!r}.')


@dataclasses.dataclass(frozen=True)
class Objective:
    """A weighted sum of terms over the same tokens.

    Attributes:
        terms: one or more `Term`.
        mtp_weight: of the same terms over tokens further ahead, for a model with multi-token
            prediction; a number or a `Schedule`.
        return_weight: of what a token does to those after it, in sequences that the student writes:
            see `distill.returns`; zero or more.
        features: what is matched inside of student and teacher, each with a weight of its own.
        across: how the student is compared with a teacher of another tokenizer; None for a teacher
            of the same.
    """

    terms: tuple[Term, ...]
    mtp_weight: float | Schedule = 0.0
    return_weight: float = 0.0
    features: tuple[Feature, ...] = ()
    across: CrossTokenizer | None = None

    def __post_init__(self) -> None:
        valid = isinstance(self.terms, tuple) and all(isinstance(t, Term) for t in self.terms)
        if not (valid and self.terms):
            raise InputError(
                f'An objective needs a tuple of one or more Term; received {self.terms!r}.'
            )
        for name in ('mtp_weight', 'return_weight'):
            check_number(getattr(self, name), lambda x: x >= 0, name, 'zero or more')
        if self.across is not None:
            require_across(self)

    @property
    def needs_teacher(self) -> bool:
        """Whether any term compares with a teacher."""
        extra = self.return_weight > 0 or bool(self.features) or self.across is not None
        return extra or any(term.needs_teacher for term in self.terms)

    @property
    def dual(self) -> bool:
        """Whether student and teacher are mapped into each other's space."""
        return self.across is not None and self.across.method == 'dskd'

    @property
    def uses_mtp(self) -> bool:
        """Whether tokens further ahead count at any step."""
        return ever_positive(self.mtp_weight)

    def at(self, step: Int[Array, ''] | int) -> tuple[Term, ...]:
        """Returns the terms with every schedule's value at a step, which may be traced."""
        return tuple(term.at(step) for term in self.terms)


def metric_names(terms: tuple[Term, ...], *, sampled: bool = False) -> tuple[str, ...]:
    """Returns a distinct name for each term: its own, numbered from the second of a name on.

    That of a term on some of the sequences says on whose: 'skew_reverse_kl_on_student'.

    On samples of the teacher, forward KL is known up to the teacher's entropy alone: it is named
    for what it is, 'teacher_cross_entropy'.
    """
    known = {'forward_kl': 'teacher_cross_entropy'} if sampled else {}
    names = [
        known.get(term.name, term.name) + ('' if term.on is None else f'_on_{term.on}')
        for term in terms
    ]
    return numbered(names)
