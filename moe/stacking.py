"""Where each layer stands when layers are stacked for a scan, and arrays stacked accordingly."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from moe.config import AttentionLike, TransformerConfig


class LayerKind(NamedTuple):
    """What one layer is made of: layers of equal kinds have parameters of equal shapes.

    Attributes:
        attention: its attention.
        has_experts: whether it routes to experts.
    """

    attention: AttentionLike
    has_experts: bool


Kind = TypeVar('Kind')


@dataclasses.dataclass(frozen=True)
class LayerGroup(Generic[Kind]):
    """Consecutive layers that repeat one pattern, scanned as one.

    Attributes:
        pattern: the kind of each layer of the pattern.
        repeats: how often the pattern occurs in a row.
    """

    pattern: tuple[Kind, ...]
    repeats: int

    @property
    def num_layers(self) -> int:
        """Layers in the group."""
        return len(self.pattern) * self.repeats


def layer_kinds(config: TransformerConfig) -> tuple[LayerKind, ...]:
    """Returns the kind of every layer."""
    return tuple(map(LayerKind, config.attention_layers, config.moe_layers))


def layer_groups(kinds: tuple[Kind, ...]) -> tuple[LayerGroup[Kind], ...]:
    """Splits the layers into repeated patterns so that as few blocks as possible are compiled.

    Args:
        kinds: of the layers, in order.

    Returns:
        Groups whose repeated patterns, one after the other, are `kinds`: of all such splits those
        with the smallest sum of pattern lengths, and among them one with the fewest groups.
    """
    best: list[tuple[int, tuple[LayerGroup[Kind], ...]]] = [(0, ())]
    for end in range(1, len(kinds) + 1):
        splits = []
        for period in range(1, end + 1):
            pattern = kinds[end - period : end]
            start, repeats = end - period, 1
            while start >= 0 and kinds[start : start + period] == pattern:
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
        for g, group in enumerate(layer_groups(layer_kinds(config)))
        for repeat in range(group.repeats)
        for j in range(len(group.pattern))
    )


def module_name(depth: int) -> str:
    """Returns where a model's variables hold the prediction module of a depth, from 1."""
    return f'mtp_{depth}'


def module_names(config: TransformerConfig) -> tuple[str, ...]:
    """Returns the names of all multi-token-prediction modules, in the order of their depths."""
    return tuple(module_name(depth + 1) for depth in range(config.mtp_depth))


def module_kind(config: TransformerConfig) -> LayerKind:
    """Returns the kind of layer in multi-token-prediction modules: that of the model's last."""
    return layer_kinds(config)[-1]


def unstack(x: Array) -> list[Array]:
    """Splits the leading axis; its transpose is one concatenation, not a sum of padded slices."""
    return [part[0] for part in jax.lax.split(x, [1] * x.shape[0], axis=0)]


def unstack_repeats(stacked: list[Any]) -> list[Any]:
    """Turns what a scan stacked, one tree for each layer of its pattern, into one a layer."""
    leaves, structure = jax.tree.flatten(stacked)
    repeats = zip(*(unstack(leaf) for leaf in leaves), strict=True)
    return [layer for repeat in repeats for layer in structure.unflatten(repeat)]


def stack_repeats(layers: Sequence[Any], repeats: int) -> list[Any]:
    """Undoes `unstack_repeats`: what a scan of so many repeats takes in."""
    width = len(layers) // repeats
    return [jax.tree.map(lambda *xs: jnp.stack(xs), *layers[j::width]) for j in range(width)]
