"""Which module and which cache each kind of attention has: all that tells one from another."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from moe.attention import Attention, empty_key_value_cache
from moe.config import (
    AttentionConfig,
    AttentionLike,
    DType,
    LatentAttentionConfig,
    LinearAttentionConfig,
    TransformerConfig,
)
from moe.latent_attention import LatentAttention, empty_latent_cache
from moe.linear_attention import LinearAttention, LinearCache, empty_linear_cache
from moe.pages import PoolShape
from moe.stacking import LayerKind, layer_groups, layer_kinds
from moe.types import KeyValueCache, KVCache, LatentCache

LayerCache = KeyValueCache | LatentCache | LinearCache


def attention_kinds(config: TransformerConfig) -> tuple[AttentionLike, ...]:
    """Returns each kind of attention once, in the order of the layers."""
    return tuple(dict.fromkeys(config.attention_layers))


def attention_module(
    kind: AttentionLike, config: TransformerConfig, mesh: jax.sharding.Mesh | None, name: str
) -> nn.Module:
    """Returns the module of one layer's attention: called on (x, cache, context), gives (y, cache).

    Args:
        kind: of attention.
        config: the model's.
        mesh: constrains heads where given.
        name: of the module.
    """
    match kind:
        case AttentionConfig():
            return Attention(kind, config, mesh, name=name)
        case LatentAttentionConfig():
            return LatentAttention(kind, config, mesh, name=name)
        case LinearAttentionConfig():
            return LinearAttention(kind, config.norm_eps, config.param_dtype, mesh, name=name)


def empty_layer_cache(
    kind: AttentionLike, batch: int, num_slots: int, dtype: DTypeLike, slack: int = 0
) -> LayerCache:
    """Preallocates what one layer keeps of up to `num_slots` tokens.

    Args:
        kind: of attention.
        batch: `B`.
        num_slots: tokens that will ever be given.
        dtype: of what is cached; a linear layer's state is float32 whatever it says.
        slack: slots that a windowed layer's ring has more than its window.
    """
    match kind:
        case AttentionConfig():
            return empty_key_value_cache(kind, batch, num_slots, dtype, slack)
        case LatentAttentionConfig():
            return empty_latent_cache(kind, batch, num_slots, dtype)
        case LinearAttentionConfig():
            return empty_linear_cache(kind, batch, dtype)


def grows(kind: AttentionLike) -> bool:
    """Whether what a layer keeps grows with the text, rather than with a window or not at all."""
    return not isinstance(kind, LinearAttentionConfig) and kind.window is None


def empty_cache(
    config: TransformerConfig,
    batch: int,
    num_slots: int,
    dtype: DType | None = None,
    *,
    slack: int = 0,
    pool: PoolShape | None = None,
) -> KVCache:
    """Preallocates what every layer keeps of up to `num_slots` tokens.

    That is keys and values; only those of a window where there is one; latents with latent
    attention; and with linear attention a state whose size does not depend on `num_slots`.

    Args:
        config: the model's.
        batch: `B`.
        num_slots: `S`, at least as many as tokens will ever be given.
        dtype: of keys, values and latents; the model's activation dtype where None.
        slack: how many tokens a row's length may ever be set back by.
        pool: of a cache in pages, which `num_slots` is then a multiple of; None for slots in order.

    Returns:
        A cache of rows of length 0.
    """
    kept = dtype or config.dtype

    def of_kind(kind: LayerKind) -> LayerCache:
        if pool is None or not grows(kind.attention):
            return empty_layer_cache(kind.attention, batch, num_slots, kept, slack)
        pages = empty_layer_cache(kind.attention, pool.pages, pool.page_size, kept)
        return stacked(pages, pool.groups)

    def stacked(cache: LayerCache, repeats: int) -> LayerCache:
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (repeats, *x.shape)), cache)

    kinds = layer_kinds(config)
    if config.scan_layers:
        groups = layer_groups(kinds)
        layers = [stacked(of_kind(k), group.repeats) for group in groups for k in group.pattern]
    else:
        layers = [of_kind(kind) for kind in kinds]
    table = None
    if pool is not None:
        shape = (pool.groups, batch // pool.groups, num_slots // pool.page_size)
        table = jnp.zeros(shape, jnp.int32)
    return KVCache(
        layers=tuple(layers),
        segment_ids=jnp.zeros((batch, num_slots), jnp.int32),
        length=jnp.zeros(batch, jnp.int32),
        slack=slack,
        table=table,
    )
