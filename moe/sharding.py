"""The device mesh, and logical axis names mapped onto it; a rule that cannot hold is an error.

Linen replicates an array without a word where a logical axis is misspelt or two of them meet on one
mesh axis. Here either raises, and the message names the parameter.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moe.errors import InputError

MESH_AXES = ('data', 'fsdp', 'expert', 'tensor')
LogicalAxes = tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices lie along each mesh axis.

    Attributes:
        data: replicas of the parameters; the batch is split.
        fsdp: the batch is split, and the parameters along their `embed` axis.
        expert: the batch is split, and the experts.
        tensor: heads, hidden widths and the vocabulary are split; the batch is not.

    One of them may be -1: all the devices that the others leave.
    """

    data: int = 1
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for axis, size in zip(MESH_AXES, self._asked(), strict=True):
            whole = isinstance(size, int) and not isinstance(size, bool)
            if not whole or (size < 1 and size != -1):
                raise InputError(
                    f'mesh.{axis} must be a positive integer, or -1 for the devices that the other '
                    f'axes leave; received {size!r}.'
                )
        if self._asked().count(-1) > 1:
            raise InputError(
                f'At most one mesh axis may be -1; received {self}. Give the others a number.'
            )

    def _asked(self) -> tuple[int, ...]:
        return tuple(getattr(self, axis) for axis in MESH_AXES)

    def sizes(self, device_count: int) -> tuple[int, ...]:
        """Returns the size of each mesh axis, in the order of `MESH_AXES`, with -1 filled in.

        Raises:
            InputError: where the product of the sizes cannot be `device_count`.
        """
        asked = self._asked()
        known = math.prod(size for size in asked if size != -1)
        if -1 in asked and device_count % known == 0:
            return tuple(device_count // known if size == -1 else size for size in asked)
        if known == device_count:
            return asked
        wanted = ', '.join(f'{axis}={size}' for axis, size in zip(MESH_AXES, asked, strict=True))
        required = f'a multiple of {known}' if -1 in asked else f'exactly {known}'
        raise InputError(
            f'The mesh ({wanted}) needs {required} devices; there are {device_count}. Choose sizes '
            f'whose product is {device_count}, or set one axis to -1.'
        )


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes the mesh of `MESH_AXES`, always all four, of size 1 where unused.

    The axes are of type Auto: Linen fails on the Explicit axes that `jax.make_mesh` defaults to.

    Args:
        config: the size of each axis.
        devices: those to use, each once; default all devices of all processes.

    Returns:
        A mesh with axes `data`, `fsdp`, `expert`, `tensor`.

    Raises:
        InputError: where the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    axis_types = (AxisType.Auto,) * len(MESH_AXES)
    return jax.make_mesh(
        config.sizes(len(devices)), MESH_AXES, axis_types=axis_types, devices=devices
    )


@dataclasses.dataclass(frozen=True)
class LogicalRules:
    """For each logical axis, the mesh axes that split it, outermost first; () leaves it whole."""

    batch: tuple[str, ...] = ('data', 'fsdp', 'expert')
    length: tuple[str, ...] = ()
    embed: tuple[str, ...] = ('fsdp',)
    mlp: tuple[str, ...] = ('tensor',)
    heads: tuple[str, ...] = ('tensor',)
    kv_heads: tuple[str, ...] = ('tensor',)
    head_dim: tuple[str, ...] = ()
    vocab: tuple[str, ...] = ('tensor',)
    experts: tuple[str, ...] = ('expert',)
    layers: tuple[str, ...] = ()
    pages: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            axes = getattr(self, field.name)
            if not isinstance(axes, tuple) or not set(axes) <= set(MESH_AXES):
                raise InputError(
                    f'The rule of logical axis {field.name!r} must be a tuple of mesh axes out of '
                    f'{", ".join(MESH_AXES)}; received {axes!r}.'
                )


DEFAULT_RULES = LogicalRules()


def spec_for(
    axes: LogicalAxes, rules: LogicalRules = DEFAULT_RULES, *, where: str = 'Array'
) -> PartitionSpec:
    """Maps the logical axes of one array onto mesh axes.

    Args:
        axes: a name for each dimension; None leaves it whole.
        rules: what splits each logical axis.
        where: what the array is called in an error.

    Returns:
        A spec with one entry for each dimension.

    Raises:
        InputError: for a name without a rule, or two dimensions split by one mesh axis.
    """
    known = [field.name for field in dataclasses.fields(rules)]
    taken: dict[str, str] = {}
    entries: list[str | tuple[str, ...] | None] = []
    for name in axes:
        if name is not None and name not in known:
            raise InputError(
                f'{where} has the unknown logical axis {name!r} in {axes}; choose from '
                f'{", ".join(known)}, or None to leave the dimension whole.'
            )
        mesh_axes = () if name is None else getattr(rules, name)
        for mesh_axis in mesh_axes:
            if mesh_axis in taken:
                raise InputError(
                    f'{where} with logical axes {axes} has both {taken[mesh_axis]!r} and {name!r} '
                    f'on mesh axis {mesh_axis!r}; one array can use a mesh axis once. Change the '
                    f'rule of one of them.'
                )
            taken[mesh_axis] = str(name)
        entries.append(mesh_axes[0] if len(mesh_axes) == 1 else mesh_axes or None)
    return PartitionSpec(*entries)


def sharding_for(
    shape: tuple[int, ...],
    axes: LogicalAxes,
    mesh: Mesh,
    rules: LogicalRules = DEFAULT_RULES,
    *,
    where: str = 'Array',
) -> NamedSharding:
    """Returns the sharding of one array, having checked that every dimension divides.

    Args:
        shape: of the whole array.
        axes: a logical name, or None, for each dimension.
        mesh: as `make_mesh` makes it.
        rules: what splits each logical axis.
        where: what the array is called in an error.

    Raises:
        InputError: as `spec_for`; or for a dimension that its mesh axes do not divide, or where
            there are not as many names as dimensions.
    """
    if len(axes) != len(shape):
        raise InputError(
            f'{where} of shape {shape} needs {len(shape)} logical axes; received {axes}.'
        )
    spec = spec_for(axes, rules, where=where)
    for dim, (size, name, entry) in enumerate(zip(shape, axes, spec, strict=True)):
        mesh_axes = (entry,) if isinstance(entry, str) else entry or ()
        shards = math.prod(mesh.shape[axis] for axis in mesh_axes)
        if size % shards:
            raise InputError(
                f'{where} of shape {shape}: dimension {dim} ({name!r}, size {size}) must be a '
                f'multiple of {shards}, the size of mesh axes {mesh_axes}. Change the size, or '
                f'make those axes of the mesh smaller.'
            )
    return NamedSharding(mesh, spec)


def constrain(
    x: jax.Array, axes: LogicalAxes, mesh: Mesh | None, rules: LogicalRules = DEFAULT_RULES
) -> jax.Array:
    """Constrains an activation to the sharding of its logical axes; the identity without a mesh.

    Args:
        x: any array, under `jit`.
        axes: a logical name, or None, for each dimension.
        mesh: None on one device.
        rules: what splits each logical axis.

    Raises:
        InputError: as `sharding_for`.
    """
    if mesh is None:
        return x
    sharding = sharding_for(x.shape, axes, mesh, rules, where='Activation')
    return jax.lax.with_sharding_constraint(x, sharding)


def batch_sharding(mesh: Mesh, rules: LogicalRules = DEFAULT_RULES) -> NamedSharding:
    """Returns the sharding of arrays [B, ...]: rows split over the batch axes, the rest whole."""
    return NamedSharding(mesh, spec_for(('batch',), rules))


@functools.lru_cache(maxsize=32)
def _boxed_variables(model: nn.Module) -> Any:
    """Traces the initializer, which takes far longer than what it is asked for."""
    return jax.eval_shape(_initializer(model), jax.random.key(0))


def _initializer(model: nn.Module) -> Callable[[jax.Array], Any]:
    """Returns `key -> variables`; they depend neither on the mesh nor on the tokens."""
    plain = model.clone(mesh=None) if hasattr(model, 'mesh') else model
    return lambda key: plain.init(key, jnp.zeros((1, 1), jnp.int32))


def abstract_variables(model: nn.Module) -> Any:
    """Returns the model's variables, unboxed, as `jax.ShapeDtypeStruct`s; nothing is computed."""
    return nn.unbox(_boxed_variables(model))


def _is_box(leaf: Any) -> bool:
    return isinstance(leaf, nn.Partitioned)


def _axes_by_leaf(boxed: Any) -> Any:
    return jax.tree_util.tree_map_with_path(_named_axes, boxed, is_leaf=_is_box)


def _named_axes(path: Any, leaf: Any) -> LogicalAxes:
    if _is_box(leaf):
        return tuple(leaf.names)
    if path[0].key == 'params':
        raise InputError(
            f'Parameter {_name(path)} of shape {leaf.shape} has no logical axes and would be '
            f'replicated. Give its initializer to flax.linen.with_logical_partitioning.'
        )
    return (None,) * leaf.ndim


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator='/')


def logical_axes(model: nn.Module) -> Any:
    """Returns, for each variable, a tuple that names the logical axis of each dimension.

    Variables outside `params` that carry no names (selection biases) are replicated: all None.

    Raises:
        InputError: for a parameter that carries no names.
    """
    return _axes_by_leaf(_boxed_variables(model))


def variable_shardings(model: nn.Module, mesh: Mesh, rules: LogicalRules = DEFAULT_RULES) -> Any:
    """Returns a `NamedSharding` for each variable, in the tree of the unboxed `model.init(...)`.

    Args:
        model: whose `init(key, tokens)` gives parameters boxed by `with_logical_partitioning`.
        mesh: as `make_mesh` makes it.
        rules: what splits each logical axis.

    Raises:
        InputError: naming the parameter, where a logical axis is unknown, two logical axes of one
            array fall on one mesh axis, a dimension does not divide, or names are missing.
    """

    def sharding(path: Any, leaf: Any, axes: LogicalAxes) -> NamedSharding:
        return sharding_for(leaf.shape, axes, mesh, rules, where=f'Parameter {_name(path)}')

    boxed = _boxed_variables(model)
    return jax.tree_util.tree_map_with_path(sharding, nn.unbox(boxed), _axes_by_leaf(boxed))


def init_sharded(
    model: nn.Module, key: jax.Array, mesh: Mesh, rules: LogicalRules = DEFAULT_RULES
) -> Any:
    """Initializes the model's variables, unboxed, each born on the devices that hold it.

    The random draws are those of one device, so the values agree to the last rounding.

    Raises:
        InputError: as `variable_shardings`.
    """
    shardings = variable_shardings(model, mesh, rules)
    init = _initializer(model)
    return jax.jit(lambda key: nn.unbox(init(key)), out_shardings=shardings)(key)
