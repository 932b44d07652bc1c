"""Routing as a value: a record replayed is the routing of the recorded pass, wherever it runs."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.attention_kinds import empty_cache
from moe.config import AttentionConfig, MoEConfig, RouterConfig, TransformerConfig
from moe.errors import InputError
from moe.replay import load_routing, save_routing
from moe.routing import route, router_scores, weigh
from moe.sharding import MeshConfig, batch_sharding, make_mesh, variable_shardings
from moe.transformer import Transformer
from moe.types import RouterOutput
from moe.unstacked import relaid

B, T, E, K, V = 8, 6, 4, 2, 24
ROUTERS = {
    'token': RouterConfig(E, K, score='sigmoid', selection_bias=True),
    'groups': RouterConfig(E, K, num_groups=2, groups_kept=1, normalize='none'),
    'hash': RouterConfig(E, K, choice='hash'),
    'expert': RouterConfig(E, K, choice='expert'),
}
CONFIG = TransformerConfig(
    vocab_size=V,
    num_layers=3,
    embed_dim=8,
    mlp_dim=8,
    attention=AttentionConfig(2, 2, 4),
    moe=MoEConfig(ROUTERS['token'], 4, dispatch='dense', first_dense_layers=1),
)
TOKENS = jax.random.randint(jax.random.key(7), (B, T), 0, V)
SEGMENTS = jnp.where(jnp.arange(T) < jnp.arange(B)[:, None] // 2 + 3, 1, 0)


def with_router(name: str, dispatch='dense', **fields: Any) -> TransformerConfig:
    assert CONFIG.moe is not None
    moe = dataclasses.replace(CONFIG.moe, router=ROUTERS[name], dispatch=dispatch)
    return dataclasses.replace(CONFIG, moe=moe, **fields)


@functools.cache
def variables_of(config: TransformerConfig):
    """Variables whose routers are far from sure of anything, so that choices differ."""
    variables = jax.jit(lambda key: nn.unbox(Transformer(config).init(key, TOKENS)))(
        jax.random.key(0)
    )
    return jax.tree.map(lambda leaf: 2 * leaf, variables)


@functools.cache
def forward(config: TransformerConfig, mesh=None):
    return jax.jit(
        lambda variables, replay: Transformer(config, mesh).apply(
            variables, TOKENS, segment_ids=SEGMENTS, replay=replay
        )
    )


def assert_same_bits(actual: Any, expected: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def reversed_bias(variables: Any) -> Any:
    """Selection biases that would have every token choose other experts."""
    biases = 100 * jnp.arange(E)
    return {
        **variables,
        'routing': jax.tree.map(
            lambda leaf: jnp.broadcast_to(biases, leaf.shape), variables['routing']
        ),
    }


@pytest.mark.parametrize(
    ('name', 'scan_layers'), [*((name, True) for name in ROUTERS), ('token', False)]
)
def test_a_replay_with_the_same_parameters_is_the_recorded_routing_bit_for_bit(name, scan_layers):
    config = with_router(name, scan_layers=scan_layers)
    variables = variables_of(config)
    recorded = forward(config)(variables, None)
    assert len(recorded.router) == 2
    if name == 'token':
        other = forward(config)(reversed_bias(variables), None)
        assert np.any(other.router[0].expert_ids != recorded.router[0].expert_ids)
        variables = reversed_bias(variables)
    replayed = forward(config)(variables, recorded.router)
    assert_same_bits(replayed.router, recorded.router)
    np.testing.assert_allclose(replayed.logits, recorded.logits, rtol=1e-5, atol=1e-6)
    ids = tuple(np.asarray(router.expert_ids) for router in recorded.router)
    assert_same_bits(forward(config)(variables, ids), replayed)


def test_ids_are_the_records_and_weights_are_of_the_current_logits():
    config = with_router('token')
    recorded = forward(config)(variables_of(config), None).router
    # Each layer replays the choices of the other, so that a mix-up of layers would show.
    rolled = recorded[::-1]
    other = jax.tree.map(lambda leaf: 0.7 * leaf, variables_of(config))
    replayed = forward(config)(other, rolled).router
    for layer, record in zip(replayed, rolled, strict=True):
        np.testing.assert_array_equal(layer.expert_ids, record.expert_ids)
        scores = np.asarray(router_scores(layer.router_logits, 'sigmoid'))
        chosen = np.take_along_axis(scores, np.asarray(record.expert_ids), -1)
        expected = chosen / chosen.sum(-1, keepdims=True)
        np.testing.assert_allclose(layer.expert_weights, expected, rtol=1e-5)
        assert np.abs(layer.expert_weights - record.expert_weights).max() > 0.01
        np.testing.assert_array_equal(
            layer.load, np.bincount(record.expert_ids[SEGMENTS > 0].ravel(), minlength=E)
        )


def loss_of(config: TransformerConfig, replay):
    def loss(params, variables):
        output = Transformer(config).apply(
            {**variables, 'params': params}, TOKENS, segment_ids=SEGMENTS, replay=replay
        )
        return jnp.square(output.logits - 1).mean(), output.router

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.parametrize(('scan_layers', 'remat'), [(True, 'full'), (False, 'dots')])
def test_remat_with_replay_has_the_routing_and_the_gradients_of_neither(scan_layers, remat):
    plain = with_router('token', scan_layers=scan_layers)
    variables = variables_of(plain)
    params = variables['params']
    (_, recorded), expected = loss_of(plain, None)(params, variables)
    rematerialised = dataclasses.replace(plain, remat=remat)
    (_, router), gradient = loss_of(rematerialised, recorded)(params, reversed_bias(variables))
    assert_same_bits([r.expert_ids for r in router], [r.expert_ids for r in recorded])
    # In float32 another order of the same sums is 3e-6 from gradients of size one.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5)
    jax.tree.map(close, gradient, expected)
    kernels = [
        np.abs(leaf).max()
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradient)
        if 'router' in jax.tree_util.keystr(path)
    ]
    assert min(kernels) > 1e-6


AHEAD = with_router('token', dispatch='grouped', mtp_depth=2)


@functools.cache
def forward_ahead(mesh=None):
    """Of the modules of multi-token prediction too."""
    apply = functools.partial(Transformer(AHEAD, mesh).apply, segment_ids=SEGMENTS, mtp=True)
    return jax.jit(lambda variables, replay: apply(variables, TOKENS, replay=replay))


def test_modules_replay_what_they_chose_bit_for_bit():
    variables = variables_of(AHEAD)
    recorded = forward_ahead()(variables, None)
    assert len(recorded.all_routers) == 4
    assert_same_bits(recorded.all_routers[2:], sum((m.router for m in recorded.ahead), ()))
    biased = reversed_bias(variables)
    anew = forward_ahead()(biased, None)
    for router, other in zip(recorded.all_routers, anew.all_routers, strict=True):
        assert np.any(router.expert_ids != other.expert_ids)
    replayed = forward_ahead()(biased, recorded.all_routers)
    assert_same_bits(replayed.all_routers, recorded.all_routers)
    for module, expected in zip(replayed.ahead, recorded.ahead, strict=True):
        np.testing.assert_allclose(module.hidden, expected.hidden, rtol=1e-5, atol=1e-6)
    # Each module replays the choices of the other, so that a mix-up would show.
    swapped = recorded.all_routers[:2] + recorded.all_routers[:1:-1]
    crossed = forward_ahead()(biased, swapped)
    ids = [[router.expert_ids for router in routers] for routers in (crossed.all_routers, swapped)]
    assert_same_bits(*ids)


def test_modules_on_a_mesh_replay_what_one_device_recorded():
    variables, mesh = variables_of(AHEAD), make_mesh(MeshConfig(data=2, expert=4))
    recorded = forward_ahead()(variables, None)
    placed = jax.device_put(
        reversed_bias(variables), variable_shardings(Transformer(AHEAD, mesh), mesh)
    )
    ids = [router.expert_ids for router in recorded.all_routers]
    rows = jax.device_put(ids, batch_sharding(mesh))
    replayed = forward_ahead(mesh)(placed, tuple(rows))
    for router, expected in zip(replayed.all_routers, recorded.all_routers, strict=True):
        np.testing.assert_array_equal(router.expert_ids, expected.expert_ids)
        np.testing.assert_array_equal(router.load, expected.load)
        np.testing.assert_allclose(router.expert_weights, expected.expert_weights, rtol=1e-5)


@pytest.mark.parametrize(('mtp', 'records'), [(True, 2), (False, 4)])
def test_a_record_of_a_pass_with_other_modules_is_refused(mtp, records):
    layers = 'the 2 MoE layers and of the 2 modules' if mtp else 'the 2 MoE layers'
    ids = (np.zeros((B, T, K), int),) * records
    with pytest.raises(InputError, match=f'each of {layers}.*; received {records}'):
        jax.eval_shape(
            lambda: Transformer(AHEAD).apply(variables_of(AHEAD), TOKENS, replay=ids, mtp=mtp)
        )


@pytest.mark.parametrize('sizes', [dict(data=2, expert=4), dict(fsdp=2, expert=2, tensor=2)])
def test_a_replay_on_a_mesh_is_that_on_one_device(sizes):
    config = with_router('token', dispatch='grouped')
    mesh, variables = make_mesh(MeshConfig(**sizes)), variables_of(config)
    recorded = forward(config)(variables, None)
    model = Transformer(config, mesh)
    placed = jax.device_put(reversed_bias(variables), variable_shardings(model, mesh))
    rows = jax.device_put([r.expert_ids for r in recorded.router], batch_sharding(mesh))
    replayed = forward(config, mesh)(placed, tuple(rows))
    for layer, record in zip(replayed.router, recorded.router, strict=True):
        np.testing.assert_array_equal(layer.expert_ids, record.expert_ids)
        np.testing.assert_array_equal(layer.load, record.load)
        np.testing.assert_allclose(layer.expert_weights, record.expert_weights, rtol=1e-5)
    # Logits near 0 are sums of terms that cancel: float32 leaves 3e-5 of them in another order.
    np.testing.assert_allclose(replayed.logits, recorded.logits, rtol=1e-4, atol=1e-4)


def test_scanned_layers_replay_what_unrolled_ones_recorded():
    unrolled = with_router('token', scan_layers=False)
    scanned = with_router('token')
    variables = variables_of(unrolled)
    recorded = forward(unrolled)(variables, None)
    restacked = {
        name: relaid(unrolled, scanned, collection) for name, collection in variables.items()
    }
    replayed = forward(scanned)(reversed_bias(restacked), recorded.router)
    for layer, record in zip(replayed.router, recorded.router, strict=True):
        np.testing.assert_array_equal(layer.expert_ids, record.expert_ids)
    np.testing.assert_allclose(replayed.logits, recorded.logits, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize('name', ['token', 'hash'])
def test_decoding_with_a_cache_replays_the_records_of_its_tokens(name):
    config = with_router(name)
    variables, model = variables_of(config), Transformer(config)
    whole = jax.jit(model.apply)(variables, TOKENS)
    cache = empty_cache(config, B, T)
    biased = reversed_bias(variables) if name == 'token' else variables

    @jax.jit
    def step(tokens, cache, ids):
        return model.apply(biased, tokens, cache=cache, replay=ids)

    for part in (slice(0, 3), slice(3, 4), slice(4, 5), slice(5, 6)):
        ids = tuple(router.expert_ids[:, part] for router in whole.router)
        output = step(TOKENS[:, part], cache, ids)
        cache = output.cache
        assert_same_bits([router.expert_ids for router in output.router], list(ids))
        np.testing.assert_allclose(output.logits, whole.logits[:, part], rtol=1e-4, atol=2e-4)


def test_weigh_by_hand():
    logits = jnp.log(jnp.array([[[0.1, 0.2, 0.3, 0.4]]]))
    ids = jnp.array([[[2, 0, 4]]])
    none = weigh(logits, ids, RouterConfig(4, 3, normalize='none', scale=2.0))
    np.testing.assert_allclose(none, [[[0.6, 0.2, 0.0]]], rtol=1e-6)
    after = weigh(logits, ids, RouterConfig(4, 3))
    np.testing.assert_allclose(after, [[[0.75, 0.25, 0.0]]], rtol=1e-6)
    chosen, weights = route(logits, RouterConfig(4, 3))
    np.testing.assert_array_equal(weigh(logits, chosen, RouterConfig(4, 3)), weights)


def test_a_record_written_and_read_is_the_same_and_replays(tmp_path):
    config = with_router('expert')
    recorded = forward(config)(variables_of(config), None).router
    save_routing(tmp_path / 'routing.npz', recorded)
    read = load_routing(tmp_path / 'routing.npz')
    assert isinstance(read[0], RouterOutput)
    assert jax.tree.map(lambda x: x.dtype, read) == jax.tree.map(lambda x: x.dtype, recorded)
    assert_same_bits(read, recorded)
    assert_same_bits(forward(config)(variables_of(config), read).router, recorded)


def test_files_that_are_no_records_are_refused(tmp_path):
    config = with_router('token')
    recorded = forward(config)(variables_of(config), None).router
    with pytest.raises(InputError, match=r'\.npz file; received .*routing\.bin'):
        save_routing(tmp_path / 'routing.bin', recorded)
    with pytest.raises(InputError, match='at least one MoE layer'):
        save_routing(tmp_path / 'routing.npz', ())
    with pytest.raises(InputError, match='cannot be read'):
        load_routing(tmp_path / 'absent.npz')
    (tmp_path / 'text.npz').write_text('no archive')
    with pytest.raises(InputError, match='cannot be read'):
        load_routing(tmp_path / 'text.npz')
    np.savez(tmp_path / 'other.npz', a=np.zeros(3))
    with pytest.raises(InputError, match=r"must hold router_logits.*it holds \['a'\]"):
        load_routing(tmp_path / 'other.npz')
    wrong = recorded[0].replace(expert_ids=recorded[0].expert_ids + 3)
    save_routing(tmp_path / 'wrong.npz', (recorded[0], wrong))
    with pytest.raises(InputError, match=r'Layer 1 of .* ids in \[0, 4\].* from 3 to 6'):
        load_routing(tmp_path / 'wrong.npz')


@pytest.mark.parametrize(
    ('ids', 'message'),
    [
        ([np.zeros((B, T, K), int)] * 3, r'each of the 2 MoE layers; received 3'),
        ([np.zeros((B, T, K + 1), int)] * 2, r'replay\[0\] must .*\(8, 6, 2\).*\(8, 6, 3\)'),
        ([np.zeros((B, T + 1, K), int)] * 2, r'replay\[0\] must .*\(8, 6, 2\).*\(8, 7, 2\)'),
        ([np.zeros((B, T, K))] * 2, r'replay\[0\] must hold integer .* received float64'),
        ([np.full((B, T, K), [0, -1])] * 2, r'ids in \[0, 4\].* from -1 to 0'),
        ([np.full((B, T, K), [0, 5])] * 2, r'ids in \[0, 4\].* from 0 to 5'),
        ([np.full((B, T, K), [2, 2])] * 2, r'at most once for a token; 48 tokens'),
    ],
)
def test_records_of_something_else_are_refused(ids, message):
    config = with_router('token')
    with pytest.raises(InputError, match=message):
        jax.eval_shape(
            lambda: Transformer(config).init(jax.random.key(0), TOKENS, replay=tuple(ids))
        )


def test_what_chooses_no_experts_has_nothing_to_replay():
    ids = (np.zeros((B, T, E), int),) * 2
    assert CONFIG.moe is not None
    soft = dataclasses.replace(CONFIG.moe, router=RouterConfig(E, E, choice='soft'))
    for moe, received in ((soft, "choice='soft'"), (None, 'a dense model')):
        model = Transformer(dataclasses.replace(CONFIG, moe=moe))
        with pytest.raises(InputError, match=f'replay needs routers.*received.*{received}'):
            jax.eval_shape(lambda m=model: m.init(jax.random.key(0), TOKENS, replay=ids))
