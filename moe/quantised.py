"""Matrices in a byte a number or less, with scales: a quarter of float32's bytes, and fewer.

    kernel[i, o] ~ values[o, i] * scales[o, i // size],
    scales[o, g] = max over the group of |kernel[i, o]| / bound

`moe.quantising` makes them of a model's parameters; here is what they are, and their products.

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
from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Num

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
        floats: of it, [*batch, *outputs, inputs].
        kind: what it is of.
        outputs: how many axes stand for them.
    """

    floats: Float[Array, '*kept inputs']
    kind: Kind = flax.struct.field(pytree_node=False)
    outputs: int = flax.struct.field(pytree_node=False)

    @property
    def batch_axes(self) -> int:
        """How many axes there are of several."""
        return len(self.floats.shape) - 1 - self.outputs


@flax.struct.dataclass
class Quantised:
    """A matrix, or several along leading axes.

    Attributes:
        values: [*batch, *outputs, inputs], in the dtype of a `Format`.
        scales: of each output's groups of inputs, float32, above zero.
        outputs: how many axes stand for them.
    """

    values: Num[Array, '*kept inputs']
    scales: Float[Array, '*kept groups']
    outputs: int = flax.struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what they stand for, `(*batch, inputs, *outputs)`."""
        *others, inputs = self.values.shape
        batch = len(others) - self.outputs
        return *others[:batch], inputs, *others[batch:]


Kernel = Array | Quantised


def stored_kernel(
    module: nn.Module,
    name: str,
    read: Callable[[], Array],
    outputs: int,
    *,
    batch_axes: int = 0,
) -> Kernel:
    """Returns a module's matrix: quantised where the variables hold it so, else what `read` reads.

    A pass in which the collection `quantised` is mutable leaves the floats there, outputs first,
    for `moe.quantising` to round.

    Args:
        module: whose it is, bound.
        name: of the matrix.
        read: returns it as floats, [*batch, *inputs, *outputs].
        outputs: how many axes they have.
        batch_axes: how many there are of several: one where it is of experts.
    """
    if module.has_variable(COLLECTION, name):
        return Quantised(**module.get_variable(COLLECTION, name), outputs=outputs)
    kernel = read()
    if not module.is_initializing() and module.is_mutable_collection(COLLECTION):
        kind = 'experts' if batch_axes else 'other'
        matrix = Matrix(outputs_first(kernel, outputs, batch_axes), kind, outputs)
        module.put_variable(COLLECTION, name, matrix)
    return kernel


def rounded(
    kernel: Float[Array, '*kernel'],
    outputs: int,
    form: Format = INT8,
    *,
    batch_axes: int = 0,
) -> Quantised:
    """Rounds to the nearest multiple of each scale; that of a group of zeros is 1.

    Args:
        kernel: [*batch, *inputs, *outputs].
        outputs: how many axes they have.
        form: what the numbers become.
        batch_axes: how many there are of several.
    """
    matrix = outputs_first(kernel, outputs, batch_axes)
    return Quantised(**values_and_scales(matrix, form), outputs=outputs)


def outputs_first(
    kernel: Float[Array, '*kernel'], outputs: int, batch_axes: int
) -> Float[Array, '*kept inputs']:
    """Lays a kernel [*batch, *inputs, *outputs] so that the inputs of an output lie together."""
    first = kernel.ndim - outputs
    last = jnp.moveaxis(
        kernel, tuple(range(batch_axes, first)), tuple(range(batch_axes - first, 0))
    )
    return last.reshape(*last.shape[: batch_axes + outputs], -1)


def values_and_scales(matrix: Float[Array, '*kept inputs'], form: Format) -> dict[str, Array]:
    """Returns what `rounded` does of matrices with their outputs first, by name."""
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
    return jnp.moveaxis(wide, -1, -1 - weight.outputs)


def _as_floats(weight: Quantised) -> Float[Array, '*kept inputs']:
    grouped = (*weight.scales.shape, -1)
    wide = weight.values.astype(jnp.float32).reshape(grouped) * weight.scales[..., None]
    return wide.reshape(weight.values.shape)


def joined(weight: Kernel) -> Kernel:
    """Lays all outputs of [E, inputs, *outputs] along one axis."""
    if isinstance(weight, Quantised):
        values, scales = (
            leaf.reshape(len(leaf), -1, leaf.shape[-1]) for leaf in (weight.values, weight.scales)
        )
        return Quantised(values, scales, outputs=1)
    return weight.reshape(*weight.shape[:2], -1)


def halves(weight: Quantised) -> tuple[Quantised, Quantised]:
    """Returns the two matrices along the first axis of outputs of one."""
    first, second = (
        Quantised(weight.values[half], weight.scales[half], weight.outputs - 1) for half in (0, 1)
    )
    return first, second


def product(
    x: Float[Array, 'N inputs'], weight: Quantised, dtype: DTypeLike | None = None
) -> Float[Array, 'N *outputs']:
    """Multiplies rows by one matrix; sums and scales are float32.

    Args:
        x: the rows.
        weight: of one matrix.
        dtype: of the result; None for that of `x`.
    """
    # Bound to the rows: a loop over tokens would convert the matrix once, before it, and then read
    # floats.
    x, weight = jax.lax.optimization_barrier((x, weight))
    outputs = weight.values.shape[:-1]
    whole = weight.scales.shape[-1] == 1
    values = (weight.values if whole else _as_floats(weight)).astype(x.dtype)
    values = values.reshape(-1, values.shape[-1])

    def rows(x: Array) -> Array:
        return jnp.matmul(x, values.T, preferred_element_type=jnp.float32)

    def one_by_one(x: Array) -> Array:
        return jnp.concatenate([rows(row) for row in jnp.split(x, len(x))])

    few = whole and len(x) <= FEW_ROWS
    sums = jax.lax.platform_dependent(x, cpu=one_by_one, default=rows) if few else rows(x)
    scaled = sums * weight.scales.reshape(-1) if whole else sums
    return scaled.astype(dtype or x.dtype).reshape(-1, *outputs)
