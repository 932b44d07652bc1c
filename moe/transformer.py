"""The decoder: blocks of attention and a gated MLP or experts, scanned and rematerialised."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe.attention_context import AttentionContext, attention_contexts
from moe.attention_kinds import LayerCache, attention_module
from moe.balance import BiasRule, updated_bias
from moe.config import AttentionLike, DType, Remat, TransformerConfig
from moe.errors import InputError
from moe.experts import MoELayer
from moe.layers import GatedMLP, norm_of, partitioned, soft_cap
from moe.routing import require_causal
from moe.sharding import LogicalAxes, constrain
from moe.stacking import LayerGroup, LayerKind, layer_groups, layer_kinds, layer_paths, unstack
from moe.types import KVCache, ModelOutput, RouterOutput

ACTIVATION_AXES = ('batch', 'length', None)
Caches = tuple[LayerCache, ...] | None
Contexts = tuple[AttentionContext, ...]


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
            y, router = MoELayer(config.moe, *settings, name='moe')(normed, mask, tokens)
        else:
            y = GatedMLP(config.mlp_dim, *settings, name='mlp')(normed)
        if config.post_norms:
            y = norm_of(config, 'mlp_post_norm')(y)
        return constrain(x + y, ACTIVATION_AXES, self.mesh), router, cache


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
            x, router, cache = layer(x, layer_cache, context, mask, tokens)
            routers += [router] if kind.has_experts else []
            extended.append(cache)
        return x, (routers, None if caches is None else tuple(extended))


class Weight(nn.Module):
    """Holds one parameter that is not a layer's: the embedding or the head."""

    leaf: str
    shape: tuple[int, ...]
    axes: LogicalAxes
    param_dtype: DType

    @nn.compact
    def __call__(self) -> Array:
        # Variance 1 / D: a tied head then starts with logits of variance one.
        deviation = self.shape[self.axes.index('embed')] ** -0.5
        init = partitioned(nn.initializers.normal(deviation), self.axes)
        return self.param(self.leaf, init, self.shape, self.param_dtype)


class Transformer(nn.Module):
    """Maps token ids to the logits of the next token.

    Attributes:
        config: what is built.
        mesh: where given, activations are constrained by the logical rules and experts exchange
            tokens over its `expert` axis; without one the model runs wherever its arguments are.
    """

    config: TransformerConfig
    mesh: jax.sharding.Mesh | None = None

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, 'B T'],
        positions: Int[Array, 'B T'] | None = None,
        segment_ids: Int[Array, 'B T'] | None = None,
        mask: Bool[Array, 'B T'] | None = None,
        cache: KVCache | None = None,
        logits: bool = True,
    ) -> ModelOutput:
        """Runs the decoder over new tokens.

        Args:
            tokens: ids in [0, V).
            positions: rotary positions; by default from 0 in each segment, or, with a cache, from
                its length on.
            segment_ids: documents within a row, 0 for padding; attention stays within a segment.
            mask: True for tokens that are routed and counted in `RouterOutput.load`; by default all
                that are not padding.
            cache: of the tokens before these; it must have room for them.
            logits: whether to multiply by the head.

        An rng named 'jitter' makes this a training pass: routers that have jitter then draw noise.

        Returns:
            Hidden states in the config's dtype, logits in float32 or None, one `RouterOutput` for
            each MoE layer, and the extended cache where one was given.

        Raises:
            InputError: for a wrong dtype or shape, more tokens than the cache has slots, or a cache
                where routing looks ahead.
        """
        config = self.config
        check_inputs(tokens, positions, segment_ids, mask, cache)
        if cache is not None and config.moe is not None:
            require_causal(config.moe.router, 'Decoding with a cache')
        if mask is None:
            mask = jnp.ones(tokens.shape, bool) if segment_ids is None else segment_ids > 0
        contexts, cache = attention_contexts(
            attention_kinds(config), positions, segment_ids, tokens.shape, cache
        )
        shape, axes = (config.vocab_size, config.embed_dim), ('vocab', 'embed')
        embedding = Weight('embedding', shape, axes, config.param_dtype, name='embed')()
        x = self._embed(embedding, tokens)
        layers = self._scan_layers if config.scan_layers else self._unroll_layers
        caches = None if cache is None else cache.layers
        x, routers, caches = layers(x, caches, contexts, mask, tokens)
        if cache is not None:
            cache = dataclasses.replace(cache, layers=caches)
        hidden = norm_of(config, 'final_norm')(x)
        if config.tie_embeddings:
            head = embedding.T
        else:
            head = Weight('kernel', shape[::-1], axes[::-1], config.param_dtype, name='head')()
        if not logits:
            return ModelOutput(hidden, None, routers, cache)
        projected = constrain(hidden_logits(hidden, head), ('batch', 'length', 'vocab'), self.mesh)
        return ModelOutput(hidden, soft_cap(projected, config.logit_soft_cap), routers, cache)

    def _embed(self, embedding: Array, tokens: Array) -> Array:
        # Rows are gathered whole: only the vocabulary of the table stays sharded.
        table = constrain(embedding, ('vocab', None), self.mesh)
        x = jnp.take(table, tokens, axis=0).astype(self.config.dtype)
        if self.config.scale_embedding:
            x *= jnp.asarray(self.config.embed_dim**0.5, x.dtype)
        return constrain(x, ACTIVATION_AXES, self.mesh)

    def _unroll_layers(
        self, x: Array, caches: Caches, contexts: Contexts, mask: Array, tokens: Array
    ) -> tuple[Array, tuple[RouterOutput, ...], Caches]:
        config = self.config
        block, kinds = remat_block(config.remat, scanned=False), attention_kinds(config)
        routers, extended = [], []
        for i, kind in enumerate(layer_kinds(config)):
            layer = block(config, kind, self.mesh, name=f'layer_{i}')
            layer_cache = None if caches is None else caches[i]
            context = contexts[kinds.index(kind.attention)]
            x, router, layer_cache = layer(x, layer_cache, context, mask, tokens)
            routers += [router] if kind.has_experts else []
            extended.append(layer_cache)
        return x, tuple(routers), None if caches is None else tuple(extended)

    def _scan_layers(
        self, x: Array, caches: Caches, contexts: Contexts, mask: Array, tokens: Array
    ) -> tuple[Array, tuple[RouterOutput, ...], Caches]:
        routers: list[RouterOutput] = []
        extended: list[LayerCache] = []
        for g, group in enumerate(layer_groups(layer_kinds(self.config))):
            done = len(extended)
            own = None if caches is None else caches[done : done + len(group.pattern)]
            x, (stacked, own) = self._scan(g, group)(x, own, contexts, mask, tokens)
            routers += unstack_routers(stacked)
            extended += own or ()
        return x, tuple(routers), None if caches is None else tuple(extended)

    def _scan(self, g: int, group: LayerGroup[LayerKind]) -> Any:
        scan: Any = nn.scan
        scanned = scan(
            Pattern,
            variable_axes={'params': 0, 'routing': 0},
            split_rngs={'params': True, 'jitter': True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=group.repeats,
            metadata_params={nn.PARTITION_NAME: 'layers'},
        )
        return scanned(self.config, group.pattern, self.mesh, name=f'group_{g}')


def attention_kinds(config: TransformerConfig) -> tuple[AttentionLike, ...]:
    """Returns each kind of attention once, in the order of the layers."""
    return tuple(dict.fromkeys(config.attention_layers))


def unstack_routers(stacked: list[RouterOutput]) -> list[RouterOutput]:
    """Turns the outputs of a scan, one for each layer of its pattern, into one for each layer."""
    leaves, structure = jax.tree.flatten(stacked)
    repeats = zip(*(unstack(leaf) for leaf in leaves), strict=True)
    return [router for repeat in repeats for router in structure.unflatten(repeat)]


def check_inputs(
    tokens: Array,
    positions: Array | None,
    segment_ids: Array | None,
    mask: Array | None,
    cache: KVCache | None,
) -> None:
    """Raises an `InputError` for arguments of `Transformer` with a wrong dtype or shape."""
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise InputError(
            f'tokens must be integer ids of shape [B, T]; received {tokens.dtype}{tokens.shape}. '
            f'Encode text with the tokenizer, and add a batch axis to a single row.'
        )
    others = {'positions': positions, 'segment_ids': segment_ids, 'mask': mask}
    for name, value in others.items():
        kind = jnp.bool_ if name == 'mask' else jnp.integer
        if value is None:
            continue
        if value.shape != tokens.shape or not jnp.issubdtype(value.dtype, kind):
            raise InputError(
                f'{name} must be {"bool" if name == "mask" else "integers"} of the shape of '
                f'tokens, {tokens.shape}; received {value.dtype}{value.shape}.'
            )
    if cache is not None and cache.segment_ids.shape[0] != tokens.shape[0]:
        raise InputError(
            f'The cache must have one row for each row of tokens, {tokens.shape[0]}; it has '
            f'{cache.segment_ids.shape[0]}. Make it with empty_cache(config, batch, num_slots).'
        )
    if cache is not None and cache.segment_ids.shape[1] < tokens.shape[1]:
        raise InputError(
            f'The cache must have a slot for each token that will ever be written; it has '
            f'{cache.segment_ids.shape[1]}, and there are {tokens.shape[1]} tokens. Give '
            f'empty_cache more slots.'
        )


def output_head(config: TransformerConfig, params: Any) -> Float[Array, 'D V']:
    """Returns the matrix by which hidden states become logits: the head, or the tied embedding.

    Args:
        config: the model's.
        params: the unboxed `params` collection.

    Returns:
        [D, V] in the parameters' dtype.

    Raises:
        InputError: where logits are soft-capped: they are then more than a product.
    """
    if config.logit_soft_cap is not None:
        raise InputError(
            f'A head stands for the logits only where model.logit_soft_cap is None; received '
            f'{config.logit_soft_cap}. Ask the model for its logits.'
        )
    return _head(config, params)


def _head(config: TransformerConfig, params: Any) -> Float[Array, 'D V']:
    return params['embed']['embedding'].T if config.tie_embeddings else params['head']['kernel']


def output_logits(
    config: TransformerConfig, params: Any, hidden: Float[Array, 'B T D']
) -> Float[Array, 'B T V']:
    """Returns the model's logits of its last hidden states, float32.

    Args:
        config: the model's.
        params: the unboxed `params` collection.
        hidden: `ModelOutput.hidden`, or some positions of it.
    """
    return soft_cap(hidden_logits(hidden, _head(config, params)), config.logit_soft_cap)


def hidden_logits(
    hidden: Float[Array, 'B T D'], head: Float[Array, 'D V']
) -> Float[Array, 'B T V']:
    """Returns `hidden @ head` in float32; the factors are in the dtype of `hidden`."""
    head = head.astype(hidden.dtype)
    return jnp.einsum('btd,dv->btv', hidden, head, preferred_element_type=jnp.float32)


def update_selection_bias(
    config: TransformerConfig,
    routing: Any,
    load: Float[Array, 'layers E'],
    *,
    rate: float,
    rule: BiasRule = 'sign',
) -> Any:
    """Moves every MoE layer's selection bias towards balance by its load; see `updated_bias`.

    Args:
        config: the model's.
        routing: the unboxed `routing` collection; an empty one is returned as it is.
        load: of each MoE layer over the whole step: summed over micro-batches.
        rate: the step of the bias, in units of the router's score.
        rule: 'sign' or 'proportional'.

    Returns:
        The new collection.
    """
    loads: dict[tuple[str, ...], list[Array]] = {}
    moe_paths = [
        path
        for (path, _), has_experts in zip(layer_paths(config), config.moe_layers, strict=True)
        if has_experts
    ]
    for path, layer in zip(moe_paths, load, strict=True):
        loads.setdefault(path, []).append(layer)

    def update(path: Any, bias: Array) -> Array:
        names = tuple(key.key for key in path)
        stacked = jnp.stack(loads[names[:2] if config.scan_layers else names[:1]])
        return updated_bias(bias, stacked.reshape(bias.shape), rate=rate, rule=rule)

    return jax.tree_util.tree_map_with_path(update, routing)
