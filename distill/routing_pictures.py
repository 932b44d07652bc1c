"""Figures of routing: balance over training, experts chosen together, what each expert reads."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, PercentFormatter

from distill import pictures
from distill.pictures import INK, Curve
from distill.routing_maps import class_shares, co_activation

# Told apart with any colour vision (Okabe and Ito, 2008), the frequent classes first.
CLASS_COLORS = ('#c9ced6', '#0f766e', '#0072b2', '#e69f00', '#cc79a7', '#56b4e9', '#1f2937')
BALANCE = 'max_violation_global'
_MOST_PANELS = 6
# Inches, of all panels of a row together.
_WIDTH = 5.8


def balance_over_steps(
    curve: Curve,
    layers: Sequence[int] = (),
    *,
    statistic: str = BALANCE,
    label: str = 'MaxVio, 0 = balanced',
) -> Figure:
    """Draws a statistic of every router over training as a heat map, layers by updates.

    Args:
        curve: rows of training metrics, with keys such as 'moe_0/max_violation_global'.
        layers: the index of each MoE layer in the model; routers beyond them are those of
            multi-token-prediction modules. By default all from 0.
        statistic: a name of `moe.balance.load_statistics`, or 'confidence'.
        label: of the colours.

    Returns:
        The figure; rows without the statistic are passed over.
    """
    steps, values = over_steps(curve, statistic)
    rows = len(values)
    figure, (axes,) = pictures.panels(1, height=min(6.0, 1.5 + 0.42 * rows))
    # An outlier, usually of the first updates, must not take all the colours.
    highest = max(1.0, float(np.nanpercentile(values, 99)))
    edges = _edges(steps)
    image = axes.pcolormesh(
        edges, np.arange(rows + 1) - 0.5, values, cmap='YlGnBu', vmin=0, vmax=highest
    )
    known = layers or range(rows)
    names = [str(known[i]) if i < len(known) else f'MTP {i - len(known) + 1}' for i in range(rows)]
    axes.set_yticks(*_thinned(names))
    axes.invert_yaxis()
    axes.set_xlabel('Updates')
    axes.set_ylabel('Layer')
    axes.xaxis.set_major_formatter(EngFormatter(sep=''))
    _as_map(axes)
    extend = 'max' if float(np.nanmax(values)) > highest else 'neither'
    _color_bar(figure, image, [axes], label, extend=extend)
    return figure


def over_steps(curve: Curve, statistic: str) -> tuple[np.ndarray, np.ndarray]:
    """Collects one statistic of every router.

    Args:
        curve: rows of training metrics.
        statistic: the part of the key behind 'moe_0/'.

    Returns:
        The updates `[S]` at which it was recorded, and the values `[routers, S]`, NaN where a row
        lacks one; both empty where none was.
    """
    rows = [row for row in curve if f'moe_0/{statistic}' in row]
    routers = 0
    while any(f'moe_{routers}/{statistic}' in row for row in rows):
        routers += 1
    # A value that was not finite is null in the file, and NaN here.
    values = [[row.get(f'moe_{i}/{statistic}') for row in rows] for i in range(routers)]
    steps = np.array([row['step'] for row in rows], np.float64)
    return steps, np.array(values, np.float64).reshape(routers, len(rows))


def experts_together(together: np.ndarray, layers: Sequence[int] | None = None) -> Figure:
    """Draws which experts are chosen by the same tokens, a square of all pairs for each layer.

    Args:
        together: `RoutingMaps.together`, `[L, E, E]`.
        layers: the index of each layer in the model; by default from 0.

    Returns:
        The figure; a cell compares with what the loads alone would give: 1 is chance, 2 twice as
        often. Of more than six layers six are shown, from the first to the last.
    """
    ratios = co_activation(together)
    shown, names = _shown(len(ratios), layers)
    figure, panels = _panels(len(shown), columns=3, aspect=1.0)
    images = []
    for axes, index, name in zip(panels, shown, names, strict=True):
        images.append(_pairs(axes, ratios[index]))
        axes.set_title(f'Layer {name}', fontsize=9.5, color=INK, loc='left')
        axes.set_xlabel('Expert')
    for axes in panels[:: min(3, len(shown))]:
        axes.set_ylabel('Expert')
    bar = _color_bar(figure, images[0], panels, 'Chosen together, against chance')
    bar.set_ticks([-2, -1, 0, 1, 2], labels=['1/4 or less', '1/2', '1', '2', '4 or more'])
    return figure


def experts_by_class(
    by_class: np.ndarray, classes: Sequence[str], layers: Sequence[int] | None = None
) -> Figure:
    """Draws what each expert reads: its load divided among classes of tokens, a bar for each.

    Args:
        by_class: `RoutingMaps.by_class`, `[L, E, C]`.
        classes: names of the `C` classes.
        layers: the index of each layer in the model; by default from 0.

    Returns:
        The figure. The first bar is of all tokens, what an expert without preferences would read;
        the place of an expert that is never chosen is empty. Of more than six layers six are shown.
    """
    by_class = np.asarray(by_class, np.float64)
    shown, names = _shown(len(by_class), layers)
    experts = by_class.shape[1]
    wide = experts > 20
    columns, aspect = (1, 0.3) if wide else (2, 0.75)
    figure, panels = _panels(len(shown), columns=columns, aspect=aspect)
    used = np.flatnonzero(by_class.sum((0, 1))).tolist()
    # The bar of all tokens stands apart, and is as wide as it must be to be seen.
    broad = max(0.86, 0.025 * experts)
    apart = -0.5 - broad
    at, widths = np.arange(experts + 1.0) - 1, np.full(experts + 1, 1.0 if wide else 0.86)
    at[0], widths[0] = apart, broad
    for axes, index, name in zip(panels, shown, names, strict=True):
        counts = np.concatenate([by_class[index].sum(0, keepdims=True), by_class[index]])
        shares = np.nan_to_num(class_shares(counts))
        bottom = np.zeros(len(at))
        for c in used:
            color = CLASS_COLORS[c % len(CLASS_COLORS)]
            axes.bar(at, shares[:, c], widths, bottom, color=color, label=classes[c], linewidth=0)
            bottom += shares[:, c]
        axes.set_title(f'Layer {name}', fontsize=9.5, color=INK, loc='left')
        ticks, labels = _thinned([str(e) for e in range(experts)])
        axes.set_xticks([apart, *ticks], ['all', *labels])
        axes.set_xlim(apart - 0.6 * broad, experts - 0.4)
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel('Expert')
        axes.grid(False)
    for axes in panels[:: min(columns, len(shown))]:
        axes.set_ylabel("Share of the expert's load")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc='outside upper center',
        ncols=min(7, len(used)),
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        handlelength=1,
        handleheight=1,
        columnspacing=1.4,
    )
    return figure


def _pairs(axes: Axes, ratios: np.ndarray) -> Any:
    """Draws one square on a scale of powers of two; brown is rarer than chance, teal more often."""
    with np.errstate(divide='ignore', invalid='ignore'):
        powers = np.clip(np.log2(ratios), -2, 2)
    image = axes.imshow(powers, cmap='BrBG', norm=TwoSlopeNorm(0, -2, 2))
    experts = len(ratios)
    axes.set_facecolor('#e5e7eb')
    ticks, labels = _thinned([str(e) for e in range(experts)], 8)
    axes.set_xticks(ticks, labels)
    axes.set_yticks(ticks, labels)
    _as_map(axes)
    if experts <= 8:
        for (row, column), value in np.ndenumerate(ratios):
            if np.isfinite(value):
                dark = abs(powers[row, column]) > 1.1
                axes.text(
                    column,
                    row,
                    f'{value:.1f}',
                    ha='center',
                    va='center',
                    fontsize=7.5,
                    color='white' if dark else INK,
                )
    return image


def _panels(count: int, *, columns: int, aspect: float) -> tuple[Figure, list[Axes]]:
    """Makes panels in rows of at most `columns`, each about `aspect` times as high as wide."""
    columns = min(columns, count)
    rows = -(-count // columns)
    height = rows * (min(3.0, _WIDTH / columns * aspect) + 0.6) + 0.4
    figure, panels = pictures.panels(columns, height=height, rows=rows)
    for axes in panels[count:]:
        axes.remove()
    return figure, panels[:count]


def _shown(count: int, layers: Sequence[int] | None) -> tuple[list[int], list[int]]:
    """Chooses the layers that have a panel, evenly from the first to the last."""
    chosen = np.unique(np.linspace(0, count - 1, min(count, _MOST_PANELS)).round().astype(int))
    names = range(count) if layers is None else layers
    return chosen.tolist(), [names[i] for i in chosen]


def _thinned(labels: Sequence[str], most: int = 16) -> tuple[list[int], list[str]]:
    """Keeps so many ticks that they can be read, at even distances."""
    step = -(-len(labels) // most)
    ticks = list(range(0, len(labels), step))
    return ticks, [labels[i] for i in ticks]


def _edges(steps: np.ndarray) -> np.ndarray:
    """Returns the borders between cells that are centred on the steps, as far as may be."""
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middles = (steps[1:] + steps[:-1]) / 2
    return np.concatenate([[2 * steps[0] - middles[0]], middles, [2 * steps[-1] - middles[-1]]])


def _as_map(axes: Axes) -> None:
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def _color_bar(
    figure: Figure, image: Any, panels: Sequence[Axes], label: str, **options: Any
) -> Any:
    bar = figure.colorbar(image, ax=list(panels), pad=0.02, fraction=0.05, **options)
    bar.set_label(label, color=INK, fontsize=9)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.tick_params(labelsize=8, length=0, colors=INK)
    return bar
