"""The stages of a study, in order: each leaves a result, and is skipped where it is complete."""

import dataclasses
import functools
import sys
import time
from collections.abc import Callable
from typing import Any

import jax

from distill import distributed
from distill.cache import CachedTargets
from distill.config import BalanceConfig, TrainConfig
from distill.loop import Stopped
from distill.objective import Objective
from distill.optimizer import OptimizerConfig, make_optimizer
from distill.projectors import projector_axes
from distill.recipe import Recipe
from distill.rollout import Rollout
from distill.separate_teacher import SeparateTeacher, Shipper
from distill.straight_through import require_qwix, straight_through
from distill.target_stream import TargetStream
from distill.teacher import CachedTeacher, OnlineTeacher, Teacher
from experiments.context import Context
from experiments.evaluation import evaluate_models
from experiments.exams import make_examinee, require_sittable, results, sit
from experiments.export import export_student
from experiments.initial import initial_variables, require_source, started_from
from experiments.loading import unstacked
from experiments.quantised_evaluation import measure_quantised
from experiments.remote_scores import (
    require_texts_of_teacher,
    write_remote_targets,
)
from experiments.reporting import measured_names, reported_names, write_study_report
from experiments.seen import is_recorded, record_seen, refuse_seen
from experiments.targets import open_targets, write_targets
from experiments.teaching import further_facts, load_teacher, online_teacher, teacher_facts
from experiments.training import Run, load_model, train_model
from moe.config import TransformerConfig
from moe.convert import family_of
from moe.errors import InputError
from moe.sharding import init_sharded, logical_axes
from moe.transformer import Transformer

# Student and control start from the same parameters, the teacher from others.
_TEACHER_KEY, _STUDENT_KEY = 0, 1


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
        _require_sittable(context)
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
    targets = context.study.targets
    needed = {
        'targets': targets.cached,
        # A student that learns from text alone, as its control does, would be its own control.
        'quantise': context.study.quantise is not None,
        'control': targets.kind != 'text',
        'exams': context.study.exams.any,
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


def teacher(context: Context) -> dict[str, Any]:
    """Trains the teacher on the text, or checks that its checkpoint can be used."""
    config = context.study.teacher
    require_source(context)
    if config.source == 'ema':
        # It comes to be with the student.
        return {}
    if config.source == 'remote':
        if context.study.targets.kind == 'text':
            require_texts_of_teacher(context)
        elif context.study.targets.path is None and config.remote.scoring != 'written':
            # That there is a key is found out before anything is asked.
            config.remote.server()
        return {}
    if config.source != 'train':
        load_teacher(context)
        return {}
    recipe = _recipe(context, config.model, config.objective(), config.optimizer, config.train)
    key = _key(context, _TEACHER_KEY)
    initial = functools.partial(init_sharded, recipe.model, key, context.mesh)
    return _train(context, 'teacher', recipe, initial)


def targets(context: Context) -> dict[str, Any]:
    """Writes what the teacher says of the student's batches, or checks what another study wrote."""
    context.workdir.require_result('teacher', wanted_by='targets')
    if context.study.targets.path is not None:
        return {'rows': len(open_targets(context, teacher_facts(context)))}
    if context.study.teacher.source == 'remote':
        return write_remote_targets(context, teacher_facts(context))
    model, variables = load_teacher(context)
    return write_targets(context, model, variables, teacher_facts(context))


def student(context: Context) -> dict[str, Any]:
    """Distils the teacher, or what it said before, into the student."""
    config = context.study.student
    context.workdir.require_result('teacher', wanted_by='student')
    reader = ship = None
    if context.study.targets.cached:
        context.workdir.require_result('targets', wanted_by='student')
        reader = open_targets(context, teacher_facts(context))
        teacher, variables = CachedTeacher(), {}
    elif context.study.targets.kind == 'text':
        teacher, variables = None, {}
    elif context.study.teacher.mesh is not None:
        model, variables = load_teacher(context, mesh=context.teacher_mesh)
        ship = Shipper(
            OnlineTeacher(model),
            variables,
            (context.mesh, context.teacher_mesh),
            micro_batches=context.study.teacher.micro_batches or 1,
        )
        teacher, variables = SeparateTeacher(), ship.head
    else:
        teacher, variables = online_teacher(context)
    recipe = _recipe(
        context,
        config.model,
        config.objective(),
        config.optimizer,
        config.train,
        balance=config.balance,
        teacher=teacher,
        rollout=context.rollout,
        ema_decay=context.study.teacher.own_decay,
    )
    return _train(
        context,
        'student',
        recipe,
        functools.partial(initial_variables, context, _key(context, _STUDENT_KEY)),
        start=started_from(context),
        teacher=variables,
        taught_by=teacher_facts(context),
        reader=reader,
        ship=ship,
    )


def quantise(context: Context) -> dict[str, Any]:
    """Trains the student on to be what it was with its matrices quantised."""
    config, student = context.study.quantise, context.study.student
    assert config is not None
    context.workdir.require_result('student', wanted_by='quantise')
    model = context.model(student.model)
    load = functools.partial(_load, context, 'student', model)
    recipe = _recipe(
        context,
        student.model,
        config.objective(student.mtp_weight),
        config.optimizer,
        config.train,
        teacher=OnlineTeacher(model),
        seen=straight_through(model, config.weights),
    )
    facts = teacher_facts(context)
    return _train(context, 'quantise', recipe, load, teacher=load(), taught_by=facts)


def control(context: Context) -> dict[str, Any]:
    """Trains the student's twin on the same batches, from the same start, without a teacher."""
    config = context.study.student
    if not config.init.is_random and config.init.source == 'teacher':
        context.workdir.require_result('teacher', wanted_by='control')
    recipe = _recipe(
        context,
        config.model,
        dataclasses.replace(context.study.control.objective(), mtp_weight=config.mtp_weight),
        config.optimizer,
        config.train,
        balance=config.balance,
    )
    return _train(
        context,
        'control',
        recipe,
        functools.partial(initial_variables, context, _key(context, _STUDENT_KEY)),
        start=started_from(context),
    )


def evaluate(context: Context) -> dict[str, Any]:
    """Measures all that are here, a remote teacher not, on the same held-out text."""
    for name in ('teacher', 'student'):
        context.workdir.require_result(name, wanted_by='evaluate')
    names = [name for name in ('student', 'control') if context.workdir.result(name) is not None]
    for name in ('teacher', *names):
        if is_recorded(context.workdir.path / name):
            refuse_seen(context.workdir.path / name, context.documents.split[1], key='--workdir')
    student_model = context.model(context.study.student.model)
    students = {name: (student_model, _load(context, name, student_model)) for name in names}
    remote = context.study.teacher.source == 'remote'
    teachers = {} if remote else {'teacher': load_teacher(context)}
    result = evaluate_models(context, teachers | students)
    kinds, quantise = context.study.quantised_kinds, context.study.quantise
    if kinds and context.mesh.size > 1:
        print(
            f'quantised weights are not measured on {context.mesh.size} devices; '
            '--stages=evaluate,report on one does.',
            file=sys.stderr,
        )
    elif kinds:
        trained = None
        if quantise is not None and context.workdir.result('quantise') is not None:
            trained = quantise.weights, _load(context, 'quantise', student_model)
        # Anew: what is measured here is given up.
        student = student_model, _load(context, 'student', student_model)
        result['quantised'] = measure_quantised(context, kinds, student, trained)
    return result


def exams(context: Context) -> dict[str, Any]:
    """Has all that are here sit the exams that are asked for, one model in memory at a time."""
    names = [name for name in ('student', 'control') if name not in _unneeded(context)]
    for name in ('teacher', *names):
        context.workdir.require_result(name, wanted_by='exams')
    if context.study.teacher.source != 'remote':
        names = ['teacher', *names]
    config, seed, sat = context.study.exams, context.study.seed, {}
    for name in names:
        print(f'exams: the {name} sits {", ".join(config.names)}', file=sys.stderr)
        model, variables = _trained(context, name)
        model, variables = unstacked(model, variables, context.mesh)
        examinee = make_examinee(model, variables, context.read_by(name)[0], config)
        sat[name] = sit(examinee, config, seed=seed)
    return results(sat, seed=seed)


def _require_sittable(context: Context) -> None:
    """Refuses exams that could not be sat, before anything is trained that should sit them."""
    if context.workdir.result('exams') is not None:
        return
    if jax.process_count() > 1:
        raise InputError(
            f'The stage exams runs in one process; received {jax.process_count()}. Leave it out '
            'of --stages, and run it by itself: --stages=exams,report.'
        )
    tokenizers = [context.tokenizer] if context.study.exams.chat else []
    if tokenizers and context.study.teacher.source != 'remote':
        tokenizers.append(context.teacher_tokenizer)
    require_sittable(context.study.exams, tokenizers)


def report(context: Context) -> dict[str, Any]:
    """Writes summary.json, report.html and the pictures, and prints the table."""
    context.workdir.require_result('evaluate', wanted_by='report')
    facts = teacher_facts(context)
    others = {f'teacher {name}': own['provenance'] for name, own in further_facts(facts).items()}
    write_study_report(context, provenance={'teacher': facts['provenance']} | others)
    return {}


def export(context: Context) -> dict[str, Any]:
    """Writes the student as a folder that others load, with its tokenizer and a model card."""
    for name in ('student', 'evaluate'):
        context.workdir.require_result(name, wanted_by='export')
    config = context.study.student.model
    variables = _load(context, 'student', context.model(config))
    return export_student(context, config, variables)


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


def _recipe(
    context: Context,
    model: TransformerConfig,
    objective: Objective,
    optimizer: OptimizerConfig,
    train: TrainConfig,
    *,
    balance: BalanceConfig = BalanceConfig(),  # noqa: B008  frozen
    teacher: Teacher | None = None,
    rollout: Rollout | None = None,
    ema_decay: float | None = None,
    seen: Callable[[Any], Any] | None = None,
) -> Recipe:
    built = context.model(model)
    axes = logical_axes(built)['params'] | projector_axes(objective.features, dual=objective.dual)
    chain = make_optimizer(optimizer, train.steps, axes)
    seed, qk_clip = context.study.seed, optimizer.qk_clip
    return Recipe(
        built, objective, chain, train, balance, teacher, seed, qk_clip, rollout, ema_decay, seen
    )


def _train(
    context: Context,
    stage: str,
    recipe: Recipe,
    initial: Callable[[], Any],
    *,
    start: dict[str, Any] | None = None,
    teacher: Any = None,
    taught_by: dict[str, Any] | None = None,
    reader: CachedTargets | None = None,
    ship: Shipper | None = None,
) -> dict[str, Any]:
    """Trains from the variables that `initial` makes, unless there is a checkpoint to go on from.

    Args:
        context: of the study.
        stage: the name of its folder.
        recipe: of one update.
        initial: makes the variables, placed.
        start: describes how they are made, where they need not be random.
        teacher: variables of the frozen teacher.
        taught_by: who that is, see `teacher_facts`.
        reader: of what it said before, where it is not there.
        ship: places batches where it has devices of its own.
    """
    data = context.study.data
    # Bad text is found out before the folder becomes this study's.
    pipeline = context.pipeline()
    stream = pipeline if reader is None else TargetStream(pipeline, reader)
    run = Run(
        stage=stage,
        folder=context.workdir.stage(stage),
        recipe=recipe,
        mesh=context.mesh,
        teacher={} if teacher is None else teacher,
        initial=initial,
        identity=context.identity(recipe.model.config) | {'teacher': taught_by, 'start': start},
        shape=(data.batch_size, data.seq_len),
        place=ship,
    )
    if distributed.is_writer():
        record_seen(run.folder, context.documents.split[0])
    result = train_model(run, stream, context.stop)
    if context.documents.ledger is not None:
        seen = context.documents.of_epoch(len(context.documents.ledger) - 1)
        if distributed.is_writer():
            record_seen(run.folder, seen)
    return result | ({} if start is None else {'start': start})


def _key(context: Context, number: int) -> jax.Array:
    """A key of the study's own."""
    return jax.random.fold_in(jax.random.key(context.study.seed), number)


def _trained(context: Context, name: str) -> tuple[Transformer, Any]:
    """A model of the study, and its variables."""
    if name == 'teacher':
        return load_teacher(context)
    model = context.model(context.study.student.model)
    return model, _load(context, name, model)


def _load(context: Context, stage: str, model: Transformer) -> Any:
    """Loads the variables of a trained stage of this study."""
    folder = context.workdir.path / stage / 'model'
    return load_model(folder, model, context.mesh, context.identity(model.config))
