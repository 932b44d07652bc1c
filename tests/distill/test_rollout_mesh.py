"""Eight devices write what one does, and learn from it what one does."""

import dataclasses
import functools

import jax
import numpy as np
from writing import make_batch, make_recipe, variables, written

from distill.recipe import initial_state
from distill.step import make_train_step
from moe.sharding import MeshConfig, batch_sharding, make_mesh, variable_shardings


def test_eight_devices_write_and_learn_what_one_does_from_the_rows_as_data():
    """So nothing of the gradient comes through what was drawn, or from prompts."""
    mesh = make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2))
    recipe = make_recipe(mesh)
    place = lambda model, values: jax.device_put(values, variable_shardings(model, mesh))  # noqa: E731
    student, teacher = variables()
    state = jax.jit(functools.partial(initial_state, recipe))(place(recipe.model, student))
    batch = jax.device_put(make_batch(), batch_sharding(mesh))
    step = jax.jit(make_train_step(recipe))
    got, metrics = jax.device_get(step(state, place(recipe.teacher.model, teacher), batch))

    rows, _, pairs = written(0)
    plain = dataclasses.replace(make_recipe(), rollout=None)
    step = jax.jit(make_train_step(plain))
    wanted, plain_metrics = jax.device_get(step(initial_state(plain, student), teacher, rows))
    close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-6)
    jax.tree.map(close, got, wanted)
    jax.tree.map(close, metrics.pairs, plain_metrics.pairs | pairs)
    assert metrics.pairs['jsd'][1] == rows.mask.sum()
