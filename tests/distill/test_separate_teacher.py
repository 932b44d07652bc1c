"""A teacher on devices of its own: the same update as one that shares the student's."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
from routed_student import STUDENT, V, variables

from distill.config import BalanceConfig, TrainConfig
from distill.objective import Objective, Term
from distill.recipe import Recipe, initial_state
from distill.separate_teacher import SeparateTeacher, Shipper
from distill.step import make_train_step
from distill.teacher import OnlineTeacher
from distill.types import Batch
from moe.config import AttentionConfig, TransformerConfig
from moe.errors import InputError
from moe.sharding import MeshConfig, batch_sharding, make_mesh, variable_shardings
from moe.transformer import Transformer

B, T = 8, 6
TEACHER = TransformerConfig(V, 2, 12, 8, AttentionConfig(2, 2, 8))
OBJECTIVE = Objective((Term('jsd', weight=0.7, temperature=1.5), Term('cross_entropy', weight=0.3)))


def make_batch() -> Batch:
    """On the host: rows of two documents."""
    tokens = np.random.default_rng(0).integers(0, V, (B, T + 1), np.int32)
    index = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    segments = np.where(index < 2, 1, 2).astype(np.int32)
    return Batch(
        tokens[:, :-1], tokens[:, 1:], index != 1, segments, np.where(index < 2, index, index - 2)
    )


def recipe_of(teacher, mesh=None) -> Recipe:
    """Plain gradient descent at rate 1: the parameters move by exactly the gradient."""
    return Recipe(
        model=Transformer(STUDENT, mesh),
        objective=OBJECTIVE,
        optimizer=optax.sgd(1.0),
        train=TrainConfig(steps=1, micro_batches=2, chunk_size=8),
        balance=BalanceConfig(),
        teacher=teacher,
    )


@functools.cache
def together():
    """The update of student and teacher on one device."""
    recipe = recipe_of(OnlineTeacher(Transformer(TEACHER)))
    state = initial_state(recipe, variables(STUDENT))
    batch = jax.tree.map(jax.numpy.asarray, make_batch())
    return jax.device_get(jax.jit(make_train_step(recipe))(state, variables(TEACHER), batch))


def test_apart_it_is_the_same_update():
    devices = jax.devices()
    own = make_mesh(MeshConfig(data=2, tensor=2), devices[:4])
    its = make_mesh(MeshConfig(fsdp=4), devices[4:])
    model = Transformer(TEACHER, its)
    known = jax.device_put(variables(TEACHER), variable_shardings(model, its))
    ship = Shipper(OnlineTeacher(model), known, (own, its))
    recipe = recipe_of(SeparateTeacher(), own)
    state = initial_state(recipe, variables(STUDENT))
    params = jax.device_put(state.params, variable_shardings(recipe.model, own)['params'])
    batch = ship(make_batch())
    in_parts = Shipper(OnlineTeacher(model), known, (own, its), micro_batches=2)(make_batch())
    np.testing.assert_allclose(in_parts.targets, batch.targets, rtol=1e-5, atol=1e-5)
    # Hidden states were shipped, to where the student's rows are, and nothing of width V.
    assert batch.targets.shape == (B, T, TEACHER.embed_dim)
    assert batch.targets.sharding.is_equivalent_to(batch_sharding(own), 3)
    assert ship.head['head'].sharding.device_set == set(own.devices.flat)
    step = jax.jit(make_train_step(recipe))
    state, metrics = step(dataclasses.replace(state, params=params), ship.head, batch)
    wanted, expected = together()
    close = functools.partial(np.testing.assert_allclose, rtol=5e-4, atol=5e-6)
    jax.tree.map(close, jax.device_get(state.params), wanted.params)
    jax.tree.map(close, jax.device_get(metrics.pairs), expected.pairs)
    assert float(metrics.pairs['jsd'][0]) > 0.1


def test_a_batch_that_was_not_shipped_is_refused():
    recipe = recipe_of(SeparateTeacher())
    state = initial_state(recipe, variables(STUDENT))
    with pytest.raises(InputError, match='batches that carry its hidden states'):
        jax.eval_shape(make_train_step(recipe), state, {}, make_batch())


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with pytest.raises(InputError, match='there are 2 processes'):
        Shipper(OnlineTeacher(Transformer(TEACHER)), {}, (mesh, mesh))
