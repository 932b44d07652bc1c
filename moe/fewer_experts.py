"""Mixture of experts to a smaller one: experts left out."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from moe.config import MoEConfig, TransformerConfig
from moe.errors import InputError
from moe.mtp_surgery import refuse_modules
from moe.saliency import routed
from moe.unstacked import Tree, join_layers, split_layers

Smaller = tuple[TransformerConfig, Tree, Tree]


def best_experts(
    scores: Float[np.ndarray, 'layers E'], num_experts: int, *, num_groups: int = 1
) -> Int[np.ndarray, 'layers kept']:
    """Returns the ids of the experts with the highest scores, in ascending order, for each layer.

    Args:
        scores: one row for each MoE layer, such as a field of `ExpertSaliency`; of equal ones the
            lower id comes first.
        num_experts: how many to return.
        num_groups: of the router; equally many are taken of each.
    """
    by_group = np.asarray(scores).reshape(len(scores), num_groups, -1)
    order = np.argsort(-by_group, axis=-1, kind='stable')[..., : num_experts // num_groups]
    first = np.arange(num_groups)[:, None] * by_group.shape[-1]
    return (np.sort(order, axis=-1) + first).reshape(len(scores), -1)


def prune_experts(
    config: TransformerConfig,
    params: Tree,
    routing: Tree,
    keep: Sequence[Sequence[int]] | Int[np.ndarray, 'layers kept'],
    *,
    experts_per_token: int | None = None,
) -> Smaller:
    """Keeps some experts of each MoE layer, with their router columns and biases.

    Args:
        config: of a model with experts.
        params: unboxed.
        routing: the selection biases; empty where there are none.
        keep: the ids to keep, in their new order, equally many for each MoE layer.
        experts_per_token: of the smaller model; unchanged where None.

    Returns:
        The config, `params` and `routing` of the smaller model.

    Raises:
        InputError: for a dense model, hash or soft routing, and ids that are repeated, out of
            range, uneven, or not equally many of each group of the router, group by group.
    """
    moe = routed_moe(config)
    ids = _checked_ids(config, moe, keep)

    def kept(params: Tree, biases: Tree, layer: int) -> tuple[Tree, Tree]:
        chosen = ids[layer]
        pruned = {name: jax.tree.map(lambda x: x[chosen], leaf) for name, leaf in params.items()}
        return pruned, jax.tree.map(lambda x: x[..., chosen], biases)

    return with_experts(config, params, routing, kept, ids.shape[1], experts_per_token)


def with_experts(
    config: TransformerConfig,
    params: Tree,
    routing: Tree,
    transform: Callable[[Tree, Tree, int], tuple[Tree, Tree]],
    num_experts: int,
    experts_per_token: int | None,
) -> Smaller:
    """Rebuilds a model with other experts in each of its MoE layers.

    Args:
        config: of a model with experts.
        params: unboxed.
        routing: the selection biases; empty where there are none.
        transform: maps the experts' parameters (experts first), those of the router and its
            selection bias (experts last), and the number of the MoE layer to both anew.
        num_experts: how many experts that leaves.
        experts_per_token: unchanged where None.
    """
    refuse_modules(config)
    moe = routed_moe(config)
    layers, rest = split_layers(config, params)
    biases, _ = split_layers(config, routing)
    for n, i in enumerate(np.flatnonzero(config.moe_layers)):
        old = layers[i]['moe']
        experts, router = transform(routed(old), {'params': old['router'], 'routing': biases[i]}, n)
        layers[i] = {**layers[i], 'moe': {**old, **experts, 'router': router['params']}}
        biases[i] = router['routing']
    k = moe.router.experts_per_token if experts_per_token is None else experts_per_token
    router = dataclasses.replace(moe.router, num_experts=num_experts, experts_per_token=k)
    target = dataclasses.replace(config, moe=dataclasses.replace(moe, router=router))
    return target, join_layers(target, layers, rest), join_layers(target, biases, {})


def routed_moe(config: TransformerConfig) -> MoEConfig:
    """Returns the experts of a model in which router columns choose them.

    Raises:
        InputError: for a dense model, and for hash and soft routing.
    """
    if config.moe is None:
        raise InputError('Experts can be pruned or merged in a model that has some; it is dense.')
    choice = config.moe.router.choice
    if choice in ('hash', 'soft'):
        raise InputError(
            f"Experts can be pruned or merged where a router's columns choose them: with "
            f"router.choice='token' or 'expert'; received {choice!r}."
        )
    return config.moe


def _checked_ids(
    config: TransformerConfig, moe: MoEConfig, keep: Any
) -> Int[np.ndarray, 'layers kept']:
    layers, experts = sum(config.moe_layers), moe.router.num_experts
    if len(keep) != layers or len({len(ids) for ids in keep}) != 1 or not len(keep[0]):
        raise InputError(
            f'keep must name equally many experts for each of the {layers} MoE layers; received '
            f'{[len(ids) for ids in keep]}.'
        )
    ids = np.asarray(keep)
    for layer, row in enumerate(ids):
        if len(set(row.tolist())) < len(row) or row.min() < 0 or row.max() >= experts:
            raise InputError(
                f'keep must name distinct experts in [0, {experts}); received {row.tolist()} for '
                f'MoE layer {layer}.'
            )
        groups = row * moe.router.num_groups // experts
        even = np.arange(len(row)) * moe.router.num_groups // len(row)
        if (groups != even).any():
            raise InputError(
                "keep must name equally many experts of each of the router's "
                f'{moe.router.num_groups} groups, in order; received {row.tolist()} for MoE layer '
                f'{layer}.'
            )
    return ids
