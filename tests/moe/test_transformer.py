"""The decoder as a whole: what layouts, masks, cache and precision may and may not change."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.attention_kinds import empty_cache
from moe.config import AttentionConfig, MoEConfig, RouterConfig, TransformerConfig
from moe.errors import InputError
from moe.selection_bias import update_selection_bias
from moe.sharding import MeshConfig, init_sharded, logical_axes, make_mesh
from moe.stacking import LayerGroup, layer_groups, layer_paths
from moe.transformer import Transformer, output_head

CONFIG = TransformerConfig(
    vocab_size=24,
    num_layers=5,
    embed_dim=16,
    mlp_dim=12,
    attention=AttentionConfig(4, 2, 4, 'head'),
    moe=MoEConfig(
        RouterConfig(4, 2, selection_bias=True), 6, shared_dim=4, dispatch='dense', layers=(1, 3, 4)
    ),
)
DENSE = dataclasses.replace(CONFIG, num_layers=2, moe=None)
TOKENS = jax.random.randint(jax.random.key(7), (2, 8), 0, 24)
SEGMENTS = jnp.array([[1, 1, 1, 2, 2, 2, 2, 0], [0, 0, 1, 1, 1, 1, 1, 1]])


@functools.cache
def variables_of(config: TransformerConfig):
    return jax.jit(lambda key: nn.unbox(Transformer(config).init(key, TOKENS)))(jax.random.key(0))


@functools.cache
def forward(config: TransformerConfig, mesh=None):
    return jax.jit(Transformer(config, mesh).apply, static_argnames='logits')


def objective(config: TransformerConfig, variables, params):
    """A scalar that every layer and router has a gradient in."""
    out = Transformer(config).apply({**variables, 'params': params}, TOKENS, segment_ids=SEGMENTS)
    routers = sum(jnp.square(router.router_logits).mean() for router in out.router)
    return jnp.square(out.logits - 1).mean() + routers, out


@functools.cache
def value_and_grad(config: TransformerConfig):
    return jax.jit(jax.value_and_grad(functools.partial(objective, config), 1, has_aux=True))


def stacked(config: TransformerConfig, unrolled: dict) -> dict:
    """Restacks the layers of a collection as a scanned model of this config has them."""
    layers: dict[tuple[str, ...], list] = {}
    for i, (path, _) in enumerate(layer_paths(config)):
        if f'layer_{i}' in unrolled:
            layers.setdefault(path, []).append(unrolled[f'layer_{i}'])
    out = {name: leaf for name, leaf in unrolled.items() if not name.startswith('layer_')}
    for (group, layer), repeats in layers.items():
        out.setdefault(group, {})[layer] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *repeats)
    return out


def assert_close(actual, expected, atol: float) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=atol)
    jax.tree.map(close, actual, expected)


@pytest.mark.parametrize(
    ('layers', 'groups'),
    [
        ('dddd', [('d', 4)]),
        ('dmdmdm', [('dm', 3)]),
        ('dmmm', [('d', 1), ('m', 3)]),
        ('ddmdmdm', [('d', 1), ('dm', 3)]),
        ('dmdmm', [('dm', 2), ('m', 1)]),
    ],
)
def test_layers_are_grouped_into_the_fewest_blocks(layers, groups):
    expected = tuple(
        LayerGroup(tuple(kind == 'm' for kind in pattern), repeats) for pattern, repeats in groups
    )
    assert layer_groups(tuple(kind == 'm' for kind in layers)) == expected


def test_scanned_layers_equal_unrolled_ones_in_values_and_gradients():
    unrolled = dataclasses.replace(CONFIG, scan_layers=False)
    variables = dict(variables_of(unrolled))
    keys = iter(jax.random.split(jax.random.key(3), 3))
    variables['routing'] = jax.tree.map(
        lambda leaf: 0.1 * jax.random.normal(next(keys), leaf.shape), variables['routing']
    )
    restacked = {name: stacked(CONFIG, part) for name, part in variables.items()}
    shapes = jax.tree.map(jnp.shape, variables_of(CONFIG))
    assert jax.tree.map(jnp.shape, restacked) == shapes
    (_, expected), gradients = value_and_grad(unrolled)(variables, variables['params'])
    (_, actual), scanned = value_and_grad(CONFIG)(restacked, restacked['params'])
    assert len(actual.router) == 3
    assert_close(actual, expected, 1e-5)
    assert_close(scanned, stacked(CONFIG, gradients), 1e-5)


def kept_bytes(config: TransformerConfig) -> int:
    """Bytes that the forward pass keeps for the backward pass."""

    def residuals(variables):
        loss = functools.partial(objective, config, variables)
        return jax.tree.leaves(jax.vjp(loss, variables['params'], has_aux=True)[1])

    leaves = jax.eval_shape(residuals, variables_of(CONFIG))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def test_remat_keeps_less_and_changes_nothing():
    policies = [dataclasses.replace(CONFIG, remat=name) for name in ('none', 'dots', 'full')]
    none, dots, full = (kept_bytes(config) for config in policies)
    assert full < dots < none
    variables = variables_of(CONFIG)
    expected, *others = (value_and_grad(c)(variables, variables['params']) for c in policies)
    for actual in others:
        assert_close(actual, expected, 1e-5)


def test_logits_depend_on_no_later_token_and_no_other_segment():
    tokens = jnp.arange(8)[None]
    segments = jnp.array([[1, 1, 1, 2, 2, 2, 2, 0]])
    variables = variables_of(CONFIG)

    def readings(embedding):
        params = {**variables['params'], 'embed': {'embedding': embedding}}
        out = Transformer(CONFIG).apply(
            {**variables, 'params': params}, tokens, segment_ids=segments
        )
        return jnp.square(out.logits[0]).sum(axis=-1)

    jacobian = jax.jit(jax.jacrev(readings))(variables['params']['embed']['embedding'])
    influence = np.abs(jacobian[:, :8]).sum(axis=-1)
    at = np.arange(8)
    reachable = (at[:, None] >= at) & np.equal.outer(segments[0], segments[0])
    assert (influence[~reachable] == 0).all()
    assert (influence[reachable] > 1e-4).all()


def test_a_packed_row_equals_each_document_alone():
    variables = variables_of(CONFIG)
    packed = forward(CONFIG)(variables, TOKENS, segment_ids=SEGMENTS)
    for row, start, stop in [(0, 0, 3), (0, 3, 7), (1, 2, 8)]:
        document = jnp.zeros_like(TOKENS).at[0, : stop - start].set(TOKENS[row, start:stop])
        segments = jnp.zeros_like(TOKENS).at[0, : stop - start].set(1)
        alone = forward(CONFIG)(variables, document, segment_ids=segments)
        np.testing.assert_allclose(
            packed.logits[row, start:stop], alone.logits[0, : stop - start], atol=1e-5
        )


@pytest.mark.parametrize('scan_layers', [True, False])
def test_decoding_with_a_cache_equals_the_full_forward(scan_layers):
    config = dataclasses.replace(CONFIG, scan_layers=scan_layers)
    variables = variables_of(config)
    segments = jnp.array([[1] * 8, [0, 0, 1, 1, 1, 1, 1, 1]])
    positions = jnp.maximum(jnp.arange(8) - jnp.array([[0], [2]]), 0)
    expected = forward(config)(variables, TOKENS, positions, segments)
    cache, logits = empty_cache(config, 2, 10), []
    for start, stop in [(0, 3), (3, 4), (4, 5), (5, 8)]:
        part = slice(start, stop)
        out = forward(config)(
            variables, TOKENS[:, part], positions[:, part], segments[:, part], cache=cache
        )
        cache = out.cache
        logits.append(out.logits)
    np.testing.assert_array_equal(cache.length, [8, 8])
    np.testing.assert_allclose(jnp.concatenate(logits, axis=1), expected.logits, atol=1e-5)


def test_positions_and_segments_default_to_one_document_that_goes_on():
    variables, cache = variables_of(DENSE), empty_cache(DENSE, 2, 8)
    expected = forward(DENSE)(
        variables, TOKENS, jnp.tile(jnp.arange(8), (2, 1)), jnp.ones((2, 8), int)
    )
    first = forward(DENSE)(variables, TOKENS[:, :5], cache=cache)
    second = forward(DENSE)(variables, TOKENS[:, 5:], cache=first.cache)
    joined = jnp.concatenate([first.logits, second.logits], axis=1)
    np.testing.assert_allclose(joined, expected.logits, atol=1e-5)


def test_masked_tokens_are_not_routed_and_padding_is_masked():
    variables = variables_of(CONFIG)
    default = forward(CONFIG)(variables, TOKENS, segment_ids=SEGMENTS)
    explicit = forward(CONFIG)(variables, TOKENS, segment_ids=SEGMENTS, mask=SEGMENTS > 0)
    everything = forward(CONFIG)(variables, TOKENS, segment_ids=SEGMENTS, mask=SEGMENTS > -1)
    assert_close(explicit, default, 0.0)
    assert [float(router.load.sum()) for router in default.router] == [13 * 2.0] * 3
    assert [float(router.load.sum()) for router in everything.router] == [16 * 2.0] * 3
    padding = np.asarray(SEGMENTS == 0)
    assert (np.abs(default.hidden - everything.hidden).max(-1)[padding] > 1e-4).all()
    np.testing.assert_allclose(default.hidden[~padding], everything.hidden[~padding], atol=1e-6)


@pytest.mark.parametrize('tied', [True, False])
def test_logits_are_hidden_times_the_head(tied):
    config = dataclasses.replace(DENSE, tie_embeddings=tied)
    variables = variables_of(config)
    out = forward(config)(variables, TOKENS)
    assert forward(config)(variables, TOKENS, logits=False).logits is None
    params = variables['params']
    assert ('head' in params) != tied
    matrix = np.asarray(params['embed']['embedding']).T if tied else params['head']['kernel']
    np.testing.assert_array_equal(output_head(config, params), matrix)
    np.testing.assert_allclose(out.logits, np.asarray(out.hidden) @ matrix, atol=1e-5)


def test_bfloat16_is_close_to_float32():
    low = dataclasses.replace(CONFIG, dtype='bfloat16', param_dtype='bfloat16')
    variables = variables_of(low)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(variables['params'])} == {'bfloat16'}
    out = forward(low)(variables, TOKENS)
    exact = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), variables)
    expected = forward(CONFIG)(exact, TOKENS)
    assert out.hidden.dtype == jnp.bfloat16
    assert out.logits.dtype == jnp.float32
    error = np.linalg.norm(out.logits - expected.logits) / np.linalg.norm(expected.logits)
    assert 1e-4 < error < 0.1


def test_a_mesh_changes_neither_values_nor_gradients():
    config = dataclasses.replace(
        CONFIG, num_layers=2, moe=dataclasses.replace(CONFIG.moe, layers=(1,))
    )
    mesh = make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2))
    model, variables = (
        Transformer(config, mesh),
        init_sharded(Transformer(config), jax.random.key(0), mesh),
    )
    tokens, segments = jnp.tile(TOKENS, (2, 1)), jnp.tile(SEGMENTS, (2, 1))

    def loss(model, params):
        everything = {**variables, 'params': params}
        return jnp.square(model.apply(everything, tokens, segment_ids=segments).logits - 1).mean()

    sharded = jax.jit(jax.value_and_grad(functools.partial(loss, model)))(variables['params'])
    variables = jax.device_put(variables, jax.devices()[0])
    alone = jax.jit(jax.value_and_grad(functools.partial(loss, Transformer(config))))
    assert_close(jax.device_get(sharded), jax.device_get(alone(variables['params'])), 1e-5)


def test_parameters_name_their_axes():
    axes = logical_axes(Transformer(CONFIG))['params']
    block = axes['group_0']['layer_0']
    assert axes['embed']['embedding'] == ('vocab', 'embed')
    assert axes['head']['kernel'] == ('embed', 'vocab')
    assert block['attention']['q'] == ('layers', 'embed', 'heads', 'head_dim')
    assert block['attention']['v'] == ('layers', 'embed', 'kv_heads', 'head_dim')
    assert block['attention']['o'] == ('layers', 'heads', 'head_dim', 'embed')
    assert block['attention']['q_norm']['scale'] == ('layers', 'head_dim')
    assert block['mlp']['gate_up'] == ('layers', 'embed', None, 'mlp')
    assert block['mlp']['down'] == ('layers', 'mlp', 'embed')


@pytest.mark.parametrize('scan_layers', [True, False])
def test_selection_biases_move_by_the_load_of_their_own_layer(scan_layers):
    config = dataclasses.replace(CONFIG, scan_layers=scan_layers)
    routing = variables_of(config)['routing']
    load = jnp.array([[4.0, 0.0, 1.0, 3.0], [0.0, 0.0, 0.0, 8.0], [2.0, 2.0, 3.0, 1.0]])
    moved = update_selection_bias(config, routing, load, rate=0.5)
    expected = 0.5 * np.array([[-1, 1, 1, -1], [1, 1, 1, -1], [0, 0, -1, 1]])
    for row, layer in enumerate([1, 3, 4]):
        path, index = layer_paths(config)[layer]
        (bias,) = jax.tree.leaves(functools.reduce(lambda tree, name: tree[name], path, moved))
        np.testing.assert_array_equal(bias if index is None else bias[index], expected[row])
    assert update_selection_bias(config, {}, load, rate=0.5) == {}


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'tokens': jnp.ones((2, 8))}, r'tokens must be integer .*float32\(2, 8\)'),
        ({'tokens': TOKENS[0]}, 'tokens must be integer'),
        ({'positions': jnp.arange(8)}, r'positions must be integers .*\(2, 8\)'),
        ({'segment_ids': jnp.ones((2, 8))}, 'segment_ids must be integers'),
        ({'mask': SEGMENTS}, 'mask must be bool'),
        ({'cache': empty_cache(DENSE, 2, 7)}, 'slot for each token'),
        ({'cache': empty_cache(DENSE, 3, 9)}, 'one row for each row'),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    arguments = {'tokens': TOKENS, **arguments}
    with pytest.raises(InputError, match=message):
        Transformer(DENSE).apply(variables_of(DENSE), **arguments)
