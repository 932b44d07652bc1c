"""What is summed or maximised over a step's tokens, on every mesh and for every split of them."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distill.config import BalanceConfig, TrainConfig
from distill.objective import Objective, Term
from distill.recipe import Recipe, initial_state
from distill.step import make_train_step
from distill.types import Batch
from moe.balance import load_statistics
from moe.config import AttentionConfig, MoEConfig, RouterConfig, TransformerConfig
from moe.errors import InputError
from moe.qk_clip import MAX_LOGITS, clip_heads
from moe.sharding import MeshConfig, batch_sharding, make_mesh, variable_shardings
from moe.transformer import Transformer

B, T, V = 8, 8, 16
CONFIG = TransformerConfig(
    vocab_size=V,
    num_layers=2,
    embed_dim=8,
    mlp_dim=8,
    attention=AttentionConfig(4, 2, 4),
    moe=MoEConfig(
        RouterConfig(8, 2, selection_bias=True), 4, dispatch='capacity', capacity_factor=0.75
    ),
)
LAYOUTS = {
    'one piece': (None, 1),
    'micro-batches': (None, 4),
    'data x fsdp x expert': (MeshConfig(data=2, fsdp=2, expert=2), 1),
    'both': (MeshConfig(data=2, expert=2, tensor=2), 2),
}


@functools.cache
def variables():
    tokens = jnp.zeros((1, 2), jnp.int32)
    init = jax.jit(lambda key: nn.unbox(Transformer(CONFIG).init(key, tokens)))
    return jax.tree.map(lambda leaf: 2 * leaf, init(jax.random.key(1)))


def make_batch() -> Batch:
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, V, (B, T + 1)), jnp.int32)
    segment_ids = jnp.asarray(np.arange(T) < rng.integers(3, T + 1, (B, 1)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    return Batch(tokens[:, :-1], tokens[:, 1:], segment_ids > 0, segment_ids, positions)


@functools.cache
def largest_logits() -> np.ndarray:
    """Of each layer and head, over the whole batch."""
    batch = make_batch()
    apply = jax.jit(functools.partial(Transformer(CONFIG).apply, mutable=[MAX_LOGITS]))
    _, noted = apply(
        variables(), batch.tokens, positions=batch.positions, segment_ids=batch.segment_ids
    )
    (highest,) = jax.tree.leaves(noted)
    assert highest.shape == (2, 4)
    return np.asarray(highest)


@functools.cache
def run(layout: str):
    """One update of gradient descent at rate 0: nothing but balance and QK-clip moves."""
    mesh_config, micro_batches = LAYOUTS[layout]
    mesh = None
    if mesh_config is not None:
        count = int(np.prod(dataclasses.astuple(mesh_config)))
        mesh = make_mesh(mesh_config, jax.devices()[:count])
    recipe = Recipe(
        model=Transformer(CONFIG, mesh),
        objective=Objective((Term('cross_entropy'),)),
        optimizer=optax.sgd(0.0),
        train=TrainConfig(steps=1, micro_batches=micro_batches, chunk_size=64),
        balance=BalanceConfig(0.1, 'global', 0.01, 0.02, 'proportional'),
        # Some heads of both layers exceed it.
        qk_clip=float(np.median(largest_logits())),
    )
    start, batch = variables(), make_batch()
    if mesh is not None:
        start = jax.device_put(start, variable_shardings(recipe.model, mesh))
        batch = jax.device_put(batch, batch_sharding(mesh))
    state = jax.jit(functools.partial(initial_state, recipe))(start)
    return jax.device_get(jax.jit(make_train_step(recipe))(state, {}, batch))


def statistics(state, metrics) -> dict[str, np.ndarray]:
    """Every statistic of balance: per layer, and of the losses."""
    layers = [
        load_statistics(load, dropped)
        for load, dropped in zip(metrics.load, metrics.dropped, strict=True)
    ]
    named = {name: np.stack([layer[name] for layer in layers]) for name in layers[0]}
    losses = ('load_balance_loss', 'router_z_loss')
    named |= {name: np.divide(*metrics.pairs[name]) for name in losses}
    return {
        **named,
        'confidence': metrics.confidence,
        'load': metrics.load,
        'biases': np.concatenate([np.ravel(x) for x in jax.tree.leaves(state.routing)]),
    }


@pytest.mark.parametrize('layout', list(LAYOUTS)[1:])
def test_every_balance_statistic_is_that_of_one_device_and_one_piece(layout):
    wanted, actual = statistics(*run('one piece')), statistics(*run(layout))
    assert set(wanted) == set(actual)
    for name, value in wanted.items():
        np.testing.assert_allclose(actual[name], value, rtol=1e-5, atol=1e-7, err_msg=name)
    # None of them is trivially equal.
    names = ('max_violation', 'gini', 'drop_fraction', 'load_balance_loss', 'router_z_loss')
    assert min(np.min(wanted[name]) for name in names) > 0.01
    assert np.all(wanted['entropy'] < 0.999)
    assert np.abs(wanted['biases']).max() > 0.001


@pytest.mark.parametrize('layout', LAYOUTS)
def test_heads_are_clipped_by_the_largest_logit_of_the_whole_batch(layout):
    highest, before = largest_logits(), variables()['params']
    threshold = float(np.median(highest))
    noted = {'group_0': {'layer_0': {'attention': {'highest': jnp.asarray(highest)}}}}
    expected = clip_heads(CONFIG, before, noted, threshold)
    state, metrics = run(layout)
    np.testing.assert_allclose(metrics.pairs['max_attention_logit'][0], highest.max(), rtol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5), state.params, expected)
    queries = (params['group_0']['layer_0']['attention']['q'] for params in (before, state.params))
    same = np.all(np.equal(*queries), axis=(1, 3))
    np.testing.assert_array_equal(same, highest <= threshold)
    assert 0 < same.sum() < 8


def test_a_clip_that_cannot_work_is_refused():
    model = Transformer(dataclasses.replace(CONFIG, attention=AttentionConfig(4, 2, 4, 'head')))
    parts = (Objective((Term('cross_entropy'),)), optax.sgd(1.0), TrainConfig(1), BalanceConfig())
    with pytest.raises(InputError, match="qk_norm='head'"):
        Recipe(model, *parts, qk_clip=10.0)
    with pytest.raises(InputError, match='qk_clip must be positive'):
        Recipe(Transformer(CONFIG), *parts, qk_clip=0.0)
