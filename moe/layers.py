"""The parts that every layer shares: RMSNorm, rotary positions, the gated MLP, initial values."""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe.config import Activation, DType
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


def linear(x: Float[Array, 'B T *inputs'], kernel: Float[Array, '*kernel']) -> Array:
    """Multiplies all of `x` beyond its first two axes by a kernel that begins with those axes.

    As one product of matrices, which is also how its transposes come out: XLA for CPUs copies whole
    activations to transpose a product that has more axes.

    Args:
        x: [B, T, ...].
        kernel: the axes of `x` after the second, then those of the result.

    Returns:
        [B, T, *the other axes of `kernel`], in the dtype of `x`.
    """
    inputs = math.prod(x.shape[2:])
    outputs = kernel.shape[x.ndim - 2 :]
    flat = x.reshape(-1, inputs) @ kernel.astype(x.dtype).reshape(inputs, -1)
    return flat.reshape(*x.shape[:2], *outputs)


def rms_norm(x: Float[Array, '...'], scale: Float[Array, '...'], eps: float) -> Array:
    """Divides by the root mean square over the trailing axes that `scale` has.

    `x / sqrt(mean(x^2) + eps)` in float32, cast to the dtype of `x`, times the scale in that dtype.

    Args:
        x: its last `scale.ndim` axes are normalised together.
        scale: a weight for each normalised element.
        eps: added to the mean square.

    Returns:
        Like `x`, in its dtype.

    Source: arXiv 1910.07467; the cast before the weight is that of the published decoders.
    """
    axes = tuple(range(-scale.ndim, 0))
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(wide), axes, keepdims=True)
    return (wide * jax.lax.rsqrt(mean_square + eps)).astype(x.dtype) * scale.astype(x.dtype)


class RMSNorm(nn.Module):
    """Normalises the trailing axes named by `axes` and scales them; see `rms_norm`.

    Attributes:
        eps: added to the mean square.
        param_dtype: of the scale.
        axes: the logical axes of the scale, and so how many trailing axes are normalised.
    """

    eps: float
    param_dtype: DType = 'float32'
    axes: tuple[str | None, ...] = (None,)

    @nn.compact
    def __call__(self, x: Float[Array, '...']) -> Array:
        init = partitioned(nn.initializers.ones_init(), self.axes)
        scale = self.param('scale', init, x.shape[-len(self.axes) :], self.param_dtype)
        return rms_norm(x, scale, self.eps)


def rope_tables(
    positions: Int[Array, 'B T'], head_dim: int, theta: float
) -> tuple[Float[Array, 'B T half'], Float[Array, 'B T half']]:
    """Returns cosines and sines of `position * theta^(-2i / head_dim)` for i < head_dim / 2.

    Args:
        positions: from 0 within each document.
        head_dim: `Dh`, even.
        theta: the base of the frequencies.

    Returns:
        Two float32 tables [B, T, Dh / 2].

    Source: RoFormer, arXiv 2104.09864, equation 15.
    """
    frequencies = theta ** -(jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(
    x: Float[Array, 'B T H Dh'], cos: Float[Array, 'B T half'], sin: Float[Array, 'B T half']
) -> Float[Array, 'B T H Dh']:
    """Rotates each pair (x[i], x[i + Dh / 2]) by its angle, in float32.

    Args:
        x: queries or keys.
        cos: from `rope_tables`.
        sin: likewise.

    Returns:
        Like `x`, in its dtype.

    Source: arXiv 2104.09864, equation 34, with the pairs taken half a head apart (`rotate_half`)
        rather than adjacent.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


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
        gate_up = self.param(
            'gate_up',
            partitioned(kernel_init(0, (1, 2)), ('embed', None, 'mlp')),
            (x.shape[-1], 2, self.hidden_dim),
            self.param_dtype,
        )
        down = self.param(
            'down',
            partitioned(kernel_init(0, 1), ('mlp', 'embed')),
            (self.hidden_dim, x.shape[-1]),
            self.param_dtype,
        )
        x = x.astype(self.dtype)
        # Two products: the halves of a joint one are not contiguous, and reading them is slower.
        gate, up = linear(x, gate_up[:, 0]), linear(x, gate_up[:, 1])
        hidden = gated_activation(self.activation)(gate, up)
        hidden = constrain(hidden, ('batch', 'length', 'mlp'), self.mesh)
        return linear(hidden, down)
