"""The ways in which a source's variables can become a target's: one signature for all.

Each takes `(source, variables, target, *, key, calibration, **options)` and returns the config that
it reached, `params` and `routing`. What it makes of a target is checked beforehand, on the configs
alone, by `moe.surgery_checks`; what comes out by `moe.surgery.initialise`.
"""

from typing import Literal

import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from moe.centroids import input_centroids
from moe.config import TransformerConfig
from moe.densify import average_experts, concatenate_experts
from moe.fewer_experts import best_experts, prune_experts
from moe.importance import importance, of_layers
from moe.merge import cluster_experts, merge_experts, weight_features
from moe.observe import Calibration
from moe.pruning import choose_layers, choose_width, prune_depth, prune_width
from moe.saliency import expert_saliency
from moe.surgery_checks import concatenated_count
from moe.transformer import Transformer
from moe.unstacked import Tree
from moe.upcycle import slices_of, upcycle

Built = tuple[TransformerConfig, Tree, Tree]
Measure = Literal['frequency', 'weight', 'activation']


def copied(
    source: TransformerConfig,
    variables: Tree,
    target: TransformerConfig,
    *,
    key: PRNGKeyArray,
    calibration: Calibration | None,
) -> Built:
    """Takes the source as it is, in the target's layout and dtype."""
    return source, variables['params'], variables.get('routing', {})


def upcycled(
    source: TransformerConfig,
    variables: Tree,
    target: TransformerConfig,
    *,
    key: PRNGKeyArray,
    calibration: Calibration | None,
    noise: float = 0.0,
    router: Literal['drawn', 'centroids'] = 'drawn',
    router_std: float = 0.02,
) -> Built:
    """Makes the dense MLPs experts; see `moe.upcycle.upcycle`.

    The columns of a router are drawn, or are the centroids of what its layer reads; see
    `moe.centroids.input_centroids`.
    """
    moe = target.moe
    assert moe is not None
    directions = None
    if router == 'centroids':
        assert calibration is not None
        copies = moe.router.num_experts // slices_of(source.mlp_dim, moe)
        found = input_centroids(
            Transformer(source),
            variables,
            calibration,
            copies,
            key=jax.random.fold_in(key, source.num_layers),
        )
        directions = [found[int(i)] for i in np.flatnonzero(target.moe_layers)]
    return upcycle(
        source,
        variables['params'],
        moe,
        key=key,
        noise=noise,
        router_std=router_std,
        directions=directions,
    )


def pruned(
    source: TransformerConfig,
    variables: Tree,
    target: TransformerConfig,
    *,
    key: PRNGKeyArray,
    calibration: Calibration,
) -> Built:
    """Leaves out the least important layers, channels, hidden units and heads, all at once."""
    measured = importance(Transformer(source), variables, calibration)
    keep = choose_layers(measured, target.num_layers)
    routing = variables.get('routing', {})
    shallow, params, routing = prune_depth(source, variables['params'], routing, keep)
    kept = choose_width(of_layers(measured, keep), shallow, target)
    return *prune_width(shallow, params, kept), routing


def with_experts_pruned(
    source: TransformerConfig,
    variables: Tree,
    target: TransformerConfig,
    *,
    key: PRNGKeyArray,
    calibration: Calibration,
    by: Measure = 'activation',
) -> Built:
    """Keeps the most salient experts; `by` names a field of `ExpertSaliency`."""
    assert target.moe is not None
    router = target.moe.router
    scores = _salience(source, variables, calibration, by)
    keep = best_experts(scores, router.num_experts, num_groups=router.num_groups)
    return prune_experts(
        source,
        variables['params'],
        variables.get('routing', {}),
        keep,
        experts_per_token=router.experts_per_token,
    )


def with_experts_merged(
    source: TransformerConfig,
    variables: Tree,
    target: TransformerConfig,
    *,
    key: PRNGKeyArray,
    calibration: Calibration,
    by: Measure = 'frequency',
    similarity: Literal['outputs', 'weights'] = 'outputs',
) -> Built:
    """Merges experts of similar outputs or weights; `by` names what weighs them in the mean."""
    assert target.moe is not None
    router = target.moe.router
    params = variables['params']
    saliency = expert_saliency(Transformer(source), variables, calibration)
    weights = np.asarray(getattr(saliency, by))
    features = saliency.output if similarity == 'outputs' else weight_features(source, params)
    clusters = cluster_experts(np.asarray(features), router.num_experts)
    return merge_experts(
        source,
        params,
        variables.get('routing', {}),
        clusters,
        weights,
        experts_per_token=router.experts_per_token,
    )


def with_experts_averaged(
    source: TransformerConfig,
    variables: Tree,
    target: TransformerConfig,
    *,
    key: PRNGKeyArray,
    calibration: Calibration,
) -> Built:
    """Makes one MLP of each layer's experts, their mean by the weights tokens give them."""
    weights = _salience(source, variables, calibration, 'weight')
    return *average_experts(source, variables['params'], weights), {}


def with_experts_concatenated(
    source: TransformerConfig,
    variables: Tree,
    target: TransformerConfig,
    *,
    key: PRNGKeyArray,
    calibration: Calibration,
) -> Built:
    """Lays as many of each layer's weightiest experts side by side as fill the target's MLP."""
    weights = _salience(source, variables, calibration, 'weight')
    count = concatenated_count(source, target)
    return *concatenate_experts(source, variables['params'], weights, count), {}


def _salience(
    source: TransformerConfig, variables: Tree, calibration: Calibration, by: str
) -> np.ndarray:
    return np.asarray(getattr(expert_saliency(Transformer(source), variables, calibration), by))
