"""How much of what experts on several TPUs exchange travels while they compute."""

import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.benchmark_row import Row
from experiments.benchmark_tpu import CHIPS
from experiments.hlo import exchanges
from moe.config import Dispatch
from moe.exchange import compiler_options
from moe.expert_parallel import BATCH_AXES, expert_parallel_dispatch

CHUNKS = (1, 2, 4)
METHODS: tuple[Dispatch, ...] = ('grouped', 'capacity')
# Those of Qwen3-30B-A3B, over the four chips of the smallest slice.
EXPERTS, K, HIDDEN, WIDTH = 128, 8, 768, 2048
AXES = {'data': 1, 'fsdp': 1, 'expert': 4, 'tensor': 1}


def overlap_rows(
    *,
    chips: Sequence[str],
    methods: Sequence[Dispatch] = METHODS,
    chunks: Sequence[int] = CHUNKS,
    tokens: int = 4096,
) -> Iterator[Row]:
    """Compiles experts over four chips, forward and backward in bfloat16, and reads the schedule.

    The figure is the share of the exchanged elements that are on their way while a product runs,
    between the start and the end of their exchange. It says what may be hidden, not how long either
    takes. With one chunk a product waits for all that it needs, and only gradients of weights can
    run meanwhile; with more, all but the first and the last exchange can hide.

    Args:
        chips: among `experiments.benchmark_tpu.CHIPS`.
        methods: of dispatch.
        chunks: values of `exchange_chunks`.
        tokens: of each chip.

    Yields:
        Rows of millions of elements, those on their way under products beside all.
    """
    for chip in chips:
        for method in methods:
            for count in chunks:
                found = exchanges(_program(chip, method, count, tokens))
                every = sum(exchange.elements for exchange in found)
                hidden = sum(exchange.elements for exchange in found if exchange.products)
                yield {
                    'name': f'tpu/{chip}/overlap/{method}/chunks{count}',
                    'value': hidden / 1e6,
                    'unit': 'M',
                    'reference': every / 1e6,
                    'ratio': hidden / every,
                    'conditions': (
                        f'forward+backward, {tokens} tokens a chip, E={EXPERTS}, K={K}, F={HIDDEN},'
                        f' D={WIDTH}, bfloat16, compiled ahead of time for {CHIPS[chip]}, jax '
                        f'{jax.__version__}; elements exchanged under products; reference: all'
                    ),
                }


def _program(chip: str, method: Dispatch, chunks: int, tokens: int) -> str:
    os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform='tpu', topology_name=CHIPS[chip])
    mesh = topologies.make_mesh(topology, tuple(AXES.values()), tuple(AXES))
    compute = functools.partial(
        expert_parallel_dispatch,
        mesh=mesh,
        method=method,
        activation='silu',
        exchange_factor=1.25,
        exchange_chunks=chunks,
    )

    def step(x: Any, weights: Any, gate_up: Any, down: Any, ids: Any, cotangent: Any) -> Any:
        def y(x: Any, weights: Any, gate_up: Any, down: Any) -> Any:
            mask = jnp.ones(x.shape[:2], bool)
            return compute(x, ids, weights, mask, gate_up, down)[0]

        value, vjp = jax.vjp(y, x, weights, gate_up, down)
        return value, vjp(cotangent)

    def array(shape: tuple[int, ...], dtype: Any, spec: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    rows, experts = P(BATCH_AXES), P('expert')
    x = array((AXES['expert'], tokens, WIDTH), jnp.bfloat16, rows)
    weights = array((AXES['expert'], tokens, K), jnp.float32, rows)
    ids = array(weights.shape, jnp.int32, rows)
    gate_up = array((EXPERTS, WIDTH, 2, HIDDEN), jnp.bfloat16, experts)
    down = array((EXPERTS, HIDDEN, WIDTH), jnp.bfloat16, experts)
    options: Any = compiler_options(mesh)
    lowered = jax.jit(step).lower(x, weights, gate_up, down, ids, x)
    return lowered.compile(compiler_options=options).as_text() or ''
