"""Rows of the benchmarks at tiny sizes: what they hold, never how fast anything is."""

import dataclasses
import json
import math
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import pytest
from absl.testing import flagsaver

from experiments import benchmark, benchmark_decode, cli
from experiments.benchmark_load import load_rows
from experiments.benchmark_loss import loss_rows, memory_rows
from experiments.benchmark_step import (
    Product,
    bare,
    step_products,
    step_rows,
    student_config,
    teacher_config,
)
from experiments.timing import interleaved_medians
from moe.accounting import flops_per_token, parameter_report

KEYS = {'name', 'value', 'unit', 'reference', 'ratio', 'conditions'}


def check(row: benchmark.Row) -> None:
    assert set(row) == KEYS
    assert row['value'] > 0
    assert row['reference'] > 0
    # More milliseconds are worse; the ratio of rates and of bytes is the plain share.
    inverse = {'ms': True, 'GFLOP/s': False, 'GB': False, 'GB/s': False, 'token/s': False}[
        row['unit']
    ]
    quotient = row['value'] / row['reference']
    assert math.isclose(row['ratio'], 1 / quotient if inverse else quotient, rel_tol=1e-9)


def test_load_rows_measure_memory_and_rate() -> None:
    memory, rate = load_rows(width=32, layers=1)
    check(rate)
    assert set(memory) == KEYS
    assert memory['ratio'] == memory['value'] / memory['reference']
    # The embedding, [64 * 32, 32] in float32, is the largest.
    assert memory['reference'] == 64 * 32 * 32 * 4 / 1e9
    assert 'D=32, L=1' in memory['conditions']


def test_moe_rows_measure_every_dispatch_against_the_mlp() -> None:
    rows = list(
        benchmark.moe_rows(experts=(4,), shapes=((2, 8), (8, 8)), tokens=16, width=8, repeats=1)
    )
    # Eight of four experts cannot be chosen: that shape is passed over.
    names = {f'moe/{dispatch}/E4_K2_F8' for dispatch in ('dense', 'capacity', 'grouped')}
    assert {row['name'] for row in rows} == names
    assert len({row['reference'] for row in rows}) == 1
    for row in rows:
        assert row['unit'] == 'ms'
        assert '16 tokens, D=8' in row['conditions']
        assert 'F=16' in row['conditions']
        check(row)


def test_moe_rows_leave_out_an_oracle_that_would_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    # 16 tokens, 4 experts, gate and up of 8, 4 bytes each.
    monkeypatch.setattr(benchmark, 'ORACLE_BYTES', 16 * 4 * 2 * 8 * 4 - 1)
    timed = []

    def fake(functions: dict, *, repeats: int) -> dict[str, float]:
        timed.extend(functions)
        return dict.fromkeys(functions, 0.5)

    monkeypatch.setattr(benchmark, 'interleaved_medians', fake)
    monkeypatch.setattr(benchmark, '_training_step', lambda *_: None)
    rows = list(benchmark.moe_rows(experts=(4,), shapes=((2, 8),), tokens=16, width=8))
    assert timed == ['capacity', 'grouped', 'mlp']
    assert [(row['value'], row['reference'], row['ratio']) for row in rows] == [(500, 500, 1)] * 2


def test_loss_rows_have_rates_and_memory() -> None:
    rows = {
        row['name']: row
        for row in loss_rows(tokens=64, vocab_size=64, student_dim=4, teacher_dim=8, repeats=1)
    }
    assert {name: row['unit'] for name, row in rows.items()} == {
        'loss/fused': 'GFLOP/s',
        'loss/fused/memory': 'GB',
        'loss/fused/time': 'ms',
        'loss/fused_kl_ce': 'GFLOP/s',
        'loss/fused_kl_ce/memory': 'GB',
        'loss/plain': 'GFLOP/s',
        'loss/plain/memory': 'GB',
    }
    assert rows['loss/plain/memory']['ratio'] == 1
    assert rows['loss/fused']['reference'] == rows['loss/plain']['reference']
    for row in rows.values():
        check(row)


def test_memory_is_that_of_the_compiled_programs() -> None:
    (row,) = memory_rows(tokens=256, vocab_size=512, dim=8, chunk_size=16)
    assert row['name'] == 'loss/fused/memory/V512'
    check(row)
    # Plain, logits of 256 x 512 float32 for both and their gradient; fused, 16 rows of them.
    assert row['reference'] * 1e9 >= 2 * 256 * 512 * 4
    assert row['ratio'] < 0.5


TINY = teacher_config(64, scale=8), student_config(64, scale=8)


def test_the_products_of_a_step_are_those_of_the_models() -> None:
    tokens, length = 32, 16
    flops = sum(product.flops for product in step_products(*TINY, tokens // length, length))
    teacher, student = (flops_per_token(model, context_length=length) for model in TINY)
    # Of scores, half of all; the accounting's average is (T + 1) / 2 of T keys.
    counted = [
        model.total - model.by_part['attention_scores'] * (1 - length / (length + 1))
        for model in (teacher, student)
    ]
    assert flops == pytest.approx(tokens * (counted[0] + 3 * counted[1]))


def test_bare_products_are_all_computed() -> None:
    products = [Product(8, 4, 6, times=3, batch=2, trained=True), Product(8, 16, 6)]
    assert [product.flops for product in products] == [3 * 3 * 2 * 2 * 8 * 4 * 6, 2 * 8 * 16 * 6]
    text = bare(products).__closure__[0].cell_contents.as_text()
    shapes = {'f32[2,8,6]', 'f32[2,8,4]', 'f32[2,4,6]'}
    for shape in shapes:
        assert shape in text
    assert jnp.isfinite(bare(products)())


def test_step_rows_are_of_the_step_against_its_products() -> None:
    rows = step_rows(*TINY, rows=2, length=16, repeats=1)
    assert [row['name'] for row in rows] == ['step', 'step/tokens', 'step/memory']
    assert rows[0]['ratio'] == pytest.approx(rows[1]['ratio'])
    for row in rows:
        assert '32 tokens, V=64' in row['conditions']
        check(row)


def test_the_models_of_a_step_have_the_sizes_that_others_were_measured_at() -> None:
    sizes = [parameter_report(model()).total / 1e6 for model in (teacher_config, student_config)]
    assert sizes == pytest.approx([60, 30], rel=0.02)


def test_medians_are_of_all_rounds_but_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0, 1, 10, 15, 20, 22, 30, 37, 40, 43, 50, 59])
    monkeypatch.setattr('time.perf_counter', lambda: next(clock))
    calls = []
    functions = {name: (lambda name=name: calls.append(name)) for name in ('a', 'b')}
    assert interleaved_medians(functions, repeats=3) == {'a': 2, 'b': 7}
    assert calls == ['a', 'b'] * 4


@pytest.fixture
def one_row(monkeypatch: pytest.MonkeyPatch) -> benchmark.Row:
    row = {
        'name': 'loss/fused',
        'value': 3.0,
        'unit': 'GFLOP/s',
        'reference': 4.0,
        'ratio': 0.75,
        'conditions': 'none',
    }
    monkeypatch.setitem(benchmark.COMMANDS, 'loss', lambda: [row])
    return row


def launch(monkeypatch: pytest.MonkeyPatch, *argv: str) -> object:
    """Runs the launcher on a command line, and gives its exit status."""
    monkeypatch.setattr('sys.argv', ['benchmark', *argv])
    with flagsaver.flagsaver(), pytest.raises(SystemExit) as exit_:
        cli.run(benchmark.main, commands=tuple(benchmark.COMMANDS))
    return exit_.value.code


def test_prints_and_writes_rows(
    one_row: benchmark.Row,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / 'new' / 'rows.json'
    assert launch(monkeypatch, 'loss', f'--json={path}') == 0
    assert json.loads(path.read_text()) == [one_row]
    assert capsys.readouterr().out.splitlines()[1].split() == [
        *('loss/fused', '3.00', '4.00', 'GFLOP/s', '0.75')
    ]


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        ((), 'name one of moe, loss, step, decode, load; received none'),
        (('mo',), "name one of moe, loss, step, decode, load; received 'mo'"),
        (('moe', 'loss'), "'loss' is no flag"),
        (('moe', '--experts=x'), '--experts must be whole numbers of at least 3'),
        (('moe', '--experts=8,2'), "received '8,2'"),
        (('loss', '--tokens=12'), '--tokens must be a multiple of 8; received 12'),
        (('loss', '--repeats=0'), 'repeats'),
        (('loss', '--speed=fast'), 'speed'),
    ],
)
def test_bad_input_is_a_message(
    argv: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert launch(monkeypatch, *argv) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert 'Traceback' not in captured.err
    assert len(captured.err.splitlines()) <= 4
    assert captured.out == ''


def test_help_says_what_can_be_measured() -> None:
    # absl lists the flags of the module that is run.
    done = subprocess.run(
        [sys.executable, '-m', 'experiments.benchmark', '--help'],
        cwd=pathlib.Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.stderr == ''
    for words in (
        'benchmark moe',
        'benchmark loss',
        'benchmark step',
        '--json',
        '--experts',
        '--repeats',
    ):
        assert words in done.stdout


def test_decode_rows_are_what_longer_texts_take_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    # A layer: q, o 512 x 512; k, v 512 x 256; norms 2 x 512 + 2 x 64; router 512 x 32; 4 experts of
    # 3 x 512 x 512. Besides: the last norm, the head, and one row of the embedding.
    layer = 2 * 512**2 + 2 * 512 * 256 + 2 * 512 + 2 * 64 + 512 * 32 + 4 * 3 * 512**2
    active = 6 * layer + 512 + 512 * 16_384 + 512
    seconds = {
        'bandwidth': 2**28 / 1e10,
        'fractional/1/8': 1.0,
        'fractional/1/72': 3.0,
        'fractional/16/8': 1.0,
        'fractional/16/72': 5.0,
        'fast/1/8': 1.0,
        'fast/1/72': 9.0,
        'fast/16/8': 1.0,
        'fast/16/72': 17.0,
        'slow/1/8': 1.0,
        'slow/1/72': 17.0,
        'slow/16/8': 1.0,
        'slow/16/72': 9.0,
    }

    def fake(functions: dict, *, repeats: int) -> dict[str, float]:
        assert set(functions) == set(seconds)
        return seconds

    monkeypatch.setattr(benchmark_decode, 'interleaved_medians', fake)
    monkeypatch.setattr(benchmark_decode, 'our_writers', lambda _: {'fractional': print})
    monkeypatch.setattr(benchmark_decode, 'their_writers', lambda _: {'fast': print, 'slow': print})
    rows = {row['name']: row for row in benchmark_decode.decode_rows()}
    limit = 1e10 / (4 * active)
    assert {name: row['value'] for name, row in rows.items()} == {
        'decode/batch1': 32.0,
        'decode/batch1/transformers': 8.0,
        'decode/batch16': 256.0,
    }
    assert math.isclose(rows['decode/batch1']['reference'], limit)
    assert math.isclose(rows['decode/batch1/transformers']['reference'], limit)
    assert rows['decode/batch16']['reference'] == 128.0
    assert rows['decode/batch16']['ratio'] == 2.0
    assert 'slow' in rows['decode/batch16']['conditions']


def test_decode_writes_as_many_tokens_as_it_is_asked_for() -> None:
    config = dataclasses.replace(
        benchmark_decode.CONFIG, vocab_size=32, num_layers=1, embed_dim=16, mlp_dim=8
    )
    (writer,) = benchmark_decode.our_writers(config).values()
    assert writer(2, 3).shape == (2, 3)
