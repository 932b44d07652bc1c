"""Ratios against a reference measured in the same run: `python -m experiments.benchmark moe`.

Figures are printed, and written with `--json=PATH` as rows of name, value, unit, reference, ratio
and conditions. A ratio is the share of the reference's rate: 1.0 is as fast.
"""

import json
import pathlib
import platform
from collections.abc import Callable, Iterator, Sequence
from typing import Any, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from absl import app, flags

from experiments.timing import interleaved_medians
from moe.config import Dispatch, MoEConfig, RouterConfig
from moe.experts import MoELayer
from moe.layers import GatedMLP

_JSON = flags.DEFINE_string('json', None, 'Where to write the figures as JSON rows.')
_REPEATS = flags.DEFINE_integer('repeats', 7, 'Timed rounds; the median counts.', lower_bound=1)
_TOKENS = flags.DEFINE_integer('tokens', 4096, 'Tokens a step.', lower_bound=1)
_WIDTH = flags.DEFINE_integer('width', 512, 'D, the width of the model.', lower_bound=1)
_EXPERTS = flags.DEFINE_list('experts', ['8', '64'], 'moe: the numbers of experts E.')

# (K, F): few coarse experts a token, few fine ones, many fine ones.
EXPERT_SHAPES = ((2, 256), (2, 1024), (8, 256))
# The dense oracle holds [tokens, E, 2 F] float32; past this many bytes it is left out.
ORACLE_BYTES = 2**30

Row = dict[str, Any]


def moe_rows() -> Iterator[Row]:
    """Measures each dispatch of a MoE layer, forward and backward, beside a dense gated MLP.

    The MLP's hidden width is `K * F`: the FLOPs of a token's active experts. Router, sorting and
    all are in the layer's time; gradients are those of the input and of every parameter.

    Yields:
        A row for each dispatch and shape: value and reference in milliseconds.
    """
    for experts in map(int, _EXPERTS.value):
        for k, hidden in EXPERT_SHAPES:
            if k < experts:
                yield from _moe_shape_rows(experts, k, hidden)


def _moe_shape_rows(experts: int, k: int, hidden: int) -> Iterator[Row]:
    tokens, width = _TOKENS.value, _WIDTH.value
    methods = list(get_args(Dispatch))
    if tokens * experts * 2 * hidden * 4 > ORACLE_BYTES:
        methods.remove('dense')
    x = jax.random.normal(jax.random.key(0), (1, tokens, width))
    mask = jnp.ones((1, tokens), bool)
    router = RouterConfig(experts, k)
    layers: dict[str, nn.Module] = {
        method: MoELayer(MoEConfig(router, hidden, dispatch=method), 'silu') for method in methods
    }
    functions = {name: _training_step(layer, x, mask) for name, layer in layers.items()}
    functions['mlp'] = _training_step(GatedMLP(k * hidden, 'silu'), x)
    seconds = interleaved_medians(functions, repeats=_REPEATS.value)
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


COMMANDS: dict[str, Callable[[], Iterator[Row]]] = {'moe': moe_rows}


def main(argv: Sequence[str]) -> None:
    """Runs the benchmark named on the command line, prints its figures and writes them if asked."""
    if len(argv) != 2 or argv[1] not in COMMANDS:
        raise app.UsageError(f'Name one benchmark: {", ".join(COMMANDS)}. Received {argv[1:]}.')
    rows = []
    print(f'{"figure":32} {"value":>10} {"reference":>10} {"unit":>5} {"ratio":>6}')
    for row in COMMANDS[argv[1]]():
        rows.append(row)
        print(
            f'{row["name"]:32} {row["value"]:10.2f} {row["reference"]:10.2f} {row["unit"]:>5} '
            f'{row["ratio"]:6.2f}',
            flush=True,
        )
    if _JSON.value:
        path = pathlib.Path(_JSON.value)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows, indent=2) + '\n')


if __name__ == '__main__':
    app.run(main)
