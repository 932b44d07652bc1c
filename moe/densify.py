"""Mixture of experts to dense: one MLP for the experts of each layer."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from moe.config import TransformerConfig
from moe.errors import InputError
from moe.fewer_experts import best_experts
from moe.merge import average
from moe.mtp_surgery import refuse_modules
from moe.saliency import routed
from moe.unstacked import Tree, join_layers, split_layers

Dense = tuple[TransformerConfig, Tree]


def average_experts(
    config: TransformerConfig, params: Tree, weights: Float[np.ndarray, 'layers E']
) -> Dense:
    """Makes each layer's experts one MLP of their width: their weighted mean, units aligned.

    Its output is multiplied by the sum of the weights: what a token's experts weigh together. A
    shared expert's hidden units come first, so the width is `shared_dim + expert_dim`. Equal to the
    mixture where all experts are permutations of one and the weights' sum is the same for all
    tokens.

    Args:
        config: of a model with experts.
        params: unboxed.
        weights: the mean weight of each expert over tokens, zero or more: `ExpertSaliency.weight`.

    Returns:
        The dense config and `params`.

    Raises:
        InputError: for a dense model, experts with biases, weights of another shape or all zero,
            or dense layers of another width.
    """

    def averaged(experts: Tree, weight: np.ndarray) -> Tree:
        mean = average(experts, weight / weight.sum())
        return {**mean, 'down': mean['down'] * weight.sum()}

    return _dense(config, params, weights, averaged, 1)


def concatenate_experts(
    config: TransformerConfig,
    params: Tree,
    weights: Float[np.ndarray, 'layers E'],
    num_experts: int,
) -> Dense:
    """Lays the hidden units of each layer's weightiest experts side by side in one MLP.

        y = shared(x) + sum over the kept e of c * weights[e] * expert_e(x)

    with c so that the kept bear all the weight. The width is `shared_dim + num_experts *
    expert_dim`. Equal to the mixture where every token gives these experts these weights: with
    `E = K = num_experts` and constant scores, with one expert, or with any number of the experts
    of a freshly upcycled model of whole copies.

    Args:
        config: of a model with experts.
        params: unboxed.
        weights: the mean weight of each expert over tokens, zero or more: `ExpertSaliency.weight`.
        num_experts: to keep, at most `E`.

    Returns:
        The dense config and `params`.

    Raises:
        InputError: as `average_experts`.
    """

    def concatenated(experts: Tree, weight: np.ndarray) -> Tree:
        kept = best_experts(weight[None], num_experts)[0]
        share = weight[kept] * (weight.sum() / weight[kept].sum())
        gate_up, down = experts['gate_up'][kept], experts['down'][kept]
        down = down.astype(jnp.float32) * share[:, None, None]
        return {
            'gate_up': jnp.moveaxis(gate_up, 0, 2).reshape(*gate_up.shape[1:3], -1),
            'down': down.reshape(-1, down.shape[-1]).astype(experts['down'].dtype),
        }

    return _dense(config, params, weights, concatenated, num_experts)


def require_mergeable(config: TransformerConfig) -> None:
    """Refuses a model whose experts no dense MLP can stand for.

    Raises:
        InputError: for a dense model, experts with biases, and soft routing.
    """
    moe = config.moe
    if moe is None:
        raise InputError('Experts can become one MLP in a model that has some; it is dense.')
    if moe.bias or moe.router.choice == 'soft':
        raise InputError(
            f'A dense MLP has no biases and mixes no tokens; received moe.bias={moe.bias} and '
            f'moe.router.choice={moe.router.choice!r}.'
        )


def dense_width(config: TransformerConfig, num_experts: int) -> int:
    """Returns the hidden width of a dense MLP that holds the shared and `num_experts` experts.

    Raises:
        InputError: for a dense model, more experts than there are, or where layers that are dense
            already have another width.
    """
    require_mergeable(config)
    moe = config.moe
    assert moe is not None
    if not 1 <= num_experts <= moe.router.num_experts:
        raise InputError(
            f'num_experts must be in [1, {moe.router.num_experts}]; received {num_experts}.'
        )
    width = moe.shared_dim + num_experts * moe.expert_dim
    if not all(config.moe_layers) and width != config.mlp_dim:
        raise InputError(
            f'The dense layers of the model have mlp_dim={config.mlp_dim}, and all layers must '
            f'have one width; {num_experts} experts of {moe.expert_dim} and a shared one of '
            f'{moe.shared_dim} make {width}. Keep another number of experts, or drop those layers.'
        )
    return width


def _dense(
    config: TransformerConfig,
    params: Tree,
    weights: Float[np.ndarray, 'layers E'],
    combine: Callable[[Tree, np.ndarray], Tree],
    num_experts: int,
) -> Dense:
    """Replaces each layer of experts by what `combine(experts, weights)` makes of them."""
    refuse_modules(config)
    width = dense_width(config, num_experts)
    moe = config.moe
    assert moe is not None
    weights = np.asarray(weights, np.float32)
    shape = (sum(config.moe_layers), moe.router.num_experts)
    if weights.shape != shape or weights.min() < 0 or not weights.sum(axis=1).all():
        raise InputError(
            f'weights must be zero or more, and not all zero, for the experts of each MoE layer, '
            f'{shape}; received {weights.shape}: {weights.tolist()}.'
        )
    layers, rest = split_layers(config, params)
    for weight, i in zip(weights, np.flatnonzero(config.moe_layers), strict=True):
        old = layers[i]['moe']
        mlp = combine(routed(old), weight)
        if moe.shared_dim:
            shared = old['shared']
            gate_up = jnp.concatenate([shared['gate_up'], mlp['gate_up']], axis=-1)
            mlp = {'gate_up': gate_up, 'down': jnp.concatenate([shared['down'], mlp['down']])}
        kept = {name: value for name, value in layers[i].items() if name != 'moe'}
        layers[i] = {**kept, 'mlp': mlp}
    target = dataclasses.replace(config, moe=None, mlp_dim=width)
    return target, join_layers(target, layers, rest)
