"""A model's variables layer by layer, out of the stacks that a scan needs and into them again."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from moe.config import TransformerConfig
from moe.stacking import layer_paths

Tree = Any


def split_layers(config: TransformerConfig, collection: Tree) -> tuple[list[Tree], Tree]:
    """Takes every layer's own arrays out of a collection, stacked or not.

    Args:
        config: the model's.
        collection: unboxed `params` or `routing`.

    Returns:
        One tree for each layer (empty where the collection holds nothing for it), and the rest:
        what belongs to no layer.
    """
    paths = layer_paths(config)
    tops = {path[0] for path, _ in paths}
    rest = {name: subtree for name, subtree in collection.items() if name not in tops}
    layers = []
    for path, index in paths:
        tree = collection
        for name in path:
            tree = tree.get(name, {})
        layers.append(tree if index is None else _at(tree, index))
    return layers, rest


def join_layers(config: TransformerConfig, layers: list[Tree], rest: Tree) -> Tree:
    """Undoes `split_layers`, in the layout that `config` asks for.

    Args:
        config: of the model that the collection shall belong to.
        layers: one tree for each of its layers.
        rest: what belongs to no layer.

    Returns:
        The collection.
    """
    stacks: dict[tuple[str, ...], list[Tree]] = {}
    for (path, _), layer in zip(layer_paths(config), layers, strict=True):
        stacks.setdefault(path, []).append(layer)
    collection = dict(rest)
    for path, trees in stacks.items():
        if not jax.tree.leaves(trees):
            continue
        joined = jax.tree.map(lambda *xs: jnp.stack(xs), *trees) if config.scan_layers else trees[0]
        parent = collection
        for name in path[:-1]:
            parent = parent.setdefault(name, {})
        parent[path[-1]] = joined
    return collection


def relaid(source: TransformerConfig, target: TransformerConfig, collection: Tree) -> Tree:
    """Moves a collection from the layout of one config to that of another with the same layers."""
    return join_layers(target, *split_layers(source, collection))


def unrolled(config: TransformerConfig) -> TransformerConfig:
    """Returns the same model with one subtree for each layer, and nothing recomputed."""
    return dataclasses.replace(config, scan_layers=False, remat='none')


def _at(tree: Tree, index: int) -> Tree:
    return jax.tree.map(lambda x: x[index], tree)
