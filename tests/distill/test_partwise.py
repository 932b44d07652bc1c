"""A teacher that reads in parts of its own says what it says of the whole batch."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from routed_student import STUDENT, variables
from test_separate_teacher import TEACHER, B, make_batch, recipe_of, together

from distill.estimators import SampledEstimator, TopKEstimator
from distill.partwise import PartwiseTeacher, joined_rows, split_rows
from distill.recipe import initial_state
from distill.step import make_train_step
from distill.teacher import EstimatedTeacher, OnlineTeacher
from moe.errors import InputError
from moe.sharding import MeshConfig, batch_sharding, make_mesh, variable_shardings
from moe.transformer import Transformer


def on_device():
    return jax.tree.map(jax.numpy.asarray, make_batch())


def assert_as_together(state, metrics):
    wanted, expected = together()
    close = functools.partial(np.testing.assert_allclose, rtol=5e-4, atol=5e-6)
    jax.tree.map(close, jax.device_get(state.params), wanted.params)
    jax.tree.map(close, jax.device_get(metrics.pairs), expected.pairs)


def test_rows_are_split_by_turns_and_joined_again():
    rows = np.arange(6)[:, None]
    assert split_rows(rows, 2)[:, :, 0].tolist() == [[0, 2, 4], [1, 3, 5]]
    np.testing.assert_array_equal(joined_rows(split_rows(rows, 2)), rows)


def test_the_update_is_that_of_the_whole_batch():
    """Four parts of the teacher's, two of the student's."""
    recipe = recipe_of(PartwiseTeacher(OnlineTeacher(Transformer(TEACHER)), 4))
    state = initial_state(recipe, variables(STUDENT))
    step = jax.jit(make_train_step(recipe))
    assert_as_together(*step(state, variables(TEACHER), on_device()))


def test_and_on_a_mesh():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    teacher = Transformer(TEACHER, mesh)
    recipe = recipe_of(PartwiseTeacher(OnlineTeacher(teacher), 2), mesh)
    state = initial_state(recipe, variables(STUDENT))
    params = jax.device_put(state.params, variable_shardings(recipe.model, mesh)['params'])
    known = jax.device_put(variables(TEACHER), variable_shardings(teacher, mesh))
    batch = jax.device_put(make_batch(), batch_sharding(mesh))
    step = jax.jit(make_train_step(recipe))
    assert_as_together(*step(dataclasses.replace(state, params=params), known, batch))


@dataclasses.dataclass(frozen=True)
class Noted(OnlineTeacher):
    """Notes how many rows it is asked about."""

    asked: list[int] = dataclasses.field(default_factory=list, compare=False)

    def targets(self, variables, batch):
        self.asked.append(batch.tokens.shape[0])
        return super().targets(variables, batch)


def test_it_reads_its_own_parts_and_learns_nothing():
    noted = Noted(Transformer(TEACHER))
    teacher = PartwiseTeacher(noted, 4)

    def total(variables):
        targets = teacher.targets(variables, teacher.ahead(variables, on_device()))
        return sum((leaf**2).sum() for leaf in jax.tree.leaves(targets))

    for gradient in jax.tree.leaves(jax.jit(jax.grad(total))(variables(TEACHER))):
        np.testing.assert_array_equal(gradient, 0)
    assert set(noted.asked) == {B // 4}


@pytest.mark.parametrize('estimator', [TopKEstimator(3), SampledEstimator(4)])
def test_an_estimate_is_that_of_the_whole_batch(estimator):
    estimated = EstimatedTeacher(OnlineTeacher(Transformer(TEACHER)), estimator)
    in_parts = PartwiseTeacher(estimated, 2)
    whole = jax.jit(estimated.targets)(variables(TEACHER), on_device())
    ahead = jax.jit(in_parts.ahead)(variables(TEACHER), on_device())
    said = in_parts.targets(variables(TEACHER), ahead)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, said, whole)


def test_parts_that_do_not_divide_the_rows_are_refused():
    teacher = PartwiseTeacher(OnlineTeacher(Transformer(TEACHER)), 3)
    with pytest.raises(InputError, match=r'must divide the 8 rows of a batch; received 3.* as 4'):
        teacher.ahead({}, make_batch())
    with pytest.raises(InputError, match='batches that carry what it said'):
        teacher.targets({}, make_batch())
    with pytest.raises(InputError, match='micro_batches must be at least 1'):
        PartwiseTeacher(teacher.teacher, 0)
