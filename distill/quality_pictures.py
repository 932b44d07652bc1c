"""Figures of how sure the models are, and of how close the student is to its teacher."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from distill.pictures import COLORS, INK, name_ends, panels
from distill.tables import measured_models

Summary = Mapping[str, Any]

CAPTIONS = {
    'reliability': 'How often the most probable next token is right, against how probable the '
    'model holds it: on the diagonal a model is as often right as it is sure; below it, it is too '
    'sure. Bars are 95 % intervals over held-out documents; a dot is as large as its share of '
    'tokens.',
    'agreement_by_position': 'How often the most probable next token is the one that the teacher '
    'holds most probable, by the position in the row of held-out text. Bands are 95 % intervals '
    'over documents.',
}


def drawn(summary: Summary) -> dict[str, Figure]:
    """Makes the pictures that say something: there are two bins at least to draw a line between.

    Args:
        summary: of the schema of `summary.json`.

    Returns:
        Figures by name, those of `CAPTIONS`; any may miss.
    """
    makers = {'reliability': reliability, 'agreement_by_position': agreement_by_position}
    return {name: make(summary) for name, make in makers.items() if _rows(summary, name)}


def _rows(summary: Summary, key: str) -> dict[str, Sequence[Mapping[str, Any]]]:
    found = {name: summary['models'][name].get(key, ()) for name in measured_models(summary)}
    return {name: rows for name, rows in found.items() if len(rows) > 1}


def reliability(summary: Summary) -> Figure:
    """Draws accuracy against confidence, a panel for each model.

    Args:
        summary: with `reliability` of at least one model.

    Returns:
        The figure.
    """
    models = _rows(summary, 'reliability')
    figure, all_axes = panels(len(models), height=2.9, sharey=True)
    for axes, (name, rows) in zip(all_axes, models.items(), strict=True):
        axes.plot([0, 1], [0, 1], color='#9ca3af', linewidth=1, linestyle=(0, (4, 3)))
        confidence = np.array([row['confidence'] for row in rows])
        share = np.array([row['tokens'] for row in rows], np.float64)
        value, low, high = _ends([row['accuracy'] for row in rows])
        color = COLORS[name]
        axes.vlines(confidence, low, high, color=color, linewidth=1.4)
        axes.plot(confidence, value, color=color, linewidth=1.6)
        axes.scatter(confidence, value, 8 + 130 * share / share.sum(), color=color, zorder=3)
        axes.set_title(name, color=color, fontsize=9.5, fontweight='bold', loc='left')
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        axes.set_xlabel('Probability of the likeliest token')
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PercentFormatter(1, decimals=0))
            axis.set_ticks([0, 0.25, 0.5, 0.75, 1])
    all_axes[0].set_ylabel('Share that is right')
    return figure


def agreement_by_position(summary: Summary) -> Figure:
    """Draws agreement with the teacher against the position in the row, a line for each model.

    Args:
        summary: with `agreement_by_position` of at least one model.

    Returns:
        The figure.
    """
    models = _rows(summary, 'agreement_by_position')
    figure, (axes,) = panels(1, height=3.2)
    ends = []
    for name, rows in models.items():
        value, low, high = _ends([row['agreement'] for row in rows])
        color, at = COLORS[name], np.arange(len(rows))
        axes.fill_between(at, low, high, color=color, alpha=0.16, linewidth=0)
        axes.plot(at, value, 'o-', color=color, linewidth=2, markersize=4.5)
        ends.append((float(at[-1]), float(value[-1]), name))
    _position_ticks(axes, max(models.values(), key=len))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_ylabel('Same likeliest token as the teacher')
    name_ends(axes, ends)
    return figure


def _position_ticks(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    names = [
        str(r['from']) if r['from'] == r['to'] else f'{r["from"]}\u2013{r["to"]}' for r in rows
    ]
    axes.set_xticks(range(len(rows)), names)
    axes.set_xlabel('Position in the row')
    axes.xaxis.label.set_color(INK)


def _ends(estimates: Sequence[Mapping[str, float]]) -> np.ndarray:
    """Returns values and ends of intervals, `[3, n]`; where there is none it is the value."""
    value = [e['value'] for e in estimates]
    low, high = ([e.get(end, e['value']) for e in estimates] for end in ('low', 'high'))
    return np.array([value, low, high], np.float64)
