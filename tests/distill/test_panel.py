"""Several teachers: their shares, the loss against float64, routes through packing, and meshes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from writing import EOS, PAD, STUDENT_CONFIG, TEACHER_CONFIG, B, T, make_batch, variables

from distill.config import BalanceConfig, RolloutConfig, TrainConfig
from distill.corpus import TokenCorpus
from distill.data import DataConfig, TrainPipeline, fingerprint
from distill.objective import Objective, Term
from distill.panel import TeacherPanel
from distill.recipe import Recipe, initial_state
from distill.rollout import Rollout
from distill.step import make_train_step
from distill.teacher import OnlineTeacher
from moe.errors import InputError
from moe.sharding import MeshConfig, batch_sharding, make_mesh, variable_shardings
from moe.transformer import Transformer

WEIGHTS = (3.0, 1.0)
TERMS = (Term('forward_kl', weight=0.7), Term('jsd', weight=0.5), Term('cross_entropy', weight=0.2))
ROUTES = np.arange(B * T).reshape(B, T) // 5 % 3


def make_recipe(mesh=None, **fields) -> Recipe:
    teacher = OnlineTeacher(Transformer(TEACHER_CONFIG, mesh))
    defaults = dict(
        model=Transformer(dataclasses.replace(TEACHER_CONFIG, embed_dim=16), mesh),
        objective=Objective(TERMS),
        optimizer=optax.sgd(1.0),
        train=TrainConfig(steps=1, micro_batches=1, chunk_size=16),
        balance=BalanceConfig(),
        teacher=TeacherPanel((teacher, teacher), WEIGHTS),
    )
    return Recipe(**(defaults | fields))


@functools.cache
def models():
    """Variables of a student and of two teachers."""
    import flax.linen as nn

    recipe = make_recipe()
    init = jax.jit(
        lambda model, key: nn.unbox(model.init(key, jnp.zeros((1, 2), jnp.int32))), static_argnums=0
    )
    student = init(recipe.model, jax.random.key(3))
    other = init(recipe.teacher.teachers[1].model, jax.random.key(4))
    double = functools.partial(jax.tree.map, lambda leaf: leaf * 2)
    return double(student), (variables()[1], double(other))


def batch(routed: bool):
    routes = jnp.asarray(ROUTES, jnp.int32) if routed else None
    return dataclasses.replace(make_batch(), routes=routes)


@functools.cache
def updated(routed: bool, micro_batches: int = 1):
    recipe = make_recipe(train=TrainConfig(steps=1, micro_batches=micro_batches, chunk_size=16))
    student, teachers = models()
    step = jax.jit(make_train_step(recipe))
    return jax.device_get(step(initial_state(recipe, student), teachers, batch(routed)))


@pytest.mark.parametrize('routed', [False, True])
def test_each_token_is_taught_by_its_shares(routed):
    recipe, (student, teachers) = make_recipe(), models()
    data = batch(routed)

    def log_probs(model, values):
        where = {'positions': data.positions, 'segment_ids': data.segment_ids}
        logits = np.asarray(jax.jit(model.apply)(values, data.tokens, **where).logits, np.float64)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    log_s = log_probs(recipe.model, student)
    s, mask = np.exp(log_s), np.asarray(data.mask)
    if routed:
        # A route past the last teacher is the first's.
        shares = np.stack([(ROUTES == 0) | (ROUTES == 2), ROUTES == 1]).astype(float)
    else:
        shares = np.broadcast_to(np.array([0.75, 0.25])[:, None, None], (2, B, T))
    kl, jsd = np.zeros((B, T)), np.zeros((B, T))
    for share, own, online in zip(shares, teachers, recipe.teacher.teachers, strict=True):
        log_t = log_probs(online.model, own)
        t, log_m = np.exp(log_t), np.log((np.exp(log_t) + s) / 2)
        kl += share * (t * (log_t - log_s)).sum(-1)
        jsd += share * (t * (log_t - log_m) + s * (log_s - log_m)).sum(-1) / 2
    said = np.take_along_axis(log_s, np.asarray(data.labels)[..., None], -1)[..., 0]
    wanted = {'forward_kl': kl[mask].mean(), 'jsd': jsd[mask].mean()}
    wanted['cross_entropy'] = -said[mask].mean()
    pairs = updated(routed)[1].pairs
    for name, value in wanted.items():
        np.testing.assert_allclose(pairs[name][0] / pairs[name][1], value, rtol=1e-4)
        np.testing.assert_allclose(pairs[name][1], mask.sum(), rtol=1e-6)
    total = sum(term.weight * wanted[term.name] for term in TERMS)
    np.testing.assert_allclose(pairs['loss'][0], total, rtol=1e-4)


def test_the_same_on_a_mesh():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    recipe, (student, teachers) = make_recipe(mesh), models()
    place = lambda model, values: jax.device_put(values, variable_shardings(model, mesh))  # noqa: E731
    placed = tuple(
        place(online.model, own)
        for online, own in zip(recipe.teacher.teachers, teachers, strict=True)
    )
    state = initial_state(recipe, place(recipe.model, student))
    data = jax.device_put(batch(True), batch_sharding(mesh))
    got = jax.device_get(jax.jit(make_train_step(recipe))(state, placed, data))
    close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-6)
    jax.tree.map(close, got, updated(True))


def test_routes_follow_their_documents_through_packing():
    lengths = np.array([3, 5, 4, 6])
    starts = np.cumsum([0, *lengths])
    owners = np.repeat(np.arange(4), lengths)
    plain = TokenCorpus(np.arange(starts[-1]), starts, -1, 'source', 'tokenizer')
    corpus = dataclasses.replace(plain, routes=np.array([1, 0, 2, 1]))
    config = DataConfig(seq_len=6, batch_size=3, seed=0)
    rows = next(TrainPipeline(corpus, config))
    within = np.asarray(rows.segment_ids) > 0
    np.testing.assert_array_equal(
        np.asarray(rows.routes)[within], corpus.routes[owners[np.asarray(rows.tokens)[within]]]
    )
    assert next(TrainPipeline(plain, config)).routes is None
    other = dataclasses.replace(plain, routes=np.array([1, 0, 2, 2]))
    assert fingerprint(other, config) != fingerprint(corpus, config) != fingerprint(plain, config)


def test_what_a_panel_cannot_be_is_refused():
    teacher = make_recipe().teacher.teachers[0]
    wide = OnlineTeacher(Transformer(dataclasses.replace(STUDENT_CONFIG, vocab_size=20)))
    for teachers, weights, message in (
        ((teacher,), (1.0,), 'teachers must be two or more'),
        ((teacher, teacher), (1.0,), 'weights must be 2 positive numbers'),
        ((teacher, teacher), (1.0, 0.0), 'weights must be 2 positive numbers'),
        ((teacher, wide), (1.0, 1.0), 'teachers must be of one vocabulary'),
    ):
        with pytest.raises(InputError, match=message):
            TeacherPanel(teachers, weights)
    rollout = Rollout(RolloutConfig(max_new_tokens=2), EOS, PAD)
    with pytest.raises(InputError, match='2 teachers together go with no rollout'):
        make_recipe(rollout=rollout)
