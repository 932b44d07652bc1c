"""The stages that train, and that in which the teacher writes what the student learns from."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from distill import distributed
from distill.cache import CachedTargets
from distill.config import BalanceConfig, TrainConfig
from distill.objective import Objective
from distill.optimizer import OptimizerConfig, make_optimizer
from distill.projectors import projector_axes
from distill.recipe import Recipe
from distill.rollout import Rollout
from distill.separate_teacher import SeparateTeacher, Shipper
from distill.straight_through import straight_through
from distill.target_stream import TargetStream
from distill.teacher import CachedTeacher, OnlineTeacher, Teacher
from experiments.context import Context
from experiments.initial import initial_variables, require_source, started_from
from experiments.remote_scores import (
    require_texts_of_teacher,
    write_remote_targets,
)
from experiments.seen import record_seen
from experiments.targets import open_targets, write_targets
from experiments.teaching import load_teacher, load_teaching, online_teacher, teacher_facts
from experiments.training import Run, load_model, train_model
from moe.config import TransformerConfig
from moe.sharding import init_sharded, logical_axes
from moe.transformer import Transformer

# Student and control start from the same parameters, the teacher from others.
_TEACHER_KEY, _STUDENT_KEY = 0, 1


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
    model, variables = load_teaching(context)
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
        model, variables = load_teaching(context, mesh=context.teacher_mesh)
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
    load = functools.partial(load_trained, context, 'student', model)
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


def load_trained(context: Context, stage: str, model: Transformer) -> Any:
    """Loads the variables of a trained stage of this study."""
    folder = context.workdir.path / stage / 'model'
    return load_model(folder, model, context.mesh, context.identity(model.config))


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
