"""Figures of exams."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from distill.pictures import COLORS, INK, panels
from distill.tables import measured_models

CAPTIONS = {
    'needle': 'How often a model finds one fact in a long text: it holds the right one of the '
    'numbers in the text likeliest. Across, the length of the text; down, where in it the fact '
    'stands.',
}


def needle(summary: Mapping[str, Any]) -> Figure:
    """Draws the share of facts that each model finds, as heat maps of depth and length.

    Args:
        summary: with `needle` of at least one model.

    Returns:
        The figure; a panel for each model.
    """
    models = {name: summary['models'][name].get('needle') for name in measured_models(summary)}
    models = {name: cells for name, cells in models.items() if cells}
    depths = sorted({cell['depth'] for cells in models.values() for cell in cells})
    figure, all_axes = panels(len(models), height=1.2 + 0.4 * len(depths), sharey=True)
    for axes, (name, cells) in zip(all_axes, models.items(), strict=True):
        lengths = sorted({cell['length'] for cell in cells})
        found = np.full((len(depths), len(lengths)), np.nan)
        for cell in cells:
            found[depths.index(cell['depth']), lengths.index(cell['length'])] = cell['value']
        axes.imshow(found, cmap='YlGnBu', vmin=0, vmax=1, aspect='auto')
        for (row, column), value in np.ndenumerate(found):
            color = 'white' if value > 0.55 else INK
            text = f'{100 * value:.0f}'
            axes.text(column, row, text, ha='center', va='center', fontsize=8, color=color)
        axes.set_xticks(range(len(lengths)), [f'{length:,}' for length in lengths])
        axes.set_yticks(range(len(depths)), [f'{100 * depth:.0f} %' for depth in depths])
        axes.set_title(name, color=COLORS[name], fontsize=9.5, fontweight='bold', loc='left')
        axes.set_xlabel('Tokens')
        axes.grid(False)
        axes.spines[:].set_visible(False)
    all_axes[0].set_ylabel('Depth')
    return figure
