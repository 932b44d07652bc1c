"""Figures of the engine: what is divided by what, and bytes counted by hand."""

import dataclasses

import pytest

from experiments import benchmark_engine
from experiments.benchmark_decode import CONFIG


def test_rows_are_of_the_engine_against_one_batch_and_slots(monkeypatch: pytest.MonkeyPatch):
    wrote = []
    step = benchmark_engine.Engine.step
    monkeypatch.setattr(
        benchmark_engine.Engine, 'step', lambda self: wrote.append(step(self)) or wrote[-1]
    )

    def fake(functions: dict, *, repeats: int) -> dict[str, float]:
        wrote.clear()
        functions['engine']()
        assert [len(events) for events in wrote] == [16] * 16
        assert [functions[name]().shape for name in ('short', 'long')] == [(16, 8), (16, 12)]
        return {'engine': 0.5, 'short': 1.0, 'long': 1.25}

    monkeypatch.setattr(benchmark_engine, 'interleaved_medians', fake)
    config = dataclasses.replace(CONFIG, vocab_size=32, num_layers=1, embed_dim=16, mlp_dim=8)
    rate, memory = benchmark_engine.engine_rows(config=config, tokens=4)
    assert rate['value'] == 512.0  # 16 rows, 16 tokens each
    assert rate['ratio'] == 2.0  # 16 rows, 4 tokens each, in a quarter of a second
    # Keys and values of 4 heads of 64 numbers a token. The long text takes 15 pages of 64, the
    # others 2 each: 45, for which 16 are doubled twice; and there is page 0.
    token, slots = 2 * 4 * 64 * 4, 65 * 64
    assert memory['value'] == pytest.approx((slots * token + 16 * 960 * 4) / 1e6, rel=1e-3)
    assert memory['reference'] == pytest.approx(16 * 1024 * (token + 4) / 1e6, rel=1e-3)
    assert memory['ratio'] == memory['value'] / memory['reference']
