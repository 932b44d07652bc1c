"""The long part of MiniLLM's gradient, by hand and against every sequence there is."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from distill.fused import fused_distillation_loss
from distill.objective import Term
from distill.returns import label_log_probs, normalized_returns, returns
from distill.types import Batch, HiddenTargets


def test_a_return_is_the_mean_of_the_later_rewards():
    rewards = jnp.array([[9.0, 1.0, 2.0, 6.0, 9.0], [1.0, 3.0, 5.0, 7.0, 9.0]])
    mask = jnp.array([[0, 1, 1, 1, 0], [1, 0, 0, 1, 1]], bool)
    # Of 1, 2, 6: the mean of 2 and 6, then 6, then of nothing. Of 1, 7, 9: 8, then 9, then nothing.
    wanted = [[0, 4, 6, 0, 0], [8, 0, 0, 9, 0]]
    np.testing.assert_allclose(normalized_returns(rewards, mask), wanted)


def test_log_probs_of_labels_in_chunks():
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(2, 5, 4)), rng.normal(size=(4, 7))
    labels = rng.integers(0, 7, (2, 5))
    logits = hidden @ head
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    wanted = np.take_along_axis(log_probs, labels[..., None], -1)[..., 0]
    got = label_log_probs(*map(jnp.asarray, (hidden, head, labels)), chunk_size=4)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


def test_the_surrogate_and_reverse_kl_are_the_gradient_of_the_whole_divergence():
    """Over all sequences of two tokens, weighted by their probability, it is the exact gradient.

    With two tokens the return of the first is the reward of the second alone, so no normalisation
    stands between the estimator and the reverse KL of whole sequences.
    """
    V, rng = 3, np.random.default_rng(1)
    # Logits of the first token, and of the second for each first one.
    student = (rng.normal(size=(1, V)), rng.normal(size=(V, V)))
    teacher = (rng.normal(size=(1, V)), rng.normal(size=(V, V)))
    sequences = np.array(list(itertools.product(range(V), repeat=2)))

    def log_softmax(x):
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    def divergence(first, second):
        total = 0.0
        for a, b in sequences:
            log_q = log_softmax(first)[0, a] + log_softmax(second)[a, b]
            log_p = log_softmax(teacher[0])[0, a] + log_softmax(teacher[1])[a, b]
            total += np.exp(log_q) * (log_q - log_p)
        return total

    wanted = [np.zeros_like(x) for x in student]
    for part in range(2):
        for index in np.ndindex(student[part].shape):
            ends = []
            for sign in (1, -1):
                moved = [x.copy() for x in student]
                moved[part][index] += sign * 1e-5
                ends.append(divergence(*moved))
            wanted[part][index] = (ends[0] - ends[1]) / 2e-5

    # Hidden states are the logits themselves, under a head that is the identity.
    def hidden(first, second):
        a = jnp.broadcast_to(jnp.asarray(first), (len(sequences), V))
        return jnp.stack([a, jnp.asarray(second)[sequences[:, 0]]], 1).astype(jnp.float32)

    labels = jnp.asarray(sequences)
    ones = jnp.ones(labels.shape, bool)
    batch = Batch(labels, labels, ones, ones.astype(jnp.int32), labels)
    head, targets = jnp.eye(V), HiddenTargets(hidden(*teacher), jnp.eye(V))
    probability = np.exp(
        log_softmax(student[0])[0, sequences[:, 0]] + log_softmax(student[1])[tuple(sequences.T)]
    )
    terms = (Term('reverse_kl'), Term('cross_entropy'))

    def estimate(logits):
        states = hidden(*logits)
        future = returns(states, head, targets, batch, chunk_size=9)
        weights = jnp.stack([jnp.ones_like(future), future], -1)
        weights *= jnp.asarray(probability, jnp.float32)[:, None, None]
        loss, _ = fused_distillation_loss(
            states, head, targets, terms, labels=labels, normalizer=1.0, token_weights=weights
        )
        return loss

    got = jax.jit(jax.grad(estimate))(tuple(jnp.asarray(x, jnp.float32) for x in student))
    for there, here in zip(wanted, got, strict=True):
        np.testing.assert_allclose(here, there, rtol=1e-3, atol=1e-5)
