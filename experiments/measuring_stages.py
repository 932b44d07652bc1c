"""The stages that come after training: models are measured, told of, and published."""

import sys
from typing import Any

import jax

from experiments.context import Context
from experiments.evaluation import evaluate_models
from experiments.exams import make_examinee, require_sittable, results, sit
from experiments.export import export_student
from experiments.loading import unstacked
from experiments.quantised_evaluation import measure_quantised
from experiments.reporting import write_study_report
from experiments.seen import is_recorded, refuse_seen
from experiments.teaching import further_facts, load_teacher, teacher_facts
from experiments.training_stages import load_trained
from moe.errors import InputError
from moe.transformer import Transformer


def evaluate(context: Context) -> dict[str, Any]:
    """Measures all that are here, a remote teacher not, on the same held-out text."""
    for name in ('teacher', 'student'):
        context.workdir.require_result(name, wanted_by='evaluate')
    names = [name for name in ('student', 'control') if context.workdir.result(name) is not None]
    for name in ('teacher', *names):
        if is_recorded(context.workdir.path / name):
            refuse_seen(context.workdir.path / name, context.documents.split[1], key='--workdir')
    student_model = context.model(context.study.student.model)
    students = {name: (student_model, load_trained(context, name, student_model)) for name in names}
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
            trained = quantise.weights, load_trained(context, 'quantise', student_model)
        # Anew: what is measured here is given up.
        student = student_model, load_trained(context, 'student', student_model)
        result['quantised'] = measure_quantised(context, kinds, student, trained)
    return result


def require_exams(context: Context) -> None:
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


def exams(context: Context) -> dict[str, Any]:
    """Has all that are here sit the exams that are asked for, one model in memory at a time."""
    names = ['student', *(['control'] if context.study.has_control else [])]
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
    variables = load_trained(context, 'student', context.model(config))
    return export_student(context, config, variables)


def _trained(context: Context, name: str) -> tuple[Transformer, Any]:
    """A model of the study, and its variables."""
    if name == 'teacher':
        return load_teacher(context)
    model = context.model(context.study.student.model)
    return model, load_trained(context, name, model)
