"""The optimizer chain against hand-worked numbers and a NumPy reference."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from distill.optimizer import (
    OptimizerConfig,
    learning_rate_schedule,
    make_optimizer,
    optimizer_state_shardings,
)
from moe.config import (
    AttentionConfig,
    LatentAttentionConfig,
    LinearAttentionConfig,
    MoEConfig,
    RouterConfig,
    TransformerConfig,
)
from moe.errors import InputError
from moe.sharding import abstract_variables, logical_axes
from moe.transformer import Transformer

AXES = {
    'embed': {'embedding': ('vocab', 'embed')},
    'head': {'kernel': ('embed', 'vocab')},
    'block': {
        'q': ('layers', 'embed', 'heads', 'head_dim'),
        'o': ('layers', 'heads', 'head_dim', 'embed'),
        'q_norm': ('layers', 'heads', 'head_dim'),
        'gate_up': ('layers', 'experts', 'embed', None, 'mlp'),
        'down': ('layers', 'experts', 'mlp', 'embed'),
        'router': ('layers', 'embed', None),
        'norm': ('layers', None),
    },
}
SIZES = {'vocab': 10, 'embed': 8, 'heads': 2, 'head_dim': 4, 'mlp': 6, 'experts': 3, 'layers': 2}
MATRICES = ('q', 'o', 'gate_up', 'down')


def _is_axes(node):
    return isinstance(node, tuple)


def _shape(name, axes):
    unnamed = {'gate_up': 2, 'router': 3, 'norm': 8}.get(name)
    return tuple(unnamed if axis is None else SIZES[axis] for axis in axes)


def _random_params(seed):
    numbers = np.random.default_rng(seed)
    return jax.tree_util.tree_map_with_path(
        lambda path, axes: jnp.asarray(
            numbers.standard_normal(_shape(path[-1].key, axes)), jnp.float32
        ),
        AXES,
        is_leaf=_is_axes,
    )


def _updates(config, total_steps, gradients, params, axes=AXES):
    """The updates of each step, for gradients given step by step and parameters that stay."""
    optimizer = make_optimizer(config, total_steps, axes)

    @jax.jit
    def run(gradients, params):
        state, updates = optimizer.init(params), []
        for gradient in gradients:
            update, state = optimizer.update(gradient, state, params)
            updates.append(update)
        return updates

    return run(gradients, params)


def _rates(config, total_steps, steps):
    schedule = learning_rate_schedule(config, total_steps)
    return [float(schedule(step)) for step in steps]


def test_cosine_schedule():
    config = OptimizerConfig(2.0, warmup_steps=4, final_fraction=0.1)
    middle = 2.0 * (0.1 + 0.9 / 2)
    quarter = 2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert _rates(config, 12, [0, 1, 3, 4, 6, 8, 12, 99]) == pytest.approx(
        [0.5, 1.0, 2.0, 2.0, quarter, middle, 0.2, 0.2]
    )


def test_wsd_schedule():
    config = OptimizerConfig(
        1.0, warmup_steps=2, schedule='wsd', decay_fraction=0.4, final_fraction=0.0
    )
    expected = [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0, 0]
    assert _rates(config, 10, range(12)) == pytest.approx(expected)


def test_constant_schedule_with_and_without_warmup():
    config = OptimizerConfig(3.0, warmup_steps=1, schedule='constant')
    assert _rates(config, 5, [0, 1, 9]) == [3.0, 3.0, 3.0]
    config = OptimizerConfig(3.0, warmup_steps=3, schedule='constant')
    assert _rates(config, 5, [0, 1, 2, 9]) == pytest.approx([1.0, 2.0, 3.0, 3.0])
    assert _rates(OptimizerConfig(3.0, schedule='constant'), 5, [0, 9]) == [3.0, 3.0]


def test_schedule_that_does_not_fit_is_refused():
    with pytest.raises(InputError, match=r'warmup_steps must be less than total_steps=10'):
        learning_rate_schedule(OptimizerConfig(1.0, warmup_steps=10), 10)
    config = OptimizerConfig(1.0, warmup_steps=6, schedule='wsd', decay_fraction=0.5)
    with pytest.raises(
        InputError, match=r'decay_fraction must be at most .* = 0\.4; received 0\.5'
    ):
        learning_rate_schedule(config, 10)
    with pytest.raises(InputError, match='total_steps'):
        learning_rate_schedule(OptimizerConfig(1.0), 0)


@pytest.mark.parametrize(
    ('field', 'value'),
    [
        ('name', 'sgd'),
        ('schedule', 'linear'),
        ('learning_rate', 0.0),
        ('learning_rate', float('nan')),
        ('warmup_steps', -1),
        ('warmup_steps', 1.5),
        ('decay_fraction', 0.0),
        ('final_fraction', 1.1),
        ('weight_decay', -0.1),
        ('b1', 1.0),
        ('b2', -0.1),
        ('eps', 0.0),
        ('clip_norm', 0.0),
        ('muon_momentum', 1.0),
        ('muon_iterations', 0),
        ('muon_rms', -1.0),
    ],
)
def test_bad_config_is_named(field, value):
    with pytest.raises(InputError, match=f'optimizer.{field} must be'):
        OptimizerConfig(**{'learning_rate': 1e-3, field: value})


def _adamw_reference(config, gradients, param, decay):
    """AdamW in float64, one parameter, without clipping and at a constant rate."""
    mu, nu, updates = 0.0, 0.0, []
    for count, gradient in enumerate(gradients, start=1):
        gradient = np.asarray(gradient, np.float64)
        mu = config.b1 * mu + (1 - config.b1) * gradient
        nu = config.b2 * nu + (1 - config.b2) * gradient**2
        step = mu / (1 - config.b1**count)
        step = step / (np.sqrt(nu / (1 - config.b2**count)) + config.eps)
        weight = np.asarray(param, np.float64) * (config.weight_decay if decay else 0.0)
        updates.append(-config.learning_rate * (step + weight))
    return updates


def test_adamw_equals_numpy_and_decays_matrices_alone():
    config = OptimizerConfig(0.1, schedule='constant', clip_norm=None, eps=1e-3)
    params = _random_params(0)
    gradients = [_random_params(seed) for seed in (1, 2, 3)]
    updates = _updates(config, 3, gradients, params)
    undecayed = {'embedding', 'q_norm', 'norm'}

    def check(path, param, *leaves):
        decay = path[-1].key not in undecayed
        expected = _adamw_reference(config, leaves[:3], param, decay)
        for actual, wanted in zip(leaves[3:], expected, strict=True):
            np.testing.assert_allclose(actual, wanted, rtol=2e-5, atol=1e-7, err_msg=str(path))

    jax.tree_util.tree_map_with_path(check, params, *gradients, *updates)


def test_gradients_are_clipped_by_their_norm_over_all_parameters():
    """With b1 = b2 = 0 and a large eps the update is -rate * g / eps: linear in the clipped g."""
    axes = {'a': ('embed', 'mlp'), 'b': ('head_dim',)}
    params = {'a': jnp.zeros((1, 1)), 'b': jnp.zeros(1)}
    gradient = {'a': jnp.full((1, 1), 3.0), 'b': jnp.full(1, 4.0)}  # norm 5
    for clip_norm, scale in ((1.0, 0.2), (10.0, 1.0), (None, 1.0)):
        config = OptimizerConfig(
            1.0, schedule='constant', b1=0.0, b2=0.0, eps=1e6, clip_norm=clip_norm
        )
        (update,) = _updates(config, 1, [gradient], params, axes)
        assert float(update['a'][0, 0]) * 1e6 == pytest.approx(-3.0 * scale, rel=1e-4)
        assert float(update['b'][0]) * 1e6 == pytest.approx(-4.0 * scale, rel=1e-4)


def _newton_schulz(matrix, iterations):
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix / np.linalg.norm(matrix)
    if x.shape[0] > x.shape[1]:
        return _newton_schulz(matrix.T, iterations).T
    for _ in range(iterations):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def _muon_reference(config, gradients, param):
    """Muon in float64 on one matrix: Nesterov momentum, bias-corrected as optax does it."""
    beta, mu, updates = config.muon_momentum, 0.0, []
    for count, gradient in enumerate(gradients, start=1):
        gradient = np.asarray(gradient, np.float64)
        mu = beta * mu + (1 - beta) * gradient
        ahead = beta * mu / (1 - beta ** (count + 1))
        ahead = ahead + (1 - beta) * gradient / (1 - beta**count)
        orthogonal = _newton_schulz(ahead, config.muon_iterations)
        scale = config.muon_rms * math.sqrt(max(gradient.shape))
        weight = config.weight_decay * np.asarray(param, np.float64)
        updates.append(-config.learning_rate * (scale * orthogonal + weight))
    return updates


def _matrices(name, leaf):
    """The matrices that a stacked parameter holds, written out name by name."""
    leaf = np.asarray(leaf)
    if name == 'q':
        return [leaf[layer].reshape(8, 2 * 4) for layer in range(2)]
    if name == 'o':
        return [leaf[layer].reshape(2 * 4, 8) for layer in range(2)]
    stacked = [leaf[layer, expert] for layer in range(2) for expert in range(3)]
    return [m[:, i] for m in stacked for i in range(2)] if name == 'gate_up' else stacked


def test_muon_orthogonalises_each_matrix_and_leaves_the_rest_to_adamw():
    config = OptimizerConfig(0.1, name='muon', schedule='constant', clip_norm=None, eps=1e-8)
    params = _random_params(0)
    gradients = [_random_params(seed) for seed in (1, 2)]
    updates = _updates(config, 2, gradients, params)
    for name in MATRICES:
        columns = [_matrices(name, tree['block'][name]) for tree in [params, *gradients, *updates]]
        for param, first, second, *actual in zip(*columns, strict=True):
            expected = _muon_reference(config, [first, second], param)
            np.testing.assert_allclose(actual, expected, rtol=2e-3, atol=2e-5, err_msg=name)
    for group, name in (
        ('embed', 'embedding'),
        ('head', 'kernel'),
        ('block', 'router'),
        ('block', 'norm'),
        ('block', 'q_norm'),
    ):
        columns = [tree[group][name] for tree in gradients]
        decay = name in ('kernel', 'router')
        expected = _adamw_reference(config, columns, params[group][name], decay)
        for update, wanted in zip(updates, expected, strict=True):
            np.testing.assert_allclose(update[group][name], wanted, rtol=2e-4, err_msg=name)


def test_muon_on_stacked_experts_equals_muon_on_each():
    config = OptimizerConfig(0.1, name='muon', clip_norm=None)
    numbers = np.random.default_rng(0)
    stacked = jnp.asarray(numbers.standard_normal((3, 8, 2, 6)), jnp.float32)
    # Experts of very different size: a norm shared between them would show.
    gradient = stacked[::-1] * jnp.asarray([1.0, 1e-3, 1e3])[:, None, None, None]
    (together,) = _updates(
        config, 9, [{'w': gradient}], {'w': stacked}, {'w': ('experts', 'embed', None, 'mlp')}
    )
    alone_axes = {f'{e}{i}': ('embed', 'mlp') for e in range(3) for i in range(2)}

    def split(tree):
        return {f'{e}{i}': tree[e, :, i] for e in range(3) for i in range(2)}

    (alone,) = _updates(config, 9, [split(gradient)], split(stacked), alone_axes)
    for name, update in split(together['w']).items():
        np.testing.assert_allclose(update, alone[name], rtol=1e-4, atol=1e-6)
        assert float(jnp.abs(update).max()) > 1e-3


# Every parameter that a model can have, by what becomes of it under name='muon'.
ORTHOGONALISED = {
    *('attention/q', 'attention/k', 'attention/v', 'attention/o', 'attention/beta'),
    *('mlp/gate_up', 'mlp/down', 'shared/gate_up', 'shared/down', 'moe/gate_up', 'moe/down'),
    'mtp_1/projection',
}
DECAYED = {
    *('head/kernel', 'router/kernel', 'attention/conv'),
    *('attention/q_down', 'attention/q_up', 'attention/kv_down', 'attention/kv_up'),
    *('attention/decay_in', 'attention/decay_out', 'attention/gate_in', 'attention/gate_out'),
}
LEFT = {
    *('embed/embedding', 'final_norm/scale', 'mlp_norm/scale', 'mlp_post_norm/scale'),
    *('attention_norm/scale', 'attention_post_norm/scale', 'q_norm/scale', 'k_norm/scale'),
    *('kv_norm/scale', 'o_norm/scale', 'attention/sinks', 'attention/log_rate'),
    *('hidden_norm/scale', 'embedding_norm/scale'),
    *('attention/q_bias', 'attention/k_bias', 'attention/v_bias', 'attention/o_bias'),
    *('attention/decay_bias', 'router/bias', 'moe/gate_up_bias', 'moe/down_bias'),
}


@pytest.mark.parametrize('scan_layers', [True, False])
def test_what_becomes_of_every_parameter(scan_layers: bool):
    router = RouterConfig(4, 2, bias=True, selection_bias=True)
    full = dict(qk_norm='full', sinks=True, qkv_bias=True, output_bias=True)
    config = TransformerConfig(
        vocab_size=9,
        num_layers=4,
        embed_dim=8,
        mlp_dim=6,
        attention=(
            AttentionConfig(2, 2, 4, **full),
            AttentionConfig(2, 2, 4, qk_norm='head'),
            LatentAttentionConfig(2, 4, 4, 4, 4, query_rank=3),
            LinearAttentionConfig(2, 4, 4, 3),
        ),
        moe=MoEConfig(router, 6, shared_dim=5, bias=True, first_dense_layers=1),
        post_norms=True,
        mtp_depth=1,
        scan_layers=scan_layers,
    )
    model = Transformer(config)
    axes, shapes = logical_axes(model)['params'], abstract_variables(model)['params']

    def names(tree, chosen):
        found = jax.tree_util.tree_leaves_with_path(tree)
        return {
            jax.tree_util.keystr(path[-2:], simple=True, separator='/')
            for path, leaf in found
            if chosen(path, leaf)
        }

    def second_moment(path, _):
        return any(getattr(key, 'name', None) == 'nu' for key in path)

    everything = names(shapes, lambda path, leaf: True)
    assert everything == ORTHOGONALISED | DECAYED | LEFT
    muon = make_optimizer(OptimizerConfig(1.0, name='muon'), 5, axes)
    by_adamw = names(jax.eval_shape(muon.init, shapes), second_moment)
    assert everything - by_adamw == ORTHOGONALISED

    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), shapes)
    zeros = jax.tree.map(np.zeros_like, params)
    adamw = make_optimizer(OptimizerConfig(1.0, schedule='constant'), 5, axes)
    updates, _ = jax.jit(adamw.update)(zeros, jax.jit(adamw.init)(params), params)
    moved = names(updates, lambda path, leaf: np.allclose(leaf, -0.1))
    assert moved == ORTHOGONALISED | DECAYED
    assert names(updates, lambda path, leaf: not np.any(leaf)) == LEFT


def test_parameter_that_is_no_stack_of_matrices_is_refused():
    with pytest.raises(ValueError, match="received \\('embed', 'mlp', 'vocab'\\)"):
        make_optimizer(OptimizerConfig(1.0), 5, {'w': ('embed', 'mlp', 'vocab')})


@pytest.mark.parametrize('name', ['adamw', 'muon'])
def test_state_lies_as_the_parameters_do(name):
    """Moments are sharded, counters replicated, and a jitted init and update agree to that."""
    mesh = jax.make_mesh((2, 2, 2), ('fsdp', 'expert', 'tensor'), axis_types=(AxisType.Auto,) * 3)
    on = {'embed': 'fsdp', 'experts': 'expert', 'mlp': 'tensor', 'vocab': 'tensor'}
    axes = {'embedding': ('vocab', 'embed'), 'down': ('experts', 'mlp', 'embed'), 'norm': (None,)}
    shapes = {'embedding': (10, 8), 'down': (4, 6, 8), 'norm': (8,)}
    params = {name: jnp.ones(shape) for name, shape in shapes.items()}
    shardings = {
        name: NamedSharding(mesh, PartitionSpec(*(on.get(axis) for axis in names)))
        for name, names in axes.items()
    }
    optimizer = make_optimizer(OptimizerConfig(1.0, name=name), 5, axes)
    derived = optimizer_state_shardings(optimizer, params, shardings, mesh)

    found = {}
    for path, sharding in jax.tree_util.tree_leaves_with_path(derived):
        key = jax.tree_util.keystr(path[-2:], simple=True, separator='/')
        found.setdefault(key, sharding.spec)
    moments = ('mu/embedding', 'nu/embedding', 'mu/norm', 'nu/norm', 'mu/down')
    moments += ('nu/down',) if name == 'adamw' else ()
    for key in moments:
        assert found.pop(key) == shardings[key.split('/')[1]].spec, key
    assert set(found.values()) == {PartitionSpec()}

    params = jax.device_put(params, shardings)
    state = jax.jit(optimizer.init, out_shardings=derived)(params)
    _, after = jax.jit(optimizer.update, out_shardings=(shardings, derived))(params, state, params)
    for leaf, sharding in zip(jax.tree.leaves(after), jax.tree.leaves(derived), strict=True):
        assert leaf.sharding == sharding
    sizes = {leaf.shape: leaf.addressable_shards[0].data.shape for leaf in jax.tree.leaves(after)}
    assert sizes[(10, 8)] == (5, 4)
    assert sizes[(4, 6, 8)] == (2, 3, 4)
