"""Dequantising published weights: fp8 with a scale for each block, and 4-bit floats in groups."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

FP8_BLOCK = 128
MXFP4_GROUP = 32
# The sixteen values of E2M1, by their bits.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@functools.partial(jax.jit, static_argnames='dtype')
def dequantize_fp8(
    weight: Float[Array, 'O I'], scale_inv: Float[Array, 'rows columns'], dtype: str
) -> Float[Array, 'O I']:
    """Multiplies each block of 128 x 128 by its scale, in float32.

    Args:
        weight: float8_e4m3fn; the last blocks of a row or column may be cut off.
        scale_inv: one factor for each block, `rows = ceil(O / 128)`, `columns = ceil(I / 128)`.
        dtype: of the result.

    Source: DeepSeek-V3, arXiv 2412.19437, section 3.3.2, and its released `weight_scale_inv`.
    """
    rows, columns = (jnp.arange(size) // FP8_BLOCK for size in weight.shape)
    factors = scale_inv.astype(jnp.float32)[rows][:, columns]
    return (weight.astype(jnp.float32) * factors).astype(dtype)


@functools.partial(jax.jit, static_argnames='dtype')
def dequantize_mxfp4(
    blocks: UInt8[Array, '*rows groups half'], scales: UInt8[Array, '*rows groups'], dtype: str
) -> Float[Array, '*rows I']:
    """Unpacks groups of 32 values that share a power of two: `value * 2^(scale - 127)`.

    Args:
        blocks: two values a byte, the lower four bits first: `half` is 16.
        scales: the exponent of each group, biased by 127.
        dtype: of the result.

    Returns:
        The last two axes as one, `I = 32 groups`.

    Source: OCP Microscaling Formats (MX) v1.0, sections 5.3.3 and 6.3; the packing is that of
        GPT-OSS.
    """
    values = jnp.asarray((*_E2M1, *(-value for value in _E2M1)), jnp.float32)
    pairs = jnp.stack([values[blocks & 15], values[blocks >> 4]], axis=-1)
    exponents = scales.astype(jnp.int32)[..., None, None] - 127
    scaled = jnp.ldexp(pairs, exponents)
    return scaled.reshape(*blocks.shape[:-2], -1).astype(dtype)
