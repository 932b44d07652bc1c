"""Learnt maps from a student's width to its teacher's: trained with it, and dropped where it ends.

They are a subtree of the parameters that are trained, so that the optimizer, checkpoints and meshes
hold them as they hold the rest; the model does not look at them.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from distill.feature_checks import layer_pairs
from distill.features import Feature, feature_names
from moe.config import TransformerConfig
from moe.sharding import LogicalAxes, sharding_for

Tree = Any

PROJECTORS = 'projectors'
# Of `distill.dual_space`: queries, the teacher into the student's space, the student into its.
DUAL = ('dual_query', 'dual_teacher', 'dual_student')
_AXES: LogicalAxes = ('layers', 'embed', None)
_INIT = jax.nn.initializers.variance_scaling(1.0, 'fan_in', 'normal', batch_axis=(0,))


def projector_shapes(
    features: Sequence[Feature],
    student: TransformerConfig,
    teacher: TransformerConfig,
    *,
    dual: bool = False,
) -> Tree:
    """Returns what the parameters have beside those of the model: {} where nothing is projected.

    Args:
        features: of an objective, comparable: see `distill.feature_checks`.
        student: its config; projectors have the dtype of its parameters.
        teacher: its config.
        dual: whether both models are mapped into each other's space, see `distill.dual_space`.

    Returns:
        `{PROJECTORS: {name: kernels [pairs, D student, D teacher]}}` as `jax.ShapeDtypeStruct`s, by
        `distill.features.feature_names`; and where `dual`, those of `DUAL`, of one pair.
    """
    shapes, dtype = {}, jnp.dtype(student.param_dtype)
    if dual:
        ours, theirs = student.embed_dim, teacher.embed_dim
        sizes = (2 * ours, 2 * theirs), (theirs, ours), (ours, theirs)
        for name, size in zip(DUAL, sizes, strict=True):
            shapes[name] = jax.ShapeDtypeStruct((1, *size), dtype)
    for name, feature in zip(feature_names(features), features, strict=True):
        if feature.project:
            pairs = max(1, len(layer_pairs(feature, student, teacher)))
            shape = (pairs, student.embed_dim, teacher.embed_dim)
            shapes[name] = jax.ShapeDtypeStruct(shape, dtype)
    return {PROJECTORS: shapes} if shapes else {}


def initial_projectors(shapes: Tree, key: jax.Array) -> Tree:
    """Draws projectors of variance 1 / D, which on average keep a channel's mean square."""
    leaves, structure = jax.tree.flatten(shapes)
    keys = jax.random.split(key, max(1, len(leaves)))
    drawn = [
        _INIT(own, leaf.shape, leaf.dtype)
        for own, leaf in zip(keys[: len(leaves)], leaves, strict=True)
    ]
    return structure.unflatten(drawn)


def without_projectors(params: Tree) -> Tree:
    """Returns the parameters of the model alone."""
    return {name: subtree for name, subtree in params.items() if name != PROJECTORS}


def projector_axes(features: Sequence[Feature], *, dual: bool = False) -> Tree:
    """Returns the logical axes of the projectors, shaped like them."""
    named = zip(feature_names(features), features, strict=True)
    axes = {name: _AXES for name, feature in named if feature.project}
    axes |= dict.fromkeys(DUAL, _AXES) if dual else {}
    return {PROJECTORS: axes} if axes else {}


def projector_shardings(shapes: Tree, mesh: Mesh) -> Tree:
    """Returns the shardings of the projectors: a student's width is split as it is elsewhere.

    Raises:
        InputError: where the mesh does not divide that width.
    """
    return jax.tree.map(
        lambda leaf: sharding_for(leaf.shape, _AXES, mesh, where='A projector'), shapes
    )


def project(
    states: Float[Array, 'B T Ds'], kernel: Float[Array, 'Ds Dt']
) -> Float[Array, 'B T Dt']:
    """Returns `states @ kernel`, float32; the factors are in the dtype of the states."""
    kernel = kernel.astype(states.dtype)
    return jnp.einsum('btd,de->bte', states, kernel, preferred_element_type=jnp.float32)
