"""Where each layer stands when layers are stacked for a scan, and arrays stacked accordingly."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array

from moe.config import TransformerConfig


@dataclasses.dataclass(frozen=True)
class LayerGroup:
    """Consecutive layers that repeat one pattern, scanned as one.

    Attributes:
        pattern: for each layer of the pattern, whether it routes to experts.
        repeats: how often the pattern occurs in a row.
    """

    pattern: tuple[bool, ...]
    repeats: int

    @property
    def num_layers(self) -> int:
        """Layers in the group."""
        return len(self.pattern) * self.repeats


def layer_groups(moe_layers: tuple[bool, ...]) -> tuple[LayerGroup, ...]:
    """Splits the layers into repeated patterns so that as few blocks as possible are compiled.

    Args:
        moe_layers: per layer, whether it routes to experts.

    Returns:
        Groups whose repeated patterns, one after the other, are `moe_layers`: of all such splits
        those with the smallest sum of pattern lengths, and among them one with the fewest groups.
    """
    best: list[tuple[int, tuple[LayerGroup, ...]]] = [(0, ())]
    for end in range(1, len(moe_layers) + 1):
        splits = []
        for period in range(1, end + 1):
            pattern = moe_layers[end - period : end]
            start, repeats = end - period, 1
            while start >= 0 and moe_layers[start : start + period] == pattern:
                blocks, groups = best[start]
                splits.append((blocks + period, (*groups, LayerGroup(pattern, repeats))))
                start, repeats = start - period, repeats + 1
        best.append(min(splits, key=lambda split: (split[0], len(split[1]))))
    return best[-1][1]


def layer_paths(config: TransformerConfig) -> tuple[tuple[tuple[str, ...], int | None], ...]:
    """Says for each layer where its variables stand: the names down to it, and its index there.

    Without `scan_layers` layer i is `layer_i` and has no index. With it `group_g/layer_j` holds the
    j-th layer of the g-th group's pattern, all repeats stacked along a leading axis.
    """
    if not config.scan_layers:
        return tuple(((f'layer_{layer}',), None) for layer in range(config.num_layers))
    return tuple(
        ((f'group_{g}', f'layer_{j}'), repeat)
        for g, group in enumerate(layer_groups(config.moe_layers))
        for repeat in range(group.repeats)
        for j in range(len(group.pattern))
    )


def unstack(x: Array) -> list[Array]:
    """Splits the leading axis; its transpose is one concatenation, not a sum of padded slices."""
    return [part[0] for part in jax.lax.split(x, [1] * x.shape[0], axis=0)]


def split_repeats(x: Array, group: LayerGroup) -> list[Array]:
    """Parts the group's layers [L, ...] by their place in the pattern: [repeats, ...] for each."""
    return unstack(jnp.moveaxis(x.reshape(group.repeats, -1, *x.shape[1:]), 1, 0))


def join_repeats(parts: list[Array]) -> Array:
    """Undoes `split_repeats`."""
    return jnp.stack(parts, axis=1).reshape(-1, *parts[0].shape[1:])
