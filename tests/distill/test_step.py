"""The update is the same on every mesh, for every split into micro-batches and chunks."""

import dataclasses
import functools
import math
import re

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
from distill.teacher import OnlineTeacher
from distill.types import Batch
from moe.config import AttentionConfig, MoEConfig, RouterConfig, TransformerConfig
from moe.sharding import MeshConfig, batch_sharding, make_mesh, variable_shardings
from moe.transformer import Transformer

B, T, V = 8, 12, 46

STUDENT = TransformerConfig(
    vocab_size=V,
    num_layers=2,
    embed_dim=16,
    mlp_dim=24,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=4, qk_norm='head'),
    moe=MoEConfig(
        router=RouterConfig(num_experts=8, experts_per_token=2, selection_bias=True),
        expert_dim=8,
        shared_dim=8,
        first_dense_layers=1,
    ),
    scan_layers=False,
)
TEACHER = TransformerConfig(
    vocab_size=V,
    num_layers=1,
    embed_dim=24,
    mlp_dim=32,
    attention=AttentionConfig(num_heads=4, num_kv_heads=4, head_dim=6),
    tie_embeddings=True,
    scan_layers=False,
)
TERMS = (
    Term('forward_kl', weight=0.7, temperature=2.0, scale_by_temperature_squared=True),
    Term('jsd', weight=0.3, beta=0.3),
    Term('cross_entropy', weight=0.5),
)
BALANCE = BalanceConfig(load_balance_weight=0.1, router_z_weight=0.01, selection_bias_rate=0.01)


def make_batch(seed: int = 0) -> Batch:
    """Rows of two documents and some padding, of different lengths."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, V, (B, T + 1))
    first, total = rng.integers(2, 6, (B, 1)), rng.integers(8, T + 1, (B, 1))
    index = np.arange(T)
    segment_ids = np.where(index < first, 1, 2) * (index < total)
    positions = np.where(index < first, index, index - first)
    mask = (segment_ids > 0) & (index != first - 1) & (index != total - 1)
    arrays = tokens[:, :T], tokens[:, 1:], mask, segment_ids, positions
    return Batch(*(jnp.asarray(a, bool if a.dtype == bool else jnp.int32) for a in arrays))


def make_recipe(
    mesh=None, *, micro_batches: int = 1, chunk_size: int = 512, dispatch: str = 'grouped'
) -> Recipe:
    """Plain gradient descent at rate 1: the parameters move by exactly the gradient."""
    moe = dataclasses.replace(STUDENT.moe, dispatch=dispatch)
    return Recipe(
        model=Transformer(dataclasses.replace(STUDENT, moe=moe), mesh),
        objective=Objective(TERMS),
        optimizer=optax.sgd(1.0),
        train=TrainConfig(steps=1, micro_batches=micro_batches, chunk_size=chunk_size),
        balance=BALANCE,
        teacher=OnlineTeacher(Transformer(TEACHER, mesh)),
    )


@functools.cache
def variables():
    """Initial variables of student and teacher, made once."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    init = jax.jit(lambda model, key: nn.unbox(model.init(key, tokens)), static_argnums=0)
    student = init(Transformer(STUDENT), jax.random.key(1))
    # Logits far from uniform, so that no term is near zero and routing is uneven.
    student['params'] = jax.tree.map(lambda leaf: leaf * 1.5, student['params'])
    return student, init(Transformer(TEACHER), jax.random.key(2))


@functools.cache
def compiled(recipe: Recipe):
    """The update on one device."""
    return jax.jit(make_train_step(recipe)).lower(*arguments(recipe)).compile()


def arguments(recipe: Recipe):
    student, teacher = variables()
    return initial_state(recipe, student), teacher, make_batch()


@functools.cache
def run(recipe: Recipe):
    return jax.device_get(compiled(recipe)(*arguments(recipe)))


PLAIN = make_recipe()


def reference():
    """One update on one device, in one piece."""
    return run(PLAIN)


def assert_same_update(got, wanted, *, exact_routing: bool = True):
    (state, metrics), (wanted_state, wanted_metrics) = got, wanted
    close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=5e-6)
    jax.tree.map(close, state.params, wanted_state.params)
    same_routing = np.testing.assert_array_equal if exact_routing else close
    jax.tree.map(same_routing, state.routing, wanted_state.routing)
    jax.tree.map(close, metrics, wanted_metrics)


def test_the_reference_moves_everything():
    student, _ = variables()
    state, metrics = reference()
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), state.params, student['params'])
    assert min(jax.tree.leaves(moved)) > 1e-5
    assert {float(abs(bias)) for bias in np.ravel(jax.tree.leaves(state.routing)[0])} <= {
        0.0,
        float(np.float32(0.01)),
    }
    assert metrics.load.sum() == 2 * (make_batch().segment_ids > 0).sum()
    assert int(state.step) == 1


def test_the_loss_is_the_weighted_sum_of_its_parts():
    _, metrics = reference()
    mean = {name: total / weight for name, (total, weight) in metrics.pairs.items()}
    expected = (
        0.7 * mean['forward_kl']
        + 0.3 * mean['jsd']
        + 0.5 * mean['cross_entropy']
        + 0.1 * mean['load_balance_loss']
        + 0.01 * mean['router_z_loss']
    )
    np.testing.assert_allclose(mean['loss'], expected, rtol=1e-6)


def test_micro_batches_add_up():
    assert_same_update(run(make_recipe(micro_batches=4, chunk_size=7)), reference())


@pytest.mark.parametrize(
    ('sizes', 'micro_batches'),
    [
        (dict(fsdp=8), 1),
        (dict(expert=8), 1),
        (dict(data=4, tensor=2), 2),
        (dict(data=2, fsdp=2, expert=2), 1),
        (dict(fsdp=2, expert=2, tensor=2), 2),
    ],
    ids=str,
)
def test_every_mesh_gives_the_same_update(sizes, micro_batches):
    mesh = make_mesh(MeshConfig(**sizes))
    assert mesh.size == 8
    recipe = make_recipe(mesh, micro_batches=micro_batches, chunk_size=16)
    assert_same_update(run_recipe_on(mesh, recipe), reference())


def run_recipe_on(mesh, recipe: Recipe):
    student, teacher = variables()
    place = lambda model, values: jax.device_put(values, variable_shardings(model, mesh))  # noqa: E731
    state = jax.jit(functools.partial(initial_state, recipe))(place(recipe.model, student))
    batch = jax.device_put(make_batch(), batch_sharding(mesh))
    step = jax.jit(make_train_step(recipe))
    return jax.device_get(step(state, place(recipe.teacher.model, teacher), batch))


def scoped_recipe(scope: str, mesh=None, *, micro_batches: int = 1) -> Recipe:
    """On one device by the oracle: no balance hangs on the dispatch."""
    balance = dataclasses.replace(
        BALANCE, load_balance_scope=scope, selection_bias_rule='proportional'
    )
    dispatch = 'dense' if mesh is None else 'grouped'
    recipe = make_recipe(mesh, micro_batches=micro_batches, dispatch=dispatch)
    return dataclasses.replace(recipe, balance=balance)


def balance_loss(metrics) -> float:
    total, weight = metrics.pairs['load_balance_loss']
    return total / weight


@functools.cache
def global_update():
    return run(scoped_recipe('global'))


def test_the_global_scope_sees_every_shard_and_micro_batch():
    wanted = global_update()
    biases = np.ravel(jax.tree.leaves(wanted[0].routing)[0])
    load = np.ravel(wanted[1].load)
    np.testing.assert_allclose(biases, 0.01 * (load.mean() - load) / load.mean(), rtol=1e-5)
    assert abs(balance_loss(wanted[1]) - balance_loss(reference()[1])) > 1e-3
    split = run(scoped_recipe('global', micro_batches=4))
    assert_same_update(split, wanted, exact_routing=False)
    mesh = make_mesh(MeshConfig(data=2, expert=4))
    recipe = scoped_recipe('global', mesh)
    assert_same_update(run_recipe_on(mesh, recipe), wanted, exact_routing=False)


def test_the_micro_batch_scope_sees_its_part_alone():
    whole = global_update()[1]
    _, parts = run(scoped_recipe('micro_batch', micro_batches=4))
    assert parts.pairs['load_balance_loss'][1] == whole.pairs['load_balance_loss'][1]
    assert balance_loss(parts) > balance_loss(whole) + 1e-3


def test_a_bad_update_is_skipped_and_counted():
    state, teacher, batch = arguments(PLAIN)
    student, _ = variables()
    poisoned = jax.tree.map(lambda leaf: leaf * jnp.nan, teacher)
    step = compiled(PLAIN)
    once, _ = step(state, poisoned, batch)
    twice, metrics = step(once, poisoned, batch)
    assert int(twice.step) == 2
    assert int(metrics.skipped) == int(twice.skipped) == 2
    jax.tree.map(np.testing.assert_array_equal, twice.params, student['params'])
    jax.tree.map(np.testing.assert_array_equal, twice.routing, state.routing)
    good, _ = step(twice, teacher, batch)
    assert int(good.skipped) == 0
    jax.tree.map(np.testing.assert_array_equal, good.params, reference()[0].params)


def compiled_text(**how) -> str:
    """The optimized HLO of the update on one device, in chunks of two tokens a row."""
    return compiled(make_recipe(chunk_size=2 * B, **how)).as_text()


def test_the_compiled_step_holds_no_logits_of_the_batch():
    def logits(text: str) -> set[str]:
        """Arrays in any layout with the vocabulary for an axis and room for every token."""
        found = set()
        for shape in re.findall(r'\w+\[([\d,]+)\]', text):
            sizes = [int(size) for size in shape.split(',')]
            if V in sizes and math.prod(sizes) >= B * T * V:
                found.add(shape)
        return found

    assert not logits(compiled_text())
    # The search is able to find them: a chunk of the whole batch does hold logits of all tokens.
    assert logits(compiled(PLAIN).as_text())


def test_the_compiled_step_does_not_expand_the_grouped_product():
    moe = STUDENT.moe
    every_expert_on_every_token = B * T * moe.router.num_experts * 2 * moe.expert_dim

    def largest(text: str) -> int:
        shapes = re.findall(r'f32\[([\d,]+)\]', text)
        return max(math.prod(map(int, shape.split(','))) for shape in shapes)

    assert largest(compiled_text()) < every_expert_on_every_token
    # The search is able to find it: the oracle is such an expansion.
    oracle = compiled_text(dispatch='dense')
    assert largest(oracle) >= every_expert_on_every_token
