"""Ratios against a reference measured in the same run.

    python -m experiments.benchmark moe     a MoE layer beside a dense MLP of equal active FLOPs
    python -m experiments.benchmark tpu     a MoE layer compiled for TPUs that need not be there
    python -m experiments.benchmark loss    the fused head and KL beside its bare matrix products
    python -m experiments.benchmark step    a distillation step beside its bare matrix products
    python -m experiments.benchmark decode  tokens a second beside memory's speed and transformers
    python -m experiments.benchmark engine  continuous batching beside one batch; pages of its cache
    python -m experiments.benchmark load    a published model's loading beside its largest tensor
    python -m experiments.benchmark cache   targets on disk: bytes, reading, what writing adds

Figures are printed, and written with --json=PATH as rows of name, value, unit, reference, ratio and
conditions. Of times the ratio is the share of the reference's rate, 1.0 is as fast; of all else it
is value / reference.
"""

import itertools
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator

from absl import flags

from experiments import benchmark_peer, cli
from experiments.benchmark_cache import cache_rows
from experiments.benchmark_decode import decode_rows
from experiments.benchmark_engine import engine_rows
from experiments.benchmark_load import load_rows
from experiments.benchmark_loss import ROWS, loss_rows, memory_rows
from experiments.benchmark_moe import EXPERT_SHAPES, moe_rows
from experiments.benchmark_overlap import overlap_rows
from experiments.benchmark_row import Row
from experiments.benchmark_step import step_rows, student_config, teacher_config
from experiments.benchmark_tpu import CHIPS, tpu_rows
from moe.errors import InputError

_JSON = flags.DEFINE_string('json', None, 'Where to write the figures as JSON rows.')
_REPEATS = flags.DEFINE_integer('repeats', 5, 'Timed rounds; the median counts.', lower_bound=1)
_TOKENS = flags.DEFINE_integer('tokens', 4096, 'moe, loss: tokens.', lower_bound=1)
_WIDTH = flags.DEFINE_integer('width', 512, 'moe: D, the width of the model.', lower_bound=1)
_EXPERTS = flags.DEFINE_list('experts', ['8', '64', '256'], 'moe: the numbers of experts E.')
_SHAPES = flags.DEFINE_list(
    'shapes',
    [f'{k}x{hidden}' for k, hidden in EXPERT_SHAPES],
    'moe: KxF, experts a token and their hidden width.',
)
_PEER = flags.DEFINE_boolean(
    'peer', True, "moe: also transformers' experts, where the extra hf-test is installed."
)
_CHIPS = flags.DEFINE_list('chips', list(CHIPS), 'tpu: the kinds of chip.')
_SOURCE = flags.DEFINE_string('source', 'python', 'cache: the text, as config.data.source.')
_VOCAB_SIZE = flags.DEFINE_integer('vocab_size', 32_000, 'loss, step: V.', lower_bound=1)


def _moe() -> Iterator[Row]:
    if not all(text.isdecimal() and int(text) >= 2 for text in _EXPERTS.value):
        raise InputError(
            '--experts must be whole numbers of at least 2, with commas and no spaces; '
            f'received {",".join(_EXPERTS.value)!r}.'
        )
    sizes = {
        'experts': [int(text) for text in _EXPERTS.value],
        'shapes': [_shape(text) for text in _SHAPES.value],
        'tokens': _TOKENS.value,
        'width': _WIDTH.value,
    }
    absent = benchmark_peer.missing() if _PEER.value else ()
    if absent:
        print(
            f"transformers' experts are left out: {' and '.join(absent)} not installed. For them "
            "pip install -e '.[hf-test]'."
        )
    return moe_rows(**sizes, repeats=_REPEATS.value, peer=_PEER.value and not absent)


def _shape(text: str) -> tuple[int, int]:
    k, cross, hidden = text.partition('x')
    if not (k.isdecimal() and cross and hidden.isdecimal() and int(k) and int(hidden)):
        raise InputError(
            f'--shapes must be pairs such as 2x1024, with commas and no spaces; received {text!r}.'
        )
    return int(k), int(hidden)


def _tpu() -> Iterator[Row]:
    return itertools.chain(tpu_rows(chips=_CHIPS.value), overlap_rows(chips=_CHIPS.value))


def _loss() -> list[Row]:
    if _TOKENS.value % ROWS:
        raise InputError(f'--tokens must be a multiple of {ROWS}; received {_TOKENS.value}.')
    sizes = {'tokens': _TOKENS.value, 'vocab_size': _VOCAB_SIZE.value}
    return [*loss_rows(**sizes, repeats=_REPEATS.value), *memory_rows()]


def _step() -> list[Row]:
    vocab_size = _VOCAB_SIZE.value
    models = teacher_config(vocab_size), student_config(vocab_size)
    return step_rows(*models, repeats=_REPEATS.value)


def _decode() -> Iterator[Row]:
    return decode_rows(repeats=_REPEATS.value)


def _engine() -> Iterator[Row]:
    return engine_rows(repeats=_REPEATS.value)


def _cache() -> Iterator[Row]:
    return cache_rows(_SOURCE.value, repeats=_REPEATS.value)


COMMANDS: dict[str, Callable[[], Iterable[Row]]] = {
    'moe': _moe,
    'tpu': _tpu,
    'loss': _loss,
    'step': _step,
    'decode': _decode,
    'engine': _engine,
    'load': load_rows,
    'cache': _cache,
}


def main(command: str) -> None:
    """Runs one benchmark, prints its figures and writes them if asked."""
    measured, rows = COMMANDS[command](), []
    print(f'{"figure":40} {"value":>10} {"reference":>10} {"unit":>7} {"ratio":>6}')
    for row in measured:
        rows.append(row)
        print(
            f'{row["name"]:40} {row["value"]:10.2f} {row["reference"]:10.2f} {row["unit"]:>7} '
            f'{row["ratio"]:6.2f}',
            flush=True,
        )
    if _JSON.value:
        path = pathlib.Path(_JSON.value)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows, indent=2) + '\n')


if __name__ == '__main__':
    cli.run(main, commands=tuple(COMMANDS))
