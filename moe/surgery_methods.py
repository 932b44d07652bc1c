"""The ways in which a source's variables can become a target's: one signature for all.

Each takes `(source, variables, target, *, key, calibration, **options)` and returns the config that
it reached, `params` and `routing`. `moe.surgery.initialise` checks what goes in and what comes out.
"""

from typing import Literal

import numpy as np
from jaxtyping import PRNGKeyArray

from moe.config import RouterConfig, TransformerConfig
from moe.densify import average_experts, concatenate_experts, dense_width
from moe.errors import InputError
from moe.fewer_experts import best_experts, prune_experts
from moe.importance import importance, of_layers
from moe.merge import cluster_experts, merge_experts, weight_features
from moe.observe import Calibration
from moe.pruning import choose_layers, choose_width, prune_depth, prune_width
from moe.saliency import ExpertSaliency, expert_saliency
from moe.transformer import Transformer
from moe.unstacked import Tree
from moe.upcycle import upcycle

Built = tuple[TransformerConfig, Tree, Tree]


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
    router_std: float = 0.02,
) -> Built:
    """Makes the dense MLPs experts; see `moe.upcycle.upcycle`."""
    if target.moe is None:
        raise InputError("'upcycle' needs a target with experts; its moe is None.")
    return upcycle(
        source, variables['params'], target.moe, key=key, noise=noise, router_std=router_std
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
    by: Literal['frequency', 'weight', 'activation'] = 'activation',
) -> Built:
    """Keeps the most salient experts; `by` names a field of `ExpertSaliency`."""
    router = _fewer(target, source)
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
    by: Literal['frequency', 'weight', 'activation'] = 'frequency',
    similarity: Literal['outputs', 'weights'] = 'outputs',
) -> Built:
    """Merges experts of similar outputs or weights; `by` names what weighs them in the mean."""
    router = _fewer(target, source)
    _require_choice('similarity', similarity, ('outputs', 'weights'))
    params = variables['params']
    saliency = expert_saliency(Transformer(source), variables, calibration)
    weights = _field(saliency, by)
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
    _require_width(target, dense_width(source, 1))
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
    shared, width = (source.moe.shared_dim, source.moe.expert_dim) if source.moe else (0, 1)
    count = max(1, (target.mlp_dim - shared) // width)
    _require_width(target, dense_width(source, count))
    weights = _salience(source, variables, calibration, 'weight')
    return *concatenate_experts(source, variables['params'], weights, count), {}


def _require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f'{name} must be one of {", ".join(choices)}; received {value!r}.')


def _require_width(target: TransformerConfig, width: int) -> None:
    if target.moe is not None or target.mlp_dim != width:
        raise InputError(
            f'These experts make a dense model of mlp_dim={width}; the target has '
            f'mlp_dim={target.mlp_dim} and moe={target.moe}. Set them so.'
        )


def _fewer(target: TransformerConfig, source: TransformerConfig) -> RouterConfig:
    """Returns the target's router, of no more experts than the source's."""
    if source.moe is None or target.moe is None:
        raise InputError('Experts can be pruned or merged in a model that has some; it is dense.')
    most, asked = source.moe.router.num_experts, target.moe.router.num_experts
    if asked > most:
        raise InputError(
            f'moe.router.num_experts must be at most the {most} of the source; received {asked}.'
        )
    return target.moe.router


def _salience(
    source: TransformerConfig, variables: Tree, calibration: Calibration, by: str
) -> np.ndarray:
    return _field(expert_saliency(Transformer(source), variables, calibration), by)


def _field(saliency: ExpertSaliency, by: str) -> np.ndarray:
    _require_choice('by', by, ('frequency', 'weight', 'activation'))
    return np.asarray(getattr(saliency, by))
