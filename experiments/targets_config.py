"""What a student sees of its teacher, as a config."""

import dataclasses
import os
from typing import Literal

from distill.estimators import SampledEstimator, TopKEstimator
from moe.config import require
from moe.errors import InputError

_NEVER_CACHED = {
    'hidden': "it is larger than the teacher's work",
    'truncated': "'top_k' keeps what it leaves out",
    'text': 'it is the data',
}


@dataclasses.dataclass(frozen=True)
class TargetsConfig:
    """What the student is given of its teacher.

    Attributes:
        kind: 'hidden' (everything), 'top_k' (the likeliest ids and the mass of the rest),
            'sampled' (ids drawn from the teacher), 'truncated' (the likeliest ids as if they were
            all: biased, to be compared with) or 'text' (what it wrote, which is the data).
        cached: whether a stage writes targets for any number of students, that then need no
            teacher; else it runs beside the student. Not of kind 'hidden'.
        path: another study's folder of targets, to read them rather than write them.
        steps: batches of training whose targets are written; None for the student's own steps.
        temperature: divides the teacher's logits; that of the terms it is used in. Of 'hidden', 1.
        k: ids of 'top_k' and 'truncated'.
        draws: of 'sampled', of each token; None finds the number that gives `distinct` ids.
        distinct: ids of a token, on average over the first batch.
        proposal_temperature: divides the logits once more to draw; draws are then weighed.
        rows_per_shard: rows of a file; as many are lost at most when a writer is killed.
    """

    kind: Literal['hidden', 'top_k', 'sampled', 'truncated', 'text']
    cached: bool
    path: str | None
    steps: int | None
    temperature: float
    k: int
    draws: int | None
    distinct: float
    proposal_temperature: float
    rows_per_shard: int

    def __post_init__(self) -> None:
        if self.cached and self.kind in _NEVER_CACHED:
            raise InputError(
                "targets.kind must be 'top_k' or 'sampled' where targets.cached=True; received "
                f'{self.kind!r}, which is not written: {_NEVER_CACHED[self.kind]}. Choose one, '
                'or set cached=False.'
            )
        if not self.cached and (self.path is not None or self.steps is not None):
            raise InputError(
                'targets.path and targets.steps need targets.cached=True; received False. Set it, '
                'or leave them out.'
            )
        if self.kind == 'hidden':
            require(
                self.temperature == 1,
                'targets.temperature',
                "1 for kind='hidden', whose terms have their own",
                self.temperature,
            )
        TopKEstimator(self.k, self.temperature)
        SampledEstimator(
            1 if self.draws is None else self.draws, self.temperature, self.proposal_temperature
        )
        require(self.distinct >= 1, 'targets.distinct', 'at least 1', self.distinct)
        for name in ('steps', 'rows_per_shard'):
            value = getattr(self, name)
            require(value is None or value > 0, f'targets.{name}', 'positive', value)
        if self.path is not None:
            object.__setattr__(self, 'path', os.path.expanduser(self.path))
