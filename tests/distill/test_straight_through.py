"""Training that is aware of quantisation sees what is served, and moves the floats behind it."""

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from routed_student import STUDENT as PLAIN
from routed_student import V, mesh_of, variables

from distill.config import BalanceConfig, TrainConfig
from distill.objective import Objective, Term
from distill.recipe import Recipe, initial_state
from distill.step import make_train_step
from distill.straight_through import straight_through
from distill.teacher import OnlineTeacher
from distill.types import Batch
from moe.errors import InputError
from moe.quantised import FORMATS, dequantised, rounded
from moe.quantising import matrix_shapes, quantise
from moe.sharding import batch_sharding, variable_shardings
from moe.transformer import Transformer

B, T = 4, 6
TIED = dataclasses.replace(PLAIN, tie_embeddings=True)


def test_values_and_gradients_by_hand():
    model = Transformer(TIED)
    params = variables(TIED)['params']
    # Rows of the embedding are the head's outputs.
    table = np.zeros((V, 8), np.float32)
    table[0], table[1, 0] = 0.3, 1.0
    table[2, :3] = 127.5, -3.3, 0.4
    params = params | {'embed': {'embedding': jnp.asarray(table)}}
    seen = straight_through(model, 'int8')
    by = np.random.default_rng(0).normal(size=(8, V))

    def loss(params):
        out = seen(params)
        return (out['head']['kernel'] * by).sum() + 2 * out['embed']['embedding'].sum()

    out, gradient = jax.jit(lambda params: (seen(params), jax.grad(loss)(params)))(params)
    expected = [127.0, -3.0, 0.0, 0, 0, 0, 0, 0]
    # 127.5 is half a step from 127 and from the 128 that there is not.
    np.testing.assert_allclose(out['head']['kernel'][:, 2], expected)
    np.testing.assert_array_equal(out['embed']['embedding'], table)
    # As if nothing had been rounded, that of the head and that of the look-up together.
    np.testing.assert_allclose(gradient['embed']['embedding'], by.T + 2, rtol=1e-6)
    assert not gradient['final_norm']['scale'].any()


@pytest.mark.parametrize('weights', FORMATS)
@pytest.mark.parametrize('config', [PLAIN, TIED], ids=['scanned', 'tied'])
def test_what_is_trained_is_what_is_served_to_the_bit(weights, config):
    model, given = Transformer(config), variables(config)
    seen = jax.jit(straight_through(model, weights))(given['params'])
    served = jax.jit(functools.partial(quantise, model, weights=weights))(given)
    stored = jax.tree.leaves_with_path(
        served['quantised'], is_leaf=lambda node: isinstance(node, dict) and 'values' in node
    )
    assert len(stored) > 6
    for path, leaf in stored:
        kernel = at(seen, path)
        wide = np.asarray(leaf['values'], np.float32)
        groups = (*leaf['scales'].shape, -1)
        wide = wide.reshape(groups) * np.asarray(leaf['scales'])[..., None]
        outputs = 2 if path[-1].key in ('q', 'k', 'v', 'gate_up') else 1
        wide = np.moveaxis(wide.reshape(leaf['values'].shape), -1, -1 - outputs)
        wide = wide.reshape(kernel.shape)
        np.testing.assert_array_equal(kernel, wide, err_msg=str(path))
    # What is not served quantised is seen as it is.
    for path, leaf in jax.tree.leaves_with_path(served['params']):
        np.testing.assert_array_equal(at(seen, path), leaf)


def at(tree, path):
    return functools.reduce(lambda subtree, key: subtree[key.key], path, tree)


def test_groups_of_inputs_are_those_that_are_served():
    wide = dataclasses.replace(
        PLAIN, embed_dim=96, moe=dataclasses.replace(PLAIN.moe, expert_dim=6)
    )
    model, params = Transformer(wide), variables(wide)['params']
    seen = jax.jit(straight_through(model, 'int4_experts'))(params)
    (path,) = [
        path
        for path, matrix in jax.tree.leaves_with_path(matrix_shapes(model))
        if matrix.shape[-1] == 96 and at(params, path[:-1]).ndim == 5
    ]
    kernel = at(params, path[:-1])
    form = FORMATS['int4_experts']['experts']
    expected = jax.jit(
        lambda kernel: dequantised(rounded(kernel, 2, form, batch_axes=2), jnp.float32)
    )(kernel)
    assert form.group_size(96) == 48
    np.testing.assert_array_equal(at(seen, path[:-1]), expected)


def batch_of(seed=0):
    rng = np.random.default_rng(seed)
    tokens = jnp.asarray(rng.integers(0, V, (B, T + 1)))
    ones = jnp.ones((B, T), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    return Batch(tokens[:, :-1], tokens[:, 1:], ones > 0, ones, positions)


def recipe_of(sizes=(1, 1, 1, 1), seen=True):
    model = Transformer(TIED, mesh_of(sizes))
    return Recipe(
        model=model,
        objective=Objective((Term('forward_kl'),)),
        optimizer=optax.sgd(0.5),
        train=TrainConfig(steps=1),
        balance=BalanceConfig(),
        teacher=OnlineTeacher(model),
        seen=straight_through(model, 'fp8') if seen else None,
    )


@functools.cache
def updated(sizes, seen=True):
    recipe, given = recipe_of(sizes, seen), variables(TIED)
    batch, teacher = batch_of(), given
    if recipe.model.mesh is not None:
        mesh = recipe.model.mesh
        given = jax.device_put(given, variable_shardings(recipe.model, mesh))
        teacher, batch = given, jax.device_put(batch, batch_sharding(mesh))
    step = jax.jit(make_train_step(recipe))
    return jax.device_get(step(initial_state(recipe, given), teacher, batch))


def test_an_update_moves_the_floats_by_the_gradient_of_what_it_saw():
    state, metrics = updated((1, 1, 1, 1))
    given = variables(TIED)
    params = recipe_of().seen(given['params'])
    recipe = recipe_of(seen=False)

    # The same update of a model whose parameters are the rounded ones, by the untied head.
    untied = dataclasses.replace(TIED, tie_embeddings=False)
    recipe = dataclasses.replace(recipe, model=Transformer(untied))
    step = jax.jit(make_train_step(recipe))
    start = initial_state(recipe, given | {'params': params})
    other, expected = step(start, given, batch_of())
    np.testing.assert_allclose(metrics.pairs['loss'][0], expected.pairs['loss'][0], rtol=1e-5)
    moved = jax.tree.map(lambda new, old: new - old, other.params, params)
    head = moved.pop('head')['kernel']
    moved['embed'] = {'embedding': moved['embed']['embedding'] + head.T}
    found = jax.tree.map(lambda new, old: new - old, state.params, given['params'])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), found, moved)
    # The teacher is the same model in floats: only rounding lies between, and it is not nothing.
    assert 1e-4 < metrics.pairs['loss'][0] < 0.1
    unseen = updated((1, 1, 1, 1), seen=False)[1]
    assert unseen.pairs['loss'][0] < 1e-6


def test_a_mesh_changes_nothing():
    state, metrics = updated((1, 1, 1, 1))
    meshed, on_mesh = updated((1, 2, 2, 2))
    np.testing.assert_allclose(on_mesh.pairs['loss'][0], metrics.pairs['loss'][0], rtol=2e-3)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), meshed.params, state.params
    )


def test_without_qwix_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, 'qwix', None)
    with pytest.raises(InputError, match=r"extra 'quant'.*fractional\[quant\]"):
        straight_through(Transformer(PLAIN), 'int8')
