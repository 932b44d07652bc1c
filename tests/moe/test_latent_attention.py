"""Latent attention against loops in float64 NumPy; its absorbed form against its expanded one."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.attention_context import AttentionContext, attention_contexts
from moe.config import LatentAttentionConfig, TransformerConfig, YarnScaling
from moe.latent_attention import (
    LatentAttention,
    absorbing_is_cheaper,
    attend_absorbed,
    attend_expanded,
)
from moe.rope import rope_frequencies

YARN = YarnScaling(4.0, 8, beta_fast=2.0, beta_slow=0.2, mscale=1.0, mscale_all_dim=0.5)
PLAIN = LatentAttentionConfig(3, 8, 6, 4, 5, rope_theta=100.0)
COMPRESSED = LatentAttentionConfig(3, 8, 6, 4, 5, 7, rope_theta=100.0, rope_scaling=YARN)
UNROTATED = LatentAttentionConfig(3, 8, 6, 4, 5, rope_theta=None)
DEEPSEEK = LatentAttentionConfig(128, 512, 128, 64, 128, 1536)


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def norm(x: np.ndarray, params) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * params['scale']


def rotated(x: np.ndarray, position: int, config: LatentAttentionConfig) -> np.ndarray:
    """Rotates adjacent pairs, and leaves them adjacent."""
    if config.rope_theta is None:
        return x
    angles = position * rope_frequencies(len(x), config.rope_theta, config.rope_scaling)
    turned = (x[::2] + 1j * x[1::2]) * np.exp(1j * angles)
    if config.rope_scaling is not None:
        turned *= (0.1 * np.log(4) + 1) / (0.05 * np.log(4) + 1)
    return np.stack([turned.real, turned.imag], axis=-1).ravel()


def reference(config: LatentAttentionConfig, params, x, segments, positions) -> np.ndarray:
    """One query, one head at a time."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    nope, rank = config.nope_dim, config.kv_rank
    scale = (config.nope_dim + config.rope_dim) ** -0.5
    if config.rope_scaling is not None:
        scale *= (0.05 * np.log(4) + 1) ** 2
    out = np.zeros(x.shape)
    for b in range(x.shape[0]):
        if config.query_rank is None:
            q = np.einsum('td,dhk->thk', x[b], params['q'])
        else:
            latent = norm(x[b] @ params['q_down'], params['q_norm'])
            q = np.einsum('tr,rhk->thk', latent, params['q_up'])
        down = x[b] @ params['kv_down']
        up = np.einsum('tr,rhk->thk', norm(down[:, :rank], params['kv_norm']), params['kv_up'])
        at = positions[b]
        shared = [rotated(down[s, rank:], at[s], config) for s in range(len(down))]
        for t in range(x.shape[1]):
            seen = [s for s in range(t + 1) if segments[b, s] == segments[b, t]]
            for h in range(config.num_heads):
                query = np.concatenate([q[t, h, :nope], rotated(q[t, h, nope:], at[t], config)])
                keys = [np.concatenate([up[s, h, :nope], shared[s]]) for s in seen]
                weights = np.exp(np.array(keys) @ query * scale)
                out[b, t] += weights / weights.sum() @ up[seen, h, nope:] @ params['o'][h]
    return out


@pytest.mark.parametrize('attention', [PLAIN, COMPRESSED, UNROTATED])
def test_latent_attention_equals_a_loop_over_queries_and_heads(attention):
    # The latents' norms have an eps of their own.
    config = TransformerConfig(16, 1, 12, 8, attention, norm_eps=0.5)
    x = normal(0, 2, 6, 12)
    segments = jnp.array([[1, 1, 1, 2, 2, 2], [0, 0, 1, 1, 1, 1]])
    positions = jnp.array([[0, 1, 2, 0, 1, 25], [0, 1, 0, 1, 2, 3]])
    (context,), _ = attention_contexts((attention,), positions, segments, (2, 6), None)
    layer = LatentAttention(attention, config)
    params = nn.unbox(jax.jit(layer.init)(jax.random.key(0), x, None, context))['params']
    params = jax.tree.map(lambda leaf: leaf + 0.3 * normal(1, *leaf.shape), params)
    y, cache = jax.jit(layer.apply)({'params': params}, x, None, context)
    expected = reference(attention, params, np.asarray(x, np.float64), segments, positions)
    assert cache is None
    np.testing.assert_allclose(y, expected, atol=2e-5)


def test_the_absorbed_form_equals_the_expanded_one_in_values_and_gradients():
    allowed = jnp.asarray(np.random.default_rng(4).random((2, 4, 9)) < 0.5).at[..., 0].set(True)
    context = AttentionContext(None, None, allowed, None, jnp.int32(5))
    operands = (normal(0, 2, 4, 3, 10), normal(1, 2, 9, 12), normal(2, 8, 3, 11))
    cotangent = normal(3, 2, 4, 3, 5)

    @jax.jit
    def both(*operands):
        results = []
        for attend in (attend_absorbed, attend_expanded):
            value, pullback = jax.vjp(lambda *o, f=attend: f(PLAIN, *o, context)[0], *operands)
            results.append((value, pullback(cotangent)))
        return results

    absorbed, expanded = both(*operands)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5), absorbed, expanded)


def test_one_token_is_absorbed_and_a_long_prompt_expanded():
    """A head of DeepSeek-V3: 131,072 multiply-adds to expand a key, 768 more a pair absorbed."""
    assert absorbing_is_cheaper(DEEPSEEK, 1, 4096)
    assert absorbing_is_cheaper(DEEPSEEK, 160, 4096)
    assert not absorbing_is_cheaper(DEEPSEEK, 180, 4096)
    assert not absorbing_is_cheaper(DEEPSEEK, 4096, 4096)
