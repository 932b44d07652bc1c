"""Log-probabilities and ranks of given text, against log-softmax in float64 of a plain forward."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill.scoring import score
from moe.config import AttentionConfig, MoEConfig, RouterConfig, TransformerConfig
from moe.errors import InputError
from moe.sharding import MeshConfig, make_mesh, variable_shardings
from moe.transformer import Transformer

V = 24
CONFIG = TransformerConfig(
    vocab_size=V,
    num_layers=2,
    embed_dim=16,
    mlp_dim=12,
    attention=(AttentionConfig(2, 2, 8, window=6), AttentionConfig(2, 2, 8)),
    # So few slots that a batch would drop tokens, if any could be dropped.
    moe=MoEConfig(RouterConfig(4, 2), 8, layers=(1,), dispatch='capacity', capacity_factor=0.25),
    logit_soft_cap=20.0,
    scan_layers=False,
)
RNG = np.random.default_rng(5)
# Context and continuation; one of them is empty, one of one token, and two are past 16 tokens.
PAIRS = [
    (RNG.integers(0, V, context).tolist(), RNG.integers(0, V, continuation).tolist())
    for context, continuation in [(1, 1), (3, 4), (9, 0), (5, 9), (1, 15), (20, 3), (14, 9)]
]


@functools.cache
def variables():
    init = jax.jit(lambda key: nn.unbox(Transformer(CONFIG).init(key, jnp.zeros((1, 2), int))))
    return jax.tree.map(lambda leaf: 2 * leaf, init(jax.random.key(1)))


@functools.cache
def reference() -> list[np.ndarray]:
    """Log-probabilities at every position of every text; with dense dispatch, in one batch."""
    moe = dataclasses.replace(CONFIG.moe, dispatch='dense')
    model = Transformer(dataclasses.replace(CONFIG, moe=moe))
    tokens = np.zeros((len(PAIRS), 24), np.int32)
    for row, (context, continuation) in zip(tokens, PAIRS, strict=True):
        row[: len(context) + len(continuation)] = [*context, *continuation]
    # What stands to the right of a text changes nothing in it.
    logits = np.asarray(jax.jit(model.apply)(variables(), tokens).logits, np.float64)
    return list(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))


def assert_scored(found, ranked=V):
    for scored, (context, continuation), log_probs in zip(found, PAIRS, reference(), strict=False):
        wanted, ranks = [], []
        for at, token in enumerate(continuation, start=len(context) - 1):
            wanted.append(log_probs[at, token])
            ranks.append(sum(log_probs[at, other] > wanted[-1] for other in range(ranked)))
        np.testing.assert_allclose(scored.log_probs, wanted, atol=2e-5)
        assert scored.ranks.tolist() == ranks
        assert scored.log_prob == pytest.approx(sum(wanted), abs=1e-4)


def test_scores_are_those_of_a_plain_forward():
    """In batches of three, whose last is filled up, and in chunks of four positions."""
    found = score(Transformer(CONFIG), variables(), PAIRS, batch_size=3, chunk_size=12)
    assert len(found) == len(PAIRS)
    assert_scored(found)
    # Nothing is written for certain.
    assert found[2].is_greedy
    assert found[2].log_prob == 0
    assert {bool(scored.ranks.any()) for scored in found} == {True, False}


def test_what_a_model_writes_is_greedy():
    context = PAIRS[3][0]
    likeliest = int(reference()[3][len(context) - 1].argmax())
    pairs = [(context, [likeliest]), (context, [(likeliest + 1) % V])]
    found = score(Transformer(CONFIG), variables(), pairs, batch_size=3, chunk_size=12)
    assert [scored.is_greedy for scored in found] == [True, False]


def test_eight_devices_score_as_one_and_ids_without_text_are_not_ranked():
    mesh = make_mesh(MeshConfig(data=2, expert=2, tensor=2))
    model = Transformer(CONFIG, mesh)
    placed = jax.device_put(variables(), variable_shardings(model, mesh))
    found = score(model, placed, PAIRS[:5], batch_size=3, vocab_size=V - 9)
    assert len(found) == 5
    assert_scored(found, V - 9)


def test_what_cannot_be_scored_is_named():
    model = Transformer(CONFIG)
    with pytest.raises(InputError, match='that of pair 1 is empty'):
        score(model, variables(), [([1], [2]), ([], [2])], batch_size=1)
    with pytest.raises(InputError, match=r'in \[0, 24\).*pair 0 has \[24\]'):
        score(model, variables(), [([1], [24])], batch_size=1)
