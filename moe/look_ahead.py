"""One multi-token-prediction module by itself: drafts of tokens further ahead."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe.attention_context import attention_contexts
from moe.attention_kinds import empty_layer_cache
from moe.config import DType
from moe.errors import InputError
from moe.inputs import check_inputs
from moe.mtp import PredictionModule
from moe.routing import require_causal
from moe.stacking import module_kind, module_name
from moe.transformer import Transformer, embed_tokens, output_logits
from moe.types import KVCache, ModelOutput


def predict_ahead(
    model: Transformer,
    variables: Any,
    hidden: Float[Array, 'B T D'],
    tokens: Int[Array, 'B T'],
    *,
    depth: int = 1,
    positions: Int[Array, 'B T'] | None = None,
    segment_ids: Int[Array, 'B T'] | None = None,
    mask: Bool[Array, 'B T'] | None = None,
    cache: KVCache | None = None,
    logits: bool = True,
) -> ModelOutput:
    """Runs the module of one depth on hidden states and the tokens `depth` ahead of them.

    To draft: `hidden` of the model at `t` and the token drawn from its logits, `t + 1`, give at
    depth 1 the logits of `t + 2`; the hidden states returned and a token drawn from those are the
    arguments of depth 2. A model with one module may apply it to its own results again.

    Args:
        model: whose module it is.
        variables: unboxed: `params`, and `routing` where there are selection biases.
        hidden: what the head multiplies, of the model for depth 1, else of the depth before.
        tokens: ids in [0, V), each `depth` ahead of the hidden state beside it.
        depth: from 1 to `mtp_depth`.
        positions: rotary positions of the hidden states, not of the tokens; as of the model.
        segment_ids: documents, 0 for padding.
        mask: True for tokens that are routed; by default all that are not padding.
        cache: of this module's tokens before these, from `empty_module_cache`; or None.
        logits: whether to multiply by the head.

    Returns:
        Hidden states, logits of the tokens `depth + 1` ahead, the module's router where it has
        experts, and the extended cache.

    Raises:
        InputError: for a depth that the model has no module of, for wrong dtypes or shapes, and
            where a cache meets routing that looks ahead.
    """
    config = model.config
    if not 1 <= depth <= config.mtp_depth:
        raise InputError(
            f'depth must be in [1, mtp_depth={config.mtp_depth}]; received {depth}. Each module is '
            'trained for one depth.'
        )
    check_inputs(tokens, positions, segment_ids, mask, cache)
    if hidden.shape != (*tokens.shape, config.embed_dim):
        raise InputError(
            f'hidden must be [B, T, D] = {(*tokens.shape, config.embed_dim)}, one for each token; '
            f'received {hidden.shape}.'
        )
    if cache is not None and config.moe is not None:
        require_causal(config.moe.router, 'Drafting with a cache')
    if mask is None:
        mask = jnp.ones(tokens.shape, bool) if segment_ids is None else segment_ids > 0
    kind, name = module_kind(config), module_name(depth)
    (context,), cache = attention_contexts(
        (kind.attention,), positions, segment_ids, tokens.shape, cache
    )
    own = {key: tree[name] for key, tree in variables.items() if name in tree}
    table = variables['params']['embed']['embedding']
    embedded = embed_tokens(config, table, tokens, model.mesh)
    layer_cache = None if cache is None else cache.layers[0]
    module: Any = PredictionModule(config, kind, model.mesh)
    hidden, router, layer_cache = module.apply(
        own, hidden, embedded, layer_cache, context, mask, tokens
    )
    if cache is not None:
        cache = dataclasses.replace(cache, layers=(layer_cache,))
    projected = output_logits(config, variables, hidden) if logits else None
    return ModelOutput(hidden, projected, () if router is None else (router,), cache)


def empty_module_cache(
    model: Transformer,
    batch: int,
    num_slots: int,
    dtype: DType | None = None,
    *,
    slack: int = 0,
) -> KVCache:
    """Preallocates what the layer of one module keeps of up to `num_slots` tokens.

    Args:
        model: whose module it is.
        batch: `B`.
        num_slots: `S`, at least as many as tokens will ever be given.
        dtype: of keys, values and latents; the model's activation dtype where None.
        slack: how many tokens a row's length may ever be set back by.

    Returns:
        A cache of rows of length 0.
    """
    attention, kept = module_kind(model.config).attention, dtype or model.config.dtype
    return KVCache(
        layers=(empty_layer_cache(attention, batch, num_slots, kept, slack),),
        segment_ids=jnp.zeros((batch, num_slots), jnp.int32),
        length=jnp.zeros(batch, jnp.int32),
        slack=slack,
    )
