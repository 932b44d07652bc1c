"""Ratios against a reference measured in the same run.

    python -m experiments.benchmark moe     a MoE layer beside a dense MLP of equal active FLOPs
    python -m experiments.benchmark loss    the fused head and KL beside its bare matrix products
    python -m experiments.benchmark step    a distillation step beside its bare matrix products
    python -m experiments.benchmark decode  tokens a second beside memory's speed and transformers
    python -m experiments.benchmark load    a published model's loading beside its largest tensor

Figures are printed, and written with --json=PATH as rows of name, value, unit, reference, ratio and
conditions. The ratio is the share of the reference's rate, 1.0 is as fast; of memory, the share of
the reference's bytes.
"""

import json
import pathlib
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from absl import flags

from experiments import cli
from experiments.benchmark_decode import decode_rows
from experiments.benchmark_load import load_rows
from experiments.benchmark_loss import ROWS, loss_rows, memory_rows
from experiments.benchmark_step import step_rows, student_config, teacher_config
from experiments.timing import interleaved_medians
from moe.config import Dispatch, MoEConfig, RouterConfig
from moe.errors import InputError
from moe.experts import MoELayer
from moe.layers import GatedMLP

_JSON = flags.DEFINE_string('json', None, 'Where to write the figures as JSON rows.')
_REPEATS = flags.DEFINE_integer('repeats', 7, 'Timed rounds; the median counts.', lower_bound=1)
_TOKENS = flags.DEFINE_integer('tokens', 4096, 'moe, loss: tokens.', lower_bound=1)
_WIDTH = flags.DEFINE_integer('width', 512, 'moe: D, the width of the model.', lower_bound=1)
_EXPERTS = flags.DEFINE_list('experts', ['8', '64'], 'moe: the numbers of experts E.')
_VOCAB_SIZE = flags.DEFINE_integer('vocab_size', 32_000, 'loss, step: V.', lower_bound=1)

# (K, F): few coarse experts a token, few fine ones, many fine ones.
EXPERT_SHAPES = ((2, 256), (2, 1024), (8, 256))
# The dense oracle holds [tokens, E, 2 F] float32; past this many bytes it is left out.
ORACLE_BYTES = 2**30

Row = dict[str, Any]


def moe_rows(
    *,
    experts: Sequence[int] = (8, 64),
    shapes: Sequence[tuple[int, int]] = EXPERT_SHAPES,
    tokens: int = 4096,
    width: int = 512,
    repeats: int = 7,
) -> Iterator[Row]:
    """Measures each dispatch of a MoE layer, forward and backward, beside a dense gated MLP.

    The MLP's hidden width is `K * F`: the FLOPs of a token's active experts. Router, sorting and
    all are in the layer's time; gradients are those of the input and of every parameter.

    Args:
        experts: the numbers of experts, `E`.
        shapes: pairs of `K` and `F`; those whose `K` is not below `E` are passed over.
        tokens: in one sequence.
        width: `D`.
        repeats: timed rounds; the median counts.

    Yields:
        A row for each dispatch and shape: value and reference in milliseconds.
    """
    for number in experts:
        for k, hidden in shapes:
            if k < number:
                x = jax.random.normal(jax.random.key(0), (1, tokens, width))
                yield from _moe_shape_rows(RouterConfig(number, k), hidden, x, repeats)


def _moe_shape_rows(router: RouterConfig, hidden: int, x: jax.Array, repeats: int) -> Iterator[Row]:
    _, tokens, width = x.shape
    experts, k = router.num_experts, router.experts_per_token
    methods = list(get_args(Dispatch))
    if tokens * experts * 2 * hidden * 4 > ORACLE_BYTES:
        methods.remove('dense')
    mask = jnp.ones((1, tokens), bool)
    layers: dict[str, nn.Module] = {
        method: MoELayer(MoEConfig(router, hidden, dispatch=method), 'silu') for method in methods
    }
    functions = {name: _training_step(layer, x, mask) for name, layer in layers.items()}
    functions['mlp'] = _training_step(GatedMLP(k * hidden, 'silu'), x)
    seconds = interleaved_medians(functions, repeats=repeats)
    for method in methods:
        yield {
            'name': f'moe/{method}/E{experts}_K{k}_F{hidden}',
            'value': seconds[method] * 1e3,
            'unit': 'ms',
            'reference': seconds['mlp'] * 1e3,
            'ratio': seconds['mlp'] / seconds[method],
            'conditions': _conditions(
                f'forward+backward, {tokens} tokens, D={width}, float32, random router; '
                f'reference: dense gated MLP of F={k * hidden}'
            ),
        }


def _training_step(layer: nn.Module, x: jax.Array, *args: jax.Array) -> Callable[[], Any]:
    """Returns a function that computes the gradients of the layer's input and parameters."""
    variables = nn.unbox(layer.init(jax.random.key(1), x, *args))
    cotangent = jax.random.normal(jax.random.key(2), x.shape)

    def loss(variables: Any, x: jax.Array) -> jax.Array:
        y = layer.apply(variables, x, *args)
        y = y[0] if isinstance(y, tuple) else y
        return (y * cotangent).sum()

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    return lambda: step(variables, x)


def _conditions(what: str) -> str:
    device = jax.devices()[0].device_kind
    return f'{what}; {device}, {platform.machine()}, jax {jax.__version__}'


def _moe() -> Iterator[Row]:
    least = min(k for k, _ in EXPERT_SHAPES) + 1
    if not all(text.isdecimal() and int(text) >= least for text in _EXPERTS.value):
        raise InputError(
            f'--experts must be whole numbers of at least {least}, with commas and no spaces; '
            f'received {",".join(_EXPERTS.value)!r}.'
        )
    return moe_rows(
        experts=[int(text) for text in _EXPERTS.value],
        tokens=_TOKENS.value,
        width=_WIDTH.value,
        repeats=_REPEATS.value,
    )


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


COMMANDS: dict[str, Callable[[], Iterable[Row]]] = {
    'moe': _moe,
    'loss': _loss,
    'step': _step,
    'decode': _decode,
    'load': load_rows,
}


def main(command: str) -> None:
    """Runs one benchmark, prints its figures and writes them if asked."""
    measured, rows = COMMANDS[command](), []
    print(f'{"figure":32} {"value":>10} {"reference":>10} {"unit":>7} {"ratio":>6}')
    for row in measured:
        rows.append(row)
        print(
            f'{row["name"]:32} {row["value"]:10.2f} {row["reference"]:10.2f} {row["unit"]:>7} '
            f'{row["ratio"]:6.2f}',
            flush=True,
        )
    if _JSON.value:
        path = pathlib.Path(_JSON.value)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows, indent=2) + '\n')


if __name__ == '__main__':
    cli.run(main, commands=tuple(COMMANDS))
