"""Dual-space distillation: each model's hidden states, in the other's space, under one head.

Tokens of two tokenizers are aligned by attention between their embeddings, within a document. With
`e` embeddings of a token and the next one side by side, `y` that of the next one, `h` last hidden
states, `P` learnt maps, and each token's vector divided by its root mean square where a hat stands,

    A = P_query(e_s) ^e_t^T / sqrt(2 Dt)
    h_ts = softmax(A) P_teacher(^h_t + ^y_t)          the teacher, in the student's space
    h_st = softmax(A^T) P_student(h_s)                the student, in the teacher's

and the loss is

    cross-entropy of softmax(h_ts W_s) against the student's labels, which trains the maps
    + KL(softmax(h_ts W_s) || softmax(h_s W_s)) where the former's best id is the label
    + KL(softmax(h_t W_t) || softmax(h_st W_t)), a mean over the teacher's tokens

with no gradient through the heads but that of `h_s W_s`, nor into the first side of a KL.

Source: arXiv 2406.17328, section 3, and its published code for the norms and the mask of the second
    term. Deviations: vectors are divided by their own root mean square rather than by the standard
    deviation of the batch, so that the loss does not depend on how a batch is split; maps have no
    bias; attention stays within a document, of which rows hold several.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from distill.fused import Metrics, fused_distillation_loss
from distill.objective import Term
from distill.projectors import DUAL
from distill.types import Batch, Counterpart, HiddenTargets
from moe.config import TransformerConfig
from moe.transformer import embed_tokens


class Reader(NamedTuple):
    """One model and the tokens that it reads.

    Attributes:
        config: the model's.
        embedding: of its tokens; no gradient flows through it.
        hidden: its last hidden states.
        head: its output head.
        batch: its tokens, labels and documents.
        counted: which of its labels are compared.
    """

    config: TransformerConfig
    embedding: Float[Array, 'V D']
    hidden: Float[Array, 'B T D']
    head: Float[Array, 'D V']
    batch: Batch | Counterpart
    counted: Bool[Array, 'B T']

    def embedded(self, ids: Int[Array, 'B T']) -> Float[Array, 'B T D']:
        """Looks ids up, float32."""
        found = embed_tokens(self.config, self.embedding, ids).astype(jnp.float32)
        return jax.lax.stop_gradient(found)


def dual_space_loss(
    student: Reader,
    teacher: Reader,
    kernels: dict[str, Float[Array, '1 D E']],
    counts: tuple[Float[Array, ''], Float[Array, '']],
    *,
    temperature: float,
    chunk_size: int,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, ''], Metrics]:
    """Computes the sum of the three parts above, each a mean over the tokens that it is of.

    Args:
        student: who learns.
        teacher: who gets no gradient.
        kernels: of `distill.projectors.DUAL`.
        counts: tokens of the student and of the teacher that the whole batch counts.
        temperature: divides the logits of both divergences, not those of the cross-entropy.
        chunk_size: tokens whose logits exist at one time.
        mesh: as of the fused loss.

    Returns:
        The loss, and by name `(sum over tokens, number of tokens compared)`.
    """
    query, of_teacher, of_student = (kernels[name][0] for name in DUAL)
    states = student.hidden.astype(jnp.float32)
    pairs = [
        jnp.concatenate([one.embedded(one.batch.tokens), one.embedded(one.batch.labels)], axis=-1)
        for one in (student, teacher)
    ]
    scores = jnp.einsum('bte,bse->bts', pairs[0] @ query, _normed(pairs[1]))
    scores /= (2 * teacher.hidden.shape[-1]) ** 0.5
    following = teacher.embedded(teacher.batch.labels)
    said = jax.lax.stop_gradient(teacher.hidden).astype(jnp.float32)
    together = student.batch.segment_ids[:, :, None] == teacher.batch.segment_ids[:, None]
    together &= student.counted[:, :, None] & teacher.counted[:, None]
    theirs = _attended(scores, together, (_normed(said) + _normed(following)) @ of_teacher)
    ours = _attended(scores.mT, together.mT, states @ of_student)
    theirs, ours = theirs.astype(student.hidden.dtype), ours.astype(teacher.hidden.dtype)

    head, their_head = (jax.lax.stop_gradient(one.head) for one in (student, teacher))
    settings: Any = {'chunk_size': chunk_size, 'mesh': mesh}
    of_labels: Any = {'labels': student.batch.labels, 'normalizer': counts[0]} | settings
    kl = (Term('forward_kl', temperature=temperature),)
    taught = jax.lax.stop_gradient(theirs)
    right = student.counted & _hits(taught, head, student.batch.labels, chunk_size)
    wanted = HiddenTargets(said.astype(teacher.hidden.dtype), their_head)
    parts = {
        'dskd_projection': fused_distillation_loss(
            theirs, head, None, (Term('cross_entropy'),), mask=student.counted, **of_labels
        ),
        'dskd_student_space': fused_distillation_loss(
            student.hidden, student.head, HiddenTargets(taught, head), kl, mask=right, **of_labels
        ),
        'dskd_teacher_space': fused_distillation_loss(
            ours, their_head, wanted, kl, mask=teacher.counted, normalizer=counts[1], **settings
        ),
    }
    loss = sum((part for part, _ in parts.values()), jnp.zeros(()))
    return loss, {name: next(iter(metrics.values())) for name, (_, metrics) in parts.items()}


def _normed(x: Float[Array, '... D']) -> Float[Array, '... D']:
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-12)


def _attended(
    scores: Float[Array, 'B T S'], allowed: Bool[Array, 'B T S'], values: Float[Array, 'B S D']
) -> Float[Array, 'B T D']:
    """Averages values by softmax over the allowed; zeros where none is."""
    least = jnp.finfo(scores.dtype).min
    weights = jax.nn.softmax(jnp.where(allowed, scores, least), axis=-1)
    return jnp.einsum('bts,bsd->btd', jnp.where(allowed, weights, 0), values)


def _hits(
    hidden: Float[Array, 'B T D'],
    head: Float[Array, 'D V'],
    labels: Int[Array, 'B T'],
    chunk_size: int,
) -> Bool[Array, 'B T']:
    """Whether the likeliest id is the label, with logits of one chunk of positions at a time."""
    batch, length, _ = hidden.shape
    width = min(length, max(1, chunk_size // batch))
    filled = jnp.pad(hidden, [(0, 0), (0, -length % width), (0, 0)])
    chunks = jnp.moveaxis(filled.reshape(batch, -1, width, hidden.shape[-1]), 1, 0)
    matrix = head.astype(hidden.dtype)
    best = jax.lax.map(lambda chunk: jnp.argmax(chunk @ matrix, axis=-1), chunks)
    return jnp.moveaxis(best, 0, 1).reshape(batch, -1)[:, :length] == labels
