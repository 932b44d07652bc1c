"""The page of a report: what a study measured, in sections, in HTML that loads nothing."""

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from distill import exam_pictures, quality_pictures
from distill.completions import FILE, Samples, side_by_side
from distill.exam_table import exam_rows, exams_of
from distill.html_tables import ABSENT, columns, plain_table
from distill.metrics import format_duration, format_quantity
from distill.page import PAGE
from distill.provenance import in_words
from distill.quantised_table import quantised_columns, quantised_rows
from distill.tables import Row, headline, measured_models, percent, student_start, table_rows

Summary = Mapping[str, Any]
# Of all prompts; the page of completions has the others.
SHOWN_SAMPLES = 3


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
    return columns(names, quantised_rows(summary)) + note


def _by_model(summary: Summary, rows: Sequence[Row]) -> str:
    return columns(measured_models(summary), rows)


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
    figures: dict[str, tuple[str, Callable[[Any], str]]] = {
        'layer': ('Layer', str),
        'max_violation': ('MaxVio', '{:.2f}'.format),
        'max_violation_batch': ('MaxVio of a batch', '{:.2f}'.format),
        'entropy': ('Entropy', '{:.3f}'.format),
        'gini': ('Gini', '{:.3f}'.format),
        'dead_experts': ('Dead experts', str),
        'drop_fraction': ('Dropped', percent),
        'confidence': ('Confidence', '{:.3f}'.format),
    }
    shown = {name: column for name, column in figures.items() if name in experts[0]}
    rows = [[write(row[name]) for name, (_, write) in shown.items()] for row in experts]
    note = (
        '<p class="note">MaxVio is how far the busiest expert lies above the mean load; entropy is '
        'that of the load, divided by its largest possible value; confidence is the mean of the '
        "router's largest score.</p>"
    )
    return plain_table([head for head, _ in shown.values()], rows) + note


def _samples(samples: Samples) -> str:
    """Renders the first prompts, and where the others are."""
    rest = count_samples(samples) - SHOWN_SAMPLES
    link = f'<p><a href="{FILE}">{rest} more beginnings, side by side</a></p>' if rest > 0 else ''
    return side_by_side(samples, limit=SHOWN_SAMPLES) + link


def count_samples(samples: Samples) -> int:
    """Counts the prompts that there are texts of."""
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
        f'<h3>Time</h3>{plain_table(["Stage", "Wall time", "Updates", "Tokens"], stages)}'
        f'<h3>Circumstances</h3><dl class="facts">{items}</dl>'
        f'<details><summary>The whole config</summary><pre>{config}</pre></details>'
    )
