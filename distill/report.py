"""The report of a study: `summary.json`, one self-contained page, and its pictures as files."""

import base64
import json
import os
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from distill import balance_pictures, exam_pictures, pictures, quality_pictures, routing_pictures
from distill.completions import FILE, Samples, completions_page, side_by_side
from distill.exam_table import exam_rows, exams_of
from distill.load_history import LoadHistory
from distill.metrics import format_duration, format_quantity
from distill.page import PAGE
from distill.provenance import in_words
from distill.quantised_table import quantised_columns, quantised_rows
from distill.routing_maps import RoutingMaps
from distill.summary import validate_summary
from distill.tables import (
    NOT_MEASURED,
    Cell,
    Row,
    headline,
    measured_models,
    percent,
    student_start,
    table_rows,
)

Summary = Mapping[str, Any]
Curves = Mapping[str, Sequence[Mapping[str, Any]]]
# Of all prompts; the page of completions has the others.
SHOWN_SAMPLES = 3

ABSENT = '\u2013'


def write_report(
    workdir: str | Path,
    summary: Summary,
    curves: Curves,
    samples: Samples,
    *,
    expert_load: np.ndarray | None = None,
    routing: RoutingMaps | None = None,
    load_history: LoadHistory | None = None,
    curve_keys: tuple[str, str] = ('step', 'cross_entropy'),
) -> Path:
    """Writes `summary.json`, `report.html` and `pictures/*.png` under the workdir.

    Where there are more samples than the report shows, `completions.html` has all of them.

    The page needs nothing besides itself. Each file is replaced whole, so a reader never sees half.

    Args:
        workdir: of the study; made where missing.
        summary: of the schema of `summary.json`; what was not measured is absent.
        curves: rows of training metrics for each model, in order.
        samples: for each model its texts, as `distill.completions.side_by_side` takes them.
        expert_load: the student's assignments to each expert on held-out text, `[MoE layers, E]`,
            in the order of `summary['experts']`.
        routing: counts of the student's routing on held-out text.
        load_history: of the student's experts while it was trained.
        curve_keys: the keys of the curves' horizontal and vertical axes.

    Returns:
        The path of the page.

    Raises:
        ValueError: where the summary does not fit its schema.
    """
    validate_summary(summary)
    workdir = Path(workdir)
    images = {
        name: pictures.png(figure)
        for name, figure in (
            _figures(summary, curves, expert_load, curve_keys)
            | _training_figures(summary, curves.get('student', ()), load_history)
            | _routing_figures(routing)
        ).items()
    }
    (workdir / 'pictures').mkdir(parents=True, exist_ok=True)
    for name, image in images.items():
        _replace(workdir / 'pictures' / f'{name}.png', image)
    text = json.dumps(summary, indent=2, allow_nan=False)
    _replace(workdir / 'summary.json', text.encode() + b'\n')
    if _count(samples) > SHOWN_SAMPLES:
        _replace(workdir / FILE, completions_page(samples).encode())
    _replace(workdir / 'report.html', render(summary, samples, images).encode())
    return workdir / 'report.html'


def _replace(path: Path, data: bytes) -> None:
    partial = path.with_name(path.name + '.partial')
    partial.write_bytes(data)
    os.replace(partial, path)


def _figures(
    summary: Summary,
    curves: Curves,
    load: np.ndarray | None,
    keys: tuple[str, str],
) -> dict[str, Figure]:
    """Makes the pictures that there are numbers for."""
    x, y = keys
    figures = {}
    if any(row.get(y) is not None for rows in curves.values() for row in rows):
        figures['learning_curves'] = pictures.learning_curves(curves, x=x, y=y)
    models = summary['models'].values()
    if any('bits_per_byte' in model and 'flops_per_token' in model for model in models):
        figures['cost_quality'] = pictures.cost_quality(summary)
    figures |= quality_pictures.drawn(summary)
    if any(model.get('needle') for model in models):
        figures['needle'] = exam_pictures.needle(summary)
    layers = [row['layer'] for row in summary.get('experts', ())]
    if load is not None and len(load):
        figures['expert_load'] = pictures.expert_load(load, layers or None)
    return figures


def _training_figures(
    summary: Summary, student: Sequence[Mapping[str, Any]], history: LoadHistory | None
) -> dict[str, Figure]:
    """Makes those of the student's balance while it was trained, over two rows or more."""
    figures = {}
    layers = [row['layer'] for row in summary.get('experts', ())]
    if len(balance_pictures.over_steps(student, balance_pictures.BALANCE)[0]) > 1:
        figures['balance_over_steps'] = balance_pictures.balance_over_steps(student, layers)
    if history is not None and len(history.steps) > 1:
        figures['load_over_steps'] = balance_pictures.load_over_steps(history, layers)
    return figures


def _routing_figures(routing: RoutingMaps | None) -> dict[str, Figure]:
    if routing is None:
        return {}
    figures = {}
    off_diagonal = routing.together.sum() - np.trace(routing.together, axis1=1, axis2=2).sum()
    # With one expert a token no two are ever chosen together.
    if off_diagonal:
        figures['experts_together'] = routing_pictures.experts_together(
            routing.together, routing.layers
        )
    figures['experts_by_class'] = routing_pictures.experts_by_class(
        routing.by_class, routing.classes, routing.layers
    )
    return figures


def render(summary: Summary, samples: Samples, images: Mapping[str, bytes]) -> str:
    """Renders the page.

    Args:
        summary: of the schema of `summary.json`.
        samples: as `write_report` takes them.
        images: PNG files by name, those of `PICTURES`; any may miss.

    Returns:
        HTML that loads nothing from elsewhere. Everything a user or a model wrote is escaped.
    """
    body = [
        f'<header><p class="kicker">Fractional: a distillation study</p>'
        f'<h1>{escape(headline(summary))}</h1></header>',
        _key_figures(summary),
        _section('Teacher, student, control', _model_table(summary)),
        _section('Learning', _picture(images, 'learning_curves')),
        _section('What quality costs', _picture(images, 'cost_quality')),
        _section('How sure, how close', _quality(images)),
        _section('Examined', _exams(summary) + _picture(images, 'needle')),
        _section('Cheaper still', _quantised(summary)),
        _section('Experts', _experts(summary, images)),
        _section('In their own words', _samples(samples)),
        _section('The price, step by step', _prices(summary)),
        _section('How it was made', _provenance(summary)),
    ]
    return PAGE.format(title=escape('Fractional: report'), body='\n'.join(filter(None, body)))


PICTURES = {
    'learning_curves': 'Training cross-entropy of each model on its own batches; student and '
    'control see the same ones. Where a faint line is the raw value, the strong one is its moving '
    'average.',
    'cost_quality': 'Down and to the left is better. Bars are 95 % intervals over held-out '
    'documents.',
    **quality_pictures.CAPTIONS,
    **exam_pictures.CAPTIONS,
    'expert_load': "How often the student's routers chose each expert on held-out text, relative "
    'to an even share: 1 is balanced, 0 is an expert that is never used.',
    'balance_over_steps': "How far each router's busiest expert lay above the mean load while the "
    'student was trained, over the updates since the column before: 0 is balanced.',
    'load_over_steps': 'How often each expert was chosen while the student was trained, relative '
    'to an even share, over the updates since the column before: pale experts starve, dark ones '
    'are crowded.',
    'experts_together': 'How often two experts were chosen by the same token of the held-out text, '
    'against what their loads alone would give. Teal pairs work together, brown ones avoid each '
    'other.',
    'experts_by_class': "What the student's experts read: the tokens each was chosen by, divided "
    'by kind. The bar on the left is all of the text, what an expert without preferences would '
    'read.',
}


def _section(title: str, content: str) -> str:
    return f'<section><h2>{escape(title)}</h2>{content}</section>' if content else ''


def _picture(images: Mapping[str, bytes], name: str) -> str:
    if name not in images:
        return ''
    data = base64.b64encode(images[name]).decode()
    caption = escape(PICTURES[name])
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
        f'<figcaption>{caption}</figcaption></figure>'
    )


def _key_figures(summary: Summary) -> str:
    """Renders the numbers that a reader looks for first, as far as they were measured."""
    comparison = summary.get('comparison', {})
    figures = []
    gain = comparison.get('control_minus_student_bits_per_byte')
    if gain is not None:
        figures.append((f'{gain["value"]:+.3f}', 'bits per byte gained over the control'))
    if 'teacher_to_student_flops' in comparison:
        ratio = comparison['teacher_to_student_flops']
        figures.append((f'{ratio:.1f}\u00d7', 'fewer FLOPs per token than the teacher'))
    if 'teacher_to_student_usd' in comparison:
        ratio = comparison['teacher_to_student_usd']
        figures.append((f'{ratio:.1f}\u00d7', 'cheaper per token than the teacher, measured here'))
    if 'retained_accuracy' in comparison:
        value = comparison['retained_accuracy']['value']
        figures.append((percent(value), "of the teacher's accuracy kept"))
    items = ''.join(f'<li><b>{escape(n)}</b> {escape(text)}</li>' for n, text in figures)
    return f'<ul class="figures">{items}</ul>' if items else ''


def _model_table(summary: Summary) -> str:
    text = 'Small figures are 95 % bootstrap intervals over held-out documents.'
    note = f'<p class="note">{escape(" ".join([text, student_start(summary)]).strip())}</p>'
    return _by_model(summary, table_rows(summary)) + note


def _exams(summary: Summary) -> str:
    exams = exams_of(summary)
    if not exams:
        return ''
    note = (
        '<p class="note">Small figures are 95 % intervals over the questions, and the standard '
        "error (\u00b1). A share of the teacher's score is paired by question where each has a "
        'grade of its own.</p>'
    )
    return _by_model(summary, exam_rows(exams)) + note


def _quantised(summary: Summary) -> str:
    names = quantised_columns(summary)
    if not names:
        return ''
    note = (
        '<p class="note">The student with its matrices quantised, and where it says so trained on '
        'to be. Tokens per second are of one text on this machine; small figures are 95 % '
        'bootstrap intervals over held-out documents.</p>'
    )
    return _columns(names, quantised_rows(summary)) + note


def _by_model(summary: Summary, rows: Sequence[Row]) -> str:
    return _columns(measured_models(summary), rows)


def _columns(names: Sequence[str], rows: Sequence[Row]) -> str:
    head = ''.join(f'<th scope="col" class="{name}">{escape(name)}</th>' for name in names)
    body = []
    for row in rows:
        unit = f'<small>{escape(row.unit)}</small>' if row.unit else ''
        cells = ''.join(map(_cell, row.cells))
        body.append(f'<tr><th scope="row">{escape(row.label)}{unit}</th>{cells}</tr>')
    return _table(f'<th></th>{head}', body)


def _cell(cell: Cell) -> str:
    if cell.text == NOT_MEASURED:
        return f'<td><abbr title="not measured">{ABSENT}</abbr></td>'
    interval = f'<small>{escape(cell.interval)}</small>' if cell.interval else ''
    return f'<td>{escape(cell.text)}{interval}</td>'


def _table(head: str, rows: Sequence[str]) -> str:
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f'<tbody>{"".join(rows)}</tbody></table></div>'
    )


def _plain_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Renders a table whose first column is text and whose others are numbers."""
    heads = ''.join(f'<th scope="col">{escape(text)}</th>' for text in head)
    body = [
        f'<tr><th scope="row">{escape(first)}</th>'
        + ''.join(f'<td>{escape(text)}</td>' for text in rest)
        + '</tr>'
        for first, *rest in rows
    ]
    return _table(heads, body)


def _quality(images: Mapping[str, bytes]) -> str:
    return ''.join(_picture(images, name) for name in quality_pictures.CAPTIONS)


def _experts(summary: Summary, images: Mapping[str, bytes]) -> str:
    maps = ('balance_over_steps', 'load_over_steps', 'experts_together', 'experts_by_class')
    pictures_of_routing = ''.join(_picture(images, name) for name in maps)
    return _picture(images, 'expert_load') + _expert_table(summary) + pictures_of_routing


def _expert_table(summary: Summary) -> str:
    experts = summary.get('experts', ())
    if not experts:
        return ''
    columns: dict[str, tuple[str, Callable[[Any], str]]] = {
        'layer': ('Layer', str),
        'max_violation': ('MaxVio', '{:.2f}'.format),
        'max_violation_batch': ('MaxVio of a batch', '{:.2f}'.format),
        'entropy': ('Entropy', '{:.3f}'.format),
        'gini': ('Gini', '{:.3f}'.format),
        'dead_experts': ('Dead experts', str),
        'drop_fraction': ('Dropped', percent),
        'confidence': ('Confidence', '{:.3f}'.format),
    }
    shown = {name: column for name, column in columns.items() if name in experts[0]}
    rows = [[write(row[name]) for name, (_, write) in shown.items()] for row in experts]
    note = (
        '<p class="note">MaxVio is how far the busiest expert lies above the mean load; entropy is '
        'that of the load, divided by its largest possible value; confidence is the mean of the '
        "router's largest score.</p>"
    )
    return _plain_table([head for head, _ in shown.values()], rows) + note


def _samples(samples: Samples) -> str:
    """Renders the first prompts, and where the others are."""
    rest = _count(samples) - SHOWN_SAMPLES
    link = f'<p><a href="{FILE}">{rest} more beginnings, side by side</a></p>' if rest > 0 else ''
    return side_by_side(samples, limit=SHOWN_SAMPLES) + link


def _count(samples: Samples) -> int:
    return max(map(len, samples.values()), default=0)


def _prices(summary: Summary) -> str:
    items = []
    for name in measured_models(summary):
        price = summary['models'][name].get('usd_per_million_tokens')
        if price is not None:
            items.append(
                f'<dt class="{name}">{name}</dt><dd><code>{escape(_text(price["basis"]))}</code>'
                f'<small>{escape(price["chip"])}: {escape(_text(price["price_source"]))}</small>'
                '</dd>'
            )
    return f'<dl>{"".join(items)}</dl>' if items else ''


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _provenance(summary: Summary) -> str:
    stages = [
        [
            name,
            format_duration(stage['seconds']),
            f'{stage["steps"]:,}' if 'steps' in stage else ABSENT,
            format_quantity(stage['tokens']) if 'tokens' in stage else ABSENT,
        ]
        for name, stage in summary['stages'].items()
    ]
    facts = {
        'seed': summary['seed'],
        **{who: in_words(terms) for who, terms in summary.get('provenance', {}).items()},
        'git commit': summary.get('git_commit', 'not measured'),
        **{f'{key} ': value for key, value in summary['devices'].items()},
        **summary['versions'],
    }
    items = ''.join(
        f'<dt>{escape(str(key).strip())}</dt><dd>{escape(_text(value))}</dd>'
        for key, value in facts.items()
    )
    config = escape(json.dumps(summary['config'], indent=2))
    return (
        f'<h3>Once more</h3><pre class="command">{escape(summary["command"])}</pre>'
        f'<h3>Time</h3>{_plain_table(["Stage", "Wall time", "Updates", "Tokens"], stages)}'
        f'<h3>Circumstances</h3><dl class="facts">{items}</dl>'
        f'<details><summary>The whole config</summary><pre>{config}</pre></details>'
    )
