"""The loss of tokens further ahead: what counts, against float64, and on every mesh and split."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distill.config import BalanceConfig, TrainConfig
from distill.fused import fused_distillation_loss
from distill.mtp_loss import batch_ahead, mtp_loss
from distill.objective import Objective, Term
from distill.recipe import Recipe, initial_state
from distill.schedules import Schedule
from distill.step import make_train_step
from distill.teacher import OnlineTeacher
from distill.types import Batch, DenseTargets, HiddenTargets
from moe.config import AttentionConfig, MoEConfig, RouterConfig, TransformerConfig
from moe.errors import InputError
from moe.sharding import MeshConfig, batch_sharding, make_mesh, variable_shardings
from moe.transformer import Transformer
from moe.types import ModelOutput

B, T, D, V = 8, 9, 16, 12
STUDENT = TransformerConfig(
    vocab_size=V,
    num_layers=1,
    embed_dim=D,
    mlp_dim=8,
    attention=AttentionConfig(4, 2, 4, qk_norm='head'),
    moe=MoEConfig(RouterConfig(4, 2, selection_bias=True), expert_dim=8, dispatch='dense'),
    mtp_depth=2,
    scan_layers=False,
)
TEACHER = TransformerConfig(V, 1, 8, 8, AttentionConfig(4, 4, 2), scan_layers=False)
TERMS = (Term('forward_kl', weight=0.7, temperature=2.0), Term('cross_entropy', weight=0.5))
BALANCE = BalanceConfig(load_balance_weight=0.1, router_z_weight=0.01, selection_bias_rate=0.01)


def make_batch() -> Batch:
    """Rows of two documents and some padding; the first token of each is a prompt, not counted."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, V, (B, T + 1))
    first, total = rng.integers(2, 5, (B, 1)), rng.integers(7, T + 1, (B, 1))
    index = np.arange(T)
    segments = np.where(index < first, 1, 2) * (index < total)
    positions = np.where(index < first, index, index - first)
    mask = (segments > 0) & (index != first - 1) & (index != total - 1) & (positions > 0)
    return Batch(*map(jnp.asarray, (tokens[:, :T], tokens[:, 1:], mask, segments, positions)))


def test_what_counts_further_ahead_by_hand():
    batch = Batch(
        tokens=jnp.array([[5, 6, 7, 8, 9, 3, 0]]),
        labels=jnp.array([[6, 7, 8, 0, 3, 0, 0]]),
        mask=jnp.array([[0, 1, 1, 0, 1, 0, 0]], bool),
        segment_ids=jnp.array([[1, 1, 1, 1, 2, 2, 0]]),
        positions=jnp.array([[0, 1, 2, 3, 0, 1, 0]]),
    )
    one, two = batch_ahead(batch, 1), batch_ahead(batch, 2)
    # Position 0 is a prompt's, but the token two ahead of it is not: it counts at depth 1.
    assert one.mask.tolist() == [[True, True, False, False, False, False, False]]
    assert one.labels[0, :2].tolist() == [7, 8]
    assert two.mask.tolist() == [[True] + [False] * 6]
    assert two.labels[0, 0] == 8


@pytest.mark.parametrize('form', [HiddenTargets, DenseTargets])
def test_the_loss_equals_a_float64_reference(form):
    rng = np.random.default_rng(1)
    batch = make_batch()
    hidden, head = rng.normal(size=(2, B, T, D)), rng.normal(size=(D, V))
    teacher, teacher_head = rng.normal(size=(B, T, 5)), rng.normal(size=(5, V))

    def log_softmax(z):
        return z - np.log(np.exp(z).sum(-1, keepdims=True))

    labels, segments = np.asarray(batch.labels), np.asarray(batch.segment_ids)
    total, sums = 0.0, {}
    for b, t, d in np.ndindex(B, T, 2):
        further = t + d + 1
        if further >= T or not batch.mask[b, further] or segments[b, t] != segments[b, further]:
            continue
        logits, wanted = hidden[d, b, t] @ head, teacher[b, further] @ teacher_head
        p, q = log_softmax(logits / 2), log_softmax(wanted / 2)
        parts = (np.exp(q) * (q - p)).sum(), -log_softmax(logits)[labels[b, further]]
        for name, part in zip(('forward_kl', 'cross_entropy'), parts, strict=True):
            name = f'mtp_{d + 1}/{name}'
            sums[name] = np.add(sums.get(name, 0.0), (part, 1))
        total += 0.7 * parts[0] + 0.5 * parts[1]
    arrays = [jnp.asarray(x, jnp.float32) for x in (teacher, teacher_head)]
    targets = (
        HiddenTargets(*arrays) if form is HiddenTargets else DenseTargets(arrays[0] @ arrays[1])
    )
    count = float(batch.mask.sum())
    outputs = [ModelOutput(jnp.asarray(h, jnp.float32), None, ()) for h in hidden]
    loss, metrics = mtp_loss(
        outputs,
        jnp.asarray(head, jnp.float32),
        targets,
        TERMS,
        batch,
        normalizer=count,
        chunk_size=16,
    )
    np.testing.assert_allclose(loss, total / 2 / count, rtol=1e-5)
    assert metrics.keys() == sums.keys()
    for name, pair in metrics.items():
        np.testing.assert_allclose(pair, sums[name], rtol=1e-5)


def test_at_depth_zero_it_would_be_the_loss_of_the_next_token():
    """What is moved is moved alike: a module that says at t what the model says at t + 1."""
    rng = np.random.default_rng(2)
    batch = dataclasses.replace(make_batch(), segment_ids=jnp.ones((B, T), int))
    hidden, head, teacher = (
        jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((B, T, D), (D, V), (B, T, V))
    )
    mask = batch.mask.at[:, 0].set(False)
    batch = dataclasses.replace(batch, mask=mask)
    further = ModelOutput(jnp.roll(hidden, -1, axis=1), None, ())
    settings = {'normalizer': mask.sum(), 'chunk_size': 32}
    actual, _ = mtp_loss([further], head, DenseTargets(teacher), TERMS, batch, **settings)
    expected, _ = fused_distillation_loss(
        hidden, head, DenseTargets(teacher), TERMS, labels=batch.labels, mask=mask, **settings
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def recipe(mesh=None, *, micro_batches: int = 1, mtp_weight=0.3, scope='sequence') -> Recipe:
    return Recipe(
        model=Transformer(STUDENT, mesh),
        objective=Objective(TERMS, mtp_weight),
        optimizer=optax.sgd(1.0),
        train=TrainConfig(steps=1, micro_batches=micro_batches, chunk_size=16),
        balance=dataclasses.replace(BALANCE, load_balance_scope=scope),
        teacher=OnlineTeacher(Transformer(TEACHER, mesh)),
    )


@functools.cache
def variables():
    init = jax.jit(
        lambda model, key: nn.unbox(model.init(key, jnp.zeros((1, 2), jnp.int32))), static_argnums=0
    )
    return init(Transformer(STUDENT), jax.random.key(1)), init(
        Transformer(TEACHER), jax.random.key(2)
    )


def run(recipe: Recipe):
    (student, teacher), mesh, batch = variables(), recipe.model.mesh, make_batch()
    if mesh is not None:
        student = jax.device_put(student, variable_shardings(recipe.model, mesh))
        teacher = jax.device_put(teacher, variable_shardings(recipe.teacher.model, mesh))
        batch = jax.device_put(batch, batch_sharding(mesh))
    state = jax.jit(functools.partial(initial_state, recipe))(student)
    return jax.device_get(jax.jit(make_train_step(recipe))(state, teacher, batch))


@functools.cache
def reference():
    return run(recipe())


def test_the_loss_is_the_weighted_sum_of_its_parts_and_moves_every_module():
    state, metrics = reference()
    sums = {name: total for name, (total, _) in metrics.pairs.items()}
    count = metrics.pairs['cross_entropy'][1]
    assert 0 < metrics.pairs['mtp_2/cross_entropy'][1] < metrics.pairs['mtp_1/cross_entropy'][1]
    further = [
        0.7 * sums[f'mtp_{d}/forward_kl'] + 0.5 * sums[f'mtp_{d}/cross_entropy'] for d in (1, 2)
    ]
    expected = (0.7 * sums['forward_kl'] + 0.5 * sums['cross_entropy']) / count
    expected += 0.3 * sum(further) / 2 / count
    # The routers' losses are averaged over the model's layer and the modules' two.
    routed = float((make_batch().segment_ids > 0).sum())
    expected += (0.1 * sums['load_balance_loss'] + 0.01 * sums['router_z_loss']) / 3 / routed
    np.testing.assert_allclose(sums['loss'], expected, rtol=1e-5)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), state.params, variables()[0]['params'])
    assert min(jax.tree.leaves(moved)) > 1e-6
    assert metrics.load.shape == (3, 4)
    assert (metrics.load.sum(1)[:-1] > metrics.load.sum(1)[1:]).all()
    assert (metrics.confidence > 1 / 4).all()
    assert all(np.any(bias) for bias in jax.tree.leaves(state.routing))


def assert_same_update(got, wanted) -> None:
    close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-6)
    jax.tree.map(close, got, wanted)


def test_a_mesh_with_micro_batches_gives_the_same_update():
    """With the global scope, for which a pass over all of them counts the load of modules too."""
    mesh = make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2))
    assert mesh.size == 8
    # At its start the schedule has the weight of the reference.
    weight = Schedule('linear', 0.3, end=0.1, steps=10)
    split = run(recipe(mesh, micro_batches=2, mtp_weight=weight, scope='global'))
    assert_same_update(split, run(recipe(scope='global')))


def test_modules_and_their_weight_go_together():
    with pytest.raises(InputError, match='mtp_depth=2 needs an mtp_weight that is above 0'):
        recipe(mtp_weight=0.0)
    plain = dataclasses.replace(recipe().model.config, mtp_depth=0)
    with pytest.raises(
        InputError, match=r'mtp_depth=0 needs an mtp_weight that is 0; received 0\.3'
    ):
        dataclasses.replace(recipe(), model=Transformer(plain))
    with pytest.raises(InputError, match='mtp_weight must be zero or more'):
        Objective(TERMS, -0.5)
