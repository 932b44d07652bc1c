"""Rotary positions: frequencies, how they are stretched to longer texts, and the rotation."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moe.validation import positive, require


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """Divides every frequency by `factor`: positions are interpolated.

    Source: arXiv 2306.15595.
    """

    factor: float

    def __post_init__(self) -> None:
        require(self.factor >= 1, 'rope_scaling.factor', 'at least 1', self.factor)


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Divides low frequencies by `factor`, keeps high ones, and goes from one to the other between.

    Attributes:
        factor: at least 1.
        original_length: positions of the text before it was stretched.
        low_frequency_factor: below this many turns over `original_length` a frequency is low.
        high_frequency_factor: above this many it is high; the larger of the two.

    Source: Llama 3.1 (arXiv 2407.21783) as released.
    """

    factor: float
    original_length: int
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0

    def __post_init__(self) -> None:
        require(self.factor >= 1, 'rope_scaling.factor', 'at least 1', self.factor)
        positive('rope_scaling.original_length', self.original_length)
        require(
            0 < self.low_frequency_factor < self.high_frequency_factor,
            'rope_scaling.low_frequency_factor',
            f'positive and below high_frequency_factor={self.high_frequency_factor}',
            self.low_frequency_factor,
        )


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """Interpolates channels that turn seldom, keeps those that turn often, and sharpens attention.

    With `m(a) = 0.1 a ln(factor) + 1`, cosines and sines are multiplied by
    `m(mscale) / m(mscale_all_dim)`, or by `m(1)` where either is 0. Latent attention multiplies its
    scores by `m(mscale_all_dim)^2` besides.

    Attributes:
        factor: at least 1.
        original_length: positions of the text before it was stretched.
        beta_fast: channels with at least this many turns over `original_length` are kept.
        beta_slow: those with at most this many are interpolated; at most `beta_fast`.
        mscale: 0 where the published config has none.
        mscale_all_dim: likewise.
        truncate: whether the ends of the ramp between the two kinds are rounded outwards to whole
            channels.

    Source: arXiv 2309.00071, sections 3.2 and 3.4; `mscale`s are those of DeepSeek-V2 and -V3 as
        released.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True

    def __post_init__(self) -> None:
        require(self.factor >= 1, 'rope_scaling.factor', 'at least 1', self.factor)
        positive('rope_scaling.original_length', self.original_length)
        require(
            0 < self.beta_slow <= self.beta_fast,
            'rope_scaling.beta_slow',
            f'positive and at most beta_fast={self.beta_fast}',
            self.beta_slow,
        )
        for name in ('mscale', 'mscale_all_dim'):
            value = getattr(self, name)
            require(value >= 0, f'rope_scaling.{name}', 'zero or more', value)

    def magnitude(self, mscale: float) -> float:
        """Returns `0.1 mscale ln(factor) + 1`."""
        return 0.1 * mscale * math.log(self.factor) + 1.0

    @property
    def table_factor(self) -> float:
        """What multiplies cosines and sines."""
        if self.mscale and self.mscale_all_dim:
            return self.magnitude(self.mscale) / self.magnitude(self.mscale_all_dim)
        return self.magnitude(1.0)

    @property
    def score_factor(self) -> float:
        """What multiplies the scores of latent attention besides."""
        return self.magnitude(self.mscale_all_dim) ** 2


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling


def rope_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Returns the angle of each pair of channels for one position, in radians: [head_dim / 2].

    `theta^(-2i / head_dim)` for i < head_dim / 2, then scaled.

    Source: RoFormer, arXiv 2104.09864, equation 15.
    """
    frequencies = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    match scaling:
        case None:
            return frequencies
        case LinearScaling():
            return frequencies / scaling.factor
        case Llama3Scaling():
            kept = _llama3_kept(frequencies, scaling)
        case YarnScaling():
            kept = _yarn_kept(head_dim, theta, scaling)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def _llama3_kept(frequencies: np.ndarray, scaling: Llama3Scaling) -> np.ndarray:
    """Returns 1 for frequencies that stay, 0 for those that are divided."""
    turns = scaling.original_length * frequencies / (2 * math.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    return np.clip((turns - low) / (high - low), 0, 1)


def _yarn_kept(head_dim: int, theta: float, scaling: YarnScaling) -> np.ndarray:
    """As `_llama3_kept`, but the ramp is linear in the channel, not in the frequency."""

    def channel(turns: float) -> float:
        wavelength = scaling.original_length / (2 * math.pi * turns)
        return head_dim * math.log(wavelength) / (2 * math.log(theta))

    first, last = channel(scaling.beta_fast), channel(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    # A ramp without width is a step; the published code makes it 0.001 wide.
    width = (last - first) or 0.001
    return 1 - np.clip((np.arange(head_dim // 2) - first) / width, 0, 1)


def rope_tables(
    positions: Int[Array, 'B T'],
    head_dim: int,
    theta: float,
    scaling: RopeScaling | None = None,
) -> tuple[Float[Array, 'B T half'], Float[Array, 'B T half']]:
    """Returns cosines and sines of each position's angles.

    Args:
        positions: from 0 within each document.
        head_dim: channels that are rotated, even.
        theta: the base of the frequencies.
        scaling: of the frequencies, and, with YaRN, of the tables.

    Returns:
        Two float32 tables [B, T, head_dim / 2].
    """
    frequencies = jnp.asarray(rope_frequencies(head_dim, theta, scaling), jnp.float32)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if isinstance(scaling, YarnScaling):
        cos, sin = cos * scaling.table_factor, sin * scaling.table_factor
    return cos, sin


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
