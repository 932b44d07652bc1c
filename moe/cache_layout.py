"""Where the parts of a cache lie on a mesh, and rows moved between caches of other sizes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Int

from moe.attention_kinds import empty_cache
from moe.config import (
    AttentionConfig,
    LatentAttentionConfig,
    LinearAttentionConfig,
    TransformerConfig,
)
from moe.linear_attention import LinearCache
from moe.sharding import LogicalAxes, constrain, sharding_for
from moe.stacking import LayerKind, layer_groups, layer_kinds
from moe.types import KeyValueCache, KVCache, LatentCache

ROWS: LogicalAxes = ('batch', 'length')


def cache_axes(config: TransformerConfig) -> KVCache:
    """Names the logical axis of each dimension of a cache, in the tree of `empty_cache`.

    Rows are split as the batch is, keys and values by their heads, the states of linear attention
    by theirs. Latents belong to all heads: they stay whole along the tensor axis.
    """
    kinds = layer_kinds(config)
    if config.scan_layers:
        stacks = [kind for group in layer_groups(kinds) for kind in group.pattern]
        layers = tuple(_layer_axes(kind, ('layers',)) for kind in stacks)
    else:
        layers = tuple(_layer_axes(kind, ()) for kind in kinds)
    axes: Any = KVCache(layers=layers, segment_ids=ROWS, length=('batch',))  # type: ignore
    return axes


def _layer_axes(kind: LayerKind, leading: LogicalAxes) -> Any:
    match kind.attention:
        case AttentionConfig():
            heads = (*leading, *ROWS, 'kv_heads', 'head_dim')
            return KeyValueCache(heads, heads)  # type: ignore
        case LatentAttentionConfig():
            return LatentCache((*leading, *ROWS, None))  # type: ignore
        case LinearAttentionConfig():
            return LinearCache(
                state=(*leading, 'batch', 'heads', None, None),  # type: ignore
                conv=(*leading, 'batch', None, 'heads', None),  # type: ignore
                segment=(*leading, 'batch'),  # type: ignore
            )


def _with_axes(function: Any, config: TransformerConfig, cache: KVCache, *more: Any) -> Any:
    axes = dataclasses.replace(cache_axes(config), slack=cache.slack)
    return jax.tree.map(function, cache, *more, axes)


def cache_shardings(config: TransformerConfig, cache: KVCache, mesh: Mesh) -> KVCache:
    """Returns a `NamedSharding` for each array of a cache, or of its shapes.

    Raises:
        InputError: where the rows or heads do not divide among the mesh axes that split them.
    """

    def sharding(leaf: Any, axes: LogicalAxes) -> NamedSharding:
        return sharding_for(leaf.shape, axes, mesh, where='Cache')

    return _with_axes(sharding, config, cache)


def constrain_cache(config: TransformerConfig, cache: KVCache, mesh: Mesh | None) -> KVCache:
    """Pins each array of a cache to its place, under `jit`; the identity without a mesh."""
    if mesh is None:
        return cache
    return _with_axes(lambda leaf, axes: constrain(leaf, axes, mesh), config, cache)


def grown(config: TransformerConfig, cache: KVCache, num_slots: int) -> KVCache:
    """Gives a cache more slots: `num_slots`, none of which may be fewer than it has.

    A ring that has not come to its window's size yet has never turned: what it holds stays where it
    is.
    """
    batch = cache.segment_ids.shape[0]

    def empty() -> KVCache:
        return empty_cache(config, batch, num_slots, slack=cache.slack)

    def pad(leaf: Array, like: Any) -> Array:
        sizes = zip(leaf.shape, like.shape, strict=True)
        return jnp.pad(leaf, [(0, new - old) for old, new in sizes])

    return jax.tree.map(pad, cache, jax.eval_shape(empty))


def compacted(config: TransformerConfig, cache: KVCache, padding: Int[Array, 'B']) -> KVCache:
    """Moves each row to the left over its padding, which stood in its first slots."""

    def roll(leaf: Array, axes: LogicalAxes) -> Array:
        if 'length' not in axes:
            return leaf
        batch = axes.index('batch')
        # In a ring the slot t % size becomes (t - padding) % size: turned by as much.
        rows = jax.vmap(lambda row, by: jnp.roll(row, -by, axis=batch), (batch, 0), batch)
        return rows(leaf, padding)

    cache = _with_axes(roll, config, cache)
    return dataclasses.replace(cache, length=cache.length - padding)


def inserted(
    config: TransformerConfig, cache: KVCache, rows: KVCache, at: Int[Array, 'P']
) -> KVCache:
    """Puts rows of another cache of as many slots in the place of some; `B` or more is nowhere."""

    def put(old: Array, new: Array, axes: LogicalAxes) -> Array:
        index = (slice(None),) * axes.index('batch')
        return old.at[(*index, at)].set(new, mode='drop')

    return _with_axes(put, config, cache, rows)


def has_state(config: TransformerConfig) -> bool:
    """Whether some layer's cache is a state that cannot be set back."""
    return any(isinstance(kind, LinearAttentionConfig) for kind in config.attention_layers)
