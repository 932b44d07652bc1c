"""The layer's account on TPUs: whatever can be said where their compiler is not installed."""

import importlib.util
import math

import pytest

from experiments import benchmark_overlap, benchmark_tpu
from experiments.benchmark_overlap import overlap_rows
from experiments.benchmark_tpu import LayerShape, tpu_rows
from moe.errors import InputError


def test_references_are_the_products_and_each_array_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: name)
    cost = {'flops': 1e9, 'bytes accessed': 2e9}
    monkeypatch.setattr(benchmark_tpu, '_layer_cost', lambda *_: cost)
    rows = list(tpu_rows(chips=['v6e'], layers=[LayerShape(4, 2, 8, 16, 32)]))
    names = ['tpu/v6e/flops/E4_K2_F8_N32', 'tpu/v6e/bytes/E4_K2_F8_N32']
    assert [row['name'] for row in rows] == names
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
def test_the_compiled_layer_has_the_products_flops_and_moves_little_else() -> None:
    # Few tokens to an expert: weights are the most of what is moved.
    flops, moved = tpu_rows(chips=['v5p'], layers=[LayerShape(16, 2, 1024, 1024, 256)])
    assert 0.95 < flops['ratio'] < 1.05
    assert 1 < moved['ratio'] < 1.25


SCHEDULES = {
    1: '\nENTRY %main (x: f32[2]) -> f32[2] {\n  %y = f32[6,2]{1,0} all-to-all(%x)\n',
    2: """
ENTRY %main (x: f32[2]) -> f32[2] {
  %s = ((f32[6]{0}), f32[6]{0}) all-to-all-start(%x)
  %p = f32[2]{0} fusion(%x), kind=kOutput, calls=%f
  %d = f32[6]{0} all-to-all-done(%s)
  %y = f32[2]{0} all-to-all(%d)
""",
}


def test_overlap_is_the_share_that_travels_under_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_overlap, '_program', lambda _1, _2, chunks, _3: SCHEDULES[chunks])
    whole, parts = overlap_rows(chips=['v5p'], methods=['grouped'], chunks=(1, 2))
    assert whole['name'] == 'tpu/v5p/overlap/grouped/chunks1'
    assert (whole['value'], whole['ratio']) == (0, 0)
    assert math.isclose(whole['reference'], 12e-6)
    assert math.isclose(parts['ratio'], 6 / 8)


@pytest.mark.skipif(not importlib.util.find_spec('libtpu'), reason='the extra tpu')
def test_chunks_travel_under_products() -> None:
    whole, parts = overlap_rows(chips=['v5p'], methods=['capacity'], chunks=(1, 2), tokens=512)
    assert whole['ratio'] < 0.5 < parts['ratio']
