"""Rotary positions against complex numbers, and stretched frequencies one channel at a time."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from moe.config import AttentionConfig, LatentAttentionConfig
from moe.errors import InputError
from moe.rope import (
    LinearScaling,
    Llama3Scaling,
    YarnScaling,
    apply_rope,
    rope_frequencies,
)
from moe.rope import rope_tables as tables

GPT_OSS = YarnScaling(32.0, 4096, truncate=False)
DEEPSEEK = YarnScaling(40.0, 4096, mscale=1.0, mscale_all_dim=1.0)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def test_rope_rotates_pairs_half_a_head_apart():
    x, positions, theta = (
        normal(0, 2, 5, 3, 8),
        np.array([[0, 1, 2, 7, 90], [3, 0, 1, 2, 40]]),
        50.0,
    )
    angles = positions[..., None] * theta ** (-np.arange(4) / 4)
    pairs = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angles)[:, :, None]
    expected = np.concatenate([pairs.real, pairs.imag], axis=-1)
    rotated = apply_rope(jnp.asarray(x, jnp.float32), *tables(jnp.asarray(positions), 8, theta))
    np.testing.assert_allclose(rotated, expected, atol=2e-5)


def test_rope_makes_products_depend_on_distance_alone():
    q, k = (jnp.asarray(normal(seed, 1, 1, 1, 8), jnp.float32) for seed in range(2))

    def product(i: int, j: int) -> float:
        at = [tables(jnp.array([[position]]), 8, 10_000.0) for position in (i, j)]
        return float((apply_rope(q, *at[0]) * apply_rope(k, *at[1])).sum())

    assert product(9, 4) == pytest.approx(product(5, 0), abs=1e-5)
    assert abs(product(9, 4) - product(4, 9)) > 1e-2


def yarn(head_dim: int, theta: float, scaling: YarnScaling) -> list[float]:
    """One channel at a time: turns over the original length decide how much of it is kept."""

    def boundary(turns: float) -> float:
        # The channel i for which original_length * theta^(-2i / head_dim) is that many turns.
        return head_dim / 2 * math.log(scaling.original_length / turns / 2 / math.pi, theta)

    first, last = boundary(scaling.beta_fast), boundary(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    frequencies = []
    for i in range(head_dim // 2):
        plain = theta ** (-2 * i / head_dim)
        stretched = min(max((i - first) / (last - first), 0), 1)
        frequencies.append(plain * (1 - stretched) + plain / scaling.factor * stretched)
    return frequencies


@pytest.mark.parametrize(
    ('head_dim', 'theta', 'scaling'),
    [(64, 150_000.0, GPT_OSS), (64, 10_000.0, DEEPSEEK), (32, 1e6, YarnScaling(4.0, 32_768))],
)
def test_yarn_keeps_fast_channels_and_interpolates_slow_ones(head_dim, theta, scaling):
    frequencies = rope_frequencies(head_dim, theta, scaling)
    np.testing.assert_allclose(frequencies, yarn(head_dim, theta, scaling), rtol=1e-12)
    assert frequencies[0] == 1.0
    assert frequencies[-1] == pytest.approx(theta ** (2 / head_dim - 1) / scaling.factor)


def test_yarn_multiplies_tables_and_the_scores_of_latent_attention():
    position = jnp.zeros((1, 1), int)
    for scaling, factor in [(GPT_OSS, 1.3465736), (DEEPSEEK, 1.0)]:
        cos, sin = tables(position, 8, 150_000.0, scaling)
        np.testing.assert_allclose(cos[0, 0], np.full(4, factor), rtol=1e-6)
        np.testing.assert_array_equal(sin[0, 0], np.zeros(4))
    half = YarnScaling(math.e**10, 4096, mscale=2.0, mscale_all_dim=0.5)
    assert half.table_factor == pytest.approx(3 / 1.5)
    latent = LatentAttentionConfig(128, 512, 128, 64, 128, 1536, rope_scaling=DEEPSEEK)
    assert latent.score_scale == pytest.approx(192**-0.5 * 1.3688879**2)
    assert LatentAttentionConfig(2, 8, 12, 4, 8).score_scale == 0.25


def test_llama3_divides_the_frequencies_that_turn_seldom():
    scaling = Llama3Scaling(8.0, 8192)
    frequencies = rope_frequencies(128, 500_000.0, scaling)
    for i, frequency in enumerate(frequencies):
        plain = 500_000.0 ** (-i / 64)
        wavelength = 2 * math.pi / plain
        if wavelength < 8192 / 4:
            expected = plain
        elif wavelength > 8192:
            expected = plain / 8
        else:
            smooth = (8192 / wavelength - 1) / 3
            expected = (1 - smooth) * plain / 8 + smooth * plain
        assert frequency == pytest.approx(expected, rel=1e-12)
    plain = rope_frequencies(128, 500_000.0)
    assert {1.0, 1 / 8} < set(np.round(frequencies / plain, 12))


def test_linear_scaling_divides_positions():
    positions = jnp.array([[0, 8, 80]])
    stretched = tables(positions, 8, 1e4, LinearScaling(8.0))
    for actual, expected in zip(stretched, tables(positions // 8, 8, 1e4), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda: YarnScaling(0.5, 4096), r'rope_scaling.factor must be at least 1; received 0.5'),
        (lambda: YarnScaling(2.0, 4096, beta_fast=0.5), 'beta_slow must be positive and at most'),
        (lambda: YarnScaling(2.0, 0), 'original_length must be a positive integer'),
        (lambda: Llama3Scaling(2.0, 8, 4.0, 1.0), 'low_frequency_factor must be positive and'),
        (lambda: LinearScaling(0.0), 'factor must be at least 1'),
        (lambda: AttentionConfig(1, 1, 2, rope_theta=1.0, rope_scaling=GPT_OSS), 'above 1'),
        (
            lambda: AttentionConfig(1, 1, 2, rope_theta=None, rope_scaling=GPT_OSS),
            'attention.rope_scaling must be None where rope_theta is',
        ),
    ],
)
def test_impossible_scalings_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()
