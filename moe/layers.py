"""The parts that every layer shares: RMSNorm, the gated MLP, matrix products, initial values."""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe.config import Activation, DType, TransformerConfig
from moe.quantised import Kernel, Quantised, halves, product, stored_kernel
from moe.sharding import constrain

# Of 'clamped_swiglu'.
SWIGLU_LIMIT = 7.0
SWIGLU_SLOPE = 1.702

ACTIVATIONS: dict[Activation, Callable[[Array], Array]] = {
    'silu': jax.nn.silu,
    'gelu': lambda x: jax.nn.gelu(x, approximate=True),
}


def activation_fn(name: Activation) -> Callable[[Array], Array]:
    """Returns the elementwise function of a gate: 'silu', or 'gelu' in its tanh approximation."""
    return ACTIVATIONS[name]


def gated_activation(name: Activation) -> Callable[[Array, Array], Array]:
    """Returns the elementwise function `(gate, up) -> hidden` of a gated MLP.

    'silu' and 'gelu' are `act(gate) * up`. 'clamped_swiglu' is, with `g = min(gate, 7)` and
    `u = clip(up, -7, 7)`, `(u + 1) * g * sigmoid(1.702 g)`.

    Source: arXiv 2002.05202, equation 6; 'clamped_swiglu' is that of GPT-OSS (arXiv 2508.10925).
    """
    if name == 'clamped_swiglu':
        return _clamped_swiglu
    return lambda gate, up: activation_fn(name)(gate) * up


def _clamped_swiglu(gate: Array, up: Array) -> Array:
    gate = jnp.minimum(gate, SWIGLU_LIMIT)
    up = jnp.clip(up, -SWIGLU_LIMIT, SWIGLU_LIMIT)
    return (up + 1) * gate * jax.nn.sigmoid(SWIGLU_SLOPE * gate)


def kernel_init(
    in_axis: int | tuple[int, ...],
    out_axis: int | tuple[int, ...],
    batch_axis: tuple[int, ...] = (),
) -> jax.nn.initializers.Initializer:
    """Returns a truncated normal of variance 1 / fan-in, the fan-in being the size of `in_axis`."""
    return jax.nn.initializers.variance_scaling(
        1.0, 'fan_in', 'truncated_normal', in_axis, out_axis, batch_axis
    )


def partitioned(init: jax.nn.initializers.Initializer, axes: tuple[str | None, ...]) -> Any:
    """Names the logical axes of what `init` returns; see `flax.linen.with_logical_partitioning`."""
    return nn.with_logical_partitioning(init, axes)


def linear(x: Float[Array, 'B T *inputs'], kernel: Kernel) -> Array:
    """Multiplies all of `x` beyond its first two axes by a kernel that begins with those axes.

    As one product of matrices, which is also how its transposes come out: XLA for CPUs copies whole
    activations to transpose a product that has more axes.

    Args:
        x: [B, T, ...].
        kernel: the axes of `x` after the second, then those of the result; or quantised.

    Returns:
        [B, T, *the other axes of `kernel`], in the dtype of `x`.
    """
    inputs = math.prod(x.shape[2:])
    if isinstance(kernel, Quantised):
        flat = product(x.reshape(-1, inputs), kernel)
        return flat.reshape(*x.shape[:2], *flat.shape[1:])
    outputs = kernel.shape[x.ndim - 2 :]
    flat = x.reshape(-1, inputs) @ kernel.astype(x.dtype).reshape(inputs, -1)
    return flat.reshape(*x.shape[:2], *outputs)


def soft_cap(x: Float[Array, '...'], cap: float | None) -> Array:
    """Returns `cap tanh(x / cap)`, which stays within +-cap; `x` where `cap` is None.

    Source: Gemma 2, arXiv 2408.00118, section 2.
    """
    return x if cap is None else cap * jnp.tanh(x / cap)


def rms_norm(
    x: Float[Array, '...'],
    scale: Float[Array, '...'],
    eps: float,
    *,
    scale_float32: bool = False,
) -> Array:
    """Divides by the root mean square over the trailing axes that `scale` has.

    `x / sqrt(mean(x^2) + eps)` in float32, cast to the dtype of `x`, times the scale in that dtype.

    Args:
        x: its last `scale.ndim` axes are normalised together.
        scale: a weight for each normalised element.
        eps: added to the mean square.
        scale_float32: multiplies by the scale in float32, before the cast.

    Returns:
        Like `x`, in its dtype.

    Source: arXiv 1910.07467; the cast before the weight is that of most published decoders, the one
        after it that of Gemma and GPT-OSS.
    """
    axes = tuple(range(-scale.ndim, 0))
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(wide), axes, keepdims=True)
    normed = wide * jax.lax.rsqrt(mean_square + eps)
    if scale_float32:
        return (normed * scale.astype(jnp.float32)).astype(x.dtype)
    return normed.astype(x.dtype) * scale.astype(x.dtype)


class RMSNorm(nn.Module):
    """Normalises the trailing axes named by `axes` and scales them; see `rms_norm`.

    Attributes:
        eps: added to the mean square.
        param_dtype: of the scale.
        axes: the logical axes of the scale, and so how many trailing axes are normalised.
        unit_offset: stores the scale less one, so that it starts at zero and decays to one.
        scale_float32: multiplies by the scale in float32, before the cast.
    """

    eps: float
    param_dtype: DType = 'float32'
    axes: tuple[str | None, ...] = (None,)
    unit_offset: bool = False
    scale_float32: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, '...']) -> Array:
        ones = nn.initializers.constant(0.0 if self.unit_offset else 1.0)
        shape = x.shape[-len(self.axes) :]
        scale = self.param('scale', partitioned(ones, self.axes), shape, self.param_dtype)
        if self.unit_offset:
            scale = 1.0 + scale.astype(jnp.float32)
        return rms_norm(x, scale, self.eps, scale_float32=self.scale_float32)


def norm_of(
    config: TransformerConfig, name: str, axes: tuple[str | None, ...] = (None,)
) -> RMSNorm:
    """Returns a norm of the kind that the model's config describes."""
    return RMSNorm(
        config.norm_eps,
        config.param_dtype,
        axes,
        config.norm_unit_offset,
        config.norm_scale_float32,
        name=name,
    )


class GatedMLP(nn.Module):
    """Computes `(act(x @ gate) * (x @ up)) @ down`; `gate_up` holds gate and up, in this order.

    Attributes:
        hidden_dim: `F`.
        activation: of the gate.
        dtype: of the products.
        param_dtype: of the stored weights.
        mesh: constrains the hidden activations where given.

    Source: arXiv 2002.05202, equation 6 (SwiGLU, GEGLU), without biases.
    """

    hidden_dim: int
    activation: Activation
    dtype: DType = 'float32'
    param_dtype: DType = 'float32'
    mesh: jax.sharding.Mesh | None = None

    @nn.compact
    def __call__(self, x: Float[Array, 'B T D']) -> Float[Array, 'B T D']:
        D, F = x.shape[-1], self.hidden_dim
        init = partitioned(kernel_init(0, (1, 2)), ('embed', None, 'mlp'))
        gate_up = self._kernel('gate_up', init, (D, 2, F))
        down = self._kernel('down', partitioned(kernel_init(0, 1), ('mlp', 'embed')), (F, D))
        x = x.astype(self.dtype)
        if isinstance(gate_up, Quantised) and self.mesh is None:
            gate, up = jnp.moveaxis(linear(x, gate_up), 2, 0)
        elif isinstance(gate_up, Quantised):
            # Each is split over devices; laid one after the other they would not be.
            gate, up = (linear(x, half) for half in halves(gate_up))
        else:
            # Two products: the halves of a joint one are not contiguous: reading them is slower.
            gate, up = linear(x, gate_up[:, 0]), linear(x, gate_up[:, 1])
        hidden = gated_activation(self.activation)(gate, up)
        hidden = constrain(hidden, ('batch', 'length', 'mlp'), self.mesh)
        return linear(hidden, down)

    def _kernel(
        self, name: str, init: jax.nn.initializers.Initializer, shape: tuple[int, ...]
    ) -> Kernel:
        read = functools.partial(self.param, name, init, shape, self.param_dtype)
        return stored_kernel(self, name, read, len(shape) - 1)
