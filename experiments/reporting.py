"""The report stage: everything the other stages measured, in summary.json and on one page."""

import json
import pathlib
from typing import Any

import numpy as np

from distill import distributed
from distill.load_history import LOAD_HISTORY, read_load_history
from distill.quantised_table import quantised_columns
from distill.report import write_report
from distill.routing_maps import RoutingMaps
from distill.tables import headline
from distill.terminal import terminal_table
from experiments.context import Context
from experiments.evaluation import ROUTING_MAPS

UNITS = {
    'bits_per_byte': 'bits/byte',
    'cross_entropy': 'nats/token',
    'accuracy': 'share',
    'kl_from_teacher': 'nats/token',
    'kl_on_own_text': 'nats/token',
    'top1_agreement': 'share',
    'calibration_error': 'share',
    'flops_per_token': 'FLOPs/token',
    'bytes_per_token': 'bytes/token',
    'tokens_per_second': 'tokens/s',
    'usd_per_million_tokens': 'USD/1M tokens',
}
QUANTISED_UNITS = {
    'bytes_on_disk': 'byte',
    'bytes_in_memory': 'byte',
    'tokens_per_second': 'tokens/s',
    'bits_per_byte': 'bits/byte',
    'kl_from_student': 'nats/token',
}
# What stands in a model's part of the summary beside its figures.
_EXAMINED = ('exams', 'needle')
_TRAINED = ('teacher', 'student', 'control')


def write_study_report(context: Context, *, provenance: dict[str, Any]) -> None:
    """Writes the report, and prints the table, where the report is and what to try next.

    Args:
        context: of the study.
        provenance: of each teacher, by what the report calls it.
    """
    if not distributed.is_writer():
        return
    evaluation = context.workdir.require_result('evaluate', wanted_by='report')
    summary = _summary(context, evaluation) | {'provenance': provenance}
    maps = context.workdir.path / ROUTING_MAPS
    page = write_report(
        context.workdir.path,
        summary,
        {name: read_curve(context.workdir.path / name) for name in _TRAINED},
        evaluation['samples'],
        expert_load=np.array(evaluation['load']),
        routing=RoutingMaps.load(maps) if maps.exists() else None,
        load_history=read_load_history(context.workdir.path / 'student' / LOAD_HISTORY),
    )
    print(f'\n{terminal_table(summary)}\n\n{headline(summary)}\n')
    print(f'Report: {page}\n{_next_steps()}')
    if context.json_path is not None:
        rows = figures(summary)
        context.json_path.parent.mkdir(parents=True, exist_ok=True)
        context.json_path.write_text(json.dumps(rows, indent=2, allow_nan=False) + '\n')


def measured_names(measured: dict[str, Any]) -> set[str]:
    """Names the stages whose models an evaluation, or a summary, has numbers of."""
    trained = any(row['trained'] for row in measured.get('quantised', ()))
    return set(measured['models']) | ({'quantise'} if trained else set())


def reported_names(context: Context) -> set[str]:
    """Names the stages whose models the report is about, where there is one."""
    file = context.workdir.path / 'summary.json'
    return measured_names(json.loads(file.read_text())) if file.exists() else set()


def figures(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Gives the table as rows of figures; the reference of each is the teacher's, if any."""
    rows = []
    for model in summary['models']:
        for name, unit in UNITS.items():
            value, reference = (
                _number(summary['models'].get(who, {}).get(name)) for who in (model, 'teacher')
            )
            if value is None:
                continue
            row = {'name': f'{model}/{name}', 'value': value, 'unit': unit}
            if reference:
                row |= {'reference': reference, 'ratio': value / reference}
            rows.append(row | {'conditions': summary['command']})
    rows += _quantised_figures(summary)
    return rows + exam_figures(summary['models'], summary['command'])


def _quantised_figures(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Gives what quantised weights save and lose; the reference is the student in floats."""
    forms = summary.get('quantised', ())
    return [
        {
            'name': f'{column}/{name}',
            'value': _number(form[name]),
            'unit': unit,
            'conditions': summary['command'],
        }
        | ({'reference': _number(forms[0][name])} if name in forms[0] else {})
        for column, form in zip(quantised_columns(summary), forms, strict=True)
        for name, unit in QUANTISED_UNITS.items()
        if name in form
    ]


def exam_figures(models: dict[str, Any], conditions: str) -> list[dict[str, Any]]:
    """Gives the scores of exams as rows of figures; the reference of each is the teacher's."""
    rows = []
    for model, measured in models.items():
        for name, exam in measured.get('exams', {}).items():
            row = {'name': f'{model}/{name}', 'value': exam['value'], 'unit': 'score'}
            reference = models.get('teacher', {}).get('exams', {}).get(name, {}).get('value')
            if reference:
                row |= {'reference': reference, 'ratio': exam['value'] / reference}
            rows.append(row | {'conditions': conditions})
    return rows


def _number(measured: Any) -> float | None:
    """The number of a figure that may be plain, an estimate, or not measured."""
    return measured['value'] if isinstance(measured, dict) else measured


def _summary(context: Context, evaluation: dict[str, Any]) -> dict[str, Any]:
    names = (*_TRAINED, 'quantise', 'targets', 'evaluate', 'exams')
    stages = {name: context.workdir.result(name) for name in names}
    examined = stages['exams'] or {}
    return {
        'schema': 1,
        'command': context.command,
        'config': json.loads(json.dumps(context.values)),
        'seed': context.study.seed,
        **evaluation['circumstances'],
        'stages': {
            name: {key: result[key] for key in ('seconds', 'steps', 'tokens') if key in result}
            for name, result in stages.items()
            if result is not None
        },
        'student_start': (stages['student'] or {}).get('start', {'method': 'random'}),
        'models': {
            name: figures | {key: examined[key][name] for key in _EXAMINED if key in examined}
            for name, figures in evaluation['models'].items()
        },
        'comparison': evaluation['comparison'],
        'experts': evaluation['experts'],
        **{key: evaluation[key] for key in ('quantised',) if key in evaluation},
    }


def read_curve(folder: pathlib.Path) -> list[dict[str, Any]]:
    file = folder / 'metrics.jsonl'
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _next_steps() -> str:
    return (
        'Next: your own text with --config.data.source=PATH_OR_GLOB, more experts with '
        '--config.student.model.moe.router.num_experts=16, longer training with '
        '--config.student.train.steps=1000; each in a --workdir of its own.'
    )
