"""Router distillation: a student's routers learn to weigh their experts as a teacher's do."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe.routing import ScoreFunction
from moe.types import RouterOutput


def router_match_loss(
    student: Sequence[RouterOutput],
    teacher: Sequence[RouterOutput],
    mask: Bool[Array, 'B T'],
    *,
    student_score: ScoreFunction = 'softmax',
    teacher_score: ScoreFunction = 'softmax',
) -> tuple[Float[Array, ''], Float[Array, '']]:
    """Compares what two models' routers make of the same tokens, over all experts.

    With each router's scores over their sum, `p_e = s_e / sum over experts of s`, softmax scores as
    they are, the loss of a token is the mean over layers of

        KL(p_teacher || p_student) = sum over e of p_teacher,e (log p_teacher,e - log p_student,e).

    Selection biases, groups and top-k play no part: what is matched is what the weights are made
    of, so that experts which neither chose are matched too.

    Args:
        student: `ModelOutput.router`.
        teacher: of the same tokens, as many layers of as many experts; no gradient flows into it.
        mask: True counts.
        student_score: the student's score function.
        teacher_score: the teacher's.

    Returns:
        `(sum, weight)`: the loss summed over unmasked tokens, in nats, and how many there are; both
        add up over micro-batches.
    """
    total = jnp.zeros(())
    for ours, theirs in zip(student, teacher, strict=True):
        expected = jax.lax.stop_gradient(log_shares(theirs, teacher_score))
        gap = expected - log_shares(ours, student_score)
        total += jnp.where(mask, (jnp.exp(expected) * gap).sum(-1), 0.0).sum()
    return total / len(student), mask.sum().astype(jnp.float32)


def log_shares(router: RouterOutput, score: ScoreFunction) -> Float[Array, 'B T E']:
    """The log of each score's share of their sum; from the logits, so that none is of zero."""
    logits = router.router_logits.astype(jnp.float32)
    return jax.nn.log_softmax(logits if score == 'softmax' else jax.nn.log_sigmoid(logits))
