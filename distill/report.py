"""The report of a study: `summary.json`, one self-contained page, and its pictures as files."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from distill import balance_pictures, exam_pictures, pictures, quality_pictures, routing_pictures
from distill.completions import FILE, Samples, completions_page
from distill.load_history import LoadHistory
from distill.report_page import SHOWN_SAMPLES, Summary, count_samples, render
from distill.routing_maps import RoutingMaps
from distill.summary import validate_summary

Curves = Mapping[str, Sequence[Mapping[str, Any]]]


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
    if count_samples(samples) > SHOWN_SAMPLES:
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
