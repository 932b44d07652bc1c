"""Figures of a study, as matplotlib `Figure`s: for the report, for files, for notebooks.

No figure touches pyplot's global state, so they can be made in any thread; a notebook shows the one
that is its cell's last value.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, Formatter, FuncFormatter, NullFormatter

from distill.tables import measured_models

Curve = Sequence[Mapping[str, Any]]

COLORS = {'teacher': '#64748b', 'student': '#0f766e', 'control': '#c2570c'}
INK = '#1f2937'
_FAINT = '#9ca3af'
_DPI = 200

_LABELS = {
    'step': 'Updates',
    'tokens': 'Tokens seen',
    'loss': 'Loss, nats per token',
    'cross_entropy': 'Cross-entropy, nats per token',
    'bits_per_byte': 'Bits per byte',
}


def learning_curves(
    curves: Mapping[str, Curve], *, x: str = 'step', y: str = 'cross_entropy'
) -> Figure:
    """Draws one quantity over training, a line for each model, named at its end.

    Where a curve has more than 40 points, its moving average is drawn over the raw values.

    Args:
        curves: rows of metrics by model, in order; rows without `x` or `y` are passed over, and so
            are models without any such row.
        x: the key of the horizontal axis.
        y: the key of the vertical axis.

    Returns:
        The figure.
    """
    figure, (axes,) = panels(1, height=3.6)
    ends = []
    for name, rows in curves.items():
        points = [(r[x], r[y]) for r in rows if r.get(x) is not None and r.get(y) is not None]
        if not points:
            continue
        xs, ys = np.array(points, np.float64).T
        color = COLORS.get(name, INK)
        smooth = moving_average(ys)
        if smooth is not ys:
            axes.plot(xs, ys, color=color, linewidth=0.7, alpha=0.28)
        axes.plot(xs, smooth, color=color, linewidth=2, solid_capstyle='round')
        axes.plot(xs[-1], smooth[-1], 'o', color=color, markersize=4.5)
        ends.append((float(xs[-1]), float(smooth[-1]), name))
    axes.set_xlabel(_LABELS.get(x, x))
    axes.set_ylabel(_LABELS.get(y, y))
    axes.xaxis.set_major_formatter(EngFormatter(sep=''))
    name_ends(axes, ends)
    return figure


def cost_quality(summary: Mapping[str, Any]) -> Figure:
    """Draws bits per byte against what a token costs: FLOPs, and dollars where priced, log scales.

    Args:
        summary: of the schema of `summary.json`; models without the two numbers are passed over.

    Returns:
        The figure; down and to the left is better. Bars are the 95 % intervals.
    """
    models = {name: summary['models'][name] for name in measured_models(summary)}
    flops = _priced(models, lambda model: model.get('flops_per_token'))
    usd = _priced(models, lambda model: model.get('usd_per_million_tokens', {}).get('value'))
    charts: list[tuple[dict[str, float], str, Formatter]] = [
        (flops, 'FLOPs per token', EngFormatter(sep=''))
    ]
    if usd:
        price = FuncFormatter(lambda value, _: f'${value:.12f}'.rstrip('0').rstrip('.'))
        charts.append((usd, 'Dollars per million tokens', price))
    figure, all_axes = panels(len(charts), height=3.6, sharey=True)
    for axes, (costs, label, form) in zip(all_axes, charts, strict=True):
        for name, cost in costs.items():
            _point(axes, cost, models[name]['bits_per_byte'], name)
        axes.set_xlabel(f'{label} (log scale)')
        _log_scale(axes, list(costs.values()), form)
        axes.margins(y=0.25)
    all_axes[0].set_ylabel('Bits per byte, held-out')
    return figure


def expert_load(
    load: Sequence[Sequence[float]] | np.ndarray, layers: Sequence[int] | None = None
) -> Figure:
    """Draws the load of each expert of each MoE layer as a heat map.

    Args:
        load: assignments to each expert, `[MoE layers, E]`.
        layers: the index of each MoE layer in the model; by default from 0.

    Returns:
        The figure; a cell is the load over its layer's mean, so 1 is balanced and 0 is dead.
    """
    load = np.asarray(load, np.float64)
    relative = load / np.maximum(load.mean(1, keepdims=True), 1e-12)
    rows, experts = load.shape
    figure, (axes,) = panels(1, height=min(6.0, 1.5 + 0.42 * rows))
    highest = max(2.0, float(relative.max()))
    image = axes.imshow(relative, cmap='YlGnBu', vmin=0, vmax=highest, aspect='auto')
    axes.set_yticks(range(rows), [str(i) for i in (range(rows) if layers is None else layers)])
    if experts <= 16:
        axes.set_xticks(range(experts))
        for (row, column), value in np.ndenumerate(relative):
            color = 'white' if value > 0.55 * highest else INK
            axes.text(
                column, row, f'{value:.2f}', ha='center', va='center', fontsize=8, color=color
            )
    axes.set_xlabel('Expert')
    axes.set_ylabel('Layer')
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    bar = figure.colorbar(image, ax=axes, pad=0.02, fraction=0.05)
    bar.set_label('Load, 1 = balanced', color=INK, fontsize=9)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.tick_params(labelsize=8, length=0, colors=INK)
    return figure


def png(figure: Figure) -> bytes:
    """Renders a figure as the bytes of a PNG file, the same for the same figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png', dpi=_DPI, metadata={'Software': None})
    return buffer.getvalue()


def panels(
    columns: int, *, height: float, rows: int = 1, sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    """Makes a figure of panels with a quiet frame: no box, a faint horizontal grid.

    Args:
        columns: panels side by side.
        height: of the whole, in inches.
        rows: of panels.
        sharey: whether they share the vertical axis.

    Returns:
        The figure and its panels, row by row.
    """
    figure = Figure(figsize=(7.2, height), layout='constrained', facecolor='white')
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(rows, columns, sharey=sharey, squeeze=False).ravel()
    for axes in all_axes:
        axes.spines[['top', 'right', 'left']].set_visible(False)
        axes.spines['bottom'].set_color(_FAINT)
        axes.grid(axis='y', color='#e5e7eb', linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(which='both', colors=INK, labelsize=9, length=0)
        axes.xaxis.label.set(color=INK, fontsize=9.5)
        axes.yaxis.label.set(color=INK, fontsize=9.5)
    return figure, list(all_axes)


def moving_average(values: np.ndarray) -> np.ndarray:
    """Averages about a twentieth of the curve around each point, less towards either end."""
    if len(values) <= 40:
        return values
    index = np.arange(len(values))
    reach = np.minimum(len(values) // 40, np.minimum(index, index[::-1]))
    sums = np.cumsum(np.concatenate([[0.0], values]))
    return (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)


def name_ends(
    axes: Axes, ends: list[tuple[float, float, str]], colors: Mapping[str, str] = COLORS
) -> None:
    """Writes each curve's name right of its end, pushed apart where names would overlap."""
    if not ends:
        return
    low, high = axes.get_ylim()
    gap = 0.06 * (high - low)
    placed = -np.inf
    for x, y, name in sorted(ends, key=lambda end: end[1]):
        placed = max(y, placed + gap)
        axes.annotate(
            name,
            (x, placed),
            xytext=(8, 0),
            textcoords='offset points',
            va='center',
            fontsize=9.5,
            fontweight='bold',
            color=colors.get(name, INK),
            annotation_clip=False,
        )
    axes.margins(x=0.02)


def _priced(models: Mapping[str, Any], cost: Any) -> dict[str, float]:
    """Returns the cost of each model that has one and a quality."""
    costs = {name: cost(model) for name, model in models.items() if 'bits_per_byte' in model}
    return {name: value for name, value in costs.items() if value is not None}


def _point(axes: Axes, cost: float, quality: Mapping[str, float], name: str) -> None:
    value = quality['value']
    bars = [[value - quality.get('low', value)], [quality.get('high', value) - value]]
    color = COLORS[name]
    axes.errorbar(
        cost, value, yerr=bars, fmt='o', color=color, markersize=7, capsize=4, elinewidth=1.6
    )
    # Student and control cost the same: their names stand on opposite sides of the point.
    side = -1 if name == 'control' else 1
    axes.annotate(
        name,
        (cost, value),
        xytext=(9 * side, 0),
        textcoords='offset points',
        ha='left' if side > 0 else 'right',
        va='center',
        fontsize=9.5,
        fontweight='bold',
        color=color,
    )


def _log_scale(axes: Axes, costs: list[float], form: Formatter) -> None:
    """Sets a logarithmic axis with room for names, and ticks at 1, 2, 5 of each decade."""
    axes.set_xscale('log')
    if not costs:
        return
    low, high = min(costs), max(costs)
    pad = (high / low) ** 0.35 * 1.5
    low, high = low / pad, high * pad
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    steps = (1,) if high / low > 200 else (1, 3) if high / low > 20 else (1, 2, 5)
    ticks = [step * 10.0**decade for decade in decades for step in steps]
    axes.set_xticks([tick for tick in ticks if low <= tick <= high])
    axes.set_xlim(low, high)
    axes.xaxis.set_major_formatter(form)
    axes.xaxis.set_minor_formatter(NullFormatter())
