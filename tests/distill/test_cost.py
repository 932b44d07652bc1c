"""Prices and arithmetic by hand; a throughput that is measured by a clock we hold."""

import dataclasses
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from distill import cost
from distill.cost import (
    PRICES,
    ChipPrice,
    chip_hours,
    chip_price,
    measure_prefill,
    teacher_to_student,
    training_flops,
    usd_per_million_tokens,
)
from moe.accounting import flops_per_token
from moe.config import AttentionConfig, TransformerConfig
from moe.errors import InputError

OWN = ChipPrice('own', 3.6, 'own chip', '2025-01', 'a friend', peak_flops=2e12)
STUDENT = TransformerConfig(
    vocab_size=10, num_layers=1, embed_dim=4, mlp_dim=6, attention=AttentionConfig(2, 1, 2)
)
TEACHER = dataclasses.replace(STUDENT, num_layers=3)


def test_usd_per_million_tokens_by_hand() -> None:
    # 2 chips at 3.6 $/hour are 0.002 $/s; at 500 tokens/s a million takes 2000 s.
    assert usd_per_million_tokens(500.0, OWN, chips=2) == {
        'value': pytest.approx(4.0),
        'chip': 'own',
        'price_source': 'a friend, as of 2025-01',
        'basis': '$3.6/chip-hour * 2 / (500 tokens/s * 3600 s/hour) * 1e6 = $4 per million tokens',
    }


def test_basis_is_the_arithmetic() -> None:
    price = usd_per_million_tokens(1234.5, chip_price('h100'))
    shown, result = price['basis'].replace('$', '').split(' = ')
    terms = re.sub(r'/chip-hour| tokens/s| s/hour', '', shown)
    assert eval(terms, {}) == pytest.approx(price['value'], rel=1e-5)
    assert float(result.split()[0]) == pytest.approx(price['value'], rel=1e-5)


def test_price_table_is_complete() -> None:
    assert {price.chip for price in PRICES} == {
        'cpu-2vcpu',
        'tpu-v5e',
        'tpu-v5p',
        'tpu-v6e',
        'h100',
        'h200',
    }
    for price in PRICES:
        assert re.fullmatch(r'20\d\d-[01]\d', price.date)
        assert 'on-demand list price' in price.source
        assert (price.peak_flops is None) == price.chip.startswith('cpu')
    eighth = {'h100': 55.04 / 8, 'h200': 63.30 / 8}
    for chip, usd in eighth.items():
        assert chip_price(chip).usd_per_hour == pytest.approx(usd, abs=0.005)


def test_own_price_takes_the_tables_place() -> None:
    cheaper = dataclasses.replace(chip_price('h100'), usd_per_hour=2.0, source='own contract')
    assert chip_price('h100', (cheaper, *PRICES)).usd_per_hour == 2.0
    assert chip_price('own', (*PRICES, OWN)) is OWN


def test_unknown_chip_names_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"'abacus'; choose from cpu-2vcpu, tpu-v5e, .*h200"):
        chip_price('abacus')


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'usd_per_hour': 0.0}, r"price of 'own': usd_per_hour must be positive; received 0\.0"),
        ({'source': ''}, 'source must be stated'),
        ({'date': ''}, 'date must be stated'),
        ({'peak_flops': -1.0}, 'peak_flops must be positive, or None'),
    ],
)
def test_price_row_is_checked(changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        dataclasses.replace(OWN, **changes)


@pytest.mark.parametrize('throughput', [0.0, -1.0, float('inf'), float('nan')])
def test_throughput_must_be_a_positive_number(throughput: float) -> None:
    with pytest.raises(InputError, match='tokens_per_second must be positive and finite'):
        usd_per_million_tokens(throughput, OWN)


def test_training_flops_by_hand() -> None:
    # A layer: attention 4*4 + 2*4*2 + 4*4 = 48 and MLP 3*4*6 = 72 weights; the head 40.
    # Scores: (3 + 1) / 2 keys, 2 products, 4 channels, 2 FLOPs each: 32 a layer.
    student = 2 * (48 + 72 + 40) + 32
    teacher = 2 * (3 * (48 + 72) + 40) + 3 * 32
    assert flops_per_token(STUDENT, context_length=3).total == student
    assert training_flops(STUDENT, tokens=7, context_length=3) == 7 * 3 * student
    distilled = training_flops(STUDENT, tokens=7, context_length=3, teacher=TEACHER)
    assert distilled == 7 * (3 * student + teacher)
    with pytest.raises(InputError, match='tokens must be at least 1'):
        training_flops(STUDENT, tokens=0, context_length=3)


def test_chip_hours_by_hand() -> None:
    # 3.6e15 FLOPs at half of 2e12 FLOP/s: 3600 s.
    assert chip_hours(3.6e15, OWN, utilization=0.5) == pytest.approx(1.0)
    with pytest.raises(InputError, match=r'utilization must be in \(0, 1\]; received 1\.5'):
        chip_hours(1.0, OWN, utilization=1.5)
    with pytest.raises(InputError, match="none is published for 'cpu-2vcpu'"):
        chip_hours(1.0, chip_price('cpu-2vcpu'), utilization=0.5)


def test_ratios_that_were_not_measured_are_absent() -> None:
    assert teacher_to_student(teacher_flops=30.0, student_flops=2.0) == {
        'teacher_to_student_flops': 15.0
    }
    both = teacher_to_student(
        teacher_flops=30.0, student_flops=2.0, teacher_usd=6.0, student_usd=1.5
    )
    assert both == {'teacher_to_student_flops': 15.0, 'teacher_to_student_usd': 4.0}


class Doubler(nn.Module):
    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.param('scale', nn.initializers.ones, ()) * tokens


def test_prefill_is_the_median_of_runs_in_turn_after_a_warm_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Runs of 9 and 1, of 2 and 6, of 3 and 4 s, for 12 tokens.
    ticks = iter([0.0, 9.0, 10.0, 11.0, 20.0, 22.0, 30.0, 36.0, 40.0, 43.0, 50.0, 54.0])
    monkeypatch.setattr('time.perf_counter', lambda: next(ticks))
    waited = []
    monkeypatch.setattr(cost.jax, 'block_until_ready', lambda x: waited.append(float(x[0, 0])))
    tokens = jnp.ones((2, 6), jnp.int32)
    variables = Doubler().init(jax.random.key(0), tokens)
    other = jax.tree.map(lambda leaf: 5 * leaf, variables)
    models = {'one': (Doubler(), variables, tokens), 'two': (Doubler(), other, tokens)}
    assert measure_prefill(models, repeats=3) == {'one': 4.0, 'two': 3.0}
    assert waited == [1.0, 5.0] * 4
    with pytest.raises(InputError, match='repeats must be at least 1'):
        measure_prefill(models, repeats=0)


@pytest.mark.parametrize(
    ('kind', 'chips'),
    [
        ('cpu', ['cpu-2vcpu']),
        ('TPU v5 lite', ['tpu-v5e']),
        ('TPU v5', ['tpu-v5p']),
        ('TPU v6 lite', ['tpu-v6e']),
        ('NVIDIA H100 80GB HBM3', ['h100']),
        ('NVIDIA H200', ['h200']),
        ('NVIDIA A100-SXM4-80GB', []),
    ],
)
def test_a_price_is_of_the_device_that_jax_names(kind: str, chips: list[str]) -> None:
    assert [price.chip for price in PRICES if price.is_of(kind)] == chips
