"""Figures of balance over training: a statistic of every router, the load of every expert."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from distill import pictures
from distill.heat_maps import as_map, color_bar, edges, grid, router_names, shown, thinned
from distill.load_history import LoadHistory
from distill.pictures import INK, Curve

BALANCE = 'max_violation_global'


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
    borders = np.arange(rows + 1) - 0.5
    image = axes.pcolormesh(edges(steps), borders, values, cmap='YlGnBu', vmin=0, vmax=highest)
    axes.set_yticks(*thinned(router_names(rows, layers)))
    axes.invert_yaxis()
    axes.set_xlabel('Updates')
    axes.set_ylabel('Layer')
    axes.xaxis.set_major_formatter(EngFormatter(sep=''))
    as_map(axes)
    extend = 'max' if float(np.nanmax(values)) > highest else 'neither'
    color_bar(figure, image, [axes], label, extend=extend)
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


def load_over_steps(history: LoadHistory, layers: Sequence[int] = ()) -> Figure:
    """Draws the load of every expert over training: a heat map for each layer, experts by updates.

    Args:
        history: from `read_load_history`.
        layers: as of `balance_over_steps`.

    Returns:
        The figure; a cell is the load over its layer's mean, so 1 is balanced and 0 is starved. Of
        more than six routers six are shown, from the first to the last.
    """
    _, routers, experts = history.load.shape
    chosen, names = shown(routers), router_names(routers, layers)
    figure, panels = grid(len(chosen), columns=2, aspect=0.6)
    # Early outliers must not take all the colours, as above.
    highest = max(2.0, float(np.percentile(history.load, 99)))
    borders = np.arange(experts + 1) - 0.5
    images = []
    for axes, router in zip(panels, chosen, strict=True):
        images.append(
            axes.pcolormesh(
                edges(history.steps),
                borders,
                history.load[:, router].T,
                cmap='YlGnBu',
                vmin=0,
                vmax=highest,
            )
        )
        name = names[router]
        title = name if name.startswith('MTP') else f'Layer {name}'
        axes.set_title(title, fontsize=9.5, color=INK, loc='left')
        axes.set_yticks(*thinned([str(e) for e in range(experts)], 8))
        axes.invert_yaxis()
        axes.set_xlabel('Updates')
        axes.xaxis.set_major_formatter(EngFormatter(sep=''))
        as_map(axes)
    for axes in panels[::2]:
        axes.set_ylabel('Expert')
    extend = 'max' if float(history.load.max()) > highest else 'neither'
    color_bar(figure, images[0], panels, 'Load, 1 = balanced', extend=extend)
    return figure
