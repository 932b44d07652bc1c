"""A tiny model of every family, with all that its table has rows for."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import moe
from moe import (
    AttentionConfig,
    LatentAttentionConfig,
    LinearScaling,
    Llama3Scaling,
    MoEConfig,
    RouterConfig,
    TransformerConfig,
    YarnScaling,
)

YARN = YarnScaling(8.0, 16, beta_fast=4.0, truncate=False)


def model(attention: Any, **fields: Any) -> TransformerConfig:
    return TransformerConfig(
        vocab_size=29, num_layers=3, embed_dim=16, mlp_dim=20, attention=attention, **fields
    )


def grouped(**fields: Any) -> AttentionConfig:
    return AttentionConfig(4, 2, 6, **fields)


def both_biases(**fields: Any) -> AttentionConfig:
    return grouped(qkv_bias=True, output_bias=True, **fields)


def gemma(*kinds: AttentionConfig, post_norms: bool = True, **fields: Any) -> TransformerConfig:
    return model(
        kinds,
        activation='gelu',
        norm_unit_offset=True,
        norm_scale_float32=True,
        post_norms=post_norms,
        scale_embedding=True,
        tie_embeddings=True,
        **fields,
    )


def deepseek(query_rank: int | None) -> TransformerConfig:
    router = RouterConfig(
        8, 3, 'sigmoid', scale=2.5, selection_bias=True, num_groups=4, groups_kept=2
    )
    scaling = YarnScaling(8.0, 16, mscale=1.0, mscale_all_dim=0.7)
    return model(
        LatentAttentionConfig(4, 10, 6, 4, 5, query_rank, rope_scaling=scaling),
        moe=MoEConfig(router, expert_dim=12, shared_dim=24, first_dense_layers=1),
    )


# Each with the family that it is of.
MODELS: dict[str, tuple[str, TransformerConfig]] = {
    'llama': ('llama', model(grouped(rope_scaling=Llama3Scaling(8.0, 16)))),
    'llama-biases': ('llama', model(both_biases(rope_theta=5e5), tie_embeddings=True)),
    'qwen2': ('qwen2', model(grouped(qkv_bias=True, rope_theta=1e6))),
    'qwen2-window': (
        'qwen2',
        model((grouped(qkv_bias=True), grouped(qkv_bias=True), grouped(qkv_bias=True, window=4))),
    ),
    'qwen3': ('qwen3', model(both_biases(qk_norm='head', rope_scaling=YARN))),
    'gemma': ('gemma', gemma(both_biases(), post_norms=False)),
    'gemma2': (
        'gemma2',
        gemma(
            grouped(window=4, soft_cap=50.0, scale=7**-0.5),
            grouped(soft_cap=50.0, scale=7**-0.5),
            logit_soft_cap=30.0,
        ),
    ),
    'gemma3': (
        'gemma3_text',
        gemma(
            grouped(qk_norm='head', window=4, rope_theta=1e3),
            grouped(qk_norm='head', window=4, rope_theta=1e3),
            grouped(qk_norm='head', rope_theta=1e6, rope_scaling=LinearScaling(8.0)),
        ),
    ),
    'mixtral': (
        'mixtral',
        model(grouped(rope_theta=1e6, window=5), moe=MoEConfig(RouterConfig(5, 2), 12)),
    ),
    'olmoe': (
        'olmoe',
        model(
            AttentionConfig(4, 2, 4, 'full', clip_qkv=2.0),
            moe=MoEConfig(RouterConfig(6, 3, normalize='none'), 12),
        ),
    ),
    'qwen3_moe': (
        'qwen3_moe',
        model(grouped(qk_norm='head'), moe=MoEConfig(RouterConfig(6, 2), 12, layers=(0, 2))),
    ),
    'deepseek': ('deepseek_v3', deepseek(query_rank=14)),
    'deepseek-no-query-latent': ('deepseek_v3', deepseek(query_rank=None)),
    'gpt_oss': (
        'gpt_oss',
        model(
            (
                both_biases(sinks=True, window=3, rope_scaling=YARN),
                both_biases(sinks=True, rope_scaling=YARN),
            ),
            activation='clamped_swiglu',
            norm_scale_float32=True,
            moe=MoEConfig(RouterConfig(5, 2, bias=True), 12, bias=True),
        ),
    ),
}


def random_variables(config: TransformerConfig, seed: int = 0) -> Any:
    """Every variable drawn at random: biases, norms and selection biases too."""
    from moe.sharding import abstract_variables

    generator = np.random.default_rng(seed)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(generator.normal(size=leaf.shape), leaf.dtype)

    return jax.tree.map(draw, abstract_variables(moe.Transformer(config)))


def in_dtype(config: TransformerConfig, dtype: Any) -> TransformerConfig:
    return dataclasses.replace(config, dtype=dtype, param_dtype=dtype)
