"""The decoder: blocks of attention and a gated MLP or experts, scanned and rematerialised."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from moe.activations import ACTIVATIONS, note
from moe.attention_context import attention_contexts
from moe.attention_kinds import LayerCache, attention_kinds
from moe.block import ACTIVATION_AXES, Caches, Contexts, Pattern, Replayed, remat_block
from moe.config import TransformerConfig
from moe.errors import InputError
from moe.inputs import check_inputs
from moe.layers import norm_of, partitioned, soft_cap
from moe.mtp import PredictionModule, ahead, same_segment_ahead
from moe.qk_clip import MAX_LOGITS
from moe.quantised import COLLECTION, Kernel, Quantised, dequantised, product, stored_kernel
from moe.replay import Replay, recorded_ids
from moe.routing import require_causal
from moe.sharding import constrain
from moe.stacking import (
    LayerGroup,
    LayerKind,
    layer_groups,
    layer_kinds,
    module_kind,
    module_names,
    stack_repeats,
    unstack_repeats,
)
from moe.types import KVCache, ModelOutput, RouterOutput

# That have arrays of each layer.
_COLLECTIONS = ('params', 'routing', COLLECTION, MAX_LOGITS, *ACTIVATIONS)


class Embedding(nn.Module):
    """Holds the row of each token."""

    config: TransformerConfig

    @nn.compact
    def __call__(self) -> Float[Array, 'V D']:
        config = self.config
        # Variance 1 / D: a tied head then starts with logits of variance one.
        init = partitioned(nn.initializers.normal(config.embed_dim**-0.5), ('vocab', 'embed'))
        shape = (config.vocab_size, config.embed_dim)
        return self.param('embedding', init, shape, config.param_dtype)


class Head(nn.Module):
    """Holds the matrix by which hidden states become logits, where it is not the embedding's."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, embedding: Float[Array, 'V D']) -> Kernel:
        config = self.config
        V, D = config.vocab_size, config.embed_dim

        def read() -> Array:
            # One may be given to a tied model all the same, see `output_head`.
            if config.tie_embeddings and not self.has_variable('params', 'kernel'):
                return embedding.T
            init = partitioned(nn.initializers.normal(D**-0.5), ('embed', 'vocab'))
            return self.param('kernel', init, (D, V), config.param_dtype)

        return stored_kernel(self, 'kernel', read, 1)


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
        replay: Replay | None = None,
        mtp: bool = False,
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
            replay: of an earlier pass over these tokens its `ModelOutput.all_routers`, or the
                `expert_ids` of each; None routes anew. Experts are those of the record, whatever
                the routers would choose. Everything else is of this pass: weights are the recorded
                experts' scores by the current logits, so that gradients reach the routers, load
                and drops are counted again, and selection biases play no part. With the parameters
                and inputs of the recorded pass that is the recorded routing, bit for bit.
            mtp: whether to run the multi-token-prediction modules too; not with a cache, where
                `moe.predict_ahead` runs one of them. A `replay` is then of a pass that ran them.

        Where the collection `max_logits` is mutable, attention notes each head's largest logit in
        it, for `moe.qk_clip`; where those of `moe.activations` are, layers note what they are named
        for. An rng named 'jitter' makes this a training pass: routers that have
        jitter then draw noise.

        Returns:
            Hidden states in the config's dtype, logits in float32 or None, one `RouterOutput` for
            each MoE layer, and the extended cache where one was given.

        Raises:
            InputError: for a wrong dtype or shape, more tokens than the cache has slots, a cache
                where routing looks ahead, or a record of other layers, tokens or experts.
        """
        config = self.config
        check_inputs(tokens, positions, segment_ids, mask, cache)
        if mtp and cache is not None:
            raise InputError(
                'mtp=True is for whole texts; received a cache too. Run one module at a time, each '
                'with a cache of its own, by moe.predict_ahead.'
            )
        if cache is not None and config.moe is not None:
            require_causal(config.moe.router, 'Decoding with a cache')
        if mask is None:
            mask = jnp.ones(tokens.shape, bool) if segment_ids is None else segment_ids > 0
        contexts, cache = attention_contexts(
            attention_kinds(config), positions, segment_ids, tokens.shape, cache
        )
        embedding = Embedding(config, name='embed')()
        x = embed_tokens(config, embedding, tokens, self.mesh)
        note(self, residual=x)
        layers = self._scan_layers if config.scan_layers else self._unroll_layers
        caches = None if cache is None else cache.layers
        replayed = further_replayed = None
        if replay is not None:
            modules = config.mtp_depth if mtp else 0
            replayed, further_replayed = recorded_ids(config, replay, tokens.shape, modules=modules)
        x, routers, caches = layers(x, caches, replayed, contexts, mask, tokens)
        if cache is not None:
            cache = dataclasses.replace(cache, layers=caches)
        hidden = norm_of(config, 'final_norm')(x)
        head = Head(config, name='head')(embedding)
        output = ModelOutput(hidden, None, routers, cache)
        if mtp or self.is_initializing():
            segments = jnp.ones_like(tokens) if segment_ids is None else segment_ids
            further = self._look_ahead(
                hidden, embedding, further_replayed, contexts, mask, tokens, segments
            )
            output = dataclasses.replace(output, ahead=further)
        if not logits:
            return output
        projected = constrain(hidden_logits(hidden, head), ('batch', 'length', 'vocab'), self.mesh)
        return dataclasses.replace(output, logits=soft_cap(projected, config.logit_soft_cap))

    def _look_ahead(
        self,
        hidden: Array,
        embedding: Array,
        replayed: Replayed,
        contexts: Contexts,
        mask: Array,
        tokens: Array,
        segment_ids: Array,
    ) -> tuple[ModelOutput, ...]:
        """Runs the prediction modules one after the other, each on what the one before returned.

        Where the token ahead is of another document, what they read means nothing; such positions
        end their document, so that none before them attends to them.
        """
        config, kind = self.config, module_kind(self.config)
        context = contexts[attention_kinds(config).index(kind.attention)]
        outputs = []
        for distance, name in enumerate(module_names(config), start=1):
            later = ahead(tokens, distance)
            embedded = embed_tokens(config, embedding, later, self.mesh)
            counted = mask & ahead(mask, distance) & same_segment_ahead(segment_ids, distance)
            module = PredictionModule(config, kind, self.mesh, name=name)
            ids = replayed[distance - 1] if replayed else None
            hidden, router, _ = module(hidden, embedded, None, context, counted, later, ids)
            outputs.append(ModelOutput(hidden, None, () if router is None else (router,)))
        return tuple(outputs)

    def _unroll_layers(
        self,
        x: Array,
        caches: Caches,
        replayed: Replayed,
        contexts: Contexts,
        mask: Array,
        tokens: Array,
    ) -> tuple[Array, tuple[RouterOutput, ...], Caches]:
        config = self.config
        block, kinds = remat_block(config.remat, scanned=False), attention_kinds(config)
        routers, extended = [], []
        for i, kind in enumerate(layer_kinds(config)):
            layer = block(config, kind, self.mesh, name=f'layer_{i}')
            layer_cache = None if caches is None else caches[i]
            context = contexts[kinds.index(kind.attention)]
            ids = replayed[len(routers)] if replayed and kind.has_experts else None
            x, router, layer_cache = layer(x, layer_cache, context, mask, tokens, ids)
            routers += [router] if kind.has_experts else []
            extended.append(layer_cache)
        return x, tuple(routers), None if caches is None else tuple(extended)

    def _scan_layers(
        self,
        x: Array,
        caches: Caches,
        replayed: Replayed,
        contexts: Contexts,
        mask: Array,
        tokens: Array,
    ) -> tuple[Array, tuple[RouterOutput, ...], Caches]:
        routers: list[RouterOutput] = []
        extended: list[LayerCache] = []
        for g, group in enumerate(layer_groups(layer_kinds(self.config))):
            done = len(extended)
            own = None if caches is None else caches[done : done + len(group.pattern)]
            ids = None
            if replayed is not None:
                count = group.repeats * sum(kind.has_experts for kind in group.pattern)
                ids = stack_repeats(replayed[len(routers) : len(routers) + count], group.repeats)
            x, (stacked, own) = self._scan(g, group)(x, own, ids, contexts, mask, tokens)
            routers += unstack_repeats(stacked)
            extended += own or ()
        return x, tuple(routers), None if caches is None else tuple(extended)

    def _scan(self, g: int, group: LayerGroup[LayerKind]) -> Any:
        scan: Any = nn.scan
        scanned = scan(
            Pattern,
            variable_axes=dict.fromkeys(_COLLECTIONS, 0),
            split_rngs={'params': True, 'jitter': True},
            in_axes=(0, 0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=group.repeats,
            metadata_params={nn.PARTITION_NAME: 'layers'},
        )
        return scanned(self.config, group.pattern, self.mesh, name=f'group_{g}')


def embed_tokens(
    config: TransformerConfig,
    embedding: Float[Array, 'V D'],
    tokens: Int[Array, 'B T'],
    mesh: jax.sharding.Mesh | None = None,
) -> Float[Array, 'B T D']:
    """Looks tokens up in the embedding, in the model's dtype and, where it says so, scaled."""
    # Rows are gathered whole: only the vocabulary of the table stays sharded.
    table = constrain(embedding, ('vocab', None), mesh)
    x = jnp.take(table, tokens, axis=0).astype(config.dtype)
    if config.scale_embedding:
        x *= jnp.asarray(config.embed_dim**0.5, x.dtype)
    return constrain(x, ACTIVATION_AXES, mesh)


def output_head(config: TransformerConfig, params: Any) -> Float[Array, 'D V']:
    """Returns the matrix by which hidden states become logits: the head, or the tied embedding.

    Parameters of a tied model that have a head besides say that its matrix is that one.

    Args:
        config: the model's.
        params: the unboxed `params` collection.

    Returns:
        [D, V] in the parameters' dtype.

    Raises:
        InputError: where logits are soft-capped: they are then more than a product.
    """
    _require_product(config)
    return _head(config, params)


def head_of(config: TransformerConfig, variables: Any, dtype: DTypeLike) -> Float[Array, 'D V']:
    """Returns `output_head` of variables that may be quantised, as floats of a dtype."""
    found = variables.get(COLLECTION, {}).get('head')
    if found is None:
        return output_head(config, variables['params']).astype(dtype)
    _require_product(config)
    return dequantised(Quantised(**found['kernel'], outputs=1), dtype)


def _require_product(config: TransformerConfig) -> None:
    if config.logit_soft_cap is not None:
        raise InputError(
            f'A head stands for the logits only where model.logit_soft_cap is None; received '
            f'{config.logit_soft_cap}. Ask the model for its logits.'
        )


def _head(config: TransformerConfig, params: Any) -> Float[Array, 'D V']:
    tied = config.tie_embeddings and 'head' not in params
    return params['embed']['embedding'].T if tied else params['head']['kernel']


def output_logits(
    config: TransformerConfig, variables: Any, hidden: Float[Array, 'B T D']
) -> Float[Array, 'B T V']:
    """Returns the model's logits of its last hidden states, float32.

    Args:
        config: the model's.
        variables: unboxed: `params`, and `quantised` where matrices are.
        hidden: `ModelOutput.hidden`, or some positions of it.
    """
    found = variables.get(COLLECTION, {}).get('head')
    if found is None:
        head = _head(config, variables['params'])
    else:
        head = Quantised(**found['kernel'], outputs=1)
    return soft_cap(hidden_logits(hidden, head), config.logit_soft_cap)


def hidden_logits(hidden: Float[Array, 'B T D'], head: Kernel) -> Float[Array, 'B T V']:
    """Returns `hidden @ head` in float32; the factors are in the dtype of `hidden`."""
    if isinstance(head, Quantised):
        flat = product(hidden.reshape(-1, hidden.shape[-1]), head, jnp.float32)
        return flat.reshape(*hidden.shape[:2], -1)
    head = head.astype(hidden.dtype)
    return jnp.einsum('btd,dv->btv', hidden, head, preferred_element_type=jnp.float32)
