"""Mixture of experts to a smaller one: experts merged with those they resemble."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from moe.config import MoEConfig, TransformerConfig
from moe.errors import InputError
from moe.fewer_experts import Smaller, routed_moe, with_experts
from moe.unstacked import Tree, split_layers

# Of one expert's parameters; those of no name here have no axis of hidden units.
HIDDEN_AXIS = {'gate_up': -1, 'gate_up_bias': -1, 'down': 0}


def merge_experts(
    config: TransformerConfig,
    params: Tree,
    routing: Tree,
    clusters: Int[np.ndarray, 'layers E'],
    saliency: Float[np.ndarray, 'layers E'],
    *,
    experts_per_token: int | None = None,
) -> Smaller:
    """Averages the experts of each cluster, their hidden units aligned, and their router columns.

    Args:
        config: of a model with experts.
        params: unboxed.
        routing: the selection biases; empty where there are none.
        clusters: of each expert, in [0, number of clusters), as `cluster_experts` gives them.
        saliency: the weight of each expert in its cluster's mean, zero or more; a cluster of zeros
            is averaged evenly.
        experts_per_token: of the smaller model; unchanged where None.

    Returns:
        The config, `params` and `routing` of the smaller model.

    Raises:
        InputError: for a dense model, clusters that are empty, or of another number of experts.

    Source: MC-SMoE, arXiv 2310.01334, and HC-SMoE, arXiv 2410.08589; both keep the wide router and
        map its choices to clusters, here its columns are averaged.
    """
    moe = routed_moe(config)
    clusters = np.asarray(clusters)
    shares = _shares(config, moe, clusters, np.asarray(saliency, np.float32))

    def merged(params: Tree, biases: Tree, layer: int) -> tuple[Tree, Tree]:
        rows = shares[layer]
        averaged = [average(params, row) for row in rows]
        router = jax.tree.map(lambda x: (x.astype(jnp.float32) @ rows.T).astype(x.dtype), biases)
        return jax.tree.map(lambda *xs: jnp.stack(xs), *averaged), router

    return with_experts(config, params, routing, merged, shares.shape[1], experts_per_token)


def require_one_group(moe: MoEConfig) -> None:
    """Raises an `InputError` for a router with groups of experts, which merging would mix."""
    if moe.router.num_groups > 1:
        raise InputError(
            'Merging knows no groups of experts; received '
            f'router.num_groups={moe.router.num_groups}. Prune them instead.'
        )


def cluster_experts(
    features: Float[np.ndarray, 'layers E X'], num_clusters: int
) -> Int[np.ndarray, 'layers E']:
    """Groups experts by average linkage of the Euclidean distances of their features.

    Args:
        features: such as `ExpertSaliency.output` or `weight_features`.
        num_clusters: at least 1, at most `E`.

    Returns:
        The cluster of each expert, numbered by the lowest id among its members.
    """
    return np.stack([_linkage(np.asarray(rows), num_clusters) for rows in features])


def weight_features(config: TransformerConfig, params: Tree) -> Float[np.ndarray, 'layers E X']:
    """Returns `[gate @ down, up @ down]` of each expert: its weights, blind to their hidden order.

    `X = 2 D^2`: for wide models, compare outputs instead.
    """
    layers, _ = split_layers(config, params)
    rows = []
    for i in np.flatnonzero(config.moe_layers):
        moe = layers[i]['moe']
        both = jnp.einsum('edgf,efh->egdh', moe['gate_up'], moe['down'])
        rows.append(np.asarray(both, np.float32).reshape(len(both), -1))
    return np.stack(rows)


def average(experts: Tree, share: Float[np.ndarray, 'E']) -> Tree:
    """Averages experts whose hidden units are first put in the order of the weightiest one's.

    Args:
        experts: 'gate_up' [E, D, 2, F], 'down' [E, F, D], and biases where there are any.
        share: of each expert in the mean; sums to 1. Those of zero take no part.

    Returns:
        One expert: the same tree without its leading axis.
    """
    reference = int(np.argmax(share))
    target = _hidden_rows(experts, reference)
    total: Any = None
    for e in np.flatnonzero(share):
        order = _aligned(target, _hidden_rows(experts, int(e)))
        parts = {name: share[e] * leaf[e].astype(jnp.float32) for name, leaf in experts.items()}
        for name, axis in HIDDEN_AXIS.items():
            if name in parts:
                parts[name] = jnp.take(parts[name], order, axis=axis)
        total = parts if total is None else jax.tree.map(jnp.add, total, parts)
    return {name: leaf.astype(experts[name].dtype) for name, leaf in total.items()}


def _hidden_rows(experts: Tree, e: int) -> Float[np.ndarray, 'F X']:
    """Collects what belongs to each hidden unit of one expert."""
    gate_up = np.asarray(experts['gate_up'][e], np.float32)
    down = np.asarray(experts['down'][e], np.float32)
    return np.concatenate([gate_up.reshape(-1, gate_up.shape[-1]).T, down], axis=1)


def _aligned(target: np.ndarray, rows: np.ndarray) -> Int[np.ndarray, 'F']:
    """Returns the order of `rows` with the largest inner products with `target`, row by row."""
    from scipy.optimize import linear_sum_assignment

    return linear_sum_assignment(target @ rows.T, maximize=True)[1]


def _linkage(rows: Float[np.ndarray, 'E X'], num_clusters: int) -> Int[np.ndarray, 'E']:
    squares = np.square(rows).sum(axis=1)
    squared = squares[:, None] + squares - 2 * rows @ rows.T
    distances = np.sqrt(np.maximum(squared, 0))
    np.fill_diagonal(distances, np.inf)
    members = {e: [e] for e in range(len(rows))}
    while len(members) > num_clusters:
        i, j = sorted(divmod(int(np.argmin(distances)), len(rows)))
        sizes = np.array([len(members[i]), len(members[j])])
        # The mean distance to a union is the mean of those to its parts, by their sizes.
        distances[i] = distances[:, i] = sizes @ distances[[i, j]] / sizes.sum()
        distances[j] = distances[:, j] = distances[i, i] = np.inf
        members[i] += members.pop(j)
    clusters = np.empty(len(rows), np.int64)
    for number, first in enumerate(sorted(members)):
        clusters[members[first]] = number
    return clusters


def _shares(
    config: TransformerConfig, moe: MoEConfig, clusters: np.ndarray, saliency: np.ndarray
) -> Float[np.ndarray, 'layers clusters E']:
    """Returns the share of each expert in each merged one; rows sum to 1."""
    require_one_group(moe)
    shape = (sum(config.moe_layers), moe.router.num_experts)
    if clusters.shape != shape or saliency.shape != shape or saliency.min() < 0:
        raise InputError(
            f'clusters and saliency must give a cluster and a weight, zero or more, to each expert '
            f'of each MoE layer, {shape}; received {clusters.shape} and {saliency.shape}.'
        )
    belongs = clusters[:, None] == np.arange(clusters.max() + 1)[:, None]
    if clusters.min() < 0 or not belongs.any(axis=-1).all():
        raise InputError(
            'Every MoE layer must use the cluster numbers 0 to the highest, each at least once; '
            f'received {clusters.tolist()}.'
        )
    weights = np.where(belongs, saliency[:, None], 0.0)
    empty = weights.sum(axis=-1, keepdims=True) == 0
    weights = np.where(empty, belongs, weights)
    return weights / weights.sum(axis=-1, keepdims=True)
