"""Figures of a MoE layer, and of another library's, beside a dense MLP of equal active FLOPs."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from distill.timing import interleaved_medians
from experiments import benchmark_peer
from experiments.benchmark_row import Row, ratio_row, this_machine
from experiments.hlo import check_not_expanded
from moe.config import Dispatch, MoEConfig, RouterConfig
from moe.experts import MoELayer
from moe.layers import GatedMLP

Step = Callable[[], Any]

# (K, F): one to eight experts a token, fine and coarse.
EXPERT_SHAPES = ((1, 1024), (2, 256), (2, 1024), (8, 256))
# (E, K, F) where the other library is measured too.
PEER_SHAPES = ((8, 2, 256), (8, 2, 1024), (64, 2, 256), (64, 2, 1024), (64, 8, 256))
# The dense oracle holds [tokens, E, 2 F] float32; past this many bytes it is left out.
ORACLE_BYTES = 2**30
# Past this many bytes of expert weights, float32, a shape is left out: gradients need them again.
WEIGHT_BYTES = 2**30


def moe_rows(
    *,
    experts: Sequence[int] = (8, 64, 256),
    shapes: Sequence[tuple[int, int]] = EXPERT_SHAPES,
    tokens: int = 4096,
    width: int = 512,
    repeats: int = 5,
    peer: bool = False,
) -> Iterator[Row]:
    """Measures dispatch in a MoE layer, forward and backward, beside a dense gated MLP.

    The MLP's hidden width is `K * F`: the FLOPs of a token's active experts. Router, sorting and
    all are in the layer's time; gradients are those of the input and of every parameter. 'skewed'
    adds one vector to every token, so that all lean to the same experts. The program of 'grouped'
    is checked to hold no dense expansion.

    Args:
        experts: the numbers of experts, `E`.
        shapes: pairs of `K` and `F`; passed over where `K` is not below `E`, or where the experts'
            weights have more than `WEIGHT_BYTES`.
        tokens: in one sequence.
        width: `D`.
        repeats: timed rounds; the median counts.
        peer: whether to measure `transformers`' experts in the same rounds, at `PEER_SHAPES`.

    Yields:
        For each shape, rows of value and reference in milliseconds: 'capacity', 'grouped',
        'grouped_skewed', and where it fits in `ORACLE_BYTES` 'dense'. With `peer` also
        'transformers', beside its own dense MLP, and 'grouped_to_transformers', the quotient of the
        two shares.
    """
    for number in experts:
        for k, hidden in shapes:
            if k < number and number * 3 * width * hidden * 4 <= WEIGHT_BYTES:
                router = RouterConfig(number, k)
                beside = peer and (number, k, hidden) in PEER_SHAPES
                yield from _shape_rows(router, hidden, (tokens, width), repeats, beside)


def _shape_rows(
    router: RouterConfig, hidden: int, size: tuple[int, int], repeats: int, peer: bool
) -> Iterator[Row]:
    tokens, width = size
    experts, k = router.num_experts, router.experts_per_token
    x = jax.random.normal(jax.random.key(0), (1, tokens, width))
    skewed = x + jax.random.normal(jax.random.key(3), (width,))
    functions, loads, variables = _layer_steps(router, hidden, x, skewed)
    mlp = GatedMLP(k * hidden, 'silu')
    functions['mlp'] = _training_step(mlp, mlp.init(jax.random.key(1), x), x)[0]
    if peer:
        functions |= benchmark_peer.steps(variables['params'], x, k)
    seconds = interleaved_medians(functions, repeats=repeats)
    shape = f'E{experts}_K{k}_F{hidden}'
    what = f'forward+backward, {tokens} tokens, D={width}, float32'
    reference = f'reference: dense gated MLP of F={k * hidden}'
    for method, load in loads.items():
        conditions = f'{what}, largest load {load:.2f} times the mean; {reference}'
        yield _row(f'moe/{method}/{shape}', seconds[method], seconds['mlp'], conditions)
    if peer:
        where = f'{what}; {benchmark_peer.conditions()}; {reference} in torch'
        yield _row(
            f'moe/transformers/{shape}', seconds['transformers'], seconds['torch_mlp'], where
        )
        ours = seconds['mlp'] / seconds['grouped']
        theirs = seconds['torch_mlp'] / seconds['transformers']
        told = f'{where}; value: of the same MLP in JAX, in the same run; {this_machine()}'
        yield ratio_row(f'moe/grouped_to_transformers/{shape}', 'share', ours, theirs, told)


def _layer_steps(
    router: RouterConfig, hidden: int, x: jax.Array, skewed: jax.Array
) -> tuple[dict[str, Step], dict[str, float], Any]:
    """Returns each form's step, its largest load over the mean, and the layer's parameters."""
    _, tokens, width = x.shape
    experts, k = router.num_experts, router.experts_per_token
    mask = jnp.ones((1, tokens), bool)
    layer = MoELayer(MoEConfig(router, hidden, dispatch='grouped'), 'silu')
    variables = nn.unbox(layer.init(jax.random.key(1), x, mask))
    steps: dict[str, Step] = {}
    loads: dict[str, float] = {}
    methods: list[Dispatch] = ['capacity', 'grouped']
    if tokens * experts * 2 * hidden * 4 <= ORACLE_BYTES:
        methods.insert(0, 'dense')
    balanced, uneven = (_largest_load(layer, variables, x, mask) for x in (x, skewed))
    for method in methods:
        layer = MoELayer(MoEConfig(router, hidden, dispatch=method), 'silu')
        steps[method], program = _training_step(layer, variables, x, mask)
        loads[method] = balanced
        if method == 'grouped':
            most = max(2 * experts * width * hidden, tokens * k * max(width, 2 * hidden))
            name = f'The grouped layer with E={experts}, K={k}, F={hidden}'
            check_not_expanded(program.as_text(), most=most, what=name)
            steps['grouped_skewed'] = functools.partial(program, variables, skewed)
            loads['grouped_skewed'] = uneven
    return steps, loads, variables


def _largest_load(layer: nn.Module, variables: Any, x: jax.Array, mask: jax.Array) -> float:
    def load(variables: Any, x: jax.Array) -> jax.Array:
        routed: Any = layer.apply(variables, x, mask)
        return routed[1].load

    loads = jax.jit(load)(variables, x)
    return float(loads.max() / loads.mean())


def _training_step(
    layer: nn.Module, variables: Mapping[str, Any], x: jax.Array, *args: jax.Array
) -> tuple[Step, Any]:
    """Returns a function that computes the gradients of the input and parameters; its program."""
    variables = nn.unbox(variables)
    cotangent = jax.random.normal(jax.random.key(2), x.shape)

    def loss(variables: Any, x: jax.Array) -> jax.Array:
        y = layer.apply(variables, x, *args)
        y = y[0] if isinstance(y, tuple) else y
        return (y * cotangent).sum()

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    program = step.lower(variables, x).compile()
    return lambda: program(variables, x), program


def _row(name: str, value: float, reference: float, conditions: str) -> Row:
    told = f'{conditions}; {this_machine()}'
    return ratio_row(name, 'ms', value * 1e3, reference * 1e3, told)
