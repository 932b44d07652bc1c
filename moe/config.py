"""Frozen, validated descriptions of a model: data alone, no arrays and no names of models.

Dims used across the package: `B` batch, `T` query position, `S` key position, `N` flattened tokens,
`D` model width, `F` MLP or expert hidden width, `V` vocabulary, `L` layers, `H`/`Hkv`/`Dh` heads,
key-value heads, head width, `E` experts, `K` experts per token, `C` slots per expert.
"""

import dataclasses
from typing import Literal, get_args

from moe.attention_config import AttentionConfig, AttentionLike, LatentAttentionConfig
from moe.linear_config import LinearAttentionConfig
from moe.rope import LinearScaling, Llama3Scaling, YarnScaling
from moe.routing import RouterConfig
from moe.validation import one_of as _one_of
from moe.validation import positive as _positive
from moe.validation import require

Dispatch = Literal['dense', 'capacity', 'grouped']
Activation = Literal['silu', 'gelu', 'clamped_swiglu']
Storage = Literal['fused', 'per_expert']
Remat = Literal['none', 'dots', 'full']
DType = Literal['float32', 'bfloat16', 'float16']

__all__ = [
    'Activation',
    'AttentionConfig',
    'AttentionLike',
    'DType',
    'Dispatch',
    'LatentAttentionConfig',
    'LinearAttentionConfig',
    'LinearScaling',
    'Llama3Scaling',
    'MoEConfig',
    'Remat',
    'RouterConfig',
    'TransformerConfig',
    'YarnScaling',
    'require',
]


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """Routed experts, an optional shared one, and which layers have them.

    Attributes:
        router: how tokens choose experts.
        expert_dim: `F` of one routed expert.
        shared_dim: hidden width of the shared expert that every token passes, ungated; 0 for none.
        dispatch: 'dense' (every expert on every token: the oracle), 'capacity' (at most `C` tokens
            of a sequence an expert, the rest dropped and counted) or 'grouped' (dropless). Soft
            routing has slots of its own and reads neither this nor the next field.
        capacity_factor: `C = ceil(T * K / E * capacity_factor)` slots per expert and sequence; used
            by 'capacity' alone.
        exchange_factor: where a mesh splits the experts, the rows that 'grouped' has room for on
            each shard, as a multiple of its balanced load; what finds none is dropped and counted.
            None for the worst load, `min(shards, E / K)`, which drops nothing.
        exchange_chunks: parts in which 'grouped' and 'capacity' exchange tokens on such a mesh, so
            that the exchange of one can run under the products of another.
        storage: of the routed experts' parameters. 'fused' keeps all experts in one array, split
            over a mesh's `expert` axis; 'per_expert' keeps each one's gate, up and down matrix by
            itself, as published checkpoints do: each can be frozen, replaced or looked at alone,
            for a copy of all of them in every step. The same is computed from either; see
            `moe.split_experts` and `moe.stack_experts`.
        bias: whether each routed expert adds a bias after its gate, up and down projections.
        first_dense_layers: layers below this index keep a dense MLP.
        layer_step: of the rest, layer i has experts where (i + 1) % layer_step == 0.
        layers: the MoE layers by index; overrides the two fields above.
    """

    router: RouterConfig
    expert_dim: int
    shared_dim: int = 0
    dispatch: Dispatch = 'grouped'
    capacity_factor: float = 1.25
    exchange_factor: float | None = None
    exchange_chunks: int = 1
    storage: Storage = 'fused'
    bias: bool = False
    first_dense_layers: int = 0
    layer_step: int = 1
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        _positive('moe.expert_dim', self.expert_dim)
        require(self.shared_dim >= 0, 'moe.shared_dim', 'zero or more', self.shared_dim)
        _one_of('moe.dispatch', self.dispatch, Dispatch)
        require(self.capacity_factor > 0, 'moe.capacity_factor', 'positive', self.capacity_factor)
        factor = self.exchange_factor
        valid = factor is None or factor > 0
        require(valid, 'moe.exchange_factor', 'positive, or None for the worst load', factor)
        _positive('moe.exchange_chunks', self.exchange_chunks)
        _one_of('moe.storage', self.storage, Storage)
        require(
            self.first_dense_layers >= 0,
            'moe.first_dense_layers',
            'zero or more',
            self.first_dense_layers,
        )
        _positive('moe.layer_step', self.layer_step)

    def has_experts(self, layer: int) -> bool:
        """Whether layer number `layer` (from 0) routes to experts."""
        if self.layers is not None:
            return layer in self.layers
        return layer >= self.first_dense_layers and (layer + 1) % self.layer_step == 0


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """A decoder-only transformer: pre-norm blocks of attention and a gated MLP or experts.

    Attributes:
        vocab_size: `V`.
        num_layers: `L`.
        embed_dim: `D`.
        mlp_dim: `F` of the dense layers' gated MLP.
        attention: of every layer; or several kinds, which the layers take in turn, over and over.
        moe: the experts; None for a dense model.
        activation: of the gate: 'silu', 'gelu' (tanh approximation) or 'clamped_swiglu'; see
            `moe.layers.gated_activation`.
        norm_eps: added to the mean square in every RMSNorm of queries, keys and residual stream.
        norm_unit_offset: those norms store their scale less one (Gemma).
        norm_scale_float32: they multiply by it in float32, before the cast (Gemma, GPT-OSS).
        post_norms: whether what attention and MLP return is normalised too, before it is added to
            the residual stream (Gemma 2).
        scale_embedding: multiplies embedded tokens by `sqrt(D)`, rounded to `dtype` (Gemma).
        logit_soft_cap: logits become `logit_soft_cap tanh(logits / logit_soft_cap)`; None leaves
            them.
        tie_embeddings: whether the output head is the transposed embedding.
        mtp_depth: multi-token-prediction modules; the d-th predicts the token d further ahead than
            the model does, with a layer of the last one's kind (`moe.mtp`).
        scan_layers: stack layers of one kind and scan over them, so compile time does not grow
            with `L`.
        remat: what a block keeps for its backward pass: 'none' recomputes nothing, 'dots' keeps
            matrix products without batch dims, 'full' keeps the block's input alone.
        dtype: of activations and matrix products (norms, router and softmax stay float32).
        param_dtype: of the stored parameters.
    """

    vocab_size: int
    num_layers: int
    embed_dim: int
    mlp_dim: int
    attention: AttentionLike | tuple[AttentionLike, ...]
    moe: MoEConfig | None = None
    activation: Activation = 'silu'
    norm_eps: float = 1e-6
    norm_unit_offset: bool = False
    norm_scale_float32: bool = False
    post_norms: bool = False
    scale_embedding: bool = False
    logit_soft_cap: float | None = None
    tie_embeddings: bool = False
    mtp_depth: int = 0
    scan_layers: bool = True
    remat: Remat = 'none'
    dtype: DType = 'float32'
    param_dtype: DType = 'float32'

    def __post_init__(self) -> None:
        for name in ('vocab_size', 'num_layers', 'embed_dim', 'mlp_dim'):
            _positive(f'model.{name}', getattr(self, name))
        _one_of('model.activation', self.activation, Activation)
        _one_of('model.remat', self.remat, Remat)
        _one_of('model.dtype', self.dtype, DType)
        _one_of('model.param_dtype', self.param_dtype, DType)
        require(self.norm_eps > 0, 'model.norm_eps', 'positive', self.norm_eps)
        depth = self.mtp_depth
        require(depth >= 0, 'model.mtp_depth', 'zero or more', depth)
        cap = self.logit_soft_cap
        require(cap is None or cap > 0, 'model.logit_soft_cap', 'positive, or None', cap)
        self._check_attention()
        if self.moe is not None:
            outside = [i for i in self.moe.layers or () if not 0 <= i < self.num_layers]
            require(not outside, 'moe.layers', f'indices in [0, {self.num_layers})', outside)
            require(
                any(self.moe_layers),
                'moe',
                'None for a model without MoE layers',
                self.moe,
            )

    def _check_attention(self) -> None:
        kinds = self.attention if isinstance(self.attention, tuple) else (self.attention,)
        names = [kind.__name__ for kind in get_args(AttentionLike)]
        for kind in kinds:
            valid = isinstance(kind, AttentionLike)
            require(valid, 'model.attention', f'made of {", ".join(names)}', kind)
        required = f'one kind to num_layers={self.num_layers} kinds'
        require(1 <= len(kinds) <= self.num_layers, 'model.attention', required, self.attention)

    @property
    def attention_layers(self) -> tuple[AttentionLike, ...]:
        """Per layer, its attention."""
        kinds = self.attention if isinstance(self.attention, tuple) else (self.attention,)
        return tuple(kinds[layer % len(kinds)] for layer in range(self.num_layers))

    @property
    def moe_layers(self) -> tuple[bool, ...]:
        """Per layer, whether it routes to experts."""
        return tuple(
            self.moe is not None and self.moe.has_experts(layer) for layer in range(self.num_layers)
        )
