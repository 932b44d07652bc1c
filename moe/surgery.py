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

from moe import surgery_checks as checks
from moe import surgery_methods as methods
from moe.centroids import input_centroids
from moe.config import TransformerConfig
from moe.densify import average_experts, concatenate_experts
from moe.errors import InputError
from moe.fewer_experts import best_experts, prune_experts
from moe.importance import Importance, importance
from moe.merge import cluster_experts, merge_experts, weight_features
from moe.mtp_surgery import with_modules, without_modules
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
    'input_centroids',
    'merge_experts',
    'method_options',
    'needs_calibration',
    'prune_depth',
    'prune_experts',
    'prune_width',
    'require_reachable',
    'upcycle',
    'weight_features',
    'with_modules',
    'without_modules',
]

# How a model is stored and run, not what it computes: any method may change these.
EXECUTION = (
    'scan_layers',
    'remat',
    'dtype',
    'param_dtype',
    'moe.dispatch',
    'moe.capacity_factor',
    'moe.exchange_factor',
    'moe.exchange_chunks',
    'moe.router.jitter',
)
# Put on, or taken off, whatever the method.
MODULES = ('mtp_depth',)
COMMON = ('source', 'variables', 'target', 'key', 'calibration')
EXPERT_COUNTS = ('moe.router.num_experts', 'moe.router.experts_per_token')
DENSE_FIELDS = ('moe', 'mlp_dim')


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to the variables of a target config.

    Attributes:
        build: `(source, variables, target, *, key, calibration, **options)` -> the config it
            reached, `params`, `routing`.
        check: `(source, target, **options)` raises where the target cannot be reached.
        frees: the fields, by dotted name, in which the target may differ from the source.
        measures: whether it needs a calibration batch.
    """

    build: Callable[..., methods.Built]
    check: Callable[..., None]
    frees: tuple[str, ...] = ()
    measures: bool = False


METHODS: dict[str, Method] = {
    'copy': Method(methods.copied, checks.copied),
    'upcycle': Method(methods.upcycled, checks.upcycled, frees=('moe',)),
    'prune': Method(
        methods.pruned,
        checks.pruned,
        frees=(
            'embed_dim',
            'mlp_dim',
            'num_layers',
            'attention',
            'moe.layers',
            'moe.first_dense_layers',
            'moe.layer_step',
        ),
        measures=True,
    ),
    'prune_experts': Method(
        methods.with_experts_pruned, checks.with_experts_pruned, EXPERT_COUNTS, measures=True
    ),
    'merge_experts': Method(
        methods.with_experts_merged, checks.with_experts_merged, EXPERT_COUNTS, measures=True
    ),
    'average_experts': Method(
        methods.with_experts_averaged, checks.with_experts_averaged, DENSE_FIELDS, measures=True
    ),
    'concatenate_experts': Method(
        methods.with_experts_concatenated,
        checks.with_experts_concatenated,
        DENSE_FIELDS,
        measures=True,
    ),
}


def method_options(method: str) -> dict[str, Any]:
    """Returns the options of a method, with their defaults.

    Raises:
        InputError: for an unknown method.
    """
    if method not in METHODS:
        raise InputError(f'The method must be one of {", ".join(METHODS)}; received {method!r}.')
    parameters = list(inspect.signature(METHODS[method].build).parameters.values())
    return {each.name: each.default for each in parameters[len(COMMON) :]}


def needs_calibration(method: str, options: Mapping[str, Any] | None = None) -> bool:
    """Whether a method measures the source, which takes a calibration batch."""
    return METHODS[method].measures or (options or {}).get('router') == 'centroids'


def require_reachable(
    method: str,
    source: TransformerConfig,
    target: TransformerConfig,
    options: Mapping[str, Any] | None = None,
) -> None:
    """Refuses what a method cannot do, told from the configs alone.

    Args:
        method: a key of `METHODS`.
        source: config of the model there is.
        target: config of the model to be.
        options: of the method; the others have their defaults.

    Raises:
        InputError: for an unknown method or option, and a target that differs from the source in a
            field that the method keeps, or in a way that it cannot make; names the field, and the
            methods that free it.
    """
    known = method_options(method)
    unknown = sorted(set(options or {}) - set(known))
    if unknown:
        raise InputError(
            f'{method!r} takes the options {list(known) or "none"}; received {", ".join(unknown)}.'
        )
    for whose, config in (('source', source), ('target', target)):
        if config.moe is not None and config.moe.storage != 'fused':
            raise InputError(
                f"{method!r} needs moe.storage='fused'; that of the {whose} is "
                f'{config.moe.storage!r}. moe.stack_experts puts the experts of a layer together.'
            )
    for name, x, y in differing_fields(source, target):
        if _is_among(name, (*METHODS[method].frees, *EXECUTION, *MODULES)):
            continue
        able = [other for other, spec in METHODS.items() if _is_among(name, spec.frees)]
        others = f', or use {", ".join(able)}' if able else ''
        raise InputError(
            f"{method!r} keeps {name}: the source has {x!r}, the target {y!r}. Set the target's to "
            f'the former{others}.'
        )
    plain = dataclasses.replace(source, mtp_depth=0)
    METHODS[method].check(plain, target, **known | dict(options or {}))


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
        key: for what is drawn at random: the router and the noise of 'upcycle', new modules of
            multi-token prediction.
        calibration: where the method measures the source, see `needs_calibration`.
        options: keyword arguments of the method beyond these.

    Returns:
        Variables in the structure and shapes of `Transformer(target).init`, in its `param_dtype`.
        Modules of multi-token prediction are those of the source where the method is 'copy', and
        otherwise new (see `moe.mtp_surgery.with_modules`).

    Raises:
        InputError: as `require_reachable`; for a missing calibration batch, and for variables that
            are not of `source`.
    """
    require_reachable(method, source, target, options)
    if needs_calibration(method, options) and calibration is None:
        raise InputError(
            f'{method!r} measures the source model: give it a calibration batch of its tokens.'
        )
    _require_variables('The source', source, variables)
    plain, layers = without_modules(source, variables)
    built, params, routing = METHODS[method].build(
        plain, layers, target, key=key, calibration=calibration, **(options or {})
    )
    if built.moe_layers != target.moe_layers:
        raise InputError(
            f'{method!r} leaves experts in the layers {_numbers(built)}; the target has them in '
            f'{_numbers(target)}. Set its moe.layers to the former.'
        )
    params = jax.tree.map(lambda x: x.astype(target.param_dtype), params)
    made = {'params': relaid(built, target, params), 'routing': relaid(built, target, routing)}
    made = {name: collection for name, collection in made.items() if collection}
    old = variables if method == 'copy' else None
    made = with_modules(target, made, key=jax.random.fold_in(key, target.num_layers), old=old)
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
