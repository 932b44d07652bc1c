"""What a student is trained for: divergences with weights and temperatures, as data."""

import dataclasses
import math

from jaxtyping import Array, Float, Int

from distill.integrands import Divergence
from distill.schedules import Schedule, value_at
from moe.errors import InputError

DEFAULT_BETA = 0.5
DEFAULT_LAM = 0.1

Number = float | Schedule | Float[Array, '']


@dataclasses.dataclass(frozen=True)
class Term:
    """One divergence of an objective; `loss = sum of weight * divergence`.

    Attributes:
        name: 'cross_entropy' (against the labels: the one term that needs no teacher),
            'forward_kl', 'reverse_kl', 'jsd', 'skew_forward_kl', 'skew_reverse_kl' or
            'total_variation'.
        weight: zero or more; a number or a `Schedule`.
        temperature: divides the logits of both sides; positive; a number or a `Schedule`.
        scale_by_temperature_squared: whether T^2 multiplies the divergence.
        beta: of 'jsd' alone, in [0, 1]; 0.5 if not given.
        lam: of the skew divergences alone, in [0, 1); 0.1 if not given.
    """

    name: str
    _: dataclasses.KW_ONLY
    weight: Number = 1.0
    temperature: Number = 1.0
    scale_by_temperature_squared: bool = False
    beta: float | None = None
    lam: float | None = None

    def __post_init__(self) -> None:
        assert self.divergence
        _check(self.weight, lambda x: x >= 0, f'The weight of {self.name}', 'zero or more')
        _check(self.temperature, lambda x: x > 0, f'The temperature of {self.name}', 'positive')

    @property
    def divergence(self) -> Divergence:
        """The divergence alone, with defaults filled in and everything validated."""
        beta, lam = self.beta, self.lam
        if self.name == 'jsd' and beta is None:
            beta = DEFAULT_BETA
        if self.name in ('skew_forward_kl', 'skew_reverse_kl') and lam is None:
            lam = DEFAULT_LAM
        return Divergence(self.name, beta=beta, lam=lam)

    @property
    def needs_teacher(self) -> bool:
        """Whether the term compares with a teacher, rather than with labels."""
        return self.name != 'cross_entropy'

    def at(self, step: Int[Array, ''] | int) -> 'Term':
        """Returns the term with its schedules' values at a step, which may be traced."""
        return dataclasses.replace(
            self,
            weight=value_at(self.weight, step),
            temperature=value_at(self.temperature, step),
        )


def _check(value: Number, valid, what: str, required: str) -> None:
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
    """

    terms: tuple[Term, ...]

    def __post_init__(self) -> None:
        valid = isinstance(self.terms, tuple) and all(isinstance(t, Term) for t in self.terms)
        if not (valid and self.terms):
            raise InputError(
                f'An objective needs a tuple of one or more Term; received {self.terms!r}.'
            )

    @property
    def needs_teacher(self) -> bool:
        """Whether any term compares with a teacher."""
        return any(term.needs_teacher for term in self.terms)

    def at(self, step: Int[Array, ''] | int) -> tuple[Term, ...]:
        """Returns the terms with every schedule's value at a step, which may be traced."""
        return tuple(term.at(step) for term in self.terms)


def metric_names(terms: tuple[Term, ...]) -> tuple[str, ...]:
    """Returns a distinct name for each term: its own, numbered from the second of a name on."""
    names = [term.name for term in terms]
    counts = [names[:i].count(name) for i, name in enumerate(names)]
    return tuple(f'{n}_{c + 1}' if c else n for n, c in zip(names, counts, strict=True))
