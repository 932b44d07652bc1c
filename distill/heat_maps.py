"""What figures of routers and experts share: panels for layers, thinned ticks, maps of colours."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from distill import pictures
from distill.pictures import INK

_MOST_PANELS = 6
# Inches, of all panels of a row together.
_WIDTH = 5.8


def grid(count: int, *, columns: int, aspect: float) -> tuple[Figure, list[Axes]]:
    """Makes panels in rows of at most `columns`, each about `aspect` times as high as wide."""
    columns = min(columns, count)
    rows = -(-count // columns)
    height = rows * (min(3.0, _WIDTH / columns * aspect) + 0.6) + 0.4
    figure, panels = pictures.panels(columns, height=height, rows=rows)
    for axes in panels[count:]:
        axes.remove()
    return figure, panels[:count]


def shown(count: int) -> list[int]:
    """Chooses the layers that have a panel, evenly from the first to the last."""
    chosen = np.linspace(0, count - 1, min(count, _MOST_PANELS)).round().astype(int)
    return np.unique(chosen).tolist()


def router_names(count: int, layers: Sequence[int]) -> list[str]:
    """Names a model's routers: by their layers, then by their modules of multi-token prediction."""
    known = layers or range(count)
    return [str(known[i]) if i < len(known) else f'MTP {i - len(known) + 1}' for i in range(count)]


def thinned(labels: Sequence[str], most: int = 16) -> tuple[list[int], list[str]]:
    """Keeps so many ticks that they can be read, at even distances."""
    step = -(-len(labels) // most)
    ticks = list(range(0, len(labels), step))
    return ticks, [labels[i] for i in ticks]


def edges(steps: np.ndarray) -> np.ndarray:
    """Returns the borders between cells that are centred on the steps, as far as may be."""
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middles = (steps[1:] + steps[:-1]) / 2
    return np.concatenate([[2 * steps[0] - middles[0]], middles, [2 * steps[-1] - middles[-1]]])


def as_map(axes: Axes) -> None:
    """Takes away what a map needs none of: grid, spines, ticks."""
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def color_bar(
    figure: Figure, image: Any, panels: Sequence[Axes], label: str, **options: Any
) -> Any:
    """Explains the colours, beside the panels."""
    bar = figure.colorbar(image, ax=list(panels), pad=0.02, fraction=0.05, **options)
    bar.set_label(label, color=INK, fontsize=9)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.tick_params(labelsize=8, length=0, colors=INK)
    return bar
