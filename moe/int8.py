"""Matrices as integers of 8 bits with a scale for each output: a quarter of float32's bytes.

    kernel[i, o] ~ values[o, i] * scales[o],    scales[o] = max_i |kernel[i, o]| / 127

Every matrix that hidden states are multiplied by is one: of attention, MLPs, experts and prediction
modules, and the head. Norms, biases, convolutions and routers stay: they are small, and a choice of
experts is not to hang on rounding. So does the embedding, of which a token reads one row (a tied
head is a matrix of its own here), and `kv_up` of latent attention, which is multiplied along either
axis.

The numbers of an output lie together: a CPU then reads them as they are and converts them on the
way, where a few rows are multiplied. More rows take a float copy of one matrix at a time.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float
from jaxtyping import Int8 as Integers

from moe.errors import InputError

COLLECTION = 'int8'
LARGEST = 127
FEW_ROWS = 4  # of more, as many products that convert as they read are slower than one copy


@flax.struct.dataclass
class Int8:
    """A matrix, or several along leading axes.

    Attributes:
        values: in [-127, 127].
        scales: of each output, float32, above zero.
        outputs: the axes that the outputs stand for.
    """

    values: Integers[Array, '*batch outputs inputs']
    scales: Float[Array, '*batch outputs']
    outputs: tuple[int, ...] = flax.struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what they stand for, `(*batch, inputs, *outputs)`."""
        return *self.values.shape[:-2], self.values.shape[-1], *self.outputs


Kernel = Array | Int8


def stored_kernel(
    module: nn.Module,
    name: str,
    read: Callable[[], Array],
    outputs: tuple[int, ...],
    *,
    batch_axes: int = 0,
) -> Kernel:
    """Returns a module's matrix: as integers where the variables hold them, else what `read` reads.

    A pass in which the collection `int8` is mutable puts the integers there, see `quantise`.

    Args:
        module: whose it is, bound.
        name: of the matrix.
        read: returns it as floats, [*batch, *inputs, *outputs].
        outputs: those axes of it.
        batch_axes: how many there are of the others.
    """
    if module.has_variable(COLLECTION, name):
        return Int8(**module.get_variable(COLLECTION, name), outputs=outputs)
    kernel = read()
    if not module.is_initializing() and module.is_mutable_collection(COLLECTION):
        whole = quantised(kernel, outputs, batch_axes=batch_axes)
        stored = {'values': whole.values, 'scales': whole.scales}
        module.put_variable(COLLECTION, name, stored)
    return kernel


def quantised(
    kernel: Float[Array, '*kernel'], outputs: tuple[int, ...], *, batch_axes: int = 0
) -> Int8:
    """Rounds to the nearest multiple of each output's scale; an output of zeros has the scale 1.

    Args:
        kernel: [*batch, *inputs, *outputs].
        outputs: those axes of it.
        batch_axes: how many there are of the others.
    """
    batch = kernel.shape[:batch_axes]
    wide = kernel.astype(jnp.float32).reshape(*batch, -1, math.prod(outputs)).swapaxes(-1, -2)
    largest = jnp.abs(wide).max(axis=-1)
    scales = jnp.where(largest > 0, largest / LARGEST, 1)
    values = jnp.round(wide / scales[..., None])
    return Int8(jnp.clip(values, -LARGEST, LARGEST).astype(jnp.int8), scales, outputs)


def dequantised(weight: Kernel, dtype: DTypeLike) -> Float[Array, '*kernel']:
    """Returns integers as floats; floats as they are."""
    if not isinstance(weight, Int8):
        return weight
    wide = weight.values.astype(jnp.float32) * weight.scales[..., None]
    return wide.astype(dtype).swapaxes(-1, -2).reshape(weight.shape)


def joined(weight: Kernel) -> Kernel:
    """Lays all outputs of [E, inputs, *outputs] along one axis."""
    if isinstance(weight, Int8):
        return weight.replace(outputs=(math.prod(weight.outputs),))  # type: ignore
    return weight.reshape(*weight.shape[:2], -1)


def product(
    x: Float[Array, 'N inputs'], weight: Int8, dtype: DTypeLike | None = None
) -> Float[Array, 'N outputs']:
    """Multiplies rows by one matrix; sums and scales are float32.

    Args:
        x: the rows.
        weight: of one matrix.
        dtype: of the result; None for that of `x`.
    """
    # Bound to the rows: a loop over tokens would convert the matrix once, before it, and then read
    # floats.
    x, integers = jax.lax.optimization_barrier((x, weight.values))
    values = integers.astype(x.dtype)

    def rows(x: Array) -> Array:
        return jnp.matmul(x, values.T, preferred_element_type=jnp.float32)

    def one_by_one(x: Array) -> Array:
        return jnp.concatenate([rows(row) for row in jnp.split(x, len(x))])

    few = len(x) <= FEW_ROWS
    sums = jax.lax.platform_dependent(x, cpu=one_by_one, default=rows) if few else rows(x)
    return (sums * weight.scales).astype(dtype or x.dtype)


def quantise(model: Any, variables: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the variables with every matrix as integers, in the collection `int8`.

    Args:
        model: a `Transformer` on one device, whose dispatch is 'grouped' or 'dense'.
        variables: all of them, unboxed: {'params': ..., 'routing': ...}.

    Raises:
        InputError: where the model has a mesh, or experts that are stored one by one.
    """
    _require_fused_on_one_device(model)

    def rounded(variables: Mapping[str, Any]) -> Any:
        tokens = jnp.zeros((1, 2), jnp.int32)
        ahead = model.config.mtp_depth > 0
        return model.apply(variables, tokens, mtp=ahead, mutable=[COLLECTION])[1][COLLECTION]

    integers = jax.jit(rounded)(variables)
    kept = _without(variables['params'], integers)
    return {**variables, 'params': kept, COLLECTION: integers}


def _require_fused_on_one_device(model: Any) -> None:
    if model.mesh is not None:
        raise InputError(
            'Integers of 8 bits are multiplied on one device; the model has a mesh. Leave out its '
            'axes (--data, --tensor), or the quantisation.'
        )
    moe = model.config.moe
    if moe is not None and moe.storage != 'fused':
        raise InputError(
            "Integers of 8 bits need moe.storage='fused', a layer's experts in one array; the "
            f'model has {moe.storage!r}. Leave out the quantisation.'
        )


def _without(params: Mapping[str, Any], integers: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves out the leaves of which there are integers."""
    kept = {}
    for name, subtree in params.items():
        if name not in integers:
            kept[name] = subtree
        elif isinstance(subtree, Mapping):
            kept[name] = _without(subtree, integers[name])
    return {name: subtree for name, subtree in kept.items() if not _empty(subtree)}


def _empty(subtree: Any) -> bool:
    return isinstance(subtree, Mapping) and not subtree
