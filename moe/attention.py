"""Grouped-query attention, to all tokens before or to the last few, with its cache."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from moe.activations import note
from moe.attention_context import AttentionContext
from moe.cache_rows import write_ring
from moe.config import AttentionConfig, TransformerConfig
from moe.dot_product import attention_and_highest, laid_out
from moe.layers import kernel_init, linear, norm_of, partitioned
from moe.qk_clip import record_max_logits
from moe.quantised import Kernel, stored_kernel
from moe.rope import apply_rope
from moe.sharding import LogicalAxes, constrain
from moe.types import KeyValueCache


class Attention(nn.Module):
    """Projects to queries, keys and values, normalises and rotates them, attends, projects back.

    Parameters: `q` [D, H, Dh], `k` and `v` [D, Hkv, Dh], `o` [H, Dh, D]; where configured `q_norm`
    and `k_norm`, `q_bias`, `k_bias`, `v_bias`, `o_bias` [D] and `sinks` [H].

    Attributes:
        attention: this layer's.
        config: the model's.
        mesh: constrains heads where given.
    """

    attention: AttentionConfig
    config: TransformerConfig
    mesh: jax.sharding.Mesh | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, 'B T D'], cache: KeyValueCache | None, context: AttentionContext
    ) -> tuple[Float[Array, 'B T D'], KeyValueCache | None]:
        config = self.attention
        D, H, Dh = x.shape[-1], config.num_heads, config.head_dim
        queries = self._rotated(self._project(x, 'q', H, 'heads'), context)
        keys = self._rotated(self._project(x, 'k', config.num_kv_heads, 'kv_heads'), context)
        values = self._project(x, 'v', config.num_kv_heads, 'kv_heads')
        note(self, queries=queries, keys=keys, values=values)
        keys, values = laid_out(keys, values)
        if cache is not None:
            attend_to = extend if config.window is None else extend_ring
            keys, values, cache = attend_to(cache, keys, values, context)
        sinks = None
        if config.sinks:
            sinks = self._parameter('sinks', nn.initializers.zeros_init(), (H,), ('heads',))
        assert context.allowed is not None
        attended, highest = attention_and_highest(
            queries,
            keys,
            values,
            context.allowed,
            causal=context.start is None,
            scale=config.score_scale,
            window=config.window,
            score_cap=config.soft_cap,
            sinks=sinks,
        )
        record_max_logits(self, highest, context.segment_ids)
        attended = constrain(attended, ('batch', 'length', 'heads', 'head_dim'), self.mesh)
        axes = ('heads', 'head_dim', 'embed')
        y = linear(attended, self._kernel('o', kernel_init((0, 1), 2), (H, Dh, D), axes, 1))
        return self._biased(y, 'o', (None,)) if config.output_bias else y, cache

    def _parameter(
        self,
        name: str,
        init: nn.initializers.Initializer,
        shape: tuple[int, ...],
        axes: LogicalAxes,
    ) -> Array:
        return self.param(name, partitioned(init, axes), shape, self.config.param_dtype)

    def _kernel(
        self,
        name: str,
        init: nn.initializers.Initializer,
        shape: tuple[int, ...],
        axes: LogicalAxes,
        outputs: int,
    ) -> Kernel:
        read = functools.partial(self._parameter, name, init, shape, axes)
        return stored_kernel(self, name, read, outputs)

    def _biased(self, x: Array, name: str, axes: LogicalAxes) -> Array:
        shape, zeros = x.shape[2:], nn.initializers.zeros_init()
        return x + self._parameter(f'{name}_bias', zeros, shape, axes).astype(x.dtype)

    def _project(self, x: Array, name: str, heads: int, axis: str) -> Array:
        """Projects, adds the bias, normalises and clips, as configured."""
        config, axes = self.attention, (axis, 'head_dim')
        shape = (x.shape[-1], heads, config.head_dim)
        y = linear(x, self._kernel(name, kernel_init(0, (1, 2)), shape, ('embed', *axes), 2))
        if config.qkv_bias:
            y = self._biased(y, name, axes)
        if config.qk_norm != 'none' and name != 'v':
            # Of each head alone, or over all of them together.
            normed = axes if config.qk_norm == 'full' else ('head_dim',)
            y = norm_of(self.config, f'{name}_norm', normed)(y)
        if config.clip_qkv is not None:
            y = jnp.clip(y, -config.clip_qkv, config.clip_qkv)
        return constrain(y, ('batch', 'length', *axes), self.mesh)

    def _rotated(self, x: Array, context: AttentionContext) -> Array:
        if context.cos is None or context.sin is None:
            return x
        return apply_rope(x, context.cos, context.sin)


def empty_key_value_cache(
    config: AttentionConfig, batch: int, num_slots: int, dtype: DTypeLike, slack: int = 0
) -> KeyValueCache:
    """Preallocates one layer's keys and values: of `num_slots` tokens, or of a window's if fewer.

    Args:
        config: the layer's.
        batch: `B`.
        num_slots: tokens that will ever be given.
        dtype: of keys and values.
        slack: slots that a ring has more than its window.
    """
    size = num_slots if config.window is None else min(config.window + slack, num_slots)
    rows, channels = (batch, config.num_kv_heads), config.head_dim
    return KeyValueCache(
        keys=jnp.zeros((*rows, channels, size), dtype),
        values=jnp.zeros((*rows, size, channels), dtype),
    )


def extend(
    cache: KeyValueCache,
    keys: Float[Array, 'B Hkv Dh T'],
    values: Float[Array, 'B Hkv T Dh'],
    context: AttentionContext,
) -> tuple[Float[Array, 'B Hkv Dh S'], Float[Array, 'B Hkv S Dh'], KeyValueCache]:
    """Writes new keys and values behind those before them.

    Returns:
        The keys and values to attend to, one for each slot, and the cache.
    """
    return _extended(cache, keys, values, context.extended)


def extend_ring(
    cache: KeyValueCache,
    keys: Float[Array, 'B Hkv Dh T'],
    values: Float[Array, 'B Hkv T Dh'],
    context: AttentionContext,
) -> tuple[Float[Array, 'B Hkv Dh S'], Float[Array, 'B Hkv S Dh'], KeyValueCache]:
    """Writes the last of the new keys and values over the oldest ones of a ring.

    Returns:
        The keys and values to attend to, those that the ring held (see `ring_slots`) and after them
        the new ones; and the cache.
    """
    start = context.start
    assert start is not None

    def both(ring: Array, new: Array, axis: int) -> tuple[Array, Array]:
        attended = jnp.concatenate([ring, new.astype(ring.dtype)], axis)
        return attended, write_ring(ring, new, start, axis)

    return _extended(cache, keys, values, both)


def _extended(
    cache: KeyValueCache, keys: Array, values: Array, write: Callable[..., tuple[Array, Array]]
) -> tuple[Array, Array, KeyValueCache]:
    """Extends both, each along its own axis of slots."""
    keys, kept_keys = write(cache.keys, keys, 3)
    values, kept_values = write(cache.values, values, 2)
    return keys, values, KeyValueCache(kept_keys, kept_values)
