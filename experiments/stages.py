"""The stages of a study, in order: each leaves a result, and is skipped where it is complete."""

import sys
import time
from collections.abc import Callable
from typing import Any

from distill import distributed
from distill.loop import Stopped
from distill.straight_through import require_qwix
from experiments.context import Context
from experiments.measuring_stages import evaluate, exams, export, report, require_exams
from experiments.reporting import measured_names, reported_names
from experiments.training_stages import control, quantise, student, targets, teacher
from moe.convert import family_of
from moe.errors import InputError


def run_stages(context: Context, names: tuple[str, ...]) -> None:
    """Runs the named stages in their order; skips those that are complete.

    Raises:
        InputError: for a name that is no stage, or a stage whose input is not there.
    """
    require_stages(names)
    if 'export' in names:
        # Before anything is trained that could not be exported.
        family_of(context.study.student.model)
    if 'quantise' in names and 'quantise' not in _unneeded(context):
        require_qwix()
    if 'exams' in names and 'exams' not in _unneeded(context):
        require_exams(context)
    if names == ('targets',) and not context.study.targets.cached:
        raise InputError(
            "--stages=targets needs config.targets.cached=True and a kind of 'top_k' or 'sampled'; "
            f'received kind={context.study.targets.kind!r}, cached=False.'
        )
    for name, stage in STAGES.items():
        if name not in names or name in _unneeded(context):
            continue
        complete = context.workdir.result(name) is not None and not _is_due_again(context, name)
        # Nobody may see what this stage writes before everybody has seen what was there.
        distributed.barrier(f'{name}: decided')
        if complete:
            if distributed.is_writer():
                print(f'{name}: complete in {context.workdir.path}, skipped', file=sys.stderr)
            continue
        if context.stop.agreed(0):
            raise Stopped(f'before stage {name!r}')
        start = time.perf_counter()
        result = stage(context)
        seconds = result.pop('seconds_before', 0.0) + time.perf_counter() - start
        context.workdir.complete(name, {'seconds': round(seconds, 3)} | result)
        distributed.barrier(f'{name}: complete')


def _is_due_again(context: Context, name: str) -> bool:
    """Whether a complete stage has more to say now: of a control that was trained after it."""
    if name not in ('evaluate', 'report'):
        return False
    evaluation = context.workdir.result('evaluate')
    measured = set() if evaluation is None else measured_names(evaluation)
    if name == 'evaluate':
        late = {'control'} if context.mesh.size > 1 else {'control', 'quantise'}
        return any(context.workdir.result(who) is not None for who in late - measured)
    # Figures that are asked for are written, though the report stands.
    return context.json_path is not None or reported_names(context) != measured


def _unneeded(context: Context) -> tuple[str, ...]:
    """Names the stages that there is nothing to do for."""
    study = context.study
    needed = {
        'targets': study.targets.cached,
        'quantise': study.quantise is not None,
        'control': study.has_control,
        'exams': study.exams.any,
    }
    return tuple(name for name, is_needed in needed.items() if not is_needed)


def require_stages(names: tuple[str, ...]) -> None:
    """Refuses names that are no stages."""
    unknown = [name for name in names if name not in STAGES]
    if unknown or not names:
        raise InputError(
            f'--stages must name some of {",".join(STAGES)}, with commas and no spaces; received '
            f'{",".join(names)!r}.'
        )


STAGES: dict[str, Callable[[Context], dict[str, Any]]] = {
    'teacher': teacher,
    'targets': targets,
    'student': student,
    'quantise': quantise,
    'control': control,
    'evaluate': evaluate,
    'exams': exams,
    'report': report,
    'export': export,
}
# The others run when they are asked for.
USUAL_STAGES = tuple(name for name in STAGES if name != 'export')
