"""Rows that models write: how prompts are cut, what counts, and the update on every mesh."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distill.config import BalanceConfig, RolloutConfig, TrainConfig
from distill.objective import Objective, Term
from distill.prompts import Completions, Prompts, as_rows, cut_prompts, joined
from distill.rollout import Author, Rollout, roll_out, rollout_key
from distill.step import Recipe, initial_state, make_train_step
from distill.teacher import CachedTeacher, OnlineTeacher
from distill.types import Batch
from distill.writers import STUDENT, TEACHER, TEXT, choose_writers
from moe.config import AttentionConfig, MoEConfig, RouterConfig, TransformerConfig
from moe.errors import InputError
from moe.sharding import MeshConfig, batch_sharding, make_mesh, variable_shardings
from moe.transformer import Transformer

JSD = Term('jsd', beta=0.3)
B, T, V, N = 8, 12, 18, 5
EOS, PAD = 16, 17

STUDENT_CONFIG = TransformerConfig(
    vocab_size=V,
    num_layers=1,
    embed_dim=16,
    mlp_dim=16,
    attention=AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=8),
    moe=MoEConfig(RouterConfig(4, 2, selection_bias=True), expert_dim=8, dispatch='dense'),
    scan_layers=False,
)
TEACHER_CONFIG = TransformerConfig(
    vocab_size=V,
    num_layers=1,
    embed_dim=24,
    mlp_dim=16,
    attention=AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=8),
    scan_layers=False,
)


def make_batch() -> Batch:
    """Rows of two documents and some padding, of different lengths."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, EOS, (B, T + 1))
    first, total = rng.integers(2, 6, (B, 1)), rng.integers(8, T + 1, (B, 1))
    index = np.arange(T)
    segment_ids = np.where(index < first, 1, 2) * (index < total)
    positions = np.where(index < first, index, index - first)
    mask = (segment_ids > 0) & (index != first - 1) & (index != total - 1)
    arrays = tokens[:, :T], tokens[:, 1:], mask, segment_ids, positions
    return Batch(*(jnp.asarray(a, bool if a.dtype == bool else jnp.int32) for a in arrays))


def make_recipe(mesh=None, *, terms=(JSD,), **fields) -> Recipe:
    """Plain gradient descent at rate 1: the parameters move by exactly the gradient."""
    config = dict(lmbda=0.5, teacher_share=0.25, max_new_tokens=N) | fields.pop('config', {})
    defaults = dict(
        model=Transformer(STUDENT_CONFIG, mesh),
        objective=Objective(terms),
        optimizer=optax.sgd(1.0),
        train=TrainConfig(steps=1, chunk_size=16),
        balance=BalanceConfig(selection_bias_rate=0.01),
        teacher=OnlineTeacher(Transformer(TEACHER_CONFIG, mesh)),
        rollout=Rollout(RolloutConfig(**config), EOS, PAD),
    )
    return Recipe(**(defaults | fields))


@functools.cache
def variables():
    """Variables of student and teacher, with logits far from uniform."""
    init = jax.jit(
        lambda model, key: nn.unbox(model.init(key, jnp.zeros((1, 2), jnp.int32))), static_argnums=0
    )
    student = init(Transformer(STUDENT_CONFIG), jax.random.key(1))
    teacher = init(Transformer(TEACHER_CONFIG), jax.random.key(2))
    double = functools.partial(jax.tree.map, lambda leaf: leaf * 2)
    return student | {'params': double(student['params'])}, double(teacher)


@functools.cache
def written(step: int, seed: int = 0):
    """The rows of a step, written on one device, and what was measured of them."""
    student, teacher = variables()
    return jax.device_get(_written(student, teacher, rollout_key(seed, step)))


@jax.jit
def _written(student, teacher, key):
    recipe = make_recipe()
    authors = {
        STUDENT: Author(recipe.model, student),
        TEACHER: Author(recipe.teacher.model, teacher),
    }
    return roll_out(recipe.rollout, authors, make_batch(), key)


def test_a_prompt_is_the_first_part_of_the_longest_piece():
    # Room for 8 - 3 = 5 tokens of prompt. Rows: the second piece is longest, and its last 3 tokens
    # are replaced; pieces of equal length, of which the first loses its second half; one piece that
    # fills the row; a single token, which is no prompt; padding alone.
    tokens = jnp.arange(40).reshape(5, 8)
    segment_ids = jnp.array(
        [
            [1, 1, 2, 2, 2, 2, 2, 0],
            [1, 1, 1, 2, 2, 2, 0, 0],
            [1, 1, 1, 1, 1, 1, 1, 1],
            [1, 0, 0, 0, 0, 0, 0, 0],
            [0, 0, 0, 0, 0, 0, 0, 0],
        ]
    )
    batch = Batch(tokens, tokens, segment_ids > 0, segment_ids, tokens)
    prompts = cut_prompts(batch, 3)
    np.testing.assert_array_equal(prompts.lengths, [3, 2, 5, 0, 0])
    np.testing.assert_array_equal(
        prompts.tokens[:3], [[0, 0, 2, 3, 4], [0, 0, 0, 8, 9], [16, 17, 18, 19, 20]]
    )
    np.testing.assert_array_equal(
        prompts.mask[:3], [[0, 0, 1, 1, 1], [0, 0, 0, 1, 1], [1, 1, 1, 1, 1]]
    )


def test_a_row_is_the_prompt_its_completion_and_padding():
    prompts = Prompts(
        tokens=jnp.array([[0, 0, 5, 6], [1, 2, 3, 4]]),
        mask=jnp.array([[0, 0, 1, 1], [1, 1, 1, 1]], bool),
        lengths=jnp.array([2, 4]),
    )
    # The first ended with eos as its second token; the second never did.
    completions = Completions(jnp.array([[7, EOS, EOS], [8, 9, 10]]), jnp.array([2, 3]))
    rows = as_rows(joined(prompts, completions), PAD)
    np.testing.assert_array_equal(
        rows.tokens, [[5, 6, 7, EOS, PAD, PAD, PAD], [1, 2, 3, 4, 8, 9, 10]]
    )
    # What predicts 7 and eos, and what predicts 8, 9 and 10: never a token of the prompt.
    np.testing.assert_array_equal(rows.mask, [[0, 1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1, 0]])
    np.testing.assert_array_equal(rows.labels[0, 1:3], [7, EOS])
    np.testing.assert_array_equal(rows.labels[1, 3:6], [8, 9, 10])
    np.testing.assert_array_equal(rows.segment_ids, [[1, 1, 1, 1, 0, 0, 0], [1] * 7])
    np.testing.assert_array_equal(rows.positions, [[0, 1, 2, 3, 0, 0, 0], np.arange(7)])


def test_shares_are_met_within_one_row_and_exactly_on_average():
    config = RolloutConfig(lmbda=0.3, teacher_share=0.4)
    draw = jax.jit(jax.vmap(lambda key: choose_writers(key, 7, config)))
    writers = np.asarray(draw(jax.random.split(jax.random.key(0), 4000)))
    for number, share in ((TEXT, 0.3), (STUDENT, 0.3), (TEACHER, 0.4)):
        counts = (writers == number).sum(1)
        assert np.abs(counts - 7 * share).max() < (1 if number == STUDENT else 2)
        # The mean of 4000 counts whose deviation is below 1.
        assert abs(counts.mean() - 7 * share) < 0.06
        # Any row may be anybody's.
        assert np.abs((writers == number).mean(0) - share).max() < 0.04
    for lmbda, number in ((0.0, TEXT), (1.0, STUDENT)):
        assert (choose_writers(jax.random.key(1), 7, RolloutConfig(lmbda)) == number).all()


@functools.partial(jax.jit, static_argnums=0)
def likely(config, values, tokens):
    return Transformer(config).apply(values, tokens).logits


def test_each_author_continues_its_own_prompts():
    """Against draws from whole forward passes, a token at a time, without a cache."""
    rolled, _, pairs = written(0)
    batch, prompts = make_batch(), cut_prompts(make_batch(), N)
    configs, keys = (None, STUDENT_CONFIG, TEACHER_CONFIG), jax.random.split(rollout_key(0, 0), 5)
    assert sorted(set(rolled.writers.tolist())) == [TEXT, STUDENT, TEACHER]
    lengths = 0
    for row, writer in enumerate(rolled.writers.tolist()):
        if writer == TEXT:
            for name in ('tokens', 'labels', 'mask', 'segment_ids', 'positions'):
                np.testing.assert_array_equal(getattr(rolled, name)[row], getattr(batch, name)[row])
            continue
        size = int(prompts.lengths[row])
        text = prompts.tokens[row, -size:].tolist()
        for number in range(N):
            padded = jnp.array([text + [0] * (T - len(text))])
            logits = likely(configs[writer], variables()[writer - 1], padded)[0, len(text) - 1]
            key = jax.random.fold_in(jax.random.fold_in(keys[2 + writer], row), number)
            text.append(int(jax.random.categorical(key, logits)))
            if text[-1] == EOS:
                break
        lengths += len(text) - size
        np.testing.assert_array_equal(rolled.tokens[row], text + [PAD] * (T - len(text)))
        assert rolled.mask[row].sum() == len(text) - size
    assert pairs['completion_tokens'] == (lengths, (rolled.writers > 0).sum())
    assert pairs['student_written'] == (4, 8)
    assert pairs['teacher_written'] == (2, 8)


def test_each_step_and_seed_writes_anew():
    first = written(0)[0]
    for other in (written(1)[0], written(0, seed=1)[0]):
        changed = (other.tokens != first.tokens).any(1)
        assert changed.sum() >= B // 2


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


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        (dict(lmbda=1.2), r'rollout.lmbda must be a share, in \[0, 1\]; received 1.2'),
        (
            dict(lmbda=0.7, teacher_share=0.5),
            'rollout.lmbda . rollout.teacher_share must be at most 1',
        ),
        (dict(temperature=-1.0), 'rollout.temperature must be zero'),
        (dict(replay_share=1.0, staleness=2), 'rollout.replay_share must be below 1'),
        (
            dict(replay_share=0.5),
            'rollout.staleness must be a positive integer with a',
        ),
        (dict(staleness=2), 'rollout.staleness must be .* else 0; received 2'),
        (dict(max_new_tokens=0), 'rollout.max_new_tokens must be a positive integer'),
    ],
)
def test_what_cannot_be_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        RolloutConfig(**fields)


def test_who_cannot_write_or_judge_is_refused():
    with pytest.raises(InputError, match=r'received CachedTeacher, who spoke before'):
        make_recipe(teacher=CachedTeacher())
    with pytest.raises(InputError, match=r'teacher_share=0.25 needs a teacher'):
        make_recipe(teacher=None, terms=(Term('cross_entropy'),))
    router = RouterConfig(4, 2, choice='expert')
    moe = dataclasses.replace(STUDENT_CONFIG.moe, router=router)
    model = Transformer(dataclasses.replace(STUDENT_CONFIG, moe=moe))
    with pytest.raises(InputError, match=r"Writing sequences in training needs .*choice='expert'"):
        make_recipe(model=model, balance=BalanceConfig())
    with pytest.raises(InputError, match=r'max_new_tokens must be below data.seq_len=5'):
        RolloutConfig(max_new_tokens=5).require_room(5)
