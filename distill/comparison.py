"""Variants of one study, each run with several seeds: what differs, and whether it is chance."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from distill.pictures import moving_average, name_ends, panels
from distill.statistics import t_interval
from distill.summary import METRICS
from distill.tables import percent

Summary = Mapping[str, Any]
Comparison = Mapping[str, Any]
Curve = Sequence[Mapping[str, Any]]

TRAINED = ('student', 'control')
# Of the table, where some model has them.
COLUMNS = {
    'bits_per_byte': 'bits per byte',
    'kl_from_teacher': 'KL from teacher',
    'kl_on_own_text': 'KL on own text',
    'top1_agreement': 'agreement',
    'calibration_error': 'calibration error',
}
# Labels below one another; more are slanted.
MOST_UPRIGHT = 4
COLORS = ('#c2570c', '#0f766e', '#6d28d9', '#1d4ed8', '#be185d', '#64748b')


def compare_variants(runs: Mapping[str, Sequence[Summary]], baseline: str) -> dict[str, Any]:
    """Compares variants over seeds; a difference is taken seed by seed.

    Args:
        runs: for each variant the summaries of its seeds, in the same order of seeds for all.
        baseline: the variant that the others are compared with.

    Returns:
        For each variant, under `models` and then `student` and `control`: each metric's mean over
        seeds as `{'value', 'low', 'high', 'seeds': [...]}` with a 95 % t-interval; under
        `difference` the same of what it has more than the baseline. A metric that some seed
        lacks is absent.
    """
    compared = {}
    for name, summaries in runs.items():
        models, difference = {}, {}
        for who in TRAINED:
            mine, theirs = _values(summaries, who), _values(runs[baseline], who)
            models[who] = {metric: _estimate(values) for metric, values in mine.items()}
            difference[who] = {
                metric: _estimate(np.subtract(mine[metric], theirs[metric]).tolist())
                for metric in mine
                if metric in theirs and name != baseline
            }
        compared[name] = {'models': models, 'difference': difference}
    return compared


def _values(summaries: Sequence[Summary], who: str) -> dict[str, list[float]]:
    rows = [summary['models'].get(who, {}) for summary in summaries]
    return {
        metric: [row[metric]['value'] for row in rows]
        for metric in METRICS
        if all(metric in row for row in rows)
    }


def _estimate(values: list[float]) -> dict[str, Any]:
    return t_interval(values).to_dict() | {'seeds': values}


def comparison_table(compared: Comparison, baseline: str) -> str:
    """Lays the variants out as a Markdown table: a line for each model, differences beside it.

    Args:
        compared: from `compare_variants`.
        baseline: as there.

    Returns:
        Lines without a trailing newline; an interval stands in brackets. Metrics that no model has
        have no column.
    """
    models = [model for parts in compared.values() for model in parts['models'].values()]
    metrics = [metric for metric in COLUMNS if any(metric in model for model in models)]
    head, *rest = (COLUMNS[metric] for metric in metrics)
    names = ['variant', 'model', head, f'more than {baseline}', *rest]
    lines = [f'| {" | ".join(names)} |', f'|---|---|{"---:|" * (len(names) - 2)}']
    for name, parts in compared.items():
        for who in TRAINED:
            model, difference = parts['models'][who], parts['difference'][who]
            if not model:
                continue
            first, *others = (_cell(model.get(metric), _form(metric)) for metric in metrics)
            more = _cell(difference.get(metrics[0]), '{:+.3f}'.format)
            lines.append(f'| {" | ".join([name, who, first, more, *others])} |')
    return '\n'.join(lines)


def _form(metric: str) -> Any:
    return percent if metric == 'top1_agreement' else '{:.3f}'.format


def _cell(estimate: Mapping[str, Any] | None, form: Any = '{:.3f}'.format) -> str:
    if estimate is None:
        return ''
    text = form(estimate['value'])
    if 'low' not in estimate:
        return text
    return f'{text} ({form(estimate["low"])} to {form(estimate["high"])})'


def comparison_picture(
    compared: Comparison, curves: Mapping[str, Sequence[Curve]], *, tokens_per_step: int
) -> Figure:
    """Draws the students' learning, and held-out bits per byte of students and controls.

    Args:
        compared: from `compare_variants`.
        curves: for each variant the student's rows of metrics, of each seed.
        tokens_per_step: of a batch.

    Returns:
        The figure. Left, the mean over seeds and the range between them, as moving averages, of the
        cross-entropy where all have logged it, else of each one's own loss; right, a point for each
        seed, and the mean with its 95 % t-interval.
    """
    figure, (left, right) = panels(2, height=3.6)
    every = [curve for seeds in curves.values() for curve in seeds]
    shared = all(any('cross_entropy' in row for row in curve) for curve in every)
    measured = 'cross_entropy' if shared else 'loss'
    ends = []
    for color, (name, seeds) in zip(COLORS, curves.items(), strict=False):
        found = [_points(rows, measured) for rows in seeds]
        steps = found[0][0] * tokens_per_step
        values = np.stack([moving_average(y) for _, y in found])
        mean = values.mean(axis=0)
        left.fill_between(steps, values.min(axis=0), values.max(axis=0), color=color, alpha=0.2)
        left.plot(steps, mean, color=color, linewidth=2)
        ends.append((float(steps[-1]), float(mean[-1]), name))
    left.set_xlabel('Tokens')
    title = {'cross_entropy': 'Cross-entropy', 'loss': 'Own loss'}[measured]
    left.set_ylabel(f'{title} of students, nats per token')
    left.xaxis.set_major_formatter(EngFormatter(sep=''))
    name_ends(left, ends, dict(zip(curves, COLORS, strict=False)))
    _draw_held_out(right, compared)
    return figure


def _points(rows: Curve, metric: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(row['step'], row[metric]) for row in rows if metric in row]
    steps, values = np.array(points, np.float64).T
    return steps, values


def _draw_held_out(axes: Axes, compared: Comparison) -> None:
    ticks = []
    for color, (name, parts) in zip(COLORS, compared.items(), strict=False):
        for who in TRAINED:
            measured = parts['models'][who].get('bits_per_byte')
            if measured is None:
                continue
            at = len(ticks)
            ticks.append(f'{name}\n{who}')
            seeds = measured['seeds']
            axes.plot([at] * len(seeds), seeds, 'o', color=color, alpha=0.45, markersize=4)
            mean = measured['value']
            reach = measured.get('high', mean) - mean
            axes.errorbar(at + 0.18, mean, reach, fmt='o', color=color, markersize=6, capsize=4)
    axes.set_xticks(range(len(ticks)), ticks, fontsize=8)
    if len(ticks) > MOST_UPRIGHT:
        slanted = [tick.replace('\n', ' ') for tick in ticks]
        axes.set_xticklabels(slanted, rotation=40, ha='right', rotation_mode='anchor')
    axes.set_ylabel('Bits per byte, held-out')
    axes.margins(x=0.15)
