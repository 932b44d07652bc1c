"""What a MoE layer costs on TPUs that need not be there: it is compiled ahead of time for them."""

import importlib.util
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.benchmark_row import Row
from moe.config import MoEConfig, RouterConfig
from moe.errors import InputError
from moe.experts import MoELayer

# The smallest slice of each kind that can be named; the layer is compiled for one chip of it.
CHIPS = {'v5p': 'v5p:2x2x1', 'v6e': 'v6e:2x2'}
# A v6e has fast memory left over, into which the compiler copies inputs; it counts both ends of
# those copies, when they begin and when they end. With this much set aside there is none left.
OPTIONS = {'v6e': {'xla_tpu_scoped_vmem_limit_kib': 98304}}


class LayerShape(NamedTuple):
    """Sizes of a MoE layer, and how many tokens one chip has of it."""

    experts: int
    k: int
    hidden: int
    width: int
    tokens: int


# Those of Mixtral 8x7B and of Qwen3-30B-A3B: few coarse experts and many fine ones, of which few
# tokens leave weights the most of what is moved.
LAYERS = (
    LayerShape(8, 2, 14336, 4096, 4096),
    LayerShape(128, 8, 768, 2048, 1024),
    LayerShape(128, 8, 768, 2048, 4096),
)


def tpu_rows(
    *, chips: Sequence[str] = tuple(CHIPS), layers: Sequence[LayerShape] = LAYERS
) -> Iterator[Row]:
    """Compiles the dropless layer, forward and backward in bfloat16, and reads what it costs.

    The ideal FLOPs are those of the products: `3 * (2 N K 3 D F + 2 N D E)`. The least bytes are,
    forward, input, weights and output once, and backward the input, weights, the outputs'
    gradients and the gradients of input and weights once. Both figures are the compiler's; for a
    kernel, what its author says it costs.

    The compiler chooses how memory holds parameters and gradients (`jax.experimental.layout`), as a
    program may let it: gate and up projections [E, D, 2, F] lie as [E, 2, D, F], which the kernels
    read and write. Held as they are by default they are copied, and their gradient back. The train
    step lets the compiler choose nothing yet: its state keeps the default.

    What is above the least: each assignment's gate and up projections are written forward and read
    backward; its row is gathered and then read by the MLP, its output written and then gathered; a
    gathered row of bfloat16 brings its neighbour along. So the ratio grows with `N K / E`. Kernels
    say what they move where loads are balanced; of a group of more rows than a window has, weights
    are read again.

    Args:
        chips: among `CHIPS`.
        layers: their sizes; `N` is the tokens of one chip.

    Yields:
        For each chip and layer a row of GFLOP and one of GB, as ratios of the least.

    Raises:
        InputError: for a chip that is not known, or where the compiler for TPUs is not installed.
    """
    unknown = [chip for chip in chips if chip not in CHIPS]
    if unknown or not chips:
        raise InputError(f'--chips must be among {", ".join(CHIPS)}; received {",".join(chips)!r}.')
    if not importlib.util.find_spec('libtpu'):
        raise InputError(
            "The compiler for TPUs must be installed; libtpu was not found. pip install -e '.[tpu]'"
        )
    return _rows(chips, layers)


def _rows(chips: Sequence[str], layers: Sequence[LayerShape]) -> Iterator[Row]:
    for chip in chips:
        for layer in layers:
            cost, tokens = _layer_cost(chip, layer), layer.tokens
            products = layer.k * 3 * layer.width * layer.hidden + layer.width * layer.experts
            weights = layer.experts * layer.width * (3 * layer.hidden + 1)
            least = 2 * (3 * weights + 5 * tokens * layer.width)
            shape = f'E{layer.experts}_K{layer.k}_F{layer.hidden}_N{tokens}'
            conditions = (
                f'forward+backward, {tokens} tokens, D={layer.width}, bfloat16, compiled ahead of '
                f'time for one chip of {CHIPS[chip]}, jax {jax.__version__}; reference: '
            )
            for name, unit, key, reference, what in (
                ('flops', 'GFLOP', 'flops', 6 * tokens * products, 'the products'),
                ('bytes', 'GB', 'bytes accessed', least, 'inputs, weights, outputs once each way'),
            ):
                yield {
                    'name': f'tpu/{chip}/{name}/{shape}',
                    'value': cost[key] / 1e9,
                    'unit': unit,
                    'reference': reference / 1e9,
                    'ratio': cost[key] / reference,
                    'conditions': conditions + what,
                }


def _layer_cost(chip: str, shape: LayerShape) -> dict[str, float]:
    """Returns the compiler's account of the layer's gradients for one chip."""
    # Without it libtpu asks the network, for minutes, which machine this is.
    os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
    from jax.experimental import topologies
    from jax.experimental.layout import Format, Layout

    topology = topologies.get_topology_desc(platform='tpu', topology_name=CHIPS[chip])
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
    config = MoEConfig(RouterConfig(shape.experts, shape.k), shape.hidden, dispatch='grouped')
    layer = MoELayer(config, 'silu', dtype='bfloat16', param_dtype='bfloat16')
    x = jax.ShapeDtypeStruct((1, shape.tokens, shape.width), jnp.bfloat16)
    mask = jax.ShapeDtypeStruct((1, shape.tokens), bool)
    variables = nn.unbox(jax.eval_shape(layer.init, jax.random.key(0), x, mask))

    def step(variables: Any, x: jax.Array, cotangent: jax.Array) -> Any:
        full = jnp.ones(mask.shape, bool)
        y, vjp = jax.vjp(lambda variables, x: layer.apply(variables, x, full)[0], variables, x)
        return y, vjp(cotangent)

    chosen = Format(Layout.AUTO, sharding)
    jitted = jax.jit(step, in_shardings=chosen, out_shardings=chosen)
    options: Any = OPTIONS.get(chip)
    program = jitted.lower(variables, x, x).compile(compiler_options=options)
    text = program.as_text()
    if not text or ' while(' in text:
        raise RuntimeError(
            'The program for TPUs must have no loop, whose body the compiler counts once; it has.'
        )
    return dict(program.cost_analysis() or {})
