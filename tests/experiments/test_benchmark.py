"""Rows of the benchmarks at tiny sizes: what they hold, never how fast anything is."""

import dataclasses
import json
import math
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import flagsaver

from distill.timing import interleaved_medians
from experiments import benchmark, benchmark_decode, benchmark_moe, benchmark_peer, cli
from experiments.benchmark_cache import cache_rows
from experiments.benchmark_load import load_rows
from experiments.benchmark_loss import loss_rows, memory_rows
from experiments.benchmark_moe import moe_rows
from experiments.benchmark_step import (
    Product,
    bare,
    step_products,
    step_rows,
    student_config,
    teacher_config,
)
from experiments.benchmark_text import Sizes
from moe.accounting import flops_per_token, parameter_report

WORDS = 'the cat sat on the mat, while a dog returned to import its definition'
KEYS = {'name', 'value', 'unit', 'reference', 'ratio', 'conditions'}


def check(row: benchmark.Row) -> None:
    assert set(row) == KEYS
    assert row['value'] > 0
    assert row['reference'] > 0
    # More milliseconds are worse; all other ratios are the plain quotient.
    quotient = row['value'] / row['reference']
    assert math.isclose(row['ratio'], 1 / quotient if row['unit'] == 'ms' else quotient)


def test_load_rows_measure_memory_and_rate() -> None:
    memory, rate = load_rows(width=32, layers=1)
    check(rate)
    assert set(memory) == KEYS
    assert memory['ratio'] == memory['value'] / memory['reference']
    # The embedding, [64 * 32, 32] in float32, is the largest.
    assert memory['reference'] == 64 * 32 * 32 * 4 / 1e9
    assert 'D=32, L=1' in memory['conditions']


def test_cache_rows_are_of_what_lies_on_disk(tmp_path: pathlib.Path) -> None:
    for number in range(4):
        (tmp_path / f'{number}.txt').write_text(f'{WORDS} ' * 9)
    sizes = Sizes(270, width=8, steps=2, rows=2, length=16, batches=2, scale=8)
    rows = {row['name']: row for row in cache_rows(f'{tmp_path}/*.txt', sizes, repeats=1)}
    both = {f'cache/{part}/{kind}' for part in ('bytes', 'read') for kind in ('sampled', 'top_k')}
    assert set(rows) == both | {'cache/estimate/sampled', 'cache/write/sampled'}
    for row in rows.values():
        check(row)
        assert 'V=270' in row['conditions']
        assert '2 batches of 2 rows of 16 tokens' in row['conditions']
    assert rows['cache/bytes/sampled']['reference'] == 36
    assert rows['cache/bytes/top_k']['reference'] == 160
    # 64 ids, of two bytes each, and as many falls: less than a byte of each is not to be had.
    assert 64 < rows['cache/bytes/top_k']['value'] < 1000


def test_moe_rows_measure_every_dispatch_against_the_mlp() -> None:
    rows = list(moe_rows(experts=(4,), shapes=((2, 8), (8, 8)), tokens=16, width=8, repeats=1))
    # Eight of four experts cannot be chosen: that shape is passed over.
    methods = ('dense', 'capacity', 'grouped', 'grouped_skewed')
    assert {row['name'] for row in rows} == {f'moe/{method}/E4_K2_F8' for method in methods}
    assert len({row['reference'] for row in rows}) == 1
    for row in rows:
        assert row['unit'] == 'ms'
        assert '16 tokens, D=8' in row['conditions']
        assert 'F=16' in row['conditions']
        check(row)


def test_skewed_tokens_lean_to_the_same_experts() -> None:
    rows = list(moe_rows(experts=(8,), shapes=((2, 8),), tokens=256, width=16, repeats=1))
    loads = {
        row['name'].split('/')[1]: float(re.search(r'load ([\d.]+) times', row['conditions'])[1])
        for row in rows
    }
    assert loads['grouped'] == loads['capacity'] < 2 < loads['grouped_skewed'] <= 4


def fake_measurement(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Puts half a second in the place of every measurement; returns what would be timed."""
    timed = []

    def fake(functions: dict, *, repeats: int) -> dict[str, float]:
        timed.extend(functions)
        return dict.fromkeys(functions, 0.5)

    monkeypatch.setattr(benchmark_moe, 'interleaved_medians', fake)
    return timed


def test_moe_rows_leave_out_what_would_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = fake_measurement(monkeypatch)
    # 16 tokens, 4 experts, gate and up of 8, 4 bytes each.
    monkeypatch.setattr(benchmark_moe, 'ORACLE_BYTES', 16 * 4 * 2 * 8 * 4 - 1)
    # 4 experts of three matrices of 8 x 8, 4 bytes each.
    monkeypatch.setattr(benchmark_moe, 'WEIGHT_BYTES', 4 * 3 * 8 * 8 * 4)
    rows = list(moe_rows(experts=(4,), shapes=((2, 8), (2, 9)), tokens=16, width=8))
    assert timed == ['capacity', 'grouped', 'grouped_skewed', 'mlp']
    assert [(row['value'], row['reference'], row['ratio']) for row in rows] == [(500, 500, 1)] * 3


def test_the_peer_is_the_same_layer_and_its_share_is_compared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch = pytest.importorskip('torch', reason='the extra hf-test')
    pytest.importorskip('transformers', reason='the extra hf-test')
    monkeypatch.setattr(benchmark_moe, 'PEER_SHAPES', ((4, 2, 8),))
    outputs = {}

    def fake(functions: dict, *, repeats: int) -> dict[str, float]:
        outputs.update({name: function() for name, function in functions.items()})
        times = {'grouped': 0.5, 'mlp': 0.3, 'transformers': 0.5, 'torch_mlp': 0.2}
        return {name: times.get(name, 1.0) for name in functions}

    monkeypatch.setattr(benchmark_moe, 'interleaved_medians', fake)
    rows = moe_rows(experts=(4,), shapes=((2, 8),), tokens=16, width=8, peer=True)
    by_name = {row['name'].split('/')[1]: row for row in rows}
    for row in by_name.values():
        check(row)
    assert math.isclose(by_name['transformers']['ratio'], 0.4)
    quotient = by_name['grouped_to_transformers']
    assert math.isclose(quotient['value'], 0.6)
    assert math.isclose(quotient['ratio'], 1.5)
    assert 'grouped_mm' in quotient['conditions']

    # The sum of output times cotangent, then the gradient of the input: ours, and theirs.
    loss, (_, d_x) = outputs['grouped']
    y, their_d_x, *_ = outputs['transformers']
    cotangent = torch.tensor(np.asarray(jax.random.normal(jax.random.key(2), d_x.shape)))
    assert math.isclose(loss, (y * cotangent).sum().item(), rel_tol=1e-4)
    np.testing.assert_allclose(d_x, their_d_x.numpy(), rtol=1e-3, atol=1e-5)


def test_without_the_other_library_its_rows_are_left_out_aloud(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark_peer, 'missing', lambda: ('torch',))
    fake_measurement(monkeypatch)
    argv = ('moe', '--experts=8', '--shapes=2x256', '--tokens=8', '--width=4')
    assert launch(monkeypatch, *argv) == 0
    out = capsys.readouterr().out
    assert "transformers' experts are left out: torch not installed" in out
    assert 'hf-test' in out
    assert 'moe/grouped/E8_K2_F256' in out
    assert 'moe/transformers' not in out


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
        ((), 'name one of moe, tpu, loss, step, decode, engine, load, cache; received none'),
        (('mo',), "name one of moe, tpu, loss, step, decode, engine, load, cache; received 'mo'"),
        (('moe', 'loss'), "'loss' is no flag"),
        (('moe', '--experts=x'), '--experts must be whole numbers of at least 2'),
        (('moe', '--experts=8,1'), "received '8,1'"),
        (('moe', '--shapes=2'), '--shapes must be pairs such as 2x1024'),
        (('tpu', '--chips=v9'), '--chips must be among v5p, v6e'),
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
        'fractional int8/1/8': 1.0,
        'fractional int8/1/72': 2.0,
        'fractional/16/8': 1.0,
        'fractional/16/72': 5.0,
        'fast/1/8': 1.0,
        'fast/1/72': 9.0,
        'slow/16/8': 1.0,
        'slow/16/72': 9.0,
    }
    short = [{'fast': 1.0, 'slow': 2.0}, {'fast': 2.0, 'slow': 1.0}]

    def fake(functions: dict, *, repeats: int) -> dict[str, float]:
        if set(functions) == {'fast', 'slow'}:
            return short.pop(0)
        assert set(functions) == set(seconds)
        return seconds

    monkeypatch.setattr(benchmark_decode, 'interleaved_medians', fake)
    ours = {benchmark_decode.FLOAT32: print, benchmark_decode.INT8: print}
    monkeypatch.setattr(benchmark_decode, 'our_writers', lambda _: ours)
    monkeypatch.setattr(benchmark_decode, 'their_writers', lambda _: {'fast': print, 'slow': print})
    rows = {row['name']: row for row in benchmark_decode.decode_rows()}
    limit = 1e10 / (4 * active)
    assert {name: row['value'] for name, row in rows.items()} == {
        'decode/batch1': 32.0,
        'decode/batch1/int8': 64.0,
        'decode/batch1/transformers': 8.0,
        'decode/batch16': 256.0,
    }
    assert math.isclose(rows['decode/batch1']['reference'], limit)
    assert rows['decode/batch1/int8']['ratio'] == 2.0
    assert math.isclose(rows['decode/batch1/transformers']['reference'], limit)
    assert rows['decode/batch16']['reference'] == 128.0
    assert rows['decode/batch16']['ratio'] == 2.0
    assert 'slow' in rows['decode/batch16']['conditions']


def test_decode_writes_as_many_tokens_as_it_is_asked_for() -> None:
    config = dataclasses.replace(
        benchmark_decode.CONFIG, vocab_size=32, num_layers=1, embed_dim=16, mlp_dim=8
    )
    for writer in benchmark_decode.our_writers(config).values():
        assert writer(2, 3).shape == (2, 3)
