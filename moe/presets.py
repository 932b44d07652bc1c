"""Published architectures by name, each with its source."""

import difflib
from collections.abc import Mapping
from typing import Any

from moe.config import (
    AttentionConfig,
    LatentAttentionConfig,
    Llama3Scaling,
    MoEConfig,
    RouterConfig,
    TransformerConfig,
    YarnScaling,
)
from moe.errors import InputError


def preset(name: str) -> TransformerConfig:
    """Returns a published model's config, its arithmetic and parameters in float32.

    For another dtype, layout or dispatch use `dataclasses.replace`.

    Args:
        name: a key of `PRESETS`, such as 'qwen3-30b-a3b'.

    Raises:
        InputError: for another name.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f' Did you mean {near[0]!r}?' if near else ''
        raise InputError(
            f'preset must be one of {", ".join(sorted(PRESETS))}; received {name!r}.{hint}'
        )
    return PRESETS[name]


def _mixtral() -> TransformerConfig:
    """arXiv 2401.04088, table 1, and mistralai/Mixtral-8x7B-v0.1."""
    return TransformerConfig(
        vocab_size=32_000,
        num_layers=32,
        embed_dim=4096,
        mlp_dim=14_336,
        attention=AttentionConfig(32, 8, 128, rope_theta=1e6),
        moe=MoEConfig(RouterConfig(8, 2), expert_dim=14_336),
        norm_eps=1e-5,
    )


def _olmoe() -> TransformerConfig:
    """arXiv 2409.02060, appendix B, and allenai/OLMoE-1B-7B-0924."""
    return TransformerConfig(
        vocab_size=50_304,
        num_layers=16,
        embed_dim=2048,
        mlp_dim=1024,
        attention=AttentionConfig(16, 16, 128, 'full'),
        moe=MoEConfig(RouterConfig(64, 8, normalize='none'), expert_dim=1024),
        norm_eps=1e-5,
    )


def _qwen3(layers: int, width: int, mlp: int, heads: int, kv_heads: int = 8, **other: Any):
    """arXiv 2505.09388, tables 1 and 2, and Qwen/Qwen3-*."""
    return TransformerConfig(
        vocab_size=151_936,
        num_layers=layers,
        embed_dim=width,
        mlp_dim=mlp,
        attention=AttentionConfig(heads, kv_heads, 128, 'head', rope_theta=1e6),
        **other,
    )


def _deepseek_like(
    attention: LatentAttentionConfig, router: RouterConfig, **other: Any
) -> TransformerConfig:
    """Latent attention; sigmoid scores, a selection bias, shared experts, dense first layers."""
    moe = MoEConfig(
        router,
        expert_dim=other.pop('expert_dim'),
        shared_dim=other.pop('shared_dim'),
        first_dense_layers=other.pop('first_dense_layers'),
    )
    return TransformerConfig(attention=attention, moe=moe, **other)


def _deepseek_v3() -> TransformerConfig:
    """arXiv 2412.19437, section 4.2, and deepseek-ai/DeepSeek-V3, of 671 billion parameters.

    The multi-token-prediction module that was trained and is published beside it is not in that
    count, nor here: `dataclasses.replace(preset('deepseek-v3'), mtp_depth=1)` has it.
    """
    yarn = YarnScaling(40.0, 4096, mscale=1.0, mscale_all_dim=1.0)
    return _deepseek_like(
        LatentAttentionConfig(128, 512, 128, 64, 128, 1536, rope_scaling=yarn),
        RouterConfig(
            256, 8, 'sigmoid', scale=2.5, selection_bias=True, num_groups=8, groups_kept=4
        ),
        vocab_size=129_280,
        num_layers=61,
        embed_dim=7168,
        mlp_dim=18_432,
        expert_dim=2048,
        shared_dim=2048,
        first_dense_layers=3,
    )


def _kimi_k2() -> TransformerConfig:
    """arXiv 2507.20534, table 2, and moonshotai/Kimi-K2-Instruct.

    The paper counts 1.04 trillion parameters; these shapes, the released ones, have 1.026.
    """
    yarn = YarnScaling(32.0, 4096, beta_fast=1.0, mscale=1.0, mscale_all_dim=1.0)
    return _deepseek_like(
        LatentAttentionConfig(64, 512, 128, 64, 128, 1536, rope_theta=5e4, rope_scaling=yarn),
        RouterConfig(384, 8, 'sigmoid', scale=2.827, selection_bias=True),
        vocab_size=163_840,
        num_layers=61,
        embed_dim=7168,
        mlp_dim=18_432,
        expert_dim=2048,
        shared_dim=2048,
        first_dense_layers=1,
    )


def _moonlight() -> TransformerConfig:
    """arXiv 2502.16982, section 3, and moonshotai/Moonlight-16B-A3B."""
    return _deepseek_like(
        LatentAttentionConfig(16, 512, 128, 64, 128, rope_theta=5e4),
        RouterConfig(64, 6, 'sigmoid', scale=2.446, selection_bias=True),
        vocab_size=163_840,
        num_layers=27,
        embed_dim=2048,
        mlp_dim=11_264,
        expert_dim=1408,
        shared_dim=2816,
        first_dense_layers=1,
        norm_eps=1e-5,
    )


def _gpt_oss(layers: int, experts: int) -> TransformerConfig:
    """arXiv 2508.10925, section 2, and openai/gpt-oss-*."""
    settings: dict[str, Any] = {
        'rope_theta': 150_000.0,
        'rope_scaling': YarnScaling(32.0, 4096, truncate=False),
        'sinks': True,
        'qkv_bias': True,
        'output_bias': True,
    }
    sliding = AttentionConfig(64, 8, 64, window=128, **settings)
    return TransformerConfig(
        vocab_size=201_088,
        num_layers=layers,
        embed_dim=2880,
        mlp_dim=2880,
        attention=(sliding, AttentionConfig(64, 8, 64, **settings)),
        moe=MoEConfig(RouterConfig(experts, 4, bias=True), expert_dim=2880, bias=True),
        activation='clamped_swiglu',
        norm_eps=1e-5,
        norm_scale_float32=True,
    )


def _llama_3_1_8b() -> TransformerConfig:
    """arXiv 2407.21783, table 3, and meta-llama/Llama-3.1-8B."""
    scaling = Llama3Scaling(8.0, 8192)
    return TransformerConfig(
        vocab_size=128_256,
        num_layers=32,
        embed_dim=4096,
        mlp_dim=14_336,
        attention=AttentionConfig(32, 8, 128, rope_theta=5e5, rope_scaling=scaling),
        norm_eps=1e-5,
    )


def _gemma(**fields: Any) -> TransformerConfig:
    return TransformerConfig(
        activation='gelu',
        norm_unit_offset=True,
        norm_scale_float32=True,
        post_norms=True,
        scale_embedding=True,
        tie_embeddings=True,
        **fields,
    )


def _gemma_2_2b() -> TransformerConfig:
    """arXiv 2408.00118, table 1, and google/gemma-2-2b."""
    sliding = AttentionConfig(8, 4, 256, window=4096, soft_cap=50.0)
    return _gemma(
        vocab_size=256_000,
        num_layers=26,
        embed_dim=2304,
        mlp_dim=9216,
        attention=(sliding, AttentionConfig(8, 4, 256, soft_cap=50.0)),
        logit_soft_cap=30.0,
    )


def _gemma_3_1b() -> TransformerConfig:
    """arXiv 2503.19786, section 2, and google/gemma-3-1b-pt."""
    sliding = AttentionConfig(4, 1, 256, 'head', window=512)
    return _gemma(
        vocab_size=262_144,
        num_layers=26,
        embed_dim=1152,
        mlp_dim=6912,
        attention=(*(sliding,) * 5, AttentionConfig(4, 1, 256, 'head', rope_theta=1e6)),
    )


PRESETS: Mapping[str, TransformerConfig] = {
    'mixtral-8x7b': _mixtral(),
    'olmoe-1b-7b': _olmoe(),
    'qwen3-30b-a3b': _qwen3(48, 2048, 6144, 32, 4, moe=MoEConfig(RouterConfig(128, 8), 768)),
    'qwen3-235b-a22b': _qwen3(94, 4096, 12_288, 64, 4, moe=MoEConfig(RouterConfig(128, 8), 1536)),
    'deepseek-v3': _deepseek_v3(),
    'kimi-k2': _kimi_k2(),
    'moonlight-16b-a3b': _moonlight(),
    'gpt-oss-20b': _gpt_oss(24, 32),
    'gpt-oss-120b': _gpt_oss(36, 128),
    'llama-3.1-8b': _llama_3_1_8b(),
    'qwen3-0.6b': _qwen3(28, 1024, 3072, 16, tie_embeddings=True),
    'qwen3-1.7b': _qwen3(28, 2048, 6144, 16, tie_embeddings=True),
    'qwen3-4b': _qwen3(36, 2560, 9728, 32, tie_embeddings=True),
    'qwen3-8b': _qwen3(36, 4096, 12_288, 32),
    'qwen3-14b': _qwen3(40, 5120, 17_408, 40),
    'qwen3-32b': _qwen3(64, 5120, 25_600, 64),
    'gemma-2-2b': _gemma_2_2b(),
    'gemma-3-1b': _gemma_3_1b(),
}
