"""Which layers of two models a feature compares, and whether they can be compared at all."""

import math
from collections.abc import Sequence
from typing import Any

from distill.features import Feature, Kind, LayerPair, Vectors
from moe.config import (
    AttentionConfig,
    LatentAttentionConfig,
    LinearAttentionConfig,
    TransformerConfig,
)
from moe.errors import InputError


def layer_pairs(
    feature: Feature, student: TransformerConfig, teacher: TransformerConfig
) -> tuple[LayerPair, ...]:
    """Returns the pairs of layers that a feature compares; none for 'embedding'.

    Raises:
        InputError: where a layer is not there or has no such feature; or none are given and the
            models have different numbers of those that do.
    """
    if feature.kind == 'embedding':
        return ()
    having = {'student': _layers(feature, student), 'teacher': _layers(feature, teacher)}
    for (who, able), config in zip(having.items(), (student, teacher), strict=True):
        if not able:
            raise InputError(_nothing(feature.kind, who, config))
    for pair in feature.layers:
        for (who, able), layer in zip(having.items(), pair, strict=True):
            if layer not in able:
                raise InputError(
                    f'{feature.kind} needs layers of the {who} that have it, {_listed(able)}; '
                    f'received {layer}. The nearest is {min(able, key=lambda x: abs(x - layer))}.'
                )
    if feature.layers:
        return feature.layers
    ours, theirs = having.values()
    if len(ours) != len(theirs):
        raise InputError(
            f'{feature.kind} pairs all layers that have it in order, and needs as many in the '
            f'student as in the teacher; received {len(ours)} and {len(theirs)}. Give layers, such '
            f'as {_spread(ours, theirs)}.'
        )
    return tuple(zip(ours, theirs, strict=True))


def require_comparable(
    features: Sequence[Feature], student: TransformerConfig, teacher: TransformerConfig
) -> None:
    """Refuses what two models do not have in common.

    Raises:
        InputError: as `layer_pairs`; or for other widths without a projector, relation heads that
            divide no width, attention maps of other numbers of heads, routers of other experts.
    """
    for feature in features:
        pairs = layer_pairs(feature, student, teacher)
        widths = (student.embed_dim, teacher.embed_dim)
        if feature.project is False and widths[0] != widths[1]:
            raise InputError(
                f'{feature.kind} with project=False needs a student as wide as its teacher; '
                f'received {widths[0]} and {widths[1]}. Set project=True.'
            )
        for pair in pairs:
            attentions = paired_attentions(pair, student, teacher)
            if feature.kind == 'relation':
                _require_divisor(feature, attentions)
            elif feature.kind == 'attention':
                _require_same_maps(attentions)
        if feature.kind == 'router':
            _require_same_experts(student, teacher)


def _layers(feature: Feature, config: TransformerConfig) -> list[int]:
    """The layers that have a feature."""
    every = range(config.num_layers)
    match feature.kind:
        case 'router' | 'usage':
            routed = config.moe is not None and config.moe.router.choice in ('token', 'expert')
            return [i for i in every if routed and config.moe_layers[i]]
        case 'relation':
            return [i for i in every if not _is_linear(config.attention_layers[i])]
        case 'attention':
            return [i for i in every if _has_maps(config.attention_layers[i])]
        case _:
            return list(every)


def _is_linear(attention: Any) -> bool:
    return isinstance(attention, LinearAttentionConfig)


def _has_maps(attention: Any) -> bool:
    """Whether the weights of all keys sum to 1: with sinks, a part is nobody's."""
    return not _is_linear(attention) and not getattr(attention, 'sinks', False)


def _nothing(kind: Kind, who: str, config: TransformerConfig) -> str:
    """Says why no layer of a model has a feature."""
    if kind in ('router', 'usage'):
        received = 'a dense model' if config.moe is None else config.moe.router.choice
        return (
            f"{kind} needs a {who} with routers of choice 'token' or 'expert'; received "
            f"{received!r}. Leave the feature out, or take 'hidden'."
        )
    if kind == 'relation':
        return (
            f'relation needs a {who} with attention by softmax; received linear attention alone. '
            "Take 'hidden'."
        )
    return (
        f'attention needs a {who} with layers whose attention is a softmax over keys; received '
        "linear attention, or sinks, alone. Take 'relation' where there are sinks, else 'hidden'."
    )


def _listed(layers: list[int]) -> str:
    return f'one of {", ".join(map(str, layers))}'


def _spread(ours: list[int], theirs: list[int]) -> tuple[LayerPair, ...]:
    """Pairs the layers of the one that has fewer with those at the same depth of the other."""
    count = min(len(ours), len(theirs))

    def picked(layers: list[int]) -> list[int]:
        return [layers[(i + 1) * len(layers) // count - 1] for i in range(count)]

    return tuple(zip(picked(ours), picked(theirs), strict=True))


def paired_attentions(
    pair: LayerPair, student: TransformerConfig, teacher: TransformerConfig
) -> tuple[Any, Any]:
    """Returns the attention of a pair's two layers."""
    return student.attention_layers[pair[0]], teacher.attention_layers[pair[1]]


def vectors_width(attention: AttentionConfig | LatentAttentionConfig, of: Vectors) -> int:
    """Returns the channels of a layer's queries, keys or values, over all heads."""
    if isinstance(attention, LatentAttentionConfig):
        return attention.num_heads * (attention.value_dim if of == 'values' else attention.key_dim)
    heads = attention.num_heads if of == 'queries' else attention.num_kv_heads
    return heads * attention.head_dim


def _require_divisor(feature: Feature, attentions: tuple[Any, Any]) -> None:
    assert feature.of is not None
    assert feature.heads is not None
    widths = [vectors_width(attention, feature.of) for attention in attentions]
    common = math.gcd(*widths)
    if common % feature.heads:
        near = max(n for n in range(1, feature.heads) if common % n == 0)
        raise InputError(
            f'The heads of relation must divide the widths of the {feature.of} in both models, '
            f'{widths[0]} and {widths[1]}; received {feature.heads}. The nearest below is {near}.'
        )


def _require_same_maps(attentions: tuple[Any, Any]) -> None:
    for what, name in (('number of heads', 'num_heads'), ('window', 'window')):
        ours, theirs = (getattr(attention, name) for attention in attentions)
        if ours != theirs:
            raise InputError(
                f'attention needs the same {what} in a layer of the student as in that of the '
                f"teacher; received {ours} and {theirs}. Pair other layers, or take kind='relation'"
                ', which needs neither.'
            )


def _require_same_experts(student: TransformerConfig, teacher: TransformerConfig) -> None:
    routed = (student.moe, teacher.moe)
    ours, theirs = (moe.router.num_experts for moe in routed if moe is not None)
    if ours != theirs:
        raise InputError(
            'router needs as many experts in the student as in the teacher, which then mean the '
            f'same; received {ours} and {theirs}. Start the student from the teacher, or take '
            "kind='usage'."
        )
