"""How a student starts, as data: at random, or out of a model that was trained already."""

import dataclasses
import os
from typing import Any, Literal

from distill.provenance import FROM_WEIGHTS, PUBLISHED, Provenance, require_permission
from moe.config import TransformerConfig, require
from moe.errors import InputError
from moe.surgery import METHODS, method_options, needs_calibration, require_reachable

_OPTIONS = ('noise', 'router', 'router_std', 'by', 'similarity')
_SOURCES = {'teacher': 'teacher', 'checkpoint': 'checkpoint', 'hf': 'published model'}


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """The parameters that a student and its control start from, the same for both.

    Attributes:
        method: 'random', or a key of `moe.surgery.METHODS`.
        source: what the other methods start from: 'teacher', the study's own, 'checkpoint' or 'hf'.
        checkpoint: the folder of a trained stage, with source='checkpoint', or, with 'hf', of a
            published model, as `transformers` saves it; `~` is the home folder. To 'copy' the
            latter makes the student what it is, whatever config.student.model says of it; how it
            is run (dispatch, remat, dtypes, modules of multi-token prediction) the config says.
        provenance: of a published model its licence, and whether that permits training from its
            weights; name and version are known where they are not declared.
        calibration_rows: of `data.seq_len` tokens of the train split, on which a method measures
            the source.
        noise: option of 'upcycle', as is `router_std`; None leaves an option at its default.
        router: of 'upcycle', how the columns of the routers begin.
        router_std: of their weights.
        by: of 'prune_experts' and 'merge_experts', the measure of an expert.
        similarity: of 'merge_experts', what of two experts is compared.
    """

    method: str
    source: Literal['teacher', 'checkpoint', 'hf']
    checkpoint: str | None
    provenance: Provenance
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
        if (self.source == 'teacher') != (self.checkpoint is None):
            raise InputError(
                "init.checkpoint is a trained stage's folder and goes with source='checkpoint', or "
                f"a published model's and goes with source='hf'; received source={self.source!r} "
                f'and checkpoint={self.checkpoint!r}.'
            )
        if self.checkpoint is not None:
            object.__setattr__(self, 'checkpoint', os.path.expanduser(self.checkpoint))
        known = [] if self.is_random else list(method_options(self.method))
        unknown = [name for name in self.options if name not in known]
        if self.is_random and self.checkpoint is not None:
            unknown.append('checkpoint')
        if unknown:
            raise InputError(
                f'init.{unknown[0]} is nothing that method={self.method!r} reads: it takes '
                f'{", ".join(known) or "no options"}. Leave init.{unknown[0]} at None, or choose '
                'another method.'
            )
        self._require_declared()

    def _require_declared(self) -> None:
        """Requires of a published model what its folder cannot tell, and of no other anything."""
        if self.source == 'hf':
            require_permission(
                self.provenance.filled(PUBLISHED),
                "The student's start",
                key='config.student.init.provenance',
                use=FROM_WEIGHTS,
            )
        elif self.provenance != Provenance():
            raise InputError(
                "init.provenance declares a published model and goes with source='hf'; received "
                f'{self.provenance} with source={self.source!r}. Leave it out.'
            )

    @property
    def is_random(self) -> bool:
        """Whether nothing is started from."""
        return self.method == 'random'

    @property
    def source_in_words(self) -> str:
        """What is started from."""
        return _SOURCES[self.source]

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
                f'its source, the {self.source_in_words}. {error}'
            ) from error
