"""Frozen descriptions of attention: grouped-query and latent; linear has a file of its own."""

import dataclasses
from typing import Literal

from moe.linear_config import LinearAttentionConfig
from moe.rope import RopeScaling, YarnScaling
from moe.validation import one_of, positive, require

QKNorm = Literal['none', 'head', 'full']


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Grouped-query attention with rotary positions, to all tokens before or to the last few.

    Attributes:
        num_heads: `H`, query heads.
        num_kv_heads: `Hkv`, key and value heads; divides `num_heads`.
        head_dim: `Dh`, even.
        qk_norm: RMSNorm of queries and keys before RoPE: 'none', 'head' (each head by itself, as
            Qwen3) or 'full' (the flattened projection, as OLMoE).
        rope_theta: base of the rotary frequencies; None for no rotary positions.
        rope_scaling: stretches the frequencies to texts longer than those of pre-training.
        window: a query sees the last `window` tokens, itself among them; None for all.
        sinks: whether each head has a learnt logit that joins the softmax and is dropped from its
            result, so that a head may attend to nothing.
        qkv_bias: whether the projections to queries, keys and values add a bias.
        output_bias: whether the projection back does.
        clip_qkv: queries, keys and values are clipped to +-this, after the norms and before RoPE.
        scale: multiplies the scores; None for `Dh^-0.5`.
        soft_cap: scores become `soft_cap tanh(scores / soft_cap)` before the mask.

    Source: windows arXiv 2310.06825; sinks GPT-OSS, arXiv 2508.10925; soft cap Gemma 2, arXiv
        2408.00118; clipping OLMo, arXiv 2402.00838.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    qk_norm: QKNorm = 'none'
    rope_theta: float | None = 10_000.0
    rope_scaling: RopeScaling | None = None
    window: int | None = None
    sinks: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    clip_qkv: float | None = None
    scale: float | None = None
    soft_cap: float | None = None

    def __post_init__(self) -> None:
        for name in ('num_heads', 'num_kv_heads', 'head_dim'):
            positive(f'attention.{name}', getattr(self, name))
        one_of('attention.qk_norm', self.qk_norm, QKNorm)
        require(
            self.num_heads % self.num_kv_heads == 0,
            'attention.num_heads',
            f'a multiple of num_kv_heads={self.num_kv_heads}',
            self.num_heads,
        )
        require(self.head_dim % 2 == 0, 'attention.head_dim', 'even (RoPE)', self.head_dim)
        check_rope(self.rope_theta, self.rope_scaling)
        if self.window is not None:
            positive('attention.window', self.window)
        for name in ('clip_qkv', 'scale', 'soft_cap'):
            value = getattr(self, name)
            require(value is None or value > 0, f'attention.{name}', 'positive, or None', value)

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that are rotated."""
        return self.head_dim

    @property
    def score_scale(self) -> float:
        """What multiplies the products of queries and keys."""
        return self.head_dim**-0.5 if self.scale is None else self.scale


@dataclasses.dataclass(frozen=True)
class LatentAttentionConfig:
    """Multi-head latent attention: keys and values of all heads come from one small latent.

    Attributes:
        num_heads: `H`.
        kv_rank: `R`, width of the latent that keys and values are made of; what a cache holds.
        nope_dim: channels of a head's queries and keys without positions, made of the latent.
        rope_dim: further channels with rotary positions, even; the key's are shared by all heads.
        value_dim: `Dv` of a head's values.
        query_rank: width of the latent that queries are made of; None makes them of the input.
        rope_theta: base of the rotary frequencies; None for no rotary positions.
        rope_scaling: stretches the frequencies to texts longer than those of pre-training.

    Source: DeepSeek-V2, arXiv 2405.04434, section 2.1. Elsewhere the fields are named
        `kv_lora_rank`, `qk_nope_head_dim`, `qk_rope_head_dim`, `v_head_dim`, `q_lora_rank`.
    """

    num_heads: int
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    query_rank: int | None = None
    rope_theta: float | None = 10_000.0
    rope_scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        for name in ('num_heads', 'kv_rank', 'nope_dim', 'rope_dim', 'value_dim'):
            positive(f'attention.{name}', getattr(self, name))
        if self.query_rank is not None:
            positive('attention.query_rank', self.query_rank)
        require(self.rope_dim % 2 == 0, 'attention.rope_dim', 'even (RoPE)', self.rope_dim)
        check_rope(self.rope_theta, self.rope_scaling)

    @property
    def window(self) -> None:
        """Queries see all tokens before."""
        return None

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that are rotated."""
        return self.rope_dim

    @property
    def key_dim(self) -> int:
        """Channels of a head's queries and keys."""
        return self.nope_dim + self.rope_dim

    @property
    def score_scale(self) -> float:
        """What multiplies the products of queries and keys."""
        scaling = self.rope_scaling
        factor = scaling.score_factor if isinstance(scaling, YarnScaling) else 1.0
        return self.key_dim**-0.5 * factor


AttentionLike = AttentionConfig | LatentAttentionConfig | LinearAttentionConfig


def check_rope(theta: float | None, scaling: RopeScaling | None) -> None:
    """Raises an `InputError` for a base or a scaling that gives no frequencies."""
    if theta is None:
        require(scaling is None, 'attention.rope_scaling', 'None where rope_theta is', scaling)
        return
    # The logarithm of the base is a divisor in YaRN.
    least = 1 if isinstance(scaling, YarnScaling) else 0
    require(theta > least, 'attention.rope_theta', 'above 1' if least else 'positive', theta)
