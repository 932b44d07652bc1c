"""QK-clip: heads whose attention logits grew too large get smaller query and key weights.

A step measures, where asked to, each head's largest logit; after the update the head's weights are
multiplied such that the same queries and keys would have reached the threshold at most.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe.attention_config import AttentionConfig, LatentAttentionConfig
from moe.config import TransformerConfig
from moe.errors import InputError
from moe.stacking import layer_paths, module_kind, module_names

# The collection that a pass over a model fills where it is mutable.
MAX_LOGITS = 'max_logits'
Tree = Any


def record_max_logits(
    module: nn.Module, highest: Float[Array, 'B T H'], segment_ids: Int[Array, 'B T'] | None
) -> None:
    """Notes the largest logit of each head, where the collection `max_logits` was asked for.

    Args:
        module: the attention, bound.
        highest: of each query and head, over the keys it may look at.
        segment_ids: 0 for padding, which does not count; None where there is none.
    """
    if module.is_initializing() or not module.is_mutable_collection(MAX_LOGITS):
        return
    if segment_ids is not None:
        highest = jnp.where(segment_ids[..., None] > 0, highest, -jnp.inf)
    module.put_variable(MAX_LOGITS, 'highest', jax.lax.stop_gradient(highest).max(axis=(0, 1)))


def require_clippable(config: TransformerConfig) -> None:
    """Raises an `InputError` for a model whose logits no factor of its weights would lower."""
    kinds = [kind for kind in _kinds(config).values() if _has_logits(kind)]
    if not kinds:
        raise InputError(
            'qk_clip needs attention by softmax; the model has none. Set optimizer.qk_clip to None.'
        )
    for kind in kinds:
        if not isinstance(kind, AttentionConfig):
            continue
        bounds = {'qk_norm': 'none', 'clip_qkv': None, 'soft_cap': None}
        set_ = {name: getattr(kind, name) for name in bounds if getattr(kind, name) != bounds[name]}
        if set_:
            raise InputError(
                f'qk_clip scales the weights of queries and keys, which bounds no logits beside '
                f'{", ".join(f"attention.{name}={value!r}" for name, value in set_.items())}: '
                'these bound them already. Set optimizer.qk_clip to None, or unset those.'
            )


def clip_heads(config: TransformerConfig, params: Tree, max_logits: Tree, threshold: float) -> Tree:
    """Shrinks the query and key weights of every head whose logits exceeded the threshold.

    With `S` a head's largest logit and `g = min(1, threshold / S)`:

        grouped-query, a key head a query head     q, k (and biases) *= sqrt(g)
        grouped-query, shared key heads            q (and bias) *= g
        latent                                     channels without positions *= sqrt(g) in q
                                                   and in kv_up; rotary channels of q *= g

    A key head that several query heads share stays as it is: shrinking it would shrink the logits
    of heads that did not exceed. So does the rotary key of latent attention, which all share. A
    head that did not exceed keeps its weights bit for bit.

    Args:
        config: the model's.
        params: the unboxed `params` collection.
        max_logits: the collection that a pass over the model filled, see `MAX_LOGITS`; the largest
            over all shards and micro-batches.
        threshold: what no logit shall exceed (tau), positive.

    Returns:
        The new parameters.

    Source: Kimi K2, arXiv 2507.20534, algorithm 1; there nothing is said of shared key heads.
    """
    for path, kind in _kinds(config).items():
        if not _has_logits(kind):
            continue
        highest = _at(max_logits, path)['attention']['highest']
        factor = jnp.where(highest > threshold, threshold / highest, 1.0)
        weights = _at(params, path)['attention']
        if isinstance(kind, AttentionConfig):
            clipped = _clip_grouped(kind, weights, factor)
        else:
            clipped = _clip_latent(kind, weights, factor)
        params = _with(params, (*path, 'attention'), {**weights, **clipped})
    return params


def _kinds(config: TransformerConfig) -> dict[tuple[str, ...], Any]:
    paths = (path for path, _ in layer_paths(config))
    kinds = dict(zip(paths, config.attention_layers, strict=True))
    modules = {(name, 'block'): module_kind(config).attention for name in module_names(config)}
    return {**kinds, **modules}


def _has_logits(kind: Any) -> bool:
    return isinstance(kind, AttentionConfig | LatentAttentionConfig)


def _clip_grouped(
    config: AttentionConfig, weights: Mapping[str, Array], factor: Float[Array, '*layers H']
) -> dict[str, Array]:
    factors = {'q': factor}
    if config.num_heads == config.num_kv_heads:
        factors = {'q': jnp.sqrt(factor), 'k': jnp.sqrt(factor)}
    clipped = {}
    for name, by in factors.items():
        clipped[name] = _scaled(weights[name], by[..., None, :, None])
        if config.qkv_bias:
            clipped[f'{name}_bias'] = _scaled(weights[f'{name}_bias'], by[..., :, None])
    return clipped


def _clip_latent(
    config: LatentAttentionConfig, weights: Mapping[str, Array], factor: Float[Array, '*layers H']
) -> dict[str, Array]:
    name = 'q' if config.query_rank is None else 'q_up'
    whole, half = factor[..., None], jnp.sqrt(factor)[..., None]
    plain = jnp.repeat(half, config.nope_dim, axis=-1)
    query = jnp.concatenate([plain, jnp.repeat(whole, config.rope_dim, axis=-1)], axis=-1)
    values = jnp.ones((*factor.shape, config.value_dim), factor.dtype)
    key = jnp.concatenate([plain, values], axis=-1)
    return {
        name: _scaled(weights[name], query[..., None, :, :]),
        'kv_up': _scaled(weights['kv_up'], key[..., None, :, :]),
    }


def _scaled(x: Array, by: Array) -> Array:
    return (x.astype(jnp.float32) * by).astype(x.dtype)


def _at(tree: Tree, path: tuple[str, ...]) -> Tree:
    for name in path:
        tree = tree[name]
    return tree


def _with(tree: Tree, path: tuple[str, ...], value: Tree) -> Tree:
    """Returns the tree with another subtree at a path."""
    if not path:
        return value
    return {**tree, path[0]: _with(tree[path[0]], path[1:], value)}
