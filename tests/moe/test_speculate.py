"""A draft changes how fast a text is written, not which: by statistics, and at once."""

import dataclasses
import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from moe.config import (
    AttentionConfig,
    LatentAttentionConfig,
    LinearAttentionConfig,
    MoEConfig,
    RouterConfig,
    TransformerConfig,
)
from moe.decode import write
from moe.drafts import ModelDraft, PromptLookup, Text
from moe.errors import InputError
from moe.module_draft import ModuleDraft
from moe.sampling import Sampling, sampling_rows
from moe.speculate import judge, speculate
from moe.transformer import Transformer, output_logits

V = 6
TINY = TransformerConfig(V, 1, 8, 8, AttentionConfig(2, 1, 4), scan_layers=False)
MIXED = dataclasses.replace(
    TINY,
    vocab_size=24,
    num_layers=3,
    attention=(
        LinearAttentionConfig(2, 4, 4, 3),
        LatentAttentionConfig(2, 6, 4, 4, 4),
        AttentionConfig(2, 1, 4, window=3),
    ),
    moe=MoEConfig(RouterConfig(4, 2), 6, layers=(1,)),
)


@functools.cache
def model_of(config: TransformerConfig, seed: int = 0):
    model = Transformer(config)
    drawn = jax.jit(lambda key: nn.unbox(model.init(key, jnp.ones((1, 1), jnp.int32))))
    return model, jax.tree.map(lambda leaf: leaf * 2.5, drawn(jax.random.key(seed)))


def draft_of(kind: str, config: TransformerConfig):
    if kind == 'lookup':
        return {'draft': PromptLookup(1)}
    if kind == 'module':
        return {'draft': ModuleDraft(Transformer(config))}
    model, params = model_of(config, 7)
    # What is nearly the same model agrees now and then.
    own = model_of(config)[1]
    near = jax.tree.map(lambda x, y: 0.85 * x + 0.15 * y, own, params)
    return {'draft': ModelDraft(model), 'draft_params': near}


@pytest.mark.parametrize(
    ('kind', 'config'),
    [
        ('lookup', dataclasses.replace(TINY, vocab_size=24)),
        ('model', MIXED),
        ('module', dataclasses.replace(TINY, vocab_size=24, mtp_depth=1)),
    ],
)
def test_greedy_text_is_that_of_the_model_alone(kind, config):
    model, params = model_of(config)
    prompts = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [8, 9, 7], [9, 3, 2, 3, 8, 4, 6]]
    how = {'max_new_tokens': 14, 'key': jax.random.key(1), 'stop_ids': (0, 11)}
    how['sampling'] = [Sampling(0.0), Sampling(0.0), Sampling(0.0, repetition_penalty=1.4)]
    expected = write(model, params, prompts, **how)
    found = speculate(model, params, prompts, num_draft=3, **draft_of(kind, config), **how)
    np.testing.assert_array_equal(found.written.lengths, expected.lengths)
    np.testing.assert_array_equal(found.written.tokens, expected.tokens)
    np.testing.assert_allclose(found.written.log_probs, expected.log_probs, atol=2e-4)
    if kind == 'model':
        assert found.passes.sum() < expected.lengths.sum() - 3


def exact_distribution(model, params, prompt, sampling: Sampling, length: int) -> np.ndarray:
    """The probability of every continuation, by a full forward over each prefix."""
    forward, probs = jax.jit(model.apply), np.ones((V,) * length)
    for at in range(length):
        prefixes = list(itertools.product(range(V), repeat=at))
        tokens = jnp.asarray([[*prompt, *prefix] for prefix in prefixes])
        logits = np.asarray(forward(params, tokens).logits[:, -1], np.float64)
        scaled = logits / sampling.temperature
        if sampling.top_k:
            least = np.sort(scaled, axis=-1)[:, -sampling.top_k, None]
            scaled = np.where(scaled >= least, scaled, -np.inf)
        own = np.exp(scaled - scaled.max(-1, keepdims=True))
        own /= own.sum(-1, keepdims=True)
        probs *= own.reshape((V,) * (at + 1) + (1,) * (length - at - 1))
    return probs


@pytest.mark.parametrize('kind', ['lookup', 'model', 'module'])
@pytest.mark.parametrize('sampling', [Sampling(1.2), Sampling(0.8, top_k=3)])
def test_what_is_drawn_has_the_distribution_of_the_model_alone(kind, sampling):
    config = dataclasses.replace(TINY, mtp_depth=int(kind == 'module'))
    model, params = model_of(config)
    prompt, B = [1, 2, 1], 6000
    found = speculate(
        model,
        params,
        np.tile(prompt, (B, 1)),
        num_draft=2,
        max_new_tokens=3,
        sampling=sampling,
        key=jax.random.key(11),
        **draft_of(kind, config),
    )
    expected = exact_distribution(model, params, prompt, sampling, 3).reshape(-1)
    tokens = np.asarray(found.written.tokens)
    observed = np.bincount(tokens @ [V * V, V, 1], minlength=V**3)
    assert observed[expected == 0].sum() == 0
    # Cells too small for the statistic are counted as one.
    rare = expected * B < 5
    counts = np.append(observed[~rare], observed[rare].sum())
    shares = np.append(expected[~rare], expected[rare].sum()) * B
    kept = shares > 0
    assert stats.chisquare(counts[kept], shares[kept] * B / shares.sum()).pvalue > 1e-3
    assert found.passes.mean() < 2  # two passes would be one for each token after the first


def test_judging_leaves_the_distribution_as_it_is():
    probs = jnp.asarray([[0.1, 0.6, 0.3, 0.0], [0.25, 0.25, 0.25, 0.25], [0.7, 0.1, 0.1, 0.1]])
    draft = jnp.asarray([[0.5, 0.1, 0.2, 0.2], [0.0, 0.0, 0.5, 0.5]])
    keys = jax.random.split(jax.random.key(2), 40_000)

    def first_two(key):
        own, *drawn = jax.random.split(key, 3)
        tokens = jnp.stack(
            [jax.random.categorical(k, jnp.log(q)) for k, q in zip(drawn, draft, strict=True)]
        )
        accepted, new = judge(probs, draft, tokens, own)
        padded = jnp.append(tokens, 0).at[accepted].set(new)
        return padded, accepted

    tokens, accepted = jax.jit(jax.vmap(first_two))(keys)
    for at in range(3):
        reached = np.asarray(accepted >= at)
        observed = np.bincount(np.asarray(tokens)[reached, at], minlength=4)
        exact = np.asarray(probs[at], np.float64)
        expected = exact / exact.sum() * reached.sum()
        assert observed[expected == 0].sum() == 0
        kept = expected > 0
        assert stats.chisquare(observed[kept], expected[kept]).pvalue > 1e-3
    # sum of min(p, q): 0.1 + 0.1 + 0.2
    np.testing.assert_allclose((accepted >= 1).mean(), 0.4, atol=0.01)


def test_look_up_proposes_what_followed_the_last_time():
    tokens = jnp.asarray(
        [[0, 5, 6, 7, 8, 5, 6, 9, 5, 6, 0, 0], [0, 0, 1, 2, 3, 4, 0, 0, 0, 0, 0, 0]]
    )
    text = Text(tokens, jnp.asarray([10, 6]), jnp.asarray([0, 2]), jnp.zeros((2, 12), bool))
    rows = sampling_rows([Sampling()] * 2)
    keys = jax.random.split(jax.random.key(0), 2)
    proposal = PromptLookup(2).propose(None, (), text, rows, keys, 4)
    np.testing.assert_array_equal(proposal.tokens[0], [9, 5, 6, 9])
    np.testing.assert_array_equal(proposal.tokens[1], [4, 4, 4, 4])
    np.testing.assert_array_equal(proposal.probs.argmax(-1), proposal.tokens)


def test_a_module_proposes_what_it_says_of_the_whole_text():
    model, params = model_of(dataclasses.replace(TINY, mtp_depth=1))
    whole = jnp.asarray([[1, 2, 1, 5, 3, 4, 2], [3, 3, 0, 4, 1, 2, 5]])
    padded = jnp.asarray([[1, 2, 1, 5, 3, 4, 2], [0, 0, 3, 3, 0, 4, 1]])
    padding, keys = jnp.asarray([0, 2]), jax.random.split(jax.random.key(0), 2)
    rows, draft = sampling_rows([Sampling()] * 2), ModuleDraft(model)
    mask = jnp.arange(7) >= padding[:, None]
    positions = jnp.maximum(jnp.arange(7) - padding[:, None], 0)
    hidden = model.apply(params, padded, positions, mask.astype(jnp.int32)).hidden
    said = model.apply(params, whole, mtp=True).ahead[0].hidden
    expected = jax.nn.softmax(output_logits(model.config, params, said))

    def proposed(state, length):
        text = Text(padded, jnp.full(2, length), padding, jnp.zeros((2, V), bool))
        proposal = draft.propose(params, state, text, rows, keys, 2)
        places = length - 2 - padding
        np.testing.assert_allclose(proposal.probs[:, 0], expected[jnp.arange(2), places], atol=1e-5)
        return text, proposal

    state = draft.start(params, padded[:, :4], mask[:, :4], hidden[:, :4], 12)
    text, proposal = proposed(state, 5)
    proposal = proposal._replace(tokens=padded[:, 5:7])
    for kept in (2, 1):  # all but the last, which was refused; and none of what was proposed
        after = draft.commit(params, state, proposal, text, jnp.full(2, kept), hidden[:, 4:7])
        proposed(after, 5 + kept)


def test_drafts_that_do_not_fit_are_refused():
    model, params = model_of(TINY)
    other = Transformer(dataclasses.replace(TINY, vocab_size=7))
    how = {'max_new_tokens': 2, 'sampling': Sampling(), 'key': jax.random.key(0)}
    for change, message in (
        ({'draft': ModelDraft(other), 'draft_params': params}, 'vocabulary of the model, 6.* 7'),
        ({'draft': ModelDraft(model)}, 'needs draft_params'),
        ({'draft': ModuleDraft(model)}, 'mtp_depth of 1 or more'),
        ({'draft': PromptLookup(), 'num_draft': 0}, 'num_draft must be a positive integer'),
    ):
        with pytest.raises(InputError, match=message):
            speculate(model, params, [[1, 2]], **(how | change))
    with pytest.raises(InputError, match='ngram must be'):
        PromptLookup(0)
