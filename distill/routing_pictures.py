"""Figures of routing: experts chosen together, what each expert reads."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from distill.heat_maps import as_map, color_bar, grid, shown, thinned
from distill.pictures import INK
from distill.routing_maps import class_shares, co_activation

# Told apart with any colour vision (Okabe and Ito, 2008), the frequent classes first.
CLASS_COLORS = ('#c9ced6', '#0f766e', '#0072b2', '#e69f00', '#cc79a7', '#56b4e9', '#1f2937')


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
    chosen, names = shown(len(ratios)), layers or range(len(ratios))
    figure, panels = grid(len(chosen), columns=3, aspect=1.0)
    images = []
    for axes, index in zip(panels, chosen, strict=True):
        images.append(_pairs(axes, ratios[index]))
        axes.set_title(f'Layer {names[index]}', fontsize=9.5, color=INK, loc='left')
        axes.set_xlabel('Expert')
    for axes in panels[:: min(3, len(chosen))]:
        axes.set_ylabel('Expert')
    bar = color_bar(figure, images[0], panels, 'Chosen together, against chance')
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
    chosen, names = shown(len(by_class)), layers or range(len(by_class))
    experts = by_class.shape[1]
    wide = experts > 20
    columns, aspect = (1, 0.3) if wide else (2, 0.75)
    figure, panels = grid(len(chosen), columns=columns, aspect=aspect)
    used = np.flatnonzero(by_class.sum((0, 1))).tolist()
    # The bar of all tokens stands apart, and is as wide as it must be to be seen.
    broad = max(0.86, 0.025 * experts)
    apart = -0.5 - broad
    at, widths = np.arange(experts + 1.0) - 1, np.full(experts + 1, 1.0 if wide else 0.86)
    at[0], widths[0] = apart, broad
    for axes, index in zip(panels, chosen, strict=True):
        counts = np.concatenate([by_class[index].sum(0, keepdims=True), by_class[index]])
        shares = np.nan_to_num(class_shares(counts))
        bottom = np.zeros(len(at))
        for c in used:
            color = CLASS_COLORS[c % len(CLASS_COLORS)]
            axes.bar(at, shares[:, c], widths, bottom, color=color, label=classes[c], linewidth=0)
            bottom += shares[:, c]
        axes.set_title(f'Layer {names[index]}', fontsize=9.5, color=INK, loc='left')
        ticks, labels = thinned([str(e) for e in range(experts)])
        axes.set_xticks([apart, *ticks], ['all', *labels])
        axes.set_xlim(apart - 0.6 * broad, experts - 0.4)
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel('Expert')
        axes.grid(False)
    for axes in panels[:: min(columns, len(chosen))]:
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
    ticks, labels = thinned([str(e) for e in range(experts)], 8)
    axes.set_xticks(ticks, labels)
    axes.set_yticks(ticks, labels)
    as_map(axes)
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
