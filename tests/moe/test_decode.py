"""Sampling: greedy equals the full forward, filters equal hand-worked ones, keys decide."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.config import (
    AttentionConfig,
    LatentAttentionConfig,
    LinearAttentionConfig,
    MoEConfig,
    RouterConfig,
    TransformerConfig,
)
from moe.decode import generate, write
from moe.errors import InputError
from moe.sampling import Sampling, filter_logits, penalise, sample, sampling_rows
from moe.transformer import Transformer

CONFIG = TransformerConfig(
    vocab_size=20,
    num_layers=2,
    embed_dim=16,
    mlp_dim=12,
    attention=AttentionConfig(2, 1, 8),
    moe=MoEConfig(RouterConfig(4, 2, selection_bias=True), 6, dispatch='dense', layers=(1,)),
)
MODEL = Transformer(CONFIG)
PROMPTS = np.array([[3, 1, 4, 1], [0, 0, 5, 9], [0, 2, 6, 5]])
MASK = np.array([[1, 1, 1, 1], [0, 0, 1, 1], [0, 1, 1, 1]], bool)
KEY = jax.random.key(5)


@functools.cache
def variables():
    init = jax.jit(lambda key: nn.unbox(MODEL.init(key, jnp.ones((1, 1), jnp.int32))))
    drawn = init(jax.random.key(0))
    # Larger weights, so that no argmax hangs on rounding.
    return {**drawn, 'params': jax.tree.map(lambda leaf: leaf * 3.0, drawn['params'])}


def run(**settings):
    settings = {'max_new_tokens': 6, 'key': KEY, 'prompt_mask': MASK, **settings}
    model, params = settings.pop('model', MODEL), settings.pop('params', None) or variables()
    tokens, log_probs = generate(model, params, PROMPTS, **settings)
    return np.asarray(tokens), np.asarray(log_probs)


def log_probs_of(tokens: np.ndarray, model=MODEL, params=None) -> np.ndarray:
    """The model's log-probabilities where each token was written: one forward without a cache."""
    lengths = MASK.sum(axis=1)
    documents = np.zeros((3, 10), int)  # padded on the right, where causality makes it harmless
    for row, length in enumerate(lengths):
        documents[row, : length + 6] = np.concatenate([PROMPTS[row][MASK[row]], tokens[row]])
    logits = np.asarray(jax.jit(model.apply)(params or variables(), documents).logits, np.float64)
    normalised = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    at = (lengths - 1)[:, None] + np.arange(6)
    return np.take_along_axis(normalised, at[:, :, None], axis=1)


def test_windows_latents_and_states_continue_padded_prompts():
    kinds = (
        AttentionConfig(2, 1, 8, window=2, sinks=True),
        LatentAttentionConfig(2, 6, 8, 4, 4),
        LinearAttentionConfig(2, 4, 6, 3),
    )
    model = Transformer(
        dataclasses.replace(
            CONFIG, num_layers=3, attention=kinds, moe=None, logit_soft_cap=2.0, scan_layers=False
        )
    )
    drawn = jax.jit(lambda key: nn.unbox(model.init(key, jnp.ones((1, 1), jnp.int32))))(KEY)
    params = {**drawn, 'params': jax.tree.map(lambda leaf: leaf * 3.0, drawn['params'])}
    tokens, log_probs = run(model=model, params=params, temperature=0.0)
    expected = log_probs_of(tokens, model, params)
    np.testing.assert_array_equal(tokens, expected.argmax(axis=-1))
    np.testing.assert_allclose(log_probs, expected.max(axis=-1), atol=1e-4)


@pytest.mark.parametrize('dispatch', ['dense', 'capacity'])
def test_greedy_takes_the_argmax_of_the_full_forward(dispatch):
    # Slots for a hundredth of the tokens: a dispatch that drops would write something else.
    moe = dataclasses.replace(CONFIG.moe, dispatch=dispatch, capacity_factor=0.01)
    model = Transformer(dataclasses.replace(CONFIG, moe=moe))
    tokens, log_probs = run(model=model, temperature=0.0)
    expected = log_probs_of(tokens)
    np.testing.assert_array_equal(tokens, expected.argmax(axis=-1))
    np.testing.assert_allclose(log_probs, expected.max(axis=-1), atol=1e-4)


def test_log_probs_are_the_models_own_whatever_filters_the_draw():
    tokens, log_probs = run(temperature=2.0, top_k=4, top_p=0.9)
    expected = np.take_along_axis(log_probs_of(tokens), tokens[:, :, None], axis=-1)[:, :, 0]
    np.testing.assert_allclose(log_probs, expected, atol=1e-4)


def test_the_key_decides():
    first, again, other = run(), run(), run(key=jax.random.key(6))
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    assert (first[0] != other[0]).any()


def test_eos_ends_a_row_alone():
    free, free_log_probs = run()
    eos_id = int(free[0, 2])
    tokens, log_probs = run(eos_id=eos_id)
    for row in range(3):
        ends = np.flatnonzero(free[row] == eos_id)
        length = int(ends[0]) + 1 if ends.size else 6
        np.testing.assert_array_equal(tokens[row, :length], free[row, :length])
        np.testing.assert_allclose(log_probs[row, :length], free_log_probs[row, :length], atol=1e-5)
        assert (tokens[row, length:] == eos_id).all()
        assert (log_probs[row, length:] == 0).all()
    assert any((free[row] != eos_id).all() for row in range(3))


def test_a_row_does_not_depend_on_those_beside_it():
    settings = [Sampling(), Sampling(0.0), Sampling(1.5, 5, 0.9, 0.01, 1.3)]
    prompts = [PROMPTS[row][MASK[row]] for row in range(3)]
    keys = jax.random.split(KEY, 3)
    how = {'max_new_tokens': 8, 'stop_ids': (7, 2)}
    together = write(MODEL, variables(), prompts, sampling=settings, key=keys, **how)
    for row in range(3):
        padded, mask = PROMPTS[row : row + 1], MASK[row : row + 1]
        how |= {'sampling': settings[row], 'key': keys[row : row + 1], 'prompt_mask': mask}
        alone = write(MODEL, variables(), padded, **how)
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])
        np.testing.assert_allclose(alone.log_probs[0], together.log_probs[row], atol=1e-4)
        assert alone.lengths[0] == together.lengths[row]


def test_a_penalty_counts_prompt_and_text():
    greedy = {'max_new_tokens': 6, 'key': KEY, 'prompt_mask': MASK}
    strong = Sampling(0.0, repetition_penalty=1e6)
    tokens = np.asarray(write(MODEL, variables(), PROMPTS, sampling=strong, **greedy).tokens)
    for row in range(3):
        text = [*PROMPTS[row][MASK[row]], *tokens[row]]
        assert len(set(tokens[row])) == 6
        assert not set(tokens[row]) & set(PROMPTS[row][MASK[row]]), text


def test_the_likeliest_tokens_are_named_best_first():
    written = write(
        MODEL,
        variables(),
        PROMPTS,
        prompt_mask=MASK,
        max_new_tokens=6,
        sampling=Sampling(),
        key=KEY,
        top_log_probs=3,
    )
    expected = log_probs_of(np.asarray(written.tokens))
    order = np.argsort(-expected, axis=-1)[..., :3]
    np.testing.assert_array_equal(written.top_ids, order)
    values = np.take_along_axis(expected, order, axis=-1)
    np.testing.assert_allclose(written.top_log_probs, values, atol=1e-4)


PROBS = np.array([0.1, 0.4, 0.2, 0.3])


@pytest.mark.parametrize(
    ('sampling', 'kept'),
    [
        (Sampling(), [0.1, 0.4, 0.2, 0.3]),
        (Sampling(top_k=2), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(top_k=9), [0.1, 0.4, 0.2, 0.3]),
        (Sampling(top_p=0.69), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(top_p=0.71), [0, 4 / 9, 2 / 9, 3 / 9]),
        (Sampling(top_p=0.01), [0, 1, 0, 0]),
        (Sampling(top_k=3, top_p=0.75), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(temperature=0.5), [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
        (Sampling(temperature=0.5, top_p=0.6), [0, 16 / 25, 0, 9 / 25]),
        (Sampling(min_p=0.7), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(min_p=0.3), [0, 4 / 9, 2 / 9, 3 / 9]),
        (Sampling(temperature=0.5, min_p=0.3), [0, 16 / 25, 0, 9 / 25]),
        (Sampling(top_k=3, min_p=0.7), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(temperature=0.0), [0, 1, 0, 0]),
    ],
)
def test_filters_keep_the_hand_worked_distribution(sampling, kept):
    filtered = filter_logits(
        jnp.log(jnp.asarray(PROBS, jnp.float32))[None], sampling_rows([sampling])
    )
    np.testing.assert_allclose(jax.nn.softmax(filtered)[0], kept, atol=1e-6)


def test_top_k_keeps_k_of_equal_logits():
    filtered = filter_logits(jnp.zeros((1, 5)), sampling_rows([Sampling(top_k=2)]))
    np.testing.assert_array_equal(filtered[0], [0, 0, -np.inf, -np.inf, -np.inf])


def test_each_row_is_filtered_by_its_own_settings():
    settings = [Sampling(top_k=2), Sampling(), Sampling(0.0, top_k=3), Sampling(top_p=0.71)]
    logits = jnp.tile(jnp.log(jnp.asarray(PROBS, jnp.float32)), (4, 1))
    probs = jax.nn.softmax(filter_logits(logits, sampling_rows(settings)))
    expected = [[0, 4 / 7, 0, 3 / 7], PROBS, [0, 1, 0, 0], [0, 4 / 9, 2 / 9, 3 / 9]]
    np.testing.assert_allclose(probs, expected, atol=1e-6)


def test_a_penalty_makes_what_was_seen_less_likely():
    logits = jnp.asarray([[2.0, -1.0, 3.0, -4.0]])
    seen = jnp.asarray([[True, True, False, False]])
    penalised = penalise(logits, seen, jnp.asarray([2.0]))
    np.testing.assert_array_equal(penalised, [[1.0, -2.0, 3.0, -4.0]])


def test_draws_have_the_frequencies_of_the_distribution():
    logits = jnp.tile(jnp.log(jnp.asarray(PROBS)), (20_000, 1))
    rows = sampling_rows([Sampling(top_k=3)] * 20_000)
    tokens = sample(logits, rows, jax.random.split(KEY, 20_000))
    frequencies = np.bincount(tokens, minlength=4) / 20_000
    np.testing.assert_allclose(frequencies, [0, 4 / 9, 2 / 9, 3 / 9], atol=0.015)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'prompts': PROMPTS.astype(float)}, 'prompts must be integer ids'),
        ({'prompts': PROMPTS[:, :0]}, 'neither of them 0'),
        ({'prompts': PROMPTS + 15}, r'ids in \[0, 20\).*from 15 to 24'),
        ({'prompts': PROMPTS - 1}, r'ids in \[0, 20\)'),
        ({'prompt_mask': MASK[:, ::-1]}, 'Pad on the left'),
        ({'prompt_mask': MASK.astype(int)}, 'prompt_mask must be bool'),
        ({'prompt_mask': MASK[:2]}, 'prompt_mask must be bool'),
        ({'max_new_tokens': 0}, 'max_new_tokens must be a positive integer'),
        ({'temperature': -1.0}, 'temperature must be'),
        ({'top_k': -1}, 'top_k must be'),
        ({'top_p': 0.0}, 'top_p must be'),
        ({'top_p': 1.5}, 'top_p must be'),
        ({'eos_id': 20}, 'What ends a row must be'),
        ({'params': 'params alone'}, 'selection biases'),
        ({'prompts': [[1, 2], []], 'prompt_mask': None}, 'prompt 1 is'),
        ({'prompts': [[1], [2.5]], 'prompt_mask': None}, 'prompt 1 is'),
        ({'key': jax.random.split(KEY, 2)}, 'key must be one for all 3 rows'),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {'params': variables(), 'prompts': PROMPTS, 'prompt_mask': MASK, **change}
    arguments = {'max_new_tokens': 2, 'key': KEY, **arguments}
    if 'params' in change:
        arguments['params'] = variables()['params']
    with pytest.raises(InputError, match=message):
        generate(MODEL, **arguments)
