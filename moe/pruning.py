"""Narrower and shallower models: channels, hidden units, heads and layers left out."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from moe.config import AttentionConfig, AttentionLike, TransformerConfig
from moe.errors import InputError
from moe.importance import Importance
from moe.mtp_surgery import refuse_modules
from moe.sharding import logical_axes
from moe.transformer import Transformer
from moe.unstacked import Tree, join_layers, split_layers, unrolled

Indices = Int[np.ndarray, 'kept']


@dataclasses.dataclass(frozen=True)
class Kept:
    """What a narrower model keeps, as ascending indices into the wider one.

    Attributes:
        embed: channels of the residual stream, the same for every layer.
        mlp: hidden units of each layer's MLP; None for a layer of experts, which keeps its own.
        kv_heads: key-value heads of each layer.
        heads: query heads of each layer: equally many of each kept key-value head, in its order.
        embed_energy: share of the residual stream's mean square that the kept channels bear, in
            (0, 1].
    """

    embed: Indices
    mlp: tuple[Indices | None, ...]
    kv_heads: tuple[Indices, ...]
    heads: tuple[Indices, ...]
    embed_energy: float


def choose_width(
    importance: Importance, config: TransformerConfig, target: TransformerConfig
) -> Kept:
    """Chooses the most important channels, hidden units and heads for the widths of `target`.

    A key-value head is as important as its query heads together; of each that is kept the most
    important query heads stay, equally many, so attention remains grouped.

    Args:
        importance: measured on the model of `config`.
        config: of the wider model.
        target: as deep; its `embed_dim`, `mlp_dim` and each layer's `num_heads` and `num_kv_heads`
            are reached.

    Raises:
        InputError: where `target` is wider than `config` in one of these, has more query heads for
            each key-value head, or another attention or depth.
    """
    require_narrower(config, target)
    if config.num_layers != target.num_layers:
        raise InputError(
            f'choose_width needs models of one depth: {config.num_layers}; received '
            f'{target.num_layers}. Prune the depth first.'
        )
    embed = _top(importance.embed, target.embed_dim)
    energy = np.asarray(importance.embed_energy)
    kinds = zip(importance.heads, config.attention_layers, target.attention_layers, strict=True)
    heads = [_top_heads(scores, old, new) for scores, old, new in kinds]
    return Kept(
        embed=embed,
        mlp=tuple(
            None if scores is None else _top(scores, target.mlp_dim) for scores in importance.mlp
        ),
        kv_heads=tuple(kv for kv, _ in heads),
        heads=tuple(queries for _, queries in heads),
        embed_energy=float(energy[embed].sum() / energy.sum()),
    )


def prune_width(
    config: TransformerConfig, params: Tree, kept: Kept
) -> tuple[TransformerConfig, Tree]:
    """Cuts every parameter, by its logical axes, down to what is kept.

    A norm divides by the mean square of the channels it sees. So that the kept ones come out as
    they did among all, its scale is multiplied by `sqrt(embed_energy * D / kept)`. That is 1 where
    the channels left out had average energy; where they were dead the logits stay as they were
    (but for `norm_eps`, which weighs against another mean square). A q/k norm over all heads
    together ('full') gets no such correction.

    Args:
        config: of the wider model.
        params: its unboxed `params`.
        kept: from `choose_width`.

    Returns:
        The narrower config and its `params`. `routing` needs no pruning.

    Source: Minitron, arXiv 2407.14679, section 2; the correction of the norms is ours.
    """
    refuse_modules(config)
    axes = logical_axes(Transformer(unrolled(config)))['params']
    ratio = config.embed_dim / len(kept.embed)
    cut = functools.partial(
        _cut, gain=(kept.embed_energy * ratio) ** 0.5, offset=float(config.norm_unit_offset)
    )
    layers, rest = split_layers(config, params)
    for i, layer in enumerate(layers):
        indices = {'embed': kept.embed, 'kv_heads': kept.kv_heads[i], 'heads': kept.heads[i]}
        hidden = kept.mlp[i]
        if hidden is not None:
            indices['mlp'] = hidden
        layers[i] = cut(layer, axes[f'layer_{i}'], indices)
    rest = cut(rest, {name: axes[name] for name in rest}, {'embed': kept.embed})
    if config.scale_embedding:
        rest = _rescaled(rest, ratio**0.5, config)
    kinds = zip(config.attention_layers, kept.heads, kept.kv_heads, strict=True)
    widths = [len(hidden) for hidden in kept.mlp if hidden is not None]
    target = dataclasses.replace(
        config,
        embed_dim=len(kept.embed),
        mlp_dim=widths[0] if widths else config.mlp_dim,
        attention=_pattern([_with_heads(kind, len(h), len(kv)) for kind, h, kv in kinds]),
    )
    return target, join_layers(target, layers, rest)


def choose_layers(importance: Importance, num_layers: int) -> tuple[int, ...]:
    """Returns the layers of the largest block influence, in order.

    Raises:
        InputError: where there are fewer than `num_layers`.
    """
    if num_layers > len(importance.layers):
        raise InputError(
            f'Pruning can only take layers away: there are {len(importance.layers)}; received '
            f'num_layers={num_layers}.'
        )
    return tuple(_top(importance.layers, num_layers).tolist())


def prune_depth(
    config: TransformerConfig, params: Tree, routing: Tree, keep: Sequence[int]
) -> tuple[TransformerConfig, Tree, Tree]:
    """Keeps some layers, in the order given.

    Args:
        config: of the deeper model.
        params: unboxed.
        routing: the selection biases; empty where there are none.
        keep: the layers' indices, at least one.

    Returns:
        The config, `params` and `routing` of the shallower model; `moe.layers` names those of the
        kept layers that have experts.

    Raises:
        InputError: for indices that are out of range, repeated, or none.
    """
    refuse_modules(config)
    valid = len(keep) and set(keep) <= set(range(config.num_layers)) and len(set(keep)) == len(keep)
    if not valid:
        raise InputError(
            f'keep must name distinct layers in [0, {config.num_layers}); received {list(keep)}.'
        )
    layers, rest = split_layers(config, params)
    biases, _ = split_layers(config, routing)
    with_experts = tuple(new for new, old in enumerate(keep) if config.moe_layers[old])
    moe = None
    if config.moe is not None and with_experts:
        moe = dataclasses.replace(config.moe, layers=with_experts)
    attention = _pattern([config.attention_layers[i] for i in keep])
    target = dataclasses.replace(config, num_layers=len(keep), attention=attention, moe=moe)
    params = join_layers(target, [layers[i] for i in keep], rest)
    return target, params, join_layers(target, [biases[i] for i in keep], {})


def require_narrower(config: TransformerConfig, target: TransformerConfig) -> None:
    """Refuses a target that is wider than the source in its channels or hidden units."""
    _require_at_most('embed_dim', config.embed_dim, target.embed_dim)
    _require_at_most('mlp_dim', config.mlp_dim, target.mlp_dim)


def require_fewer_heads(old: AttentionLike, new: AttentionLike) -> None:
    """Refuses attention that differs in more than a smaller number of heads.

    Raises:
        InputError: for more key-value heads, more query heads for each, or another field.
    """
    if type(old) is not type(new) or _with_heads(new, old.num_heads, _kv_heads(old)) != old:
        raise InputError(
            f'Pruning changes the number of heads and nothing else of attention: the source has '
            f'{old}, the target {new}.'
        )
    _require_at_most('attention.num_kv_heads', _kv_heads(old), _kv_heads(new))
    counts = (kind.num_heads // _kv_heads(kind) for kind in (old, new))
    _require_at_most('attention.num_heads / num_kv_heads', *counts)


def _top(scores: Any, count: int) -> Indices:
    """Returns the indices of the `count` largest, ascending; of equal ones the first."""
    return np.sort(np.argsort(-np.asarray(scores), kind='stable')[:count])


def _top_heads(scores: Any, old: AttentionLike, new: AttentionLike) -> tuple[Indices, Indices]:
    """Returns the kept key-value heads, and the query heads of each in turn."""
    require_fewer_heads(old, new)
    num_kv_heads, count = _kv_heads(new), new.num_heads // _kv_heads(new)
    by_group = np.asarray(scores).reshape(_kv_heads(old), -1)
    kv_heads = _top(by_group.sum(axis=1), num_kv_heads)
    queries = [kv * by_group.shape[1] + _top(by_group[kv], count) for kv in kv_heads]
    return kv_heads, np.concatenate(queries)


def _kv_heads(kind: AttentionLike) -> int:
    """Returns the heads that are kept whole: where keys are not shared, every one."""
    return kind.num_kv_heads if isinstance(kind, AttentionConfig) else kind.num_heads


def _with_heads(kind: AttentionLike, num_heads: int, num_kv_heads: int) -> AttentionLike:
    if isinstance(kind, AttentionConfig):
        return dataclasses.replace(kind, num_heads=num_heads, num_kv_heads=num_kv_heads)
    return dataclasses.replace(kind, num_heads=num_heads)


def _pattern(kinds: Sequence[AttentionLike]) -> AttentionLike | tuple[AttentionLike, ...]:
    return kinds[0] if len(set(kinds)) == 1 else tuple(kinds)


def _require_at_most(name: str, most: int, asked: int) -> None:
    if asked > most:
        raise InputError(f'Pruning can only narrow: {name} is {most}; received {asked}.')


def _cut(
    tree: Tree, axes: Tree, indices: Mapping[str, Indices], *, gain: float, offset: float
) -> Tree:
    """Takes the indices of each named axis; multiplies the norms of the residual stream."""

    def cut(path: Any, x: Array, names: tuple[str | None, ...]) -> Array:
        # Vectors of the residual stream are replicated, and so have no name: norms and a bias.
        is_norm = len(path) == 2 and path[-1].key == 'scale'
        if is_norm or path[-1].key == 'o_bias':
            names = ('embed',)
        for axis, name in enumerate(names):
            if name is not None and name in indices:
                x = jnp.take(x, indices[name], axis=axis)
        return ((x + offset) * gain - offset).astype(x.dtype) if is_norm else x

    return jax.tree_util.tree_map_with_path(cut, tree, axes)


def _rescaled(rest: Tree, factor: float, config: TransformerConfig) -> Tree:
    """Makes up for embeddings that the model multiplies by the root of a smaller width."""
    scaled = {**rest, 'embed': jax.tree.map(lambda x: x * factor, rest['embed'])}
    if config.tie_embeddings:
        offset = float(config.norm_unit_offset)
        scale = (rest['final_norm']['scale'] + offset) / factor - offset
        scaled['final_norm'] = {'scale': scale}
    return scaled
