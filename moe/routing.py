"""Token-choice top-k routing: scores, choice and weights as one pure function of the logits."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe.config import RouterConfig, ScoreFunction


def router_scores(
    router_logits: Float[Array, 'B T E'], score: ScoreFunction
) -> Float[Array, 'B T E']:
    """Scores every expert in float32.

    Args:
        router_logits: unbounded, any float type.
        score: 'softmax' over the experts, or an elementwise 'sigmoid'.

    Returns:
        Scores in [0, 1], float32; a softmax's sum to 1.
    """
    logits = router_logits.astype(jnp.float32)
    return jax.nn.softmax(logits, axis=-1) if score == 'softmax' else jax.nn.sigmoid(logits)


def route(
    router_logits: Float[Array, 'B T E'],
    config: RouterConfig,
    *,
    selection_bias: Float[Array, 'E'] | None = None,
) -> tuple[Int[Array, 'B T K'], Float[Array, 'B T K']]:
    """Chooses `K` experts for each token and weighs them.

        s = score(logits)                      float32
        s = s / (sum over E of s + eps)        normalize='before'
        ids = top_k(s + selection_bias)        ties go to the lowest id
        w = s[ids]
        w = w / (sum over K of w + eps)        normalize='after'
        weights = scale * w

    The bias takes part in the choice alone: weights and their gradients never see it.

    Args:
        router_logits: one row a token.
        config: the router as data.
        selection_bias: added to the scores before the choice, any real value; None for zeros.

    Returns:
        `(expert_ids, expert_weights)`, best first by the biased score; ids int32, weights float32.

    Source: DeepSeek-V3 (arXiv 2412.19437, eqs. 12 to 16), Auxiliary-loss-free balancing (arXiv
        2408.15664, eq. 3); with `selection_bias=None`, Mixtral's and OLMoE's softmax routers.
    """
    scores = router_scores(router_logits, config.score)
    if config.normalize == 'before':
        scores = scores / (scores.sum(axis=-1, keepdims=True) + config.eps)
    selection = scores if selection_bias is None else scores + selection_bias.astype(jnp.float32)
    _, ids = jax.lax.top_k(jax.lax.stop_gradient(selection), config.experts_per_token)
    # A select instead of a gather: its transpose is a sum, not a scatter.
    chosen = ids[..., None] == jnp.arange(config.num_experts)
    weights = jnp.where(chosen, scores[..., None, :], 0.0).sum(axis=-1)
    if config.normalize == 'after':
        weights = weights / (weights.sum(axis=-1, keepdims=True) + config.eps)
    return ids, config.scale * weights


def expert_load(
    expert_ids: Int[Array, 'B T K'], mask: Bool[Array, 'B T'], num_experts: int
) -> Float[Array, 'E']:
    """Counts the unmasked assignments of each expert.

    Args:
        expert_ids: in [0, num_experts).
        mask: True counts.
        num_experts: `E`.

    Returns:
        Assignments per expert, float32, summed over the whole (global) batch.
    """
    chosen = expert_ids[..., None] == jnp.arange(num_experts)
    counted = jnp.where(mask[..., None, None], chosen, False)
    return counted.sum(axis=tuple(range(counted.ndim - 1)), dtype=jnp.int32).astype(jnp.float32)
