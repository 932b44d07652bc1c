"""Ways from one model's variables to another config's: the choices of how a student starts.

Each method of `METHODS` maps variables of a source config to variables of a target config and frees
some of its fields; every other field must be equal. What the methods are made of is importable
here too.
"""

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from moe import surgery_methods as methods
from moe.config import TransformerConfig
from moe.densify import average_experts, concatenate_experts
from moe.errors import InputError
from moe.fewer_experts import best_experts, prune_experts
from moe.importance import Importance, importance
from moe.merge import cluster_experts, merge_experts, weight_features
from moe.observe import Calibration
from moe.pruning import choose_layers, choose_width, prune_depth, prune_width
from moe.saliency import ExpertSaliency, expert_saliency
from moe.sharding import abstract_variables
from moe.transformer import Transformer
from moe.unstacked import Tree, relaid
from moe.upcycle import upcycle

__all__ = [
    'METHODS',
    'Calibration',
    'ExpertSaliency',
    'Importance',
    'Method',
    'average_experts',
    'best_experts',
    'choose_layers',
    'choose_width',
    'cluster_experts',
    'concatenate_experts',
    'expert_saliency',
    'importance',
    'initialise',
    'merge_experts',
    'prune_depth',
    'prune_experts',
    'prune_width',
    'upcycle',
    'weight_features',
]

# How a model is stored and run, not what it computes: any method may change these.
EXECUTION = (
    'scan_layers',
    'remat',
    'dtype',
    'param_dtype',
    'moe.dispatch',
    'moe.capacity_factor',
    'moe.router.jitter',
)
COMMON = ('source', 'variables', 'target', 'key', 'calibration')
EXPERT_COUNTS = ('moe.router.num_experts', 'moe.router.experts_per_token')


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to the variables of a target config.

    Attributes:
        build: `(source, variables, target, *, key, calibration, **options)` -> the config it
            reached, `params`, `routing`.
        frees: the fields, by dotted name, in which the target may differ from the source.
        needs_calibration: whether `calibration` may not be None.
    """

    build: Callable[..., methods.Built]
    frees: tuple[str, ...] = ()
    needs_calibration: bool = False


METHODS: dict[str, Method] = {
    'copy': Method(methods.copied),
    'upcycle': Method(methods.upcycled, frees=('moe',)),
    'prune': Method(
        methods.pruned,
        frees=(
            'embed_dim',
            'mlp_dim',
            'num_layers',
            'attention',
            'moe.layers',
            'moe.first_dense_layers',
            'moe.layer_step',
        ),
        needs_calibration=True,
    ),
    'prune_experts': Method(methods.with_experts_pruned, EXPERT_COUNTS, needs_calibration=True),
    'merge_experts': Method(methods.with_experts_merged, EXPERT_COUNTS, needs_calibration=True),
    'average_experts': Method(
        methods.with_experts_averaged, ('moe', 'mlp_dim'), needs_calibration=True
    ),
    'concatenate_experts': Method(
        methods.with_experts_concatenated, ('moe', 'mlp_dim'), needs_calibration=True
    ),
}


def initialise(
    method: str,
    source: TransformerConfig,
    variables: Tree,
    target: TransformerConfig,
    *,
    key: PRNGKeyArray,
    calibration: Calibration | None = None,
    options: Mapping[str, Any] | None = None,
) -> Tree:
    """Makes the variables of `target` out of those of `source`.

    Args:
        method: a key of `METHODS`: 'copy', 'upcycle', 'prune', 'prune_experts', 'merge_experts',
            'average_experts' or 'concatenate_experts'.
        source: config of the model there is.
        variables: its unboxed variables: `params`, and `routing` where it has selection biases.
        target: config of the model to be.
        key: for what is drawn at random: the router and the noise of 'upcycle'.
        calibration: for methods that measure the source.
        options: keyword arguments of the method beyond these.

    Returns:
        Variables in the structure and shapes of `Transformer(target).init`, in its `param_dtype`.

    Raises:
        InputError: for an unknown method or option, a missing calibration batch, variables that
            are not of `source`, and a target that differs from the source in a field that the
            method keeps; the last names the field and the methods that free it.
    """
    if method not in METHODS:
        raise InputError(f'The method must be one of {", ".join(METHODS)}; received {method!r}.')
    chosen, options = METHODS[method], dict(options or {})
    known = list(inspect.signature(chosen.build).parameters)[len(COMMON) :]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise InputError(
            f'{method!r} takes the options {known or "none"}; received {", ".join(unknown)}.'
        )
    if chosen.needs_calibration and calibration is None:
        raise InputError(
            f'{method!r} measures the source model: give it a calibration batch of its tokens.'
        )
    _require_reachable(method, source, target)
    _require_variables('The source', source, variables)
    built, params, routing = chosen.build(
        source, variables, target, key=key, calibration=calibration, **options
    )
    if built.moe_layers != target.moe_layers:
        raise InputError(
            f'{method!r} leaves experts in the layers {_numbers(built)}; the target has them in '
            f'{_numbers(target)}. Set its moe.layers to the former.'
        )
    params = jax.tree.map(lambda x: x.astype(target.param_dtype), params)
    made = {'params': relaid(built, target, params), 'routing': relaid(built, target, routing)}
    made = {name: collection for name, collection in made.items() if collection}
    _require_variables('What came out for the target', target, made)
    return made


def differing_fields(a: Any, b: Any, prefix: str = '') -> Iterator[tuple[str, Any, Any]]:
    """Yields the dotted name and both values of every field in which two configs differ."""
    for field in dataclasses.fields(a):
        name, x, y = prefix + field.name, getattr(a, field.name), getattr(b, field.name)
        if dataclasses.is_dataclass(x) and type(x) is type(y):
            yield from differing_fields(x, y, f'{name}.')
        elif x != y:
            yield name, x, y


def _require_reachable(method: str, source: TransformerConfig, target: TransformerConfig) -> None:
    for name, x, y in differing_fields(source, target):
        if _is_among(name, (*METHODS[method].frees, *EXECUTION)):
            continue
        able = [other for other, spec in METHODS.items() if _is_among(name, spec.frees)]
        others = f', or use {", ".join(able)}' if able else ''
        raise InputError(
            f"{method!r} keeps {name}: the source has {x!r}, the target {y!r}. Set the target's to "
            f'the former{others}.'
        )


def _is_among(name: str, fields: tuple[str, ...]) -> bool:
    return any(name == field or name.startswith(f'{field}.') for field in fields)


def _require_variables(whose: str, config: TransformerConfig, variables: Tree) -> None:
    """Compares structure and shapes with what the config's model has."""
    have, need = (
        {
            jax.tree_util.keystr(path, simple=True, separator='/'): leaf.shape
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        for tree in (variables, abstract_variables(Transformer(config)))
    )
    for name in sorted({*have, *need}):
        if have.get(name) != need.get(name):
            raise InputError(
                f'{whose} must have the variables of its config: {name} has shape '
                f'{need.get(name, "(absent)")} there; received {have.get(name, "none")}.'
            )


def _numbers(config: TransformerConfig) -> list[int]:
    return np.flatnonzero(config.moe_layers).tolist()
