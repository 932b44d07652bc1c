"""Numbers that change with the training step, as data."""

import dataclasses
import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe.errors import InputError

Kind = Literal['constant', 'linear', 'cosine']


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Goes from `start` at step 0 to `end` at step `steps`, and stays there.

    Attributes:
        kind: 'constant' stays at `start` (and takes neither `end` nor `steps`); 'linear' goes in a
            straight line; 'cosine' along half a cosine wave, flat at both ends.
        start: the value at step 0.
        end: the value from step `steps` on.
        steps: how many updates the way takes; a positive integer.
    """

    kind: Kind
    start: float
    end: float | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise InputError(
                f"The kind of a schedule must be one of 'constant', 'linear', 'cosine'; "
                f'received {self.kind!r}.'
            )
        if self.kind == 'constant':
            if self.end is not None or self.steps is not None:
                raise InputError(
                    f'A constant schedule takes neither end nor steps; received end={self.end!r}, '
                    f'steps={self.steps!r}: leave them out, or choose linear or cosine.'
                )
        elif self.end is None or not isinstance(self.steps, int) or self.steps < 1:
            raise InputError(
                f'A {self.kind} schedule needs an end and a positive integer of steps; received '
                f'end={self.end!r}, steps={self.steps!r}.'
            )
        if not all(math.isfinite(bound) for bound in self.bounds):
            raise InputError(f'A schedule must be finite; received {self.bounds}.')

    @property
    def bounds(self) -> tuple[float, float]:
        """The values at both ends; every other value lies between them."""
        return self.start, self.start if self.end is None else self.end

    def at(self, step: Int[Array, ''] | int) -> Float[Array, ''] | float:
        """Returns the value at a step, which may be traced.

        Args:
            step: updates done so far, 0 or more.

        Returns:
            A float for a constant, else a float32 scalar.
        """
        if self.end is None or self.steps is None:
            return self.start
        done = jnp.clip(jnp.asarray(step, jnp.float32) / self.steps, 0, 1)
        if self.kind == 'cosine':
            done = (1 - jnp.cos(jnp.pi * done)) / 2
        return self.start + (self.end - self.start) * done


def bounds_of(value: 'float | Schedule | Array') -> tuple[Any, ...]:
    """Returns the values between which those of all steps lie: of a number, itself."""
    return value.bounds if isinstance(value, Schedule) else (value,)


def ever_positive(value: 'float | Schedule | Array') -> bool:
    """Whether a value is above zero at any step."""
    return any(float(bound) > 0 for bound in bounds_of(value))


def value_at(value: 'float | Schedule | Array', step: Int[Array, ''] | int) -> float | jax.Array:
    """Returns a schedule's value at a step, and any other value as it is."""
    return value.at(step) if isinstance(value, Schedule) else value
