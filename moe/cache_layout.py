"""Where the parts of a cache lie on a mesh, and rows moved between caches of other sizes."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Int

from moe.attention_kinds import empty_cache, grows
from moe.config import (
    AttentionConfig,
    LatentAttentionConfig,
    LinearAttentionConfig,
    TransformerConfig,
)
from moe.linear_attention import LinearCache
from moe.pages import PoolShape, enter_pages
from moe.sharding import LogicalAxes, constrain, sharding_for
from moe.stacking import LayerKind, layer_groups, layer_kinds
from moe.types import KeyValueCache, KVCache, LatentCache

ROWS: LogicalAxes = ('batch',)
POOL: LogicalAxes = ('batch', 'pages')


def cache_axes(config: TransformerConfig, *, paged: bool = False) -> KVCache:
    """Names the logical axis of each dimension of a cache, in the tree of `empty_cache`.

    Rows, and groups of pages, are split as the batch is, keys and values by their heads, the states
    of linear attention by theirs. Latents belong to all heads: they stay whole along the tensor
    axis.
    """
    kinds = layer_kinds(config)
    if config.scan_layers:
        stacks = [kind for group in layer_groups(kinds) for kind in group.pattern]
        layers = tuple(_layer_axes(kind, ('layers',), paged) for kind in stacks)
    else:
        layers = tuple(_layer_axes(kind, (), paged) for kind in kinds)
    axes: Any = KVCache(layers=layers, segment_ids=(*ROWS, 'length'), length=('batch',))  # type: ignore
    return dataclasses.replace(axes, table=('batch', None, None)) if paged else axes


def _layer_axes(kind: LayerKind, leading: LogicalAxes, paged: bool) -> Any:
    rows = (*leading, *(POOL if paged and grows(kind.attention) else ROWS))
    match kind.attention:
        case AttentionConfig():
            heads = (*rows, 'kv_heads')
            return KeyValueCache(
                keys=(*heads, 'head_dim', 'length'),  # type: ignore
                values=(*heads, 'length', 'head_dim'),  # type: ignore
            )
        case LatentAttentionConfig():
            return LatentCache((*rows, 'length', None))  # type: ignore
        case LinearAttentionConfig():
            return LinearCache(
                state=(*leading, 'batch', 'heads', None, None),  # type: ignore
                conv=(*leading, 'batch', None, 'heads', None),  # type: ignore
                segment=(*leading, 'batch'),  # type: ignore
            )


def _with_axes(function: Any, config: TransformerConfig, cache: KVCache, *more: Any) -> Any:
    axes = cache_axes(config, paged=cache.table is not None)
    axes = dataclasses.replace(axes, slack=cache.slack)
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


def fitted(leaf: Array, shape: tuple[int, ...]) -> Array:
    """Pads an array with zeros, or cuts it off, at the end of each dimension."""
    kept = leaf[tuple(map(slice, shape))]
    return jnp.pad(kept, [(0, size - old) for size, old in zip(shape, kept.shape, strict=True)])


def resized(
    config: TransformerConfig, cache: KVCache, num_slots: int, pool: PoolShape, mesh: Mesh | None
) -> KVCache:
    """Gives a cache in pages as many slots for each row, and pools of no fewer pages.

    No row may be longer. A ring smaller than its window has then never turned, before or after:
    what it holds stays where it is.
    """
    batch = cache.segment_ids.shape[0]

    def empty() -> KVCache:
        return empty_cache(config, batch, num_slots, slack=cache.slack, pool=pool)

    def fit(leaf: Array, like: Any, axes: LogicalAxes) -> Array:
        same = leaf.shape == like.shape  # then it is not copied
        return leaf if same else constrain(fitted(leaf, like.shape), axes, mesh)

    return _with_axes(fit, config, cache, jax.eval_shape(empty))


def compacted(config: TransformerConfig, cache: KVCache, padding: Int[Array, 'B']) -> KVCache:
    """Moves each row to the left over its padding, which stood in its first slots."""

    def roll(leaf: Array, axes: LogicalAxes) -> Array:
        if 'length' not in axes:
            return leaf
        batch, slots = axes.index('batch'), axes.index('length') - 1
        # In a ring the slot t % size becomes (t - padding) % size: turned by as much.
        rows = jax.vmap(lambda row, by: jnp.roll(row, -by, axis=slots), (batch, 0), batch)
        return rows(leaf, padding)

    cache = _with_axes(roll, config, cache)
    return dataclasses.replace(cache, length=cache.length - padding)


def inserted(
    config: TransformerConfig, cache: KVCache, rows: KVCache, at: Int[Array, 'F']
) -> KVCache:
    """Puts rows whose slots lie in order in the place of some of a cache in pages.

    Args:
        config: the model's.
        cache: whose table says where their slots go.
        rows: of which those that get a place are no longer than `cache` has slots.
        at: of each its place; `B` is nowhere.
    """
    table = cache.table
    assert table is not None

    def put(old: Array, new: Array, axes: LogicalAxes) -> Array:
        if 'pages' in axes:
            slots = axes.index('length') - axes.index('pages')
            enter = functools.partial(enter_pages, at=at, table=table, axis=slots)
            return jax.vmap(enter)(old, new) if 'layers' in axes else enter(old, new)
        place = axes.index('batch')
        shape = (*new.shape[: place + 1], *old.shape[place + 1 :])
        return old.at[(*(slice(None),) * place, at)].set(fitted(new, shape), mode='drop')

    axes = dataclasses.replace(cache_axes(config, paged=True), slack=cache.slack, table=None)
    cache = jax.tree.map(put, dataclasses.replace(cache, table=None), rows, axes)
    return dataclasses.replace(cache, table=table)


def has_state(config: TransformerConfig) -> bool:
    """Whether some layer's cache is a state that cannot be set back."""
    return any(isinstance(kind, LinearAttentionConfig) for kind in config.attention_layers)
