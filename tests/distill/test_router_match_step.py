"""A student's update with its routers matched to a teacher's: its loss, and every split alike."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from routed_student import STUDENT, V, mesh_of, variables

from distill.config import BalanceConfig, TrainConfig
from distill.features import Feature
from distill.objective import Objective, Term
from distill.recipe import Recipe, initial_state
from distill.router_match import router_match_loss
from distill.step import make_train_step
from distill.teacher import CachedTeacher, OnlineTeacher
from distill.types import Batch
from moe.config import AttentionConfig, MoEConfig, RouterConfig, TransformerConfig
from moe.errors import InputError
from moe.sharding import (
    batch_sharding,
    variable_shardings,
)
from moe.transformer import Transformer

B, T = 4, 6
TEACHER = TransformerConfig(
    vocab_size=V,
    num_layers=2,
    embed_dim=12,
    mlp_dim=8,
    attention=AttentionConfig(2, 2, 4),
    moe=MoEConfig(RouterConfig(4, 2, score='sigmoid'), 8, dispatch='dense'),
)
TERMS = (Term('forward_kl', weight=0.7),)
WEIGHT = 0.4


def make_batch() -> Batch:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, V, (B, T + 1))
    segment_ids = np.where(np.arange(T) < np.array([[6], [3], [5], [4]]), 1, 0)
    mask = (segment_ids > 0) & (np.arange(T) != 2)
    arrays = tokens[:, :T], tokens[:, 1:], mask, segment_ids, np.tile(np.arange(T), (B, 1))
    return Batch(*(jnp.asarray(a, bool if a.dtype == bool else jnp.int32) for a in arrays))


@functools.cache
def run(micro_batches: int = 1, sizes: tuple[int, ...] = (1, 1, 1)):
    """One update at rate 1: parameters move by exactly the gradient."""
    mesh = mesh_of(sizes)
    recipe = Recipe(
        model=Transformer(STUDENT, mesh),
        objective=Objective(TERMS, features=(Feature('router', weight=WEIGHT),)),
        optimizer=optax.sgd(1.0),
        train=TrainConfig(steps=1, micro_batches=micro_batches, chunk_size=8),
        balance=BalanceConfig(),
        teacher=OnlineTeacher(Transformer(TEACHER, mesh)),
    )
    student, teacher, batch = variables(STUDENT), variables(TEACHER), make_batch()
    if mesh is not None:
        student, teacher = (
            jax.device_put(values, variable_shardings(model, mesh))
            for values, model in ((student, recipe.model), (teacher, recipe.teacher.model))
        )
        batch = jax.device_put(batch, batch_sharding(mesh))
    state = initial_state(recipe, student)
    return jax.device_get(jax.jit(make_train_step(recipe))(state, teacher, batch))


@functools.cache
def matched():
    """The loss of the routers alone, and its gradient, from passes of the two models."""
    batch = make_batch()
    inputs = {'positions': batch.positions, 'segment_ids': batch.segment_ids}

    def loss(params):
        ours = Transformer(STUDENT).apply({'params': params}, batch.tokens, **inputs)
        theirs = Transformer(TEACHER).apply(variables(TEACHER), batch.tokens, **inputs)
        total, count = router_match_loss(
            ours.router, theirs.router, batch.segment_ids > 0, teacher_score='sigmoid'
        )
        return total / count

    return jax.jit(jax.value_and_grad(loss))(variables(STUDENT)['params'])


def test_the_loss_has_the_routers_share():
    _, metrics = run()
    mean = {name: total / count for name, (total, count) in metrics.pairs.items()}
    np.testing.assert_allclose(mean['router_match_loss'], matched()[0], rtol=1e-5)
    expected = 0.7 * mean['forward_kl'] + WEIGHT * mean['router_match_loss']
    np.testing.assert_allclose(mean['loss'], expected, rtol=1e-6)
    # Tokens that are routed count, whether or not their label does.
    assert metrics.pairs['router_match_loss'][1] == 18


def of_routers(tree) -> np.ndarray:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return np.concatenate([np.ravel(leaf) for path, leaf in leaves if 'router' in str(path)])


def test_routers_descend_towards_the_teachers():
    """With one expert a token, of weight 1, no other loss has a gradient in the routers."""
    moved = jax.tree.map(jnp.subtract, variables(STUDENT)['params'], run()[0].params)
    np.testing.assert_allclose(
        of_routers(moved), WEIGHT * of_routers(matched()[1]), rtol=1e-4, atol=1e-6
    )
    assert np.abs(of_routers(moved)).max() > 1e-3


@pytest.mark.parametrize(('micro_batches', 'sizes'), [(2, (1, 1, 1)), (1, (2, 1, 2))])
def test_every_split_gives_the_same_update(micro_batches, sizes):
    (state, metrics), (wanted, expected) = run(micro_batches, sizes), run()
    close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-6)
    jax.tree.map(close, state.params, wanted.params)
    jax.tree.map(close, metrics.pairs, expected.pairs)


@pytest.mark.parametrize(
    ('teacher', 'message'),
    [
        (None, 'need a teacher that runs beside the student, .* received NoneType'),
        (CachedTeacher(), 'received CachedTeacher'),
        (
            OnlineTeacher(Transformer(TransformerConfig(V, 1, 8, 8, AttentionConfig(2, 2, 4)))),
            "router needs a teacher with .* received 'a dense model'",
        ),
    ],
)
def test_teachers_whose_routers_cannot_be_matched_are_refused(teacher, message):
    with pytest.raises(InputError, match=message):
        Recipe(
            model=Transformer(STUDENT),
            objective=Objective(TERMS, features=(Feature('router', weight=WEIGHT),)),
            optimizer=optax.sgd(1.0),
            train=TrainConfig(steps=1),
            balance=BalanceConfig(),
            teacher=teacher,
        )
