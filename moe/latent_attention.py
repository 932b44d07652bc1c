"""Multi-head latent attention: expanded for training, absorbed for decoding; a cache of latents."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from moe.activations import asked_for, note
from moe.attention_context import AttentionContext
from moe.config import LatentAttentionConfig, TransformerConfig
from moe.dot_product import attention_and_highest, laid_out
from moe.layers import RMSNorm, kernel_init, linear, partitioned
from moe.qk_clip import record_max_logits
from moe.quantised import Kernel, stored_kernel
from moe.rope import apply_rope
from moe.sharding import LogicalAxes, constrain
from moe.types import LatentCache

HEADS = ('batch', 'length', 'heads', 'head_dim')
LATENT_EPS = 1e-6  # of the latents' norms in the published models, whatever their other norms have


def absorbing_is_cheaper(config: LatentAttentionConfig, queries: int, keys: int) -> bool:
    """Compares the multiply-adds a head of attending in the latent space and of expanding keys.

    Absorbed, a score and its weighted value cost `2 R + rope_dim` channels, and queries and results
    pass the up-projection; expanded they cost `key_dim + value_dim`, and all keys pass it.
    """
    up = config.kv_rank * (config.nope_dim + config.value_dim)
    absorbed = queries * keys * (2 * config.kv_rank + config.rope_dim) + queries * up
    expanded = queries * keys * (config.key_dim + config.value_dim) + keys * up
    return absorbed < expanded


class LatentAttention(nn.Module):
    """Attends over keys and values that are an up-projection of one latent for each token.

    With `[c, r] = x kv_down`, a token's latent is `[norm(c), rotated r]`; a head's key is
    `[norm(c) K, rotated r]` and its value `norm(c) V`, where `[K, V]` is the head's `kv_up`. As
    `q (norm(c) K)^T = (q K^T) norm(c)^T`, the absorbed form moves the up-projection from the keys
    to the query and the result, so that all heads attend to the latents themselves, as to one
    key-value head. A call with a cache takes whichever form costs less; one without expands.

    Parameters: `kv_down` [D, R + rope_dim], `kv_norm`, `kv_up` [R, H, nope_dim + value_dim], `o`
    [H, Dv, D]; for queries `q` [D, H, nope_dim + rope_dim], or, where they have a latent, `q_down`
    [D, query_rank], `q_norm` and `q_up`. Rotary channels are stored in adjacent pairs.

    Attributes:
        attention: this layer's.
        config: the model's.
        mesh: constrains heads where given.

    Source: DeepSeek-V2, arXiv 2405.04434, section 2.1 and appendix C.
    """

    attention: LatentAttentionConfig
    config: TransformerConfig
    mesh: jax.sharding.Mesh | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, 'B T D'], cache: LatentCache | None, context: AttentionContext
    ) -> tuple[Float[Array, 'B T D'], LatentCache | None]:
        config = self.attention
        D, H, Dv = x.shape[-1], config.num_heads, config.value_dim
        queries = self._queries(x, context)
        latents = self._latents(x, context)
        absorbed = False
        if cache is not None:
            latents, kept = context.extended(cache.latents, latents)
            cache = LatentCache(kept)
            latents = latents.astype(x.dtype)
            absorbed = absorbing_is_cheaper(config, x.shape[1], latents.shape[1])
        shape = (config.kv_rank, H, config.nope_dim + Dv)
        kv_up = self._kernel('kv_up', kernel_init(0, (1, 2)), shape, (None, *HEADS[2:]))
        kv_up = kv_up.astype(x.dtype)
        note(self, queries=queries)
        if cache is None and (asked_for(self, 'keys') or asked_for(self, 'values')):
            keys, values = expanded(config, latents, kv_up)
            note(self, keys=keys, values=values)
        attend = attend_absorbed if absorbed else attend_expanded
        attended, highest = attend(config, queries, latents, kv_up, context)
        record_max_logits(self, highest, context.segment_ids)
        attended = constrain(attended, HEADS, self.mesh)
        kernel = self._matrix('o', kernel_init((0, 1), 2), (H, Dv, D), (*HEADS[2:], 'embed'), 1)
        return linear(attended, kernel), cache

    def _queries(self, x: Array, context: AttentionContext) -> Float[Array, 'B T H Dk']:
        config = self.attention
        name = 'q'
        if config.query_rank is not None:
            x = self._norm('q_norm')(self._down(x, 'q_down', config.query_rank))
            name = 'q_up'
        shape = (x.shape[-1], config.num_heads, config.key_dim)
        axis = 'embed' if name == 'q' else None
        kernel = self._matrix(name, kernel_init(0, (1, 2)), shape, (axis, *HEADS[2:]), 2)
        queries = constrain(linear(x, kernel), HEADS, self.mesh)
        plain, rotary = jnp.split(queries, [config.nope_dim], axis=-1)
        return jnp.concatenate([plain, rotate_pairs(rotary, context)], axis=-1)

    def _latents(self, x: Array, context: AttentionContext) -> Float[Array, 'B T latent']:
        config = self.attention
        down = self._down(x, 'kv_down', config.kv_rank + config.rope_dim)
        latents, rotary = jnp.split(down, [config.kv_rank], axis=-1)
        rotary = rotate_pairs(rotary[:, :, None], context)[:, :, 0]
        return jnp.concatenate([self._norm('kv_norm')(latents), rotary], axis=-1)

    def _down(self, x: Array, name: str, width: int) -> Array:
        kernel = self._matrix(name, kernel_init(0, 1), (x.shape[-1], width), ('embed', None), 1)
        return constrain(linear(x, kernel), ('batch', 'length', None), self.mesh)

    def _norm(self, name: str) -> RMSNorm:
        return RMSNorm(LATENT_EPS, self.config.param_dtype, name=name)

    def _kernel(
        self,
        name: str,
        init: nn.initializers.Initializer,
        shape: tuple[int, ...],
        axes: LogicalAxes,
    ) -> Array:
        return self.param(name, partitioned(init, axes), shape, self.config.param_dtype)

    def _matrix(
        self,
        name: str,
        init: nn.initializers.Initializer,
        shape: tuple[int, ...],
        axes: LogicalAxes,
        outputs: int,
    ) -> Kernel:
        read = functools.partial(self._kernel, name, init, shape, axes)
        return stored_kernel(self, name, read, outputs)


def rotate_pairs(
    x: Float[Array, 'B T H rope'], context: AttentionContext
) -> Float[Array, 'B T H rope']:
    """Rotates each pair (x[2i], x[2i + 1]); what comes out is all firsts, then all seconds.

    Queries and keys are permuted alike, so their products are not.
    """
    if context.cos is None or context.sin is None:
        return x
    halves = jnp.concatenate([x[..., ::2], x[..., 1::2]], axis=-1)
    return apply_rope(halves, context.cos, context.sin)


def expanded(
    config: LatentAttentionConfig,
    latents: Float[Array, 'B S latent'],
    kv_up: Float[Array, 'R H up'],
) -> tuple[Float[Array, 'B S H Dk'], Float[Array, 'B S H Dv']]:
    """Makes every head's keys and values of the latents."""
    compressed, rotary = jnp.split(latents, [config.kv_rank], axis=-1)
    plain, values = jnp.split(linear(compressed, kv_up), [config.nope_dim], axis=-1)
    rotary = jnp.broadcast_to(rotary[:, :, None], (*plain.shape[:3], config.rope_dim))
    return jnp.concatenate([plain, rotary], axis=-1), values


def attend_expanded(
    config: LatentAttentionConfig,
    queries: Float[Array, 'B T H Dk'],
    latents: Float[Array, 'B S latent'],
    kv_up: Float[Array, 'R H up'],
    context: AttentionContext,
) -> tuple[Float[Array, 'B T H Dv'], Float[Array, 'B T H']]:
    """Makes every head's keys and values of the latents, and attends to those; with the highest."""
    assert context.allowed is not None
    keys, values = laid_out(*expanded(config, latents, kv_up))
    causal, scale = context.start is None, config.score_scale
    return attention_and_highest(queries, keys, values, context.allowed, causal=causal, scale=scale)


def attend_absorbed(
    config: LatentAttentionConfig,
    queries: Float[Array, 'B T H Dk'],
    latents: Float[Array, 'B S latent'],
    kv_up: Float[Array, 'R H up'],
    context: AttentionContext,
) -> tuple[Float[Array, 'B T H Dv'], Float[Array, 'B T H']]:
    """Brings the queries into the space of the latents, attends there, and brings results back."""
    assert context.allowed is not None
    key_up, value_up = jnp.split(kv_up, [config.nope_dim], axis=-1)
    plain, rotary = jnp.split(queries, [config.nope_dim], axis=-1)
    plain = jnp.einsum('bthn,rhn->bthr', plain, key_up)
    queries = jnp.concatenate([plain, rotary], axis=-1)
    # The values are whole latents, not a slice of them, which would be a copy of the cache.
    keys, values = latents.swapaxes(1, 2)[:, None], latents[:, None]
    causal, scale = context.start is None, config.score_scale
    attended, highest = attention_and_highest(
        queries, keys, values, context.allowed, causal=causal, scale=scale
    )
    return jnp.einsum('bthr,rhv->bthv', attended[..., : config.kv_rank], value_up), highest


def empty_latent_cache(
    config: LatentAttentionConfig, batch: int, num_slots: int, dtype: DTypeLike
) -> LatentCache:
    """Preallocates one layer's latents of `num_slots` tokens.

    Args:
        config: the layer's.
        batch: `B`.
        num_slots: tokens that will ever be given.
        dtype: of the latents.
    """
    return LatentCache(jnp.zeros((batch, num_slots, config.kv_rank + config.rope_dim), dtype))
