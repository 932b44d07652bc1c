"""What lies between two models' hidden states, relations, attention maps and routers: pure maths.

Each loss is `(sum over unmasked tokens, how many there are)`, so that both add up over rows, shards
and micro-batches. No gradient flows into the teacher.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from distill.router_match import log_shares
from moe.layers import soft_cap
from moe.routing import ScoreFunction
from moe.types import RouterOutput

Metric = Literal['mse', 'cosine']
Pair = tuple[Float[Array, ''], Float[Array, '']]


def hidden_match_loss(
    student: Float[Array, 'B T D'],
    teacher: Float[Array, 'B T D'],
    mask: Bool[Array, 'B T'],
    *,
    metric: Metric = 'mse',
) -> Pair:
    """Compares hidden states, token by token.

    'mse' is the mean over channels of the squared difference; 'cosine' is one less the cosine of
    the angle between both, and is blind to their lengths.

    Args:
        student: projected to the teacher's width where it has another.
        teacher: of the same tokens.
        mask: True counts.
        metric: see above.

    Source: 'mse' FitNets, arXiv 1412.6550, equation 3, as TinyBERT, arXiv 1909.10351, section 3;
        'cosine' DistilBERT, arXiv 1910.01108, section 3.
    """
    ours = student.astype(jnp.float32)
    theirs = jax.lax.stop_gradient(teacher).astype(jnp.float32)
    if metric == 'mse':
        distance = jnp.square(ours - theirs).mean(-1)
    else:
        distance = 1 - (_unit(ours) * _unit(theirs)).sum(-1)
    return _over_tokens(distance, mask)


def relation_match_loss(
    student: Float[Array, 'B T *Hs'],
    teacher: Float[Array, 'B T *Ht'],
    segment_ids: Int[Array, 'B T'],
    *,
    heads: int,
) -> Pair:
    """Compares how alike two models find the tokens of a document, by queries, keys or values.

    All heads of a model are put side by side and cut into `A` relation heads of equal widths, so
    that neither the models' heads nor their widths need agree. With `X_a` one of them, `d` wide,

        R_a = softmax(X_a X_a^T / sqrt(d)) over the tokens of the document,
        loss of token t = mean over a of KL(R_a,t of the teacher || R_a,t of the student).

    Args:
        student: its queries, keys or values.
        teacher: of the same tokens.
        segment_ids: documents within a row; 0 for padding, which neither counts nor is looked at.
        heads: `A`, a divisor of both models' widths over all heads.

    Source: MiniLMv2, arXiv 2012.15828, section 3.1. Relations reach both ways, as there,
        though a decoder's attention does not.
    """
    together = _same_document(segment_ids)
    ours, theirs = _relations(student, heads), _relations(teacher, heads)
    return _relation_kl(ours, theirs, together, segment_ids > 0)


def attention_match_loss(
    student: Float[Array, 'B H T S'],
    teacher: Float[Array, 'B H T S'],
    allowed: Bool[Array, '#B T S'],
    mask: Bool[Array, 'B T'],
) -> Pair:
    """Compares attention maps: the mean over heads of KL(teacher's map || student's), by query.

    Args:
        student: scores before the softmax, see `attention_scores`.
        teacher: of as many heads.
        allowed: where queries may look.
        mask: queries that count.

    Source: MiniLM, arXiv 2002.10957, section 3.1.
    """
    return _relation_kl(student, teacher, allowed, mask)


def attention_scores(
    queries: Float[Array, 'B T H Dk'],
    keys: Float[Array, 'B S Hkv Dk'],
    *,
    scale: float,
    score_cap: float | None = None,
) -> Float[Array, 'B H T S']:
    """Returns what the softmax of attention is of, float32; see `moe.dot_product`."""
    B, T, H, Dk = queries.shape
    grouped = queries.reshape(B, T, keys.shape[2], -1, Dk)
    scores = jnp.einsum('btkgd,bskd->bkgts', grouped, keys, preferred_element_type=jnp.float32)
    return soft_cap(scale * scores.reshape(B, H, T, -1), score_cap)


def usage_match_loss(
    student: RouterOutput,
    teacher: RouterOutput,
    segment_ids: Int[Array, 'B T'],
    *,
    student_score: ScoreFunction = 'softmax',
    teacher_score: ScoreFunction = 'softmax',
) -> Pair:
    """Compares which tokens use the same experts, whatever the experts are and however many.

    With `p_t` the shares of a token's router scores, tokens `t` and `s` of a document use the same
    expert with probability `c_ts`, and

        c_ts = sum over e of p_t,e p_s,e,    r_ts = c_ts / sum over s of c_ts,
        loss of token t = KL(r_t of the teacher || r_t of the student).

    Renumbered experts, or all of them split into as many equal copies, change nothing.

    Args:
        student: what its router decided.
        teacher: of the same tokens, of any number of experts.
        segment_ids: documents within a row; 0 for padding.
        student_score: the student's score function.
        teacher_score: the teacher's.
    """
    ours, theirs = _shared_use(student, student_score), _shared_use(teacher, teacher_score)
    return _relation_kl(ours, theirs, _same_document(segment_ids), segment_ids > 0)


def _relation_kl(
    student: Float[Array, 'B H T S'],
    teacher: Float[Array, 'B H T S'],
    allowed: Bool[Array, '#B T S'],
    mask: Bool[Array, 'B T'],
) -> Pair:
    """The mean over heads of the KL between the softmaxes over what is allowed, by token."""
    allowed = allowed[:, None]

    def log_weights(scores: Array) -> Array:
        # Finite, so that 0 times a difference of two of them is 0.
        return jax.nn.log_softmax(jnp.where(allowed, scores, -1e30))

    expected = jax.lax.stop_gradient(log_weights(teacher))
    gap = jnp.where(allowed, expected - log_weights(student), 0.0)
    return _over_tokens((jnp.exp(expected) * gap).sum(-1).mean(1), mask)


def _relations(x: Float[Array, 'B T *heads'], heads: int) -> Float[Array, 'B A T T']:
    x = x.reshape(*x.shape[:2], heads, -1)
    products = jnp.einsum('btad,bsad->bats', x, x, preferred_element_type=jnp.float32)
    return products * x.shape[-1] ** -0.5


def _shared_use(router: RouterOutput, score: ScoreFunction) -> Float[Array, 'B 1 T T']:
    shares = jnp.exp(log_shares(router, score))
    shared = jnp.einsum('bte,bse->bts', shares, shares, precision='highest')
    return jnp.log(jnp.maximum(shared, jnp.finfo(jnp.float32).tiny))[:, None]


def _same_document(segment_ids: Int[Array, 'B T']) -> Bool[Array, 'B T T']:
    return segment_ids[:, :, None] == segment_ids[:, None, :]


def _unit(x: Float[Array, 'B T D']) -> Float[Array, 'B T D']:
    # A state of zeros has no direction, and its gradient must not be NaN.
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))


def _over_tokens(loss: Float[Array, 'B T'], mask: Bool[Array, 'B T']) -> Pair:
    return jnp.where(mask, loss, 0.0).sum(), mask.sum().astype(jnp.float32)
