"""The layer's account on TPUs: whatever can be said where their compiler is not installed."""

import importlib.util
import math

import pytest

from experiments import benchmark_tpu
from experiments.benchmark_tpu import LayerShape, tpu_rows
from moe.errors import InputError


def test_references_are_the_products_and_each_array_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: name)
    cost = {'flops': 1e9, 'bytes accessed': 2e9}
    monkeypatch.setattr(benchmark_tpu, '_layer_cost', lambda *_: cost)
    rows = list(tpu_rows(chips=['v6e'], layers=[LayerShape(4, 2, 8, 16)], tokens=32))
    assert [row['name'] for row in rows] == ['tpu/v6e/flops/E4_K2_F8', 'tpu/v6e/bytes/E4_K2_F8']
    # Two experts of three products of 16 x 8, and a router of 16 x 4: 832 a token; two FLOPs each,
    # three times. 32 tokens.
    assert math.isclose(rows[0]['reference'], 832 * 2 * 3 * 32 / 1e9)
    # Weights of 4 x 3 x 16 x 8 + 16 x 4 = 1600 forward, backward and as gradients; x and y, then x,
    # dy and dx of 512. Two bytes each.
    assert math.isclose(rows[1]['reference'], 2 * (3 * 1600 + 5 * 512) / 1e9)
    for row in rows:
        assert math.isclose(row['ratio'], row['value'] / row['reference'])


def test_an_unknown_chip_and_a_missing_compiler_are_messages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(InputError, match='--chips must be among v5p, v6e'):
        tpu_rows(chips=['v5p', 'v7'])
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(InputError, match=r'libtpu was not found.*\[tpu\]'):
        tpu_rows()


@pytest.mark.skipif(not importlib.util.find_spec('libtpu'), reason='the extra tpu')
def test_the_compiled_layer_has_the_products_flops() -> None:
    flops, _ = tpu_rows(chips=['v5p'], layers=[LayerShape(16, 2, 256, 512)], tokens=1024)
    assert 0.95 < flops['ratio'] < 1.05
