"""A model's matrices quantised, on one device or each part where the mesh has it.

Values are split as the kernels that they stand for, and so are scales along outputs. Along inputs
those of one group are whole, and those of several are split as the inputs are: no group is.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from moe.errors import InputError
from moe.quantised import (
    COLLECTION,
    FORMATS,
    Matrix,
    Weights,
    outputs_first,
    values_and_scales,
)
from moe.sharding import (
    LogicalAxes,
    abstract_variables,
    logical_axes,
    sharding_for,
    variable_shardings,
)


def quantise(model: Any, variables: Mapping[str, Any], weights: Weights = 'int8') -> dict[str, Any]:
    """Returns the variables with every matrix quantised, in the collection `quantised`.

    On a mesh every number is that of one device: the maxima, of which the scales are made, are over
    all shards of an output's inputs.

    Args:
        model: a `Transformer`, with a mesh or without.
        variables: all of them, unboxed: {'params': ..., 'routing': ...}, placed on the mesh.
        weights: a key of `FORMATS`.

    Raises:
        InputError: where the model's experts are stored one by one, or the mesh splits a group.
    """
    matrices = matrix_shapes(model)

    def narrow(params: Mapping[str, Any]) -> Any:
        params = _with_head(params, jnp.transpose)

        def one(path: Any, matrix: Matrix) -> dict[str, Array]:
            kernel = outputs_first(_at(params, path), matrix.outputs, matrix.batch_axes)
            return values_and_scales(kernel, FORMATS[weights][matrix.kind])

        return jax.tree.map_with_path(one, matrices, is_leaf=_is_matrix)

    shardings = None if model.mesh is None else quantised_shardings(model, weights)[COLLECTION]
    found = jax.jit(narrow, out_shardings=shardings)(variables['params'])
    return {**variables, 'params': _without(variables['params'], found), COLLECTION: found}


def matrix_shapes(model: Any) -> dict[str, Any]:
    """Returns which parameters `quantise` rounds, without computing anything.

    Args:
        model: a `Transformer`, with a mesh or without.

    Returns:
        A `Matrix` of a shape at the path of each. A tied head stands at `head/kernel`.

    Raises:
        InputError: where the model's experts are stored one by one.
    """
    _require_fused(model)
    alone = model.clone(mesh=None)
    return jax.eval_shape(functools.partial(_matrices, alone), abstract_variables(alone))


def quantised_shardings(model: Any, weights: Weights) -> dict[str, Any]:
    """Returns a `NamedSharding` for each variable that `quantise` returns.

    Args:
        model: a `Transformer` with a mesh.
        weights: a key of `FORMATS`.

    Raises:
        InputError: as `quantise` and `moe.sharding.variable_shardings`.
    """
    mesh, matrices = model.mesh, matrix_shapes(model)
    axes = _with_head(logical_axes(model)['params'], lambda names: names[::-1])

    def shardings(path: Any, matrix: Matrix) -> dict[str, Any]:
        where = jax.tree_util.keystr(path, simple=True, separator='/')
        *others, inputs = matrix.floats.shape
        groups = inputs // FORMATS[weights][matrix.kind].group_size(inputs)
        kept, summed = _kept_and_summed(_at(axes, path), matrix)
        by_group = summed if groups > 1 else None
        what = f'The scales of {where}, one for each group of inputs,'
        return {
            'values': sharding_for(matrix.floats.shape, (*kept, summed), mesh, where=where),
            'scales': sharding_for((*others, groups), (*kept, by_group), mesh, where=what),
        }

    found = jax.tree.map_with_path(shardings, matrices, is_leaf=_is_matrix)
    placed = {'routing': {}} | variable_shardings(model, mesh)
    return {**placed, 'params': _without(placed['params'], found), COLLECTION: found}


def _kept_and_summed(axes: LogicalAxes, matrix: Matrix) -> tuple[LogicalAxes, str | None]:
    """Names the axes before the inputs, and the one that the inputs are laid along."""
    batch, last = matrix.batch_axes, len(axes) - matrix.outputs
    # Of several axes of inputs the first is the outermost; channels of a head are never split.
    return (*axes[:batch], *axes[last:]), axes[batch]


def _matrices(model: Any, variables: Mapping[str, Any]) -> Any:
    tokens = jnp.zeros((1, 2), jnp.int32)
    ahead = model.config.mtp_depth > 0
    return model.apply(variables, tokens, mtp=ahead, mutable=[COLLECTION])[1][COLLECTION]


def _is_matrix(node: Any) -> bool:
    return isinstance(node, Matrix)


def _at(tree: Any, path: Any) -> Any:
    return functools.reduce(lambda subtree, key: subtree[key.key], path, tree)


def _with_head(params: Mapping[str, Any], transposed: Any) -> Mapping[str, Any]:
    """Gives a tied model a head, which is its embedding transposed."""
    if 'head' in params:
        return params
    return {**params, 'head': {'kernel': transposed(params['embed']['embedding'])}}


def _require_fused(model: Any) -> None:
    moe = model.config.moe
    if moe is not None and moe.storage != 'fused':
        raise InputError(
            "Quantised matrices need moe.storage='fused', a layer's experts in one array; the "
            f'model has {moe.storage!r}. Leave out the quantisation.'
        )


def _without(params: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves out the leaves that were found to be matrices."""
    kept = {}
    for name, subtree in params.items():
        if name not in found:
            kept[name] = subtree
        elif isinstance(subtree, Mapping):
            kept[name] = _without(subtree, found[name])
    return {name: subtree for name, subtree in kept.items() if not _empty(subtree)}


def _empty(subtree: Any) -> bool:
    return isinstance(subtree, Mapping) and not subtree
