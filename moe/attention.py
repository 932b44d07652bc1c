"""Grouped-query attention, the masks of packed rows, and the cache of keys and values."""

import dataclasses

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe.config import DType, TransformerConfig
from moe.dot_product import dot_product_attention
from moe.layers import RMSNorm, kernel_init, linear, partitioned
from moe.rope import apply_rope, rope_tables
from moe.sharding import constrain
from moe.types import KVCache

LayerCache = tuple[Float[Array, 'B S Hkv Dh'], Float[Array, 'B S Hkv Dh']]


@flax.struct.dataclass
class AttentionContext:
    """What every layer's attention shares: computed once a call, not once a layer.

    Attributes:
        cos: of the rotary angles of the new tokens.
        sin: likewise.
        allowed: True where a query may look at a key; its batch dim is 1 where all rows agree.
        start: the cache slot of the first new token; None without a cache.
    """

    cos: Float[Array, 'B T half']
    sin: Float[Array, 'B T half']
    allowed: Bool[Array, 'B T S']
    start: Int[Array, ''] | None = None


def segment_positions(segment_ids: Int[Array, 'B T']) -> Int[Array, 'B T']:
    """Counts from 0 at the start of every run of equal segment ids."""
    index = jnp.arange(segment_ids.shape[1])
    changed = segment_ids[:, 1:] != segment_ids[:, :-1]
    starts = jnp.where(jnp.pad(changed, ((0, 0), (1, 0))), index, 0)
    return index - jax.lax.cummax(starts, axis=1)


def attention_mask(
    query_slots: Int[Array, 'T'],
    query_segments: Int[Array, 'B T'] | None,
    key_segments: Int[Array, 'B S'] | None,
    num_keys: int,
) -> Bool[Array, 'B T S']:
    """Lets a query look at the keys of its own segment that stand no later than itself.

    Padding (segment 0) looks at padding, so every query has at least itself to look at, and no
    softmax is empty.

    Args:
        query_slots: where the queries stand among the keys.
        query_segments: None where the row is one document.
        key_segments: None where the row is one document.
        num_keys: `S`.

    Returns:
        True where allowed; [1, T, S] without segments.
    """
    causal = (query_slots[:, None] >= jnp.arange(num_keys))[None]
    if query_segments is None or key_segments is None:
        return causal
    return causal & (query_segments[:, :, None] == key_segments[:, None, :])


class Attention(nn.Module):
    """Projects to queries, keys and values, normalises and rotates them, attends, projects back.

    Attributes:
        config: the model's.
        mesh: constrains heads where given.
    """

    config: TransformerConfig
    mesh: jax.sharding.Mesh | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, 'B T D'], cache: LayerCache | None, context: AttentionContext
    ) -> tuple[Float[Array, 'B T D'], LayerCache | None]:
        config = self.config.attention
        D, H, Hkv, Dh = x.shape[-1], config.num_heads, config.num_kv_heads, config.head_dim
        queries = self._project(x, 'q', H, 'heads')
        keys = self._project(x, 'k', Hkv, 'kv_heads')
        values = self._project(x, 'v', Hkv, 'kv_heads')
        queries = apply_rope(self._normalise(queries, 'q_norm', 'heads'), context.cos, context.sin)
        keys = apply_rope(self._normalise(keys, 'k_norm', 'kv_heads'), context.cos, context.sin)
        if cache is not None:
            assert context.start is not None
            cache = extend(cache, keys, values, context.start)
            keys, values = cache
        attended = dot_product_attention(
            queries, keys, values, context.allowed, causal=cache is None
        )
        attended = constrain(attended, ('batch', 'length', 'heads', 'head_dim'), self.mesh)
        init = kernel_init((0, 1), 2)
        kernel = self._kernel('o', init, (H, Dh, D), ('heads', 'head_dim', 'embed'))
        return linear(attended, kernel), cache

    def _kernel(self, name: str, init: nn.initializers.Initializer, shape, axes) -> Array:
        init = partitioned(init, axes)
        return self.param(name, init, shape, self.config.param_dtype)

    def _project(self, x: Array, name: str, heads: int, axis: str) -> Array:
        shape = (x.shape[-1], heads, self.config.attention.head_dim)
        kernel = self._kernel(name, kernel_init(0, (1, 2)), shape, ('embed', axis, 'head_dim'))
        return constrain(linear(x, kernel), ('batch', 'length', axis, 'head_dim'), self.mesh)

    def _normalise(self, x: Array, name: str, axis: str) -> Array:
        """Applies the q/k norm of the config: to each head alone, or over all of them together."""
        kind = self.config.attention.qk_norm
        if kind == 'none':
            return x
        axes = ('head_dim',) if kind == 'head' else (axis, 'head_dim')
        norm = RMSNorm(self.config.norm_eps, self.config.param_dtype, axes, name=name)
        return norm(x)


def extend(cache: LayerCache, keys: Array, values: Array, start: Int[Array, '']) -> LayerCache:
    """Writes new keys and values into one layer's cache from slot `start` on."""
    at = (0, start, 0, 0)
    old_keys, old_values = cache
    return (
        jax.lax.dynamic_update_slice(old_keys, keys.astype(old_keys.dtype), at),
        jax.lax.dynamic_update_slice(old_values, values.astype(old_values.dtype), at),
    )


def empty_cache(
    config: TransformerConfig, batch: int, num_slots: int, dtype: DType | None = None
) -> KVCache:
    """Preallocates the keys and values of `num_slots` positions for every layer.

    Args:
        config: the model's.
        batch: `B`.
        num_slots: `S`, at least as many as tokens will ever be given.
        dtype: of keys and values; the model's activation dtype where None.

    Returns:
        A cache of length 0.
    """
    attention = config.attention
    shape = (config.num_layers, batch, num_slots, attention.num_kv_heads, attention.head_dim)
    return KVCache(
        keys=jnp.zeros(shape, dtype or config.dtype),
        values=jnp.zeros(shape, dtype or config.dtype),
        segment_ids=jnp.zeros((batch, num_slots), jnp.int32),
        length=jnp.zeros((), jnp.int32),
    )


def attention_context(
    config: TransformerConfig,
    positions: Int[Array, 'B T'] | None,
    segment_ids: Int[Array, 'B T'] | None,
    shape: tuple[int, ...],
    cache: KVCache | None,
) -> tuple[AttentionContext, KVCache | None]:
    """Computes rotary tables and mask, and notes the new tokens' segments in the cache.

    Args:
        config: the model's.
        positions: None counts from each segment's start, or from the first slot with a cache.
        segment_ids: 0 for padding; None makes a row one document.
        shape: (B, T) of the new tokens.
        cache: whose keys come first, or None.

    Returns:
        The context, and the cache with its segments and length advanced (not yet its keys).
    """
    B, T = shape
    attention = config.attention
    slots = jnp.arange(T)
    if cache is None:
        allowed = attention_mask(slots, segment_ids, segment_ids, T)
        start = None
        if positions is None and segment_ids is not None:
            positions = segment_positions(segment_ids)
    else:
        start = cache.length
        slots = slots + start
        segments = jnp.ones((B, T), jnp.int32) if segment_ids is None else segment_ids
        cached = jax.lax.dynamic_update_slice(
            cache.segment_ids, segments.astype(jnp.int32), (0, start)
        )
        cache = dataclasses.replace(cache, segment_ids=cached, length=start + T)
        allowed = attention_mask(slots, segments, cached, cached.shape[1])
    if positions is None:
        positions = jnp.broadcast_to(slots, (B, T))
    cos, sin = rope_tables(positions, attention.head_dim, attention.rope_theta)
    return AttentionContext(cos, sin, allowed, start), cache
