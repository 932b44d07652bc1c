import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from moe.config import MoEConfig, RouterConfig
from moe.dispatch import ExpertBiases, dispatch
from moe.errors import InputError
from moe.exchange import Bounds, exchange_bounds
from moe.expert_parallel import expert_parallel_dispatch
from moe.experts import MoELayer

AXES = ('data', 'fsdp', 'expert', 'tensor')
B, T, D, E, F, K = 8, 3, 8, 8, 8, 3
MESHES = [
    (8, 1, 1, 1),
    (1, 8, 1, 1),
    (1, 1, 8, 1),
    (1, 1, 1, 8),
    (2, 2, 2, 1),
    (1, 1, 4, 2),
    (1, 2, 2, 2),
]


def mesh_of(shape: tuple[int, ...]) -> jax.sharding.Mesh:
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 4)


@functools.cache
def operands():
    rng = np.random.default_rng(0)
    x, weights, gate_up, down, cotangent = (
        jnp.array(rng.normal(size=shape), jnp.float32)
        for shape in ((B, T, D), (B, T, K), (E, D, 2, F), (E, F, D), (B, T, D))
    )
    mask = rng.uniform(size=(B, T)) > 0.2
    return x, weights, gate_up, down, cotangent, mask


def choices(kind: str) -> np.ndarray:
    """All to one shard's experts is the worst case of the exchange; the other is uneven."""
    rng = np.random.default_rng(1)
    favour = {'uneven': 0.7, 'one shard takes all': 1e3}[kind]
    return np.argsort(rng.normal(size=(B, T, E)) + favour * np.arange(E), axis=-1)[..., :K]


def compile_for(run):
    @jax.jit
    def output_and_gradients(x, weights, gate_up, down, cotangent, mask, ids):
        def forward(x, weights, gate_up, down):
            return run(x, ids, weights, mask, gate_up, down)

        y, vjp, dropped = jax.vjp(forward, x, weights, gate_up, down, has_aux=True)
        return y, dropped, vjp(cotangent)

    return output_and_gradients


@functools.cache
def expected(kind: str, method: str, factor: float):
    run = functools.partial(dispatch, method=method, activation='gelu', capacity_factor=factor)
    return compile_for(run)(*operands(), choices(kind))


def assert_same_on_every_device(actual, expected):
    for got, want in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        scale = max(1.0, np.abs(want).max())
        np.testing.assert_allclose(got / scale, want / scale, atol=2e-6)
        for shard in got.addressable_shards:
            part = np.asarray(want)[shard.index]
            np.testing.assert_allclose(shard.data / scale, part / scale, atol=2e-6)


@pytest.mark.parametrize(
    ('method', 'factor', 'oracle'), [('grouped', 1.0, 'dense'), ('capacity', 1.0, 'capacity')]
)
@pytest.mark.parametrize('shape', MESHES, ids=str)
def test_every_mesh_equals_one_device(shape, method, factor, oracle):
    run = functools.partial(
        expert_parallel_dispatch,
        mesh=mesh_of(shape),
        method=method,
        activation='gelu',
        capacity_factor=factor,
    )
    compiled = compile_for(run)
    for kind in ('uneven', 'one shard takes all'):
        wanted = expected(kind, oracle, factor)
        assert_same_on_every_device(compiled(*operands(), choices(kind)), wanted)
        assert (wanted[1] > 0) == (method == 'capacity')


@pytest.mark.parametrize('method', ['grouped', 'capacity'])
@pytest.mark.parametrize('shape', [(2, 2, 2, 1), (1, 2, 2, 2), (1, 1, 1, 8)], ids=str)
def test_biases_on_every_mesh_equal_one_device(shape, method):
    x, weights, gate_up, down, cotangent, mask = operands()
    rng = np.random.default_rng(2)
    gate_up_bias, down_bias = (
        jnp.array(rng.normal(size=size), jnp.float32) for size in ((E, 2, F), (E, D))
    )
    ids, settings = choices('uneven'), {'activation': 'clamped_swiglu', 'capacity_factor': 1.0}

    def compile_biased(run):
        @jax.jit
        def output_and_gradients(*arrays):
            def forward(x, weights, gate_up, down, gate_up_bias, down_bias):
                biases = ExpertBiases(gate_up_bias, down_bias)
                return run(
                    x, ids, weights, mask, gate_up, down, method=method, biases=biases, **settings
                )[0]

            y, vjp = jax.vjp(forward, *arrays)
            return y, vjp(cotangent)

        return output_and_gradients

    arrays = (x, weights, gate_up, down, gate_up_bias, down_bias)
    sharded = functools.partial(expert_parallel_dispatch, mesh=mesh_of(shape))
    assert_same_on_every_device(compile_biased(sharded)(*arrays), compile_biased(dispatch)(*arrays))


@pytest.mark.parametrize('shape', [(2, 2, 2, 1), (1, 1, 4, 2)], ids=str)
@pytest.mark.parametrize(('method', 'oracle'), [('grouped', 'dense'), ('capacity', 'capacity')])
def test_chunks_change_nothing(shape, method, oracle):
    run = functools.partial(
        expert_parallel_dispatch,
        mesh=mesh_of(shape),
        method=method,
        activation='gelu',
        capacity_factor=1.0,
    )
    wanted = expected('uneven', oracle, 1.0)
    exchanges = []
    for chunks in (1, 2):
        compiled = compile_for(functools.partial(run, exchange_chunks=chunks))
        assert_same_on_every_device(compiled(*operands(), choices('uneven')), wanted)
        text = compiled.lower(*operands(), choices('uneven')).as_text()
        exchanges.append(text.count('stablehlo.all_to_all'))
    assert exchanges[1] == 2 * exchanges[0] > 0


def kept_by_hand(ids, mask, *, shards: int, capacity: int) -> np.ndarray:
    """Which assignments find room: one row of the batch a shard, groups of shards in order."""
    kept = np.zeros(ids.shape, bool)
    for group in range(0, B, shards):
        room = np.full(shards, capacity)
        for b in range(group, group + shards):
            for t, k in np.ndindex(T, K):
                peer = ids[b, t, k] // (E // shards)
                if mask[b, t] and room[peer] > 0:
                    kept[b, t, k] = True
                    room[peer] -= 1
    return kept


@pytest.mark.parametrize('factor', [0.5, 1.0, 1.4])
def test_a_bounded_exchange_drops_what_has_no_room_and_counts_it(factor):
    x, weights, gate_up, down, cotangent, mask = operands()
    run = functools.partial(
        expert_parallel_dispatch,
        mesh=mesh_of((2, 1, 4, 1)),
        method='grouped',
        activation='gelu',
        exchange_factor=factor,
    )
    compiled = compile_for(run)
    for kind in ('uneven', 'one shard takes all'):
        ids = choices(kind)
        kept = kept_by_hand(ids, mask, shards=4, capacity=int(np.ceil(T * K * factor)))
        oracle = functools.partial(dispatch, method='dense', activation='gelu')
        left = np.where(kept, ids, E)
        y, _, gradients = compile_for(oracle)(*operands(), left)
        dropped = (mask[..., None] & ~kept).sum()
        assert dropped > 0 or kind == 'uneven'
        actual = compiled(x, weights, gate_up, down, cotangent, mask, ids)
        assert_same_on_every_device(actual, (y, np.float32(dropped), gradients))


def test_no_factor_reserves_more_than_the_worst_load():
    assert exchange_bounds(6, 2, 8, 4, None) == Bounds(sent=12, received=48, pair=12)
    assert exchange_bounds(6, 4, 8, 4, None) == Bounds(sent=24, received=48, pair=12)
    assert exchange_bounds(6, 2, 8, 4, 1.3) == Bounds(sent=12, received=16, pair=12)
    assert exchange_bounds(6, 2, 8, 4, 0.5) == Bounds(sent=12, received=6, pair=6)
    assert exchange_bounds(6, 2, 8, 4, 99.0) == exchange_bounds(6, 2, 8, 4, None)


@pytest.mark.parametrize(
    'fields',
    [
        {'dispatch': 'capacity', 'capacity_factor': 0.5},
        {'dispatch': 'grouped', 'exchange_factor': 0.5, 'exchange_chunks': 2},
    ],
    ids=str,
)
def test_layer_load_and_drops_are_sums_over_the_whole_batch(fields):
    config = MoEConfig(RouterConfig(E, K), expert_dim=F, **fields)
    x, *_, mask = operands()
    one, many = (MoELayer(config, 'silu', mesh=m) for m in (None, mesh_of((1, 2, 2, 2))))
    variables = jax.jit(one.init)(jax.random.key(0), x, mask)
    y, router = jax.jit(one.apply)(variables, x, mask)
    sharded_y, sharded = jax.jit(many.apply)(variables, x, mask)
    assert_same_on_every_device(sharded.load, router.load)
    assert router.load.sum() == mask.sum() * K
    assert 0 < sharded.dropped < router.load.sum()
    if config.dispatch == 'capacity':
        assert_same_on_every_device((sharded_y, sharded.dropped), (y, router.dropped))
    else:
        # One device exchanges nothing, and has no bound.
        assert router.dropped == 0


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        (dict(exchange_factor=0.0), 'exchange_factor must be positive, or None'),
        (dict(exchange_chunks=0), 'exchange_chunks must be a positive integer'),
    ],
)
def test_exchanges_that_mean_nothing_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        MoEConfig(RouterConfig(E, K), expert_dim=F, **fields)


@pytest.mark.parametrize(
    ('shape', 'changed', 'message'),
    [
        ((1, 1, 8, 1), {'experts': 6}, 'number of experts must be a multiple of 8.*received 6'),
        ((4, 2, 1, 1), {'batch': 6}, 'batch must be a multiple of 8.*received 6'),
        ((1, 8, 1, 1), {'embed': 12}, 'model width must be a multiple of 8.*received 12'),
        ((1, 1, 1, 8), {'mlp': 4}, 'expert width must be a multiple of 8.*received 4'),
    ],
)
def test_what_a_mesh_does_not_divide_is_refused(shape, changed, message):
    sizes = {'experts': 8, 'batch': 8, 'embed': 8, 'mlp': 8} | changed
    batch, dim, hidden = sizes['batch'], sizes['embed'], sizes['mlp']
    with pytest.raises(InputError, match=message):
        expert_parallel_dispatch(
            jnp.zeros((batch, 2, dim)),
            jnp.zeros((batch, 2, 1), int),
            jnp.ones((batch, 2, 1)),
            jnp.ones((batch, 2), bool),
            jnp.zeros((sizes['experts'], dim, 2, hidden)),
            jnp.zeros((sizes['experts'], hidden, dim)),
            mesh=mesh_of(shape),
            method='grouped',
            activation='silu',
        )
