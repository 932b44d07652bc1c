"""One layer of the decoder, and the pattern of layers that a scan repeats."""

from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array, Bool, Float, Int

from moe.activations import note
from moe.attention_context import AttentionContext
from moe.attention_kinds import LayerCache, attention_kinds, attention_module
from moe.config import Remat, TransformerConfig
from moe.experts import MoELayer
from moe.layers import GatedMLP, norm_of
from moe.sharding import constrain
from moe.stacking import LayerKind
from moe.types import RouterOutput

ACTIVATION_AXES = ('batch', 'length', None)
Caches = tuple[LayerCache, ...] | None
Contexts = tuple[AttentionContext, ...]
Replayed = list[Int[Array, 'B T K']] | None


class Block(nn.Module):
    """Adds attention, then the MLP or the experts, each of the normalised residual stream.

    Attributes:
        config: the model's.
        kind: this layer's attention, and whether it routes to experts.
        mesh: constrains activations where given.
    """

    config: TransformerConfig
    kind: LayerKind
    mesh: jax.sharding.Mesh | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, 'B T D'],
        cache: LayerCache | None,
        context: AttentionContext,
        mask: Bool[Array, 'B T'],
        tokens: Int[Array, 'B T'],
        replayed: Int[Array, 'B T K'] | None,
    ) -> tuple[Float[Array, 'B T D'], RouterOutput | None, LayerCache | None]:
        config = self.config
        attention: Any = attention_module(self.kind.attention, config, self.mesh, 'attention')
        attended, cache = attention(norm_of(config, 'attention_norm')(x), cache, context)
        if config.post_norms:
            attended = norm_of(config, 'attention_post_norm')(attended)
        x = constrain(x + attended, ACTIVATION_AXES, self.mesh)
        normed = norm_of(config, 'mlp_norm')(x)
        settings = (config.activation, config.dtype, config.param_dtype, self.mesh)
        router = None
        if self.kind.has_experts:
            assert config.moe is not None
            y, router = MoELayer(config.moe, *settings, name='moe')(normed, mask, tokens, replayed)
        else:
            y = GatedMLP(config.mlp_dim, *settings, name='mlp')(normed)
        if config.post_norms:
            y = norm_of(config, 'mlp_post_norm')(y)
        x = constrain(x + y, ACTIVATION_AXES, self.mesh)
        note(self, residual=x)
        return x, router, cache


def remat_block(policy: Remat, *, scanned: bool) -> type[Block]:
    """Returns `Block`, made to recompute in its backward pass what `policy` does not keep."""
    if policy == 'none':
        return Block
    kept = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if policy == 'dots' else None
    return nn.remat(Block, prevent_cse=not scanned, policy=kept)


class Pattern(nn.Module):
    """Runs each layer of a group's pattern once: the body of the scan over its repeats."""

    config: TransformerConfig
    pattern: tuple[LayerKind, ...]
    mesh: jax.sharding.Mesh | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, 'B T D'],
        caches: Caches,
        replayed: Replayed,
        contexts: Contexts,
        mask: Bool[Array, 'B T'],
        tokens: Int[Array, 'B T'],
    ) -> tuple[Float[Array, 'B T D'], tuple[list[RouterOutput], Caches]]:
        block = remat_block(self.config.remat, scanned=True)
        kinds = attention_kinds(self.config)
        routers, extended = [], []
        for j, kind in enumerate(self.pattern):
            layer = block(self.config, kind, self.mesh, name=f'layer_{j}')
            layer_cache = None if caches is None else caches[j]
            context = contexts[kinds.index(kind.attention)]
            ids = replayed[len(routers)] if replayed and kind.has_experts else None
            x, router, cache = layer(x, layer_cache, context, mask, tokens, ids)
            routers += [router] if kind.has_experts else []
            extended.append(cache)
        return x, (routers, None if caches is None else tuple(extended))
