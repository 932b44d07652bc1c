"""The update with terms on some writers' sequences and with returns, whole and in micro-batches."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from writing import EOS, PAD, TEACHER_CONFIG, B, N, T, make_batch, make_recipe, variables

from distill import step as step_module
from distill.config import BalanceConfig, TrainConfig
from distill.estimators import TopKEstimator
from distill.objective import Objective, Term
from distill.prompts import Sequences, as_rows
from distill.recipe import initial_state
from distill.rollout import Rolled, with_rows
from distill.step import make_train_step
from distill.teacher import EstimatedTeacher, OnlineTeacher
from distill.writers import STUDENT, TEACHER, TEXT
from moe.errors import InputError
from moe.sharding import MeshConfig, make_mesh, variable_shardings
from moe.transformer import Transformer

MODEL = Transformer(TEACHER_CONFIG)
TERMS = (
    Term('reverse_kl', on='student'),
    Term('skew_forward_kl', weight=0.5, on='teacher', lam=0.1),
    Term('cross_entropy', weight=0.25, on='text'),
)
RETURN_WEIGHT = 0.7


def recipe(micro_batches: int = 1, **fields):
    defaults = dict(
        model=MODEL,
        objective=Objective(TERMS, return_weight=RETURN_WEIGHT),
        balance=BalanceConfig(),
        train=TrainConfig(steps=1, micro_batches=micro_batches, chunk_size=16),
    )
    return make_recipe(**(defaults | fields))


@functools.cache
def student():
    init = jax.jit(lambda key: nn.unbox(MODEL.init(key, jnp.zeros((1, 2), jnp.int32))))
    return jax.tree.map(lambda leaf: leaf * 2, init(jax.random.key(5)))


@functools.cache
def rows():
    """A batch as a rollout leaves it: completions of one to five tokens after prompts."""
    rng = np.random.default_rng(3)
    sequences = Sequences(
        jnp.asarray(rng.integers(0, EOS, (B, T)), jnp.int32),
        jnp.asarray(rng.integers(2, T - N, B)),
        jnp.asarray([1, 5, 2, 3, 4, 2, 5, 4]),
    )
    writers = jnp.array([TEXT, STUDENT, TEACHER, STUDENT, TEXT, TEACHER, STUDENT, TEXT])
    return with_rows(make_batch(), writers, as_rows(sequences, PAD))


def update(made, place=lambda values: values):
    """One update on those rows, and its metrics."""
    rolled = Rolled(rows(), None, {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_module, 'roll_out', lambda *_, **__: rolled)
        run = jax.jit(make_train_step(made))
        state = initial_state(made, place(student()))
        return jax.device_get(run(state, place(variables()[1]), make_batch()))


@functools.cache
def updated(micro_batches: int):
    return update(recipe(micro_batches))


def reference() -> dict[str, float]:
    """Every part of the loss in float64, from the logits."""
    batch = rows()

    def log_probs(values):
        where = {'positions': batch.positions, 'segment_ids': batch.segment_ids}
        logits = np.asarray(jax.jit(MODEL.apply)(values, batch.tokens, **where).logits, np.float64)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    log_q, log_p = log_probs(student()), log_probs(variables()[1])
    q, p = np.exp(log_q), np.exp(log_p)
    labels, mask = np.asarray(batch.labels)[..., None], np.asarray(batch.mask)
    said = np.take_along_axis(log_q, labels, -1)[..., 0]
    reward = np.take_along_axis(log_p, labels, -1)[..., 0] - said
    future = np.zeros((B, T))
    for row in range(B):
        for position in np.flatnonzero(mask[row]):
            later = reward[row, position + 1 :][mask[row, position + 1 :]]
            future[row, position] = later.mean() if later.size else 0
    on = {w: mask & (np.asarray(batch.writers) == w)[:, None] for w in (TEXT, STUDENT, TEACHER)}
    skewed = (p * (log_p - np.log(0.1 * p + 0.9 * q))).sum(-1)
    return {
        'reverse_kl_on_student': (q * (log_q - log_p)).sum(-1)[on[STUDENT]].mean(),
        'skew_forward_kl_on_teacher': skewed[on[TEACHER]].mean(),
        'cross_entropy_on_text': -said[on[TEXT]].mean(),
        'return': future[on[STUDENT]].mean(),
        'surrogate': -(future * said)[on[STUDENT]].mean(),
    }


def test_the_loss_is_that_of_each_writers_own_tokens():
    pairs = updated(2)[1].pairs
    wanted = reference()
    for name in wanted.keys() - {'surrogate'}:
        np.testing.assert_allclose(pairs[name][0] / pairs[name][1], wanted[name], rtol=1e-4)
    weights = (1.0, 0.5, 0.25)
    names = ('reverse_kl_on_student', 'skew_forward_kl_on_teacher', 'cross_entropy_on_text')
    total = sum(w * wanted[name] for w, name in zip(weights, names, strict=True))
    total += RETURN_WEIGHT * wanted['surrogate']
    np.testing.assert_allclose(pairs['loss'][0], total, rtol=1e-4)
    assert set(pairs) == {*names, 'return', 'loss', 'gradient_norm'}


def test_micro_batches_add_up():
    close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=1e-5)
    jax.tree.map(close, updated(2), updated(1))


def test_the_same_on_a_mesh_with_the_vocabulary_split():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    model = Transformer(TEACHER_CONFIG, mesh)
    place = lambda values: jax.device_put(values, variable_shardings(model, mesh))  # noqa: E731
    got = update(recipe(model=model, teacher=OnlineTeacher(model)), place)
    close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=1e-5)
    jax.tree.map(close, got, updated(1))


def test_returns_need_all_that_a_teacher_says():
    teacher = EstimatedTeacher(OnlineTeacher(MODEL), TopKEstimator(4, 1.0))
    terms = (Term('reverse_kl', on='student'),)
    with pytest.raises(InputError, match='return_weight needs the whole distribution'):
        recipe(teacher=teacher, objective=Objective(terms, return_weight=1.0))
    with pytest.raises(InputError, match=r"forward_kl on='teacher' needs a rollout"):
        recipe(rollout=None, objective=Objective((Term('forward_kl', on='teacher'),)))
    with pytest.raises(InputError, match=r"cross_entropy on='student' needs a rollout"):
        dataclasses.replace(recipe(), rollout=None, objective=Objective((
            Term('forward_kl'), Term('cross_entropy', on='student'),
        )))  # fmt: skip
