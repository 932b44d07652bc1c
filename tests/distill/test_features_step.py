"""A student's update with features: its loss, what it moves, and every split and mesh alike."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from routed_student import STUDENT as PLAIN
from routed_student import V, mesh_of, variables

from distill.config import BalanceConfig, TrainConfig
from distill.feature_match import Inside, features_loss
from distill.features import Feature, activations_of
from distill.objective import Objective, Term
from distill.panel import TeacherPanel
from distill.projectors import (
    PROJECTORS,
    initial_projectors,
    projector_axes,
    projector_shapes,
    projector_shardings,
    without_projectors,
)
from distill.recipe import Recipe, initial_state
from distill.schedules import Schedule
from distill.step import make_train_step
from distill.teacher import CachedTeacher, OnlineTeacher
from distill.types import Batch
from moe.config import AttentionConfig, MoEConfig, RouterConfig, TransformerConfig
from moe.errors import InputError
from moe.sharding import (
    MeshConfig,
    batch_sharding,
    make_mesh,
    variable_shardings,
)
from moe.transformer import Transformer

B, T = 16, 6
STUDENT = dataclasses.replace(PLAIN, remat='full')
TEACHER = TransformerConfig(
    vocab_size=V,
    num_layers=3,
    embed_dim=12,
    mlp_dim=8,
    attention=AttentionConfig(2, 1, 8),
    moe=MoEConfig(RouterConfig(6, 2, score='sigmoid'), 8, dispatch='dense'),
    scan_layers=False,
)
LAYERS = ((0, 0), (1, 2))
FEATURES = (
    Feature('embedding', weight=0.3),
    Feature('hidden', layers=LAYERS),
    Feature('hidden', weight=0.7, layers=((1, 1),), metric='cosine'),
    Feature('relation', weight=2.0, layers=((1, 2),), of='values', heads=4),
    Feature('attention', weight=Schedule('constant', 5.0), layers=LAYERS),
    Feature('usage', weight=3.0, layers=LAYERS),
)
NAMES = ('embedding', 'hidden', 'hidden_2', 'relation', 'attention', 'usage')
WEIGHTS = (0.3, 1.0, 0.7, 2.0, 5.0, 3.0)
TERMS = (Term('forward_kl', weight=0.7),)


def make_batch() -> Batch:
    """Rows of two documents and some padding, of different lengths."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, V, (B, T + 1))
    index, total = np.arange(T), rng.integers(3, T + 1, (B, 1))
    segment_ids = np.where(index < 2, 1, 2) * (index < total)
    mask = (segment_ids > 0) & (index != 1) & (index != total - 1)
    positions = np.where(index < 2, index, index - 2)
    arrays = tokens[:, :T], tokens[:, 1:], mask, segment_ids, np.tile(positions, (B, 1))
    return Batch(*(jnp.asarray(a, bool if a.dtype == bool else jnp.int32) for a in arrays))


def make_recipe(mesh=None, micro_batches: int = 1, **changes) -> Recipe:
    """Plain gradient descent at rate 1: the parameters move by exactly the gradient."""
    own = dict(
        model=Transformer(STUDENT, mesh),
        objective=Objective(TERMS, features=FEATURES),
        optimizer=optax.sgd(1.0),
        train=TrainConfig(steps=1, micro_batches=micro_batches, chunk_size=8),
        balance=BalanceConfig(),
        teacher=OnlineTeacher(Transformer(TEACHER, mesh)),
    )
    return Recipe(**(own | changes))


@functools.cache
def run(micro_batches: int = 1, sizes: tuple[int, ...] = (1, 1, 1)):
    """The state before and after one update, and what it measured."""
    mesh = mesh_of(sizes)
    recipe = make_recipe(mesh, micro_batches)
    state = jax.jit(functools.partial(initial_state, recipe))(variables(STUDENT))
    teacher, batch = variables(TEACHER), make_batch()
    if mesh is not None:
        teacher = jax.device_put(teacher, variable_shardings(recipe.teacher.model, mesh))
        batch = jax.device_put(batch, batch_sharding(mesh))
        shardings = variable_shardings(recipe.model, mesh)['params']
        shardings |= projector_shardings(recipe.projectors, mesh)
        state = dataclasses.replace(state, params=jax.device_put(state.params, shardings))
    return jax.device_get((state, *jax.jit(make_train_step(recipe))(state, teacher, batch)))


def inside(config: TransformerConfig, params, batch: Batch) -> Inside:
    output, noted = Transformer(config).apply(
        {'params': params},
        batch.tokens,
        positions=batch.positions,
        segment_ids=batch.segment_ids,
        mutable=list(activations_of(FEATURES)),
    )
    return Inside.of(config, output.router, noted)


@functools.cache
def gradients():
    """Of the features' loss alone in the parameters of both models, from passes over them."""
    batch, before = make_batch(), run()[0]

    def loss(student, teacher):
        own = inside(STUDENT, without_projectors(student), batch)
        wanted = inside(TEACHER, teacher, batch)
        known = student[PROJECTORS], batch.segment_ids, 0
        total, pairs = features_loss(FEATURES, own, wanted, *known)
        return total / (batch.segment_ids > 0).sum(), pairs

    run_it = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    return run_it(before.params, variables(TEACHER)['params'])


def test_the_loss_is_the_sum_of_its_parts():
    _, _, metrics = run()
    mean = {name: total / count for name, (total, count) in metrics.pairs.items()}
    apart = [w * mean[f'{name}_match_loss'] for name, w in zip(NAMES, WEIGHTS, strict=True)]
    np.testing.assert_allclose(mean['loss'], 0.7 * mean['forward_kl'] + sum(apart), rtol=1e-5)
    assert min(apart) > 1e-3
    routed = int((make_batch().segment_ids > 0).sum())
    assert {int(metrics.pairs[f'{name}_match_loss'][1]) for name in NAMES} == {routed}
    for name, (total, _) in gradients()[1].items():
        np.testing.assert_allclose(metrics.pairs[name][0], total, rtol=1e-4)


def test_projectors_and_student_learn_and_the_teacher_does_not():
    before, after, _ = run()
    (student, teacher), _ = gradients()
    moved = jax.tree.map(jnp.subtract, before.params[PROJECTORS], after.params[PROJECTORS])
    # No other term has a gradient in them.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5)
    jax.tree.map(close, moved, student[PROJECTORS])
    assert set(moved) == {'embedding', 'hidden', 'hidden_2'}
    assert moved['hidden'].shape == (2, 8, 12)
    assert min(np.abs(kernel).max(axis=(1, 2)).min() for kernel in moved.values()) > 1e-4
    layer = student['group_0']['layer_0']
    for leaf in (layer['attention']['q'], layer['attention']['v'], student['embed']['embedding']):
        assert np.abs(leaf).max() > 1e-4
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(teacher))


def test_micro_batches_on_eight_devices_give_the_same_update():
    (first, state, metrics), (start, wanted, expected) = run(2, (2, 2, 2)), run()
    close = functools.partial(np.testing.assert_allclose, rtol=5e-4, atol=5e-6)
    jax.tree.map(np.testing.assert_array_equal, first.params, start.params)
    jax.tree.map(close, state.params, wanted.params)
    jax.tree.map(close, metrics.pairs, expected.pairs)


def test_projectors_keep_the_mean_square_and_are_split_as_the_student_is():
    recipe = make_recipe()
    (kernels,) = (recipe.projectors[PROJECTORS],)
    assert {name: leaf.shape for name, leaf in kernels.items()} == {
        'embedding': (1, 8, 12),
        'hidden': (2, 8, 12),
        'hidden_2': (1, 8, 12),
    }
    assert jax.tree.structure(projector_axes(FEATURES), is_leaf=lambda x: type(x) is tuple) == (
        jax.tree.structure(recipe.projectors)
    )
    mesh = make_mesh(MeshConfig(fsdp=4), jax.devices()[:4])
    split = projector_shardings(recipe.projectors, mesh)[PROJECTORS]['hidden']
    assert split.shard_shape((2, 8, 12)) == (2, 2, 12)
    wide = dataclasses.replace(STUDENT, embed_dim=512)
    shapes = projector_shapes((Feature('hidden', layers=((0, 0),)),), wide, TEACHER)
    (kernel,) = jax.tree.leaves(initial_projectors(shapes, jax.random.key(0)))
    np.testing.assert_allclose(kernel.std() * 512**0.5, 1, rtol=0.05)
    assert projector_shapes((Feature('usage'),), STUDENT, STUDENT) == {}


def test_an_average_holds_the_model_alone():
    features = (Feature('hidden', weight=1.0), Feature('router'))
    recipe = make_recipe(
        objective=Objective(TERMS, features=features),
        teacher=OnlineTeacher(Transformer(STUDENT)),
        ema_decay=0.5,
    )
    state = jax.eval_shape(functools.partial(initial_state, recipe), variables(STUDENT))
    after, _ = jax.eval_shape(make_train_step(recipe), state, {}, make_batch())
    assert PROJECTORS in after.params
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert jax.tree.structure(after.ema['params']) == (
        jax.tree.structure(variables(STUDENT)['params'])
    )


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(teacher=None), r'features \(embedding, hidden, .* received NoneType'),
        (dict(teacher=CachedTeacher()), 'received CachedTeacher'),
        (
            dict(teacher=TeacherPanel((OnlineTeacher(Transformer(TEACHER)),) * 2, (1.0, 1.0))),
            'by itself; received TeacherPanel',
        ),
        (
            dict(objective=Objective(TERMS, features=(Feature('router', layers=LAYERS),))),
            "as many experts .* received 4 and 6. .* kind='usage'",
        ),
    ],
)
def test_what_cannot_be_matched_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        make_recipe(**changes)
