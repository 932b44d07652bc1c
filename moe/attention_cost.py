"""What one layer of attention costs, by kind: parameters, FLOPs, and what it keeps of a token."""

import dataclasses

from moe.config import (
    AttentionConfig,
    AttentionLike,
    LatentAttentionConfig,
    LinearAttentionConfig,
)


@dataclasses.dataclass(frozen=True)
class AttentionCost:
    """Counts for one layer.

    Attributes:
        matrices: elements of what multiplies activations, each once a token.
        vectors: biases, sinks and rates.
        norm_scales: of the layer's own norms.
        flops_per_key: for each key that a query attends to: its score and its weighted value.
        state_flops: products with the state, a token.
        window: the most keys that a query sees; None for all tokens before.
        cached_per_token: elements kept of each token that can still be seen.
        cached_inputs: elements kept however long the text.
        state: elements of the state, which is float32.
    """

    matrices: int
    vectors: int = 0
    norm_scales: int = 0
    flops_per_key: int = 0
    state_flops: int = 0
    window: int | None = None
    cached_per_token: int = 0
    cached_inputs: int = 0
    state: int = 0

    def seen(self, length: int) -> int:
        """Returns how many of the last `length` tokens a query sees."""
        return length if self.window is None else min(length, self.window)

    def pairs(self, length: int) -> int:
        """Returns how many keys the queries of a causal sequence see, all together."""
        seen = self.seen(length)
        return seen * (seen + 1) // 2 + (length - seen) * seen


def attention_cost(kind: AttentionLike, embed_dim: int) -> AttentionCost:
    """Counts what one layer costs in a model of width `embed_dim`."""
    match kind:
        case AttentionConfig():
            return _grouped(kind, embed_dim)
        case LatentAttentionConfig():
            return _latent(kind, embed_dim)
        case LinearAttentionConfig():
            return _linear(kind, embed_dim)


def _grouped(config: AttentionConfig, D: int) -> AttentionCost:
    H, Hkv, Dh = config.num_heads, config.num_kv_heads, config.head_dim
    qkv_bias = (H + 2 * Hkv) * Dh if config.qkv_bias else 0
    output_bias = D if config.output_bias else 0
    return AttentionCost(
        matrices=D * (2 * H + 2 * Hkv) * Dh,
        vectors=qkv_bias + output_bias + (H if config.sinks else 0),
        norm_scales={'none': 0, 'head': 2 * Dh, 'full': (H + Hkv) * Dh}[config.qk_norm],
        flops_per_key=4 * H * Dh,
        window=config.window,
        cached_per_token=2 * Hkv * Dh,
    )


def _latent(config: LatentAttentionConfig, D: int) -> AttentionCost:
    """Counts the expanded form; a step of decoding is absorbed, and costs more a key."""
    H, R, rank = config.num_heads, config.kv_rank, config.query_rank
    latent = R + config.rope_dim
    queries = H * config.key_dim * D if rank is None else rank * (D + H * config.key_dim)
    keys_and_values = D * latent + R * H * (config.nope_dim + config.value_dim)
    return AttentionCost(
        matrices=queries + keys_and_values + H * config.value_dim * D,
        norm_scales=R + (rank or 0),
        flops_per_key=2 * H * (config.key_dim + config.value_dim),
        cached_per_token=latent,
    )


def _linear(config: LinearAttentionConfig, D: int) -> AttentionCost:
    """Counts the recurrence: the decayed state answers a key, takes its value, answers a query."""
    H, Dk, Dv = config.num_heads, config.key_dim, config.value_dim
    channels = H * (2 * Dk + Dv)
    projections = D * channels + H * Dv * D
    gates = config.gate_rank * (2 * D + H * (Dk + Dv)) + D * H
    return AttentionCost(
        matrices=projections + gates + config.conv_width * channels,
        vectors=H + H * Dk,
        norm_scales=Dv,
        state_flops=3 * 2 * H * Dk * Dv,
        cached_inputs=(config.conv_width - 1) * channels,
        state=H * Dk * Dv,
    )
