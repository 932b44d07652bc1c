"""The divergence on a model's own text: of which tokens, and against a float64 reference."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill.config import RolloutConfig
from distill.data import EvaluationSet
from distill.exposure import exposure, own_text
from distill.rollout import Rollout
from moe.config import AttentionConfig, TransformerConfig
from moe.errors import InputError
from moe.transformer import Transformer

T, V, N = 8, 12, 3
EOS, PAD = 10, 11
ROLLOUT = Rollout(RolloutConfig(lmbda=0.0, max_new_tokens=N), EOS, PAD)
MODEL = Transformer(
    TransformerConfig(
        vocab_size=V,
        num_layers=1,
        embed_dim=8,
        mlp_dim=8,
        attention=AttentionConfig(num_heads=1, num_kv_heads=1, head_dim=8),
        scan_layers=False,
    )
)


def held_out(*sizes: int) -> EvaluationSet:
    """Rows of one document each, of these sizes."""
    index, sizes = np.arange(T), np.array(sizes)[:, None]
    within = index < sizes
    tokens = np.random.default_rng(0).integers(0, EOS, within.shape)
    rows = {
        'tokens': np.where(within, tokens, PAD).astype(np.int32),
        'labels': np.roll(tokens, -1, 1).astype(np.int32),
        'mask': index < sizes - 1,
        'segment_ids': within.astype(np.int32),
        'positions': np.where(within, index, 0).astype(np.int32),
    }
    documents = np.arange(len(sizes))
    names = tuple(map(str, documents))
    return EvaluationSet(rows, documents, np.full(len(sizes), 5), names)


@functools.cache
def variables(seed: int):
    init = jax.jit(lambda key: nn.unbox(MODEL.init(key, jnp.zeros((1, 2), jnp.int32))))
    return jax.tree.map(lambda leaf: leaf * 2, init(jax.random.key(seed)))


def written(texts: EvaluationSet, seed: int = 0) -> EvaluationSet:
    return own_text(MODEL, variables(1), texts, rollout=ROLLOUT, batch_size=4, seed=seed)


TEXTS = held_out(8, 7, 5, 1, 2)


def test_only_what_was_written_counts():
    rows = written(TEXTS).rows
    # Prompts: all but 3 tokens, all but the half of 5, none, and one of two.
    for row, (prompt, most) in enumerate(((5, 3), (4, 3), (3, 3), (0, 0), (1, 3))):
        kept = TEXTS.rows['tokens'][row, :prompt]
        np.testing.assert_array_equal(rows['tokens'][row, :prompt], kept)
        counted = np.flatnonzero(rows['mask'][row])
        length = len(counted)
        assert length == 0 if most == 0 else 1 <= length <= most
        np.testing.assert_array_equal(counted, np.arange(prompt - 1, prompt - 1 + length))
        if 0 < length < most:
            assert rows['labels'][row, counted[-1]] == EOS
    assert (written(TEXTS, seed=1).rows['tokens'] != rows['tokens']).any()


def test_the_divergence_is_that_of_the_written_tokens():
    rows = written(TEXTS).rows

    def log_probs(values):
        output = jax.jit(MODEL.apply)(
            values, rows['tokens'], positions=rows['positions'], segment_ids=rows['segment_ids']
        )
        logits = np.asarray(output.logits, np.float64)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    theirs, ours = log_probs(variables(2)), log_probs(variables(1))
    wanted = (np.exp(theirs) * (theirs - ours)).sum(-1)[rows['mask']].mean()
    measure = functools.partial(
        exposure, MODEL, variables(1), TEXTS, teacher=MODEL, rollout=ROLLOUT, batch_size=4
    )
    estimate = measure(teacher_variables=variables(2))
    np.testing.assert_allclose(estimate.value, wanted, rtol=1e-4)
    assert estimate.low < estimate.value < estimate.high
    assert abs(measure(teacher_variables=variables(1)).value) < 1e-6


def test_text_without_prompts_is_refused():
    with pytest.raises(InputError, match='needs a held-out row of two tokens or more'):
        written(held_out(1, 1))
