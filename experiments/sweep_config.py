"""A sweep as data: variants of one study, each with the same seeds, on equally many tokens."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import ml_collections

from experiments.build import unknown_key
from experiments.study import StudyConfig, build_study
from moe.errors import InputError

KEYS = ('study', 'variants', 'baseline', 'seeds')


@dataclasses.dataclass(frozen=True)
class Run:
    """One variant with one seed: a study like any other."""

    variant: str
    seed: int
    config: ml_collections.ConfigDict
    study: StudyConfig

    @property
    def tokens(self) -> int:
        """That the student is trained on, padding included."""
        data = self.study.data
        return self.study.student.train.steps * data.batch_size * data.seq_len

    @property
    def teacher_inputs(self) -> Any:
        """All that the teacher hangs on."""
        values: dict[str, Any] = self.config.to_dict()
        return {key: values[key] for key in ('seed', 'data', 'mesh', 'teacher')}

    @property
    def control_inputs(self) -> Any:
        """All that the control hangs on: not on what teaches the student."""
        values: dict[str, Any] = self.config.to_dict()
        del values['evaluate'], values['student']['terms'], values['student']['features']
        # Of 'text' the student has no control: it would be its own.
        values['targets'] = values['targets']['kind'] == 'text'
        return values


def build_runs(config: Any) -> list[Run]:
    """Builds and checks every run of a sweep: all variants of the first seed, then of the next.

    Args:
        config: a ConfigDict of `study`, all keys of a study; `variants`, for each name the keys
            of the study that it changes, nested; `baseline`, the variant that the others are
            compared with; and `seeds`.

    Raises:
        InputError: for a missing or unknown key, fewer than two variants, a variant that is no
            study, or variants whose students see unequally many tokens.
    """
    for key in config:
        if key not in KEYS:
            raise InputError(unknown_key('config', key, list(KEYS)))
    missing = [key for key in KEYS if key not in config]
    if missing:
        raise InputError(
            f'A sweep needs {", ".join(missing)} in its config, as configs/upcycle.py has them; a '
            'study by itself is run by experiments.launch.'
        )
    names, seeds = list(config.variants), tuple(config.seeds)
    if len(names) < 2 or config.baseline not in names:
        raise InputError(
            'config.variants must name two or more, config.baseline one of them; received '
            f'{", ".join(names) or "none"} and {config.baseline!r}.'
        )
    if not seeds or len(set(seeds)) < len(seeds):
        raise InputError(f'config.seeds must be different numbers, one or more; received {seeds}.')
    runs = [_run(config, name, seed) for seed in seeds for name in names]
    tokens = {run.variant: run.tokens for run in runs}
    if len(set(tokens.values())) > 1:
        raise InputError(
            'Variants are compared at equal tokens: data.batch_size * data.seq_len * '
            f'student.train.steps must be equal; received {tokens}.'
        )
    return runs


def _run(config: Any, name: str, seed: int) -> Run:
    study = config.study.copy_and_resolve_references()
    try:
        _change(study, config.variants[name], 'study')
        study.seed = seed
        return Run(name, seed, study, build_study(study))
    except InputError as error:
        raise InputError(f'In config.variants.{name}: {error}') from error


def _change(part: Any, changes: Any, path: str) -> None:
    """Sets what a variant changes in a part of the study; terms and features may be new there."""
    for key, value in changes.items():
        if key not in part and not path.endswith(('.terms', '.features')):
            raise InputError(unknown_key(path, key, list(part)))
        if isinstance(value, Mapping | ml_collections.ConfigDict) and part.get(key) is not None:
            _change(part[key], value, f'{path}.{key}')
            continue
        try:
            with part.unlocked():
                part[key] = value
        except TypeError as error:
            raise InputError(f'{path}.{key}: {error}') from error
