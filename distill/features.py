"""What a student is to have in common with its teacher inside, as data."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

from jaxtyping import Array, Int

from distill.feature_losses import Metric
from distill.naming import numbered
from distill.schedules import Schedule, bounds_of, value_at
from moe.activations import Activation
from moe.errors import InputError
from moe.validation import one_of

Kind = Literal['embedding', 'hidden', 'relation', 'attention', 'router', 'usage']
Vectors = Literal['queries', 'keys', 'values']
LayerPair = tuple[int, int]
# The options that some kinds alone take, and their defaults.
_OPTIONS: dict[str, dict[str, Any]] = {
    'embedding': {'metric': 'mse', 'project': True},
    'hidden': {'metric': 'mse', 'project': True},
    'relation': {'of': 'values'},
}


@dataclasses.dataclass(frozen=True)
class Feature:
    """One thing inside a student that is matched to its teacher's.

    Attributes:
        kind: 'embedding' (of the tokens) or 'hidden' (the residual stream after a layer), both
            through a learnt projector; 'relation' (MiniLMv2's, between queries, keys or values);
            'attention' (its maps, of as many heads); 'router' (its scores, of as many experts) or
            'usage' (which tokens use the same experts, however many there are). See
            `distill.feature_losses`, and `distill.router_match` for 'router'.
        weight: zero or more; a number or a `Schedule`.
        layers: pairs (the student's layer, the teacher's), from 0; the loss is their mean. Where
            empty, all layers that have the feature are paired in order.
        metric: of 'embedding' and 'hidden' alone: 'mse', if not given, or 'cosine'.
        project: of these alone: whether the student's states pass a learnt projector, one for each
            pair of layers; True if not given.
        of: of 'relation' alone: 'queries', 'keys' or 'values', the last if not given.
        heads: of 'relation' alone, and needed there: relation heads.
    """

    kind: Kind
    _: dataclasses.KW_ONLY
    weight: float | Schedule = 1.0
    layers: tuple[LayerPair, ...] = ()
    metric: Metric | None = None
    project: bool | None = None
    of: Vectors | None = None
    heads: int | None = None

    def __post_init__(self) -> None:
        one_of('A feature', self.kind, Kind)
        taken = (*_OPTIONS.get(self.kind, {}), *(('heads',) if self.kind == 'relation' else ()))
        for name in ('metric', 'project', 'of', 'heads'):
            value = getattr(self, name)
            if name not in taken and value is not None:
                raise InputError(f'{self.kind} takes no {name}; received {value!r}: leave it out.')
        for name, default in _OPTIONS.get(self.kind, {}).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        if self.metric is not None:
            one_of(f'The metric of {self.kind}', self.metric, Metric)
        if self.of is not None:
            one_of('of', self.of, Vectors)
        if self.kind == 'relation' and not (isinstance(self.heads, int) and self.heads > 0):
            raise InputError(
                f'relation needs heads, a positive integer; received {self.heads!r}. Give a '
                "divisor of both models' widths over all heads."
            )
        self._check_weight()
        self._check_layers()

    def _check_weight(self) -> None:
        if not all(math.isfinite(bound) and bound >= 0 for bound in bounds_of(self.weight)):
            raise InputError(
                f'The weight of {self.kind} must be zero or more; received {self.weight!r}.'
            )

    def _check_layers(self) -> None:
        if self.kind == 'embedding' and self.layers:
            raise InputError(f'embedding takes no layers; received {self.layers}: leave them out.')
        pairs = all(isinstance(pair, tuple) and len(pair) == 2 for pair in self.layers)
        if not pairs or len(set(self.layers)) < len(self.layers):
            raise InputError(
                f'The layers of {self.kind} must be distinct pairs (student, teacher), such as '
                f'((0, 1), (1, 3)); received {self.layers!r}.'
            )

    @property
    def reads(self) -> tuple[Activation, ...]:
        """The activations that it is made of; none for what routers return anyway."""
        match self.kind:
            case 'embedding' | 'hidden':
                return ('residual',)
            case 'relation':
                return (self.of or 'values',)
            case 'attention':
                return ('queries', 'keys')
            case _:
                return ()

    def weight_at(self, step: Int[Array, ''] | int) -> Any:
        """Returns the weight at a step, which may be traced."""
        return value_at(self.weight, step)


def activations_of(features: Sequence[Feature]) -> tuple[Activation, ...]:
    """Returns all activations that the features are made of, each once."""
    return tuple(dict.fromkeys(name for feature in features for name in feature.reads))


def feature_names(features: Sequence[Feature]) -> tuple[str, ...]:
    """Returns a distinct name for each: its kind, numbered from the second of a kind on."""
    return numbered([feature.kind for feature in features])
