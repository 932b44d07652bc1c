"""The teachers of a study: from where they come, and what is known of them."""

import dataclasses
import hashlib
import pathlib
from typing import Any

import jax
from jax.sharding import Mesh

from distill.checkpoint import read_metadata
from distill.foreign_teacher import ForeignTeacher
from distill.panel import TeacherPanel
from distill.partwise import PartwiseTeacher
from distill.pretrained_tokenizer import PretrainedTokenizer
from distill.provenance import Provenance, require_permission
from distill.spans import match_vocabularies
from distill.teacher import EstimatedTeacher, OnlineTeacher, Teacher
from distill.token_bytes import token_bytes
from experiments.context import Context
from experiments.panel_config import FurtherTeacherConfig
from experiments.remote_scores import remote_teacher_facts
from experiments.seen import refuse_seen
from experiments.targets import online_estimator
from experiments.teacher_config import OWN_TEACHER, TeacherConfig
from experiments.training import load_model, model_sha256
from moe.convert import folder_sha256, load_pretrained
from moe.errors import InputError
from moe.quantising import quantise
from moe.sharding import variable_shardings
from moe.transformer import Transformer


def load_teacher(
    context: Context, further: FurtherTeacherConfig | None = None, mesh: Mesh | None = None
) -> tuple[Transformer, Any]:
    """Loads the frozen teacher in its own dtype, each array on the devices that hold it.

    Args:
        context: of the study.
        further: another teacher than the first.
        mesh: another than the study's.
    """
    mesh = mesh or context.mesh
    config = further or context.study.teacher
    folder = context.folder_of(config)
    if config.source == 'hf':
        if further is not None:
            _require_same_tokenizer(context, folder)
        _, published = load_pretrained(folder, mesh=mesh, dtype=config.dtype)
        return context.model(config.model, mesh), {'routing': {}} | published
    if config.source == 'ema':
        model = context.model(config.model)
        folder = context.workdir.path / 'student' / 'ema'
        return model, load_model(folder, model, context.mesh, context.identity(model.config))
    trained = context.model(config.model, mesh)
    if config.checkpoint is not None:
        refuse_seen(folder, context.documents.split[1], key='config.teacher.checkpoint')
    identity = context.identity(trained.config, teacher=True)
    variables = load_model(folder / 'model', trained, mesh, identity)
    frozen = dataclasses.replace(config.model, dtype=config.dtype, param_dtype=config.dtype)
    model = context.model(frozen, mesh)
    cast = jax.jit(
        lambda params: jax.tree.map(lambda leaf: leaf.astype(config.dtype), params),
        out_shardings=variable_shardings(model, mesh)['params'],
    )
    return model, variables | {'params': cast(variables['params'])}


def load_teaching(context: Context, mesh: Mesh | None = None) -> tuple[Transformer, Any]:
    """Loads the frozen teacher as it teaches: its matrices quantised where the config says so."""
    model, variables = load_teacher(context, mesh=mesh)
    weights = context.study.teacher.weights
    return model, variables if weights is None else quantise(model, variables, weights)


def _require_same_tokenizer(context: Context, folder: pathlib.Path) -> None:
    """Refuses a published teacher that reads other ids than the first."""
    own, ours = PretrainedTokenizer(str(folder)).fingerprint, context.tokenizer.fingerprint
    if own != ours:
        raise InputError(
            f'The tokenizer of {folder} must be that of the study, {ours}; it is {own}. Teachers '
            'together need one vocabulary: choose one of the same family.'
        )


def online_teacher(context: Context) -> tuple[Teacher, Any]:
    """The teacher beside the student: all of it, or the estimate of it that might be cached.

    An average of the student has its variables in the state that is trained.
    """
    if context.study.teacher.source == 'ema':
        own = OnlineTeacher(context.model(context.study.student.model))
        return _in_parts(context, own), {}
    model, variables = load_teaching(context)
    if context.study.student.cross_tokenizer is not None:
        both = context.tokenizer, context.teacher_tokenizer
        return ForeignTeacher(model, match_vocabularies(*both, *map(token_bytes, both))), variables
    online = OnlineTeacher(model)
    if context.study.more_teachers:
        return _panel(context, online, variables)
    if context.study.targets.kind == 'hidden':
        return _in_parts(context, online), variables
    estimator = online_estimator(context, model, variables)
    return _in_parts(context, EstimatedTeacher(online, estimator)), variables


def _in_parts(context: Context, teacher: OnlineTeacher | EstimatedTeacher) -> Teacher:
    """The teacher, in its own parts of a batch where the config says how many."""
    parts = context.study.teacher.micro_batches
    return teacher if parts is None else PartwiseTeacher(teacher, parts)


def _panel(context: Context, first: OnlineTeacher, variables: Any) -> tuple[Teacher, Any]:
    """The first teacher and the others, together."""
    more = context.study.more_teachers or {}
    loaded = [load_teacher(context, config) for config in more.values()]
    teachers = (first, *(OnlineTeacher(model) for model, _ in loaded))
    weights = (context.study.teacher.weight, *(config.weight for config in more.values()))
    return TeacherPanel(teachers, weights), (variables, *(own for _, own in loaded))


def teacher_facts(context: Context) -> dict[str, Any]:
    """Who the teacher is: the hash of its weights and its provenance; and who the others are."""
    more = context.study.more_teachers or {}
    others = {name: _facts_of(context, config) for name, config in more.items()}
    facts, weights = _facts_of(context, context.study.teacher), context.study.teacher.weights
    if weights is not None:
        # What it says is said by other numbers.
        facts['sha256'] = hashlib.sha256(f'{weights} {facts["sha256"]}'.encode()).hexdigest()
    return facts | ({'others': others} if others else {})


def further_facts(facts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Those who taught beside the first, by name."""
    return facts.get('others', {})


def _facts_of(context: Context, config: TeacherConfig | FurtherTeacherConfig) -> dict[str, Any]:
    if config.source == 'remote':
        return remote_teacher_facts(context.study.teacher)
    if config.source == 'ema':
        decay = context.study.teacher.ema_decay
        known = dataclasses.replace(
            OWN_TEACHER, name='an average of the student', version=f'decay {decay}'
        )
        return {'provenance': dataclasses.asdict(config.provenance.filled(known))}
    folder = context.folder_of(config)
    published = config.source == 'hf'
    sha256 = folder_sha256(folder) if published else model_sha256(folder / 'model')
    own = dataclasses.replace(OWN_TEACHER, version=sha256[:16])
    if published:
        own = Provenance(name=folder.name, version=sha256[:16])
    elif config.checkpoint is not None:
        own = dataclasses.replace(own, name=f'checkpoint {folder.name!r} of another study')
        # What was taught itself is under its own teacher's terms.
        taught_by = read_metadata(folder / 'model').metadata['identity'].get('teacher')
        if isinstance(taught_by, dict):
            terms = [
                facts['provenance'] for facts in (taught_by, *further_facts(taught_by).values())
            ]
            own = dataclasses.replace(
                own,
                licence=' and '.join(dict.fromkeys(one['licence'] for one in terms)),
                permits_training=all(one['permits_training'] for one in terms),
            )
    provenance = config.provenance.filled(own)
    require_permission(provenance, 'The teacher')
    return {'sha256': sha256, 'provenance': dataclasses.asdict(provenance)}
