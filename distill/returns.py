"""What a token does to those after it: the long part of a policy gradient of reverse KL.

The reverse KL of whole sequences, `L = -E sum_t r_t` with `r_t = log p(y_t) - log q(y_t)` over what
the student `q` writes, has a gradient of two parts. The single-step part, with each token's own
`r_t`, is summed over the vocabulary exactly: it is the gradient of the term 'reverse_kl' on the
student's sequences. The long part weighs the log-probability of each token by the return of those
after it,

    - sum_t R_{t+1} grad log q(y_t),    R_{t+1} = mean of r_u over the tokens u > t of the sequence,

which is the gradient of a cross-entropy against what was written, each token weighted by its
return. A plain sum would favour short sequences, since what is not written costs nothing.

Source: MiniLLM, arXiv 2306.08543, equation 3 (both parts) and the length normalisation of section
2.2, which divides the sum of the `n` later rewards by `n - 1`; here it is their mean, and the last
token's is 0. Left out: sampling from a mixture with the teacher and the importance weights that it
needs, clipping, and the average over sequences (here over tokens).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from distill.eval_step import in_chunks
from distill.types import Batch, HiddenTargets


def returns(
    student_hidden: Float[Array, 'B T D'],
    student_head: Float[Array, 'D V'],
    teacher: HiddenTargets,
    batch: Batch,
    *,
    chunk_size: int,
) -> Float[Array, 'B T']:
    """Computes each token's return from both models' hidden states.

    Args:
        student_hidden: last hidden states; no gradient flows to them.
        student_head: the output head.
        teacher: likewise.
        batch: rows of one sequence each; `labels` are what was written where `mask` is True.
        chunk_size: tokens whose logits exist at one time.

    Returns:
        `R_{t+1}` in nats, at the position that predicts token `t`; 0 where masked.
    """

    def log_probs(hidden: Array, head: Array) -> Array:
        return label_log_probs(hidden, head, batch.labels, chunk_size=chunk_size)

    rewards = log_probs(teacher.hidden, teacher.head) - log_probs(student_hidden, student_head)
    return jax.lax.stop_gradient(normalized_returns(rewards, batch.mask))


def normalized_returns(
    rewards: Float[Array, 'B T'], mask: Bool[Array, 'B T']
) -> Float[Array, 'B T']:
    """Averages the rewards of the unmasked positions after each one; 0 where there is none."""
    rewards = jnp.where(mask, rewards, 0)
    later = _after(rewards) / jnp.maximum(_after(mask.astype(rewards.dtype)), 1)
    return jnp.where(mask, later, 0)


def _after(x: Float[Array, 'B T']) -> Float[Array, 'B T']:
    """Sums what stands after each position."""
    return jax.lax.cumsum(x, axis=1, reverse=True) - x


def label_log_probs(
    hidden: Float[Array, 'B T D'],
    head: Float[Array, 'D V'],
    labels: Int[Array, 'B T'],
    *,
    chunk_size: int,
) -> Float[Array, 'B T']:
    """Returns the log-probability of each label, in nats, with logits that exist only in chunks."""
    rows, length = labels.shape
    width = min(length, max(1, chunk_size // rows))

    def of_chunk(chunk: Any) -> Array:
        hidden, labels = chunk
        logits = jnp.matmul(hidden, head, preferred_element_type=jnp.float32)
        chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1)

    chunks = (in_chunks(hidden, width), in_chunks(labels, width))
    by_chunk = jax.lax.stop_gradient(jax.lax.map(of_chunk, chunks))
    return jnp.moveaxis(by_chunk, 0, 1).reshape(rows, -1)[:, :length]
