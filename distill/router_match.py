"""Router distillation: a student's routers learn to weigh their experts as a teacher's do."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from distill.teacher import OnlineTeacher, Teacher
from distill.types import Batch
from moe.config import TransformerConfig
from moe.errors import InputError
from moe.routing import ScoreFunction
from moe.types import RouterOutput


def require_matchable(student: TransformerConfig, teacher: TransformerConfig) -> None:
    """Refuses models whose routers are not of the same experts, layer by layer.

    Layers are paired in order, so that a student may have fewer dense ones.

    Raises:
        InputError: where one is dense, a choice is not learnt or weighs slots, or the numbers of
            MoE layers or experts differ.
    """
    for who, config in (('student', student), ('teacher', teacher)):
        if config.moe is None or config.moe.router.choice not in ('token', 'expert'):
            received = 'a dense model' if config.moe is None else config.moe.router.choice
            raise InputError(
                f"Matching routers needs a {who} with routers of choice 'token' or 'expert'; "
                f'received {received!r}. Set router_match_weight to 0, or give it such routers.'
            )
    pairs = {
        'MoE layers': (sum(student.moe_layers), sum(teacher.moe_layers)),
        'experts': tuple(
            config.moe.router.num_experts for config in (student, teacher) if config.moe is not None
        ),
    }
    for what, (ours, theirs) in pairs.items():
        if ours != theirs:
            raise InputError(
                f'Matching routers needs as many {what} in the student as in the teacher, whose '
                f'experts then mean the same; received {ours} and {theirs}. Start the student from '
                'the teacher and keep both numbers, or set router_match_weight to 0.'
            )


def require_routers(student: TransformerConfig, teacher: Teacher | None) -> None:
    """Refuses a teacher whose routers are not there to be matched.

    Raises:
        InputError: where it does not run beside the student, or as `require_matchable`.
    """
    if not isinstance(teacher, OnlineTeacher):
        raise InputError(
            'router_match_weight needs the routers of a teacher that runs beside the student; '
            f'received {type(teacher).__name__}. Set it to 0, or give an OnlineTeacher.'
        )
    require_matchable(student, teacher.model.config)


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
        expected = jax.lax.stop_gradient(_log_shares(theirs, teacher_score))
        gap = expected - _log_shares(ours, student_score)
        total += jnp.where(mask, (jnp.exp(expected) * gap).sum(-1), 0.0).sum()
    return total / len(student), mask.sum().astype(jnp.float32)


def matched(
    student: TransformerConfig,
    teacher: Any,
    ours: Sequence[RouterOutput],
    theirs: Sequence[RouterOutput],
    batch: Batch,
) -> tuple[Float[Array, ''], Float[Array, '']]:
    """Returns `router_match_loss` over a batch's routed tokens; `require_routers` comes first."""
    return router_match_loss(
        ours,
        theirs,
        batch.segment_ids > 0,
        student_score=_score(student),
        teacher_score=_score(teacher.model.config),
    )


def _score(config: TransformerConfig) -> ScoreFunction:
    assert config.moe is not None
    return config.moe.router.score


def _log_shares(router: RouterOutput, score: ScoreFunction) -> Float[Array, 'B T E']:
    """The log of each score's share of their sum; from the logits, so that none is of zero."""
    logits = router.router_logits.astype(jnp.float32)
    return jax.nn.log_softmax(logits if score == 'softmax' else jax.nn.log_sigmoid(logits))
