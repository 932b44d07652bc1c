"""Matrices in a byte a number or less, with scales: a quarter of float32's bytes, and fewer.

    kernel[i, o] ~ values[o, i] * scales[o, i // size],
    scales[o, g] = max over the group of |kernel[i, o]| / bound

Every matrix that hidden states are multiplied by is one: of attention, MLPs, experts and prediction
modules, and the head. Norms, biases, convolutions and routers stay: they are small, and a choice of
experts is not to hang on rounding. So does the embedding, of which a token reads one row (a tied
head is a matrix of its own here), and `kv_up` of latent attention, which is multiplied along either
axis.

The numbers of an output lie together: a CPU then reads integers of 8 bits as they are and converts
them on the way, where a few rows are multiplied. More rows take a float copy of one matrix at a
time, as numbers in groups do always.

Source: the rounding is that of `qwix.quantize`, by 'absmax', by which `distill.straight_through`
trains.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Num

from moe.errors import InputError
from moe.sharding import abstract_variables

COLLECTION = 'quantised'
FEW_ROWS = 4  # of more, as many products that convert as they read are slower than one copy


@dataclasses.dataclass(frozen=True)
class Format:
    """What a number of a matrix is kept as.

    Attributes:
        dtype: of it.
        bound: what the largest of a group is scaled to; of integers half a step past the last.
        group: the most inputs of an output that share a scale; None for all of them.
    """

    dtype: str
    bound: float
    group: int | None = None

    def group_size(self, inputs: int) -> int:
        """Returns how many inputs share a scale: as many as may that divide them all."""
        largest = inputs if self.group is None else min(self.group, inputs)
        return next(size for size in range(largest, 0, -1) if inputs % size == 0)


INT8 = Format('int8', 127.5)
FP8 = Format('float8_e4m3fn', 448.0)
INT4 = Format('int4', 7.5, group=64)

Weights = Literal['int8', 'fp8', 'int4_experts']
Kind = Literal['experts', 'other']
FORMATS: dict[Weights, dict[Kind, Format]] = {
    'int8': {'experts': INT8, 'other': INT8},
    'fp8': {'experts': FP8, 'other': FP8},
    'int4_experts': {'experts': INT4, 'other': INT8},
}


@flax.struct.dataclass
class Matrix:
    """A matrix that may be quantised, or several along leading axes; or what stands for its shape.

    Attributes:
        floats: of it.
        kind: what it is of.
    """

    floats: Float[Array, '*batch outputs inputs']
    kind: Kind = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class Quantised:
    """A matrix, or several along leading axes.

    Attributes:
        values: in the dtype of a `Format`.
        scales: of each output's groups of inputs, float32, above zero.
        outputs: the axes that the outputs stand for.
    """

    values: Num[Array, '*batch outputs inputs']
    scales: Float[Array, '*batch outputs groups']
    outputs: tuple[int, ...] = flax.struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what they stand for, `(*batch, inputs, *outputs)`."""
        return *self.values.shape[:-2], self.values.shape[-1], *self.outputs


Kernel = Array | Quantised


def stored_kernel(
    module: nn.Module,
    name: str,
    read: Callable[[], Array],
    outputs: tuple[int, ...],
    *,
    batch_axes: int = 0,
) -> Kernel:
    """Returns a module's matrix: quantised where the variables hold it so, else what `read` reads.

    A pass in which the collection `quantised` is mutable leaves the floats there, outputs first,
    for `quantise` to round.

    Args:
        module: whose it is, bound.
        name: of the matrix.
        read: returns it as floats, [*batch, *inputs, *outputs].
        outputs: those axes of it.
        batch_axes: how many there are of the others: one where it is of experts.
    """
    if module.has_variable(COLLECTION, name):
        return Quantised(**module.get_variable(COLLECTION, name), outputs=outputs)
    kernel = read()
    if not module.is_initializing() and module.is_mutable_collection(COLLECTION):
        kind = 'experts' if batch_axes else 'other'
        matrix = Matrix(_outputs_first(kernel, outputs, batch_axes), kind)
        module.put_variable(COLLECTION, name, matrix)
    return kernel


def rounded(
    kernel: Float[Array, '*kernel'],
    outputs: tuple[int, ...],
    form: Format = INT8,
    *,
    batch_axes: int = 0,
) -> Quantised:
    """Rounds to the nearest multiple of each scale; that of a group of zeros is 1.

    Args:
        kernel: [*batch, *inputs, *outputs].
        outputs: those axes of it.
        form: what the numbers become.
        batch_axes: how many there are of the others.
    """
    return Quantised(**_rounded(_outputs_first(kernel, outputs, batch_axes), form), outputs=outputs)


def _outputs_first(kernel: Array, outputs: tuple[int, ...], batch_axes: int) -> Array:
    batch = kernel.shape[:batch_axes]
    return kernel.reshape(*batch, -1, math.prod(outputs)).swapaxes(-1, -2)


def _rounded(matrix: Float[Array, '*batch outputs inputs'], form: Format) -> dict[str, Array]:
    """Returns the values and the scales of matrices with their outputs first."""
    size = form.group_size(matrix.shape[-1])
    wide = matrix.astype(jnp.float32).reshape(*matrix.shape[:-1], -1, size)
    scales = jnp.abs(wide).max(axis=-1) / form.bound
    scales = jnp.where(scales < jnp.sqrt(jnp.finfo(jnp.float32).tiny), 1, scales)
    values = wide / scales[..., None]
    if jnp.issubdtype(form.dtype, jnp.integer):
        # There is one integer more below zero than above.
        values = jnp.clip(jnp.round(values), -form.bound - 0.5, form.bound - 0.5)
    else:
        values = jnp.clip(values, -form.bound, form.bound)
    return {'values': values.reshape(matrix.shape).astype(form.dtype), 'scales': scales}


def dequantised(weight: Kernel, dtype: DTypeLike) -> Float[Array, '*kernel']:
    """Returns a quantised matrix as floats; floats as they are."""
    if not isinstance(weight, Quantised):
        return weight
    wide = _as_floats(weight).astype(dtype)
    return wide.swapaxes(-1, -2).reshape(weight.shape)


def _as_floats(weight: Quantised) -> Float[Array, '*batch outputs inputs']:
    grouped = (*weight.scales.shape, -1)
    wide = weight.values.astype(jnp.float32).reshape(grouped) * weight.scales[..., None]
    return wide.reshape(weight.values.shape)


def joined(weight: Kernel) -> Kernel:
    """Lays all outputs of [E, inputs, *outputs] along one axis."""
    if isinstance(weight, Quantised):
        return weight.replace(outputs=(math.prod(weight.outputs),))  # type: ignore
    return weight.reshape(*weight.shape[:2], -1)


def product(
    x: Float[Array, 'N inputs'], weight: Quantised, dtype: DTypeLike | None = None
) -> Float[Array, 'N outputs']:
    """Multiplies rows by one matrix; sums and scales are float32.

    Args:
        x: the rows.
        weight: of one matrix.
        dtype: of the result; None for that of `x`.
    """
    # Bound to the rows: a loop over tokens would convert the matrix once, before it, and then read
    # floats.
    x, weight = jax.lax.optimization_barrier((x, weight))
    whole = weight.scales.shape[-1] == 1
    values = (weight.values if whole else _as_floats(weight)).astype(x.dtype)

    def rows(x: Array) -> Array:
        return jnp.matmul(x, values.T, preferred_element_type=jnp.float32)

    def one_by_one(x: Array) -> Array:
        return jnp.concatenate([rows(row) for row in jnp.split(x, len(x))])

    few = whole and len(x) <= FEW_ROWS
    sums = jax.lax.platform_dependent(x, cpu=one_by_one, default=rows) if few else rows(x)
    return (sums * weight.scales[:, 0] if whole else sums).astype(dtype or x.dtype)


def quantise(model: Any, variables: Mapping[str, Any], weights: Weights = 'int8') -> dict[str, Any]:
    """Returns the variables with every matrix quantised, in the collection `quantised`.

    Args:
        model: a `Transformer` on one device, whose dispatch is 'grouped' or 'dense'.
        variables: all of them, unboxed: {'params': ..., 'routing': ...}.
        weights: a key of `FORMATS`.

    Raises:
        InputError: where the model has a mesh, or experts that are stored one by one.
    """
    if model.mesh is not None:
        raise InputError(
            'Quantised matrices are multiplied on one device; the model has a mesh. Leave out its '
            'axes (--data, --tensor), or the quantisation.'
        )
    _require_fused(model)

    def narrow(variables: Mapping[str, Any]) -> Any:
        return jax.tree.map(
            lambda matrix: _rounded(matrix.floats, FORMATS[weights][matrix.kind]),
            _matrices(model, variables),
            is_leaf=lambda node: isinstance(node, Matrix),
        )

    found = jax.jit(narrow)(variables)
    kept = _without(variables['params'], found)
    return {**variables, 'params': kept, COLLECTION: found}


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


def _matrices(model: Any, variables: Mapping[str, Any]) -> Any:
    tokens = jnp.zeros((1, 2), jnp.int32)
    ahead = model.config.mtp_depth > 0
    return model.apply(variables, tokens, mtp=ahead, mutable=[COLLECTION])[1][COLLECTION]


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
