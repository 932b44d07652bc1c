"""Rows that models write: how prompts are cut, what counts, and the update on every mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from writing import (
    EOS,
    PAD,
    STUDENT_CONFIG,
    TEACHER_CONFIG,
    B,
    N,
    T,
    make_batch,
    make_recipe,
    variables,
    written,
)

from distill.config import BalanceConfig, RolloutConfig
from distill.objective import Term
from distill.prompts import Completions, Prompts, as_rows, cut_prompts, joined
from distill.rollout import rollout_key
from distill.teacher import CachedTeacher
from distill.types import Batch
from distill.writers import STUDENT, TEACHER, TEXT, choose_writers
from moe.config import RouterConfig
from moe.errors import InputError
from moe.transformer import Transformer


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
