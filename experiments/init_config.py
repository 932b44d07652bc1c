"""How a student starts, as data: at random, or out of a model that was trained already."""

import dataclasses
import os
from typing import Any, Literal

from moe.config import TransformerConfig, require
from moe.errors import InputError
from moe.surgery import METHODS, method_options, needs_calibration, require_reachable

_OPTIONS = ('noise', 'router', 'router_std', 'by', 'similarity')


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """The parameters that a student and its control start from, the same for both.

    Attributes:
        method: 'random', or a key of `moe.surgery.METHODS`.
        source: what the other methods start from: 'teacher', the study's own, or 'checkpoint'.
        checkpoint: the folder of a trained stage, with source='checkpoint'; `~` is the home folder.
        calibration_rows: of `data.seq_len` tokens of the train split, on which a method measures
            the source.
        noise: option of 'upcycle', as is `router_std`; None leaves an option at its default.
        router: of 'upcycle', how the columns of the routers begin.
        router_std: of their weights.
        by: of 'prune_experts' and 'merge_experts', the measure of an expert.
        similarity: of 'merge_experts', what of two experts is compared.
    """

    method: str
    source: Literal['teacher', 'checkpoint']
    checkpoint: str | None
    calibration_rows: int
    noise: float | None
    router: Literal['drawn', 'centroids'] | None
    router_std: float | None
    by: Literal['frequency', 'weight', 'activation'] | None
    similarity: Literal['outputs', 'weights'] | None

    def __post_init__(self) -> None:
        require(
            self.method in ('random', *METHODS),
            'init.method',
            f'one of random, {", ".join(METHODS)}',
            self.method,
        )
        require(
            self.calibration_rows > 0, 'init.calibration_rows', 'positive', self.calibration_rows
        )
        if (self.source == 'checkpoint') != (self.checkpoint is not None):
            raise InputError(
                "init.checkpoint is a trained stage's folder and goes with source='checkpoint'; "
                f'received source={self.source!r} and checkpoint={self.checkpoint!r}.'
            )
        if self.checkpoint is not None:
            object.__setattr__(self, 'checkpoint', os.path.expanduser(self.checkpoint))
        known = [] if self.is_random else list(method_options(self.method))
        unknown = [name for name in self.options if name not in known]
        if self.is_random and self.source == 'checkpoint':
            unknown.append('checkpoint')
        if unknown:
            raise InputError(
                f'init.{unknown[0]} is nothing that method={self.method!r} reads: it takes '
                f'{", ".join(known) or "no options"}. Leave init.{unknown[0]} at None, or choose '
                'another method.'
            )

    @property
    def is_random(self) -> bool:
        """Whether nothing is started from."""
        return self.method == 'random'

    @property
    def options(self) -> dict[str, Any]:
        """What was set of the method's options."""
        values = {name: getattr(self, name) for name in _OPTIONS}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def calibrates(self) -> bool:
        """Whether the method measures its source."""
        return not self.is_random and needs_calibration(self.method, self.options)

    def require_reachable(self, source: TransformerConfig, target: TransformerConfig) -> None:
        """Refuses a student that the method cannot make of the source; names the field.

        Args:
            source: config of the model to start from.
            target: the student's.
        """
        try:
            require_reachable(self.method, source, target, self.options)
        except InputError as error:
            raise InputError(
                f'config.student.init.method={self.method!r} cannot make config.student.model of '
                f'its source, the {self.source}. {error}'
            ) from error
