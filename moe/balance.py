"""Balancing of expert load: auxiliary losses, the loss-free bias update and load statistics.

Losses come as `(sum, weight)`: the mean is `sum / weight`, and both add up over micro-batches.
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe.routing import ScoreFunction, router_scores
from moe.types import RouterOutput

Scope = Literal['sequence', 'global']


def load_balance_loss(
    router: RouterOutput,
    mask: Bool[Array, 'B T'],
    *,
    scope: Scope = 'sequence',
    score: ScoreFunction = 'softmax',
) -> tuple[Float[Array, ''], Float[Array, '']]:
    """Penalises load that is spread unevenly over the experts.

        loss = E * sum_e f_e * P_e

    where `f_e` is the share of the unmasked assignments that expert e received (they sum to 1: the
    loss is divided by `K`) and `P_e` the mean over unmasked tokens of the normalised score. It is 1
    where either is uniform. Its gradient flows through `P` alone.

    Args:
        router: one layer's routing.
        mask: True counts.
        scope: 'sequence' takes `f` and `P` of each sequence by itself; 'global' takes `f` from
            `router.load`. Over micro-batches 'global' is exact where `router.load` holds the load
            of all of them.
        score: the router's score function; scores are divided by their sum over the experts.

    Returns:
        `(sum, weight)`: the loss summed over unmasked tokens, dimensionless, and how many there
        are.

    Source: Switch (arXiv 2101.03961, eq. 4); DeepSeek-V3 (arXiv 2412.19437, eqs. 17 to 20) for
        'sequence'. `transformers` pools all layers and does not divide by `K`; this does neither.
    """
    if scope not in get_args(Scope):
        raise ValueError(f'scope must be one of {get_args(Scope)}; received {scope!r}')
    num_experts = router.router_logits.shape[-1]
    scores = router_scores(router.router_logits, score)
    scores = scores / jnp.maximum(scores.sum(axis=-1, keepdims=True), 1e-20)
    scores = jnp.where(mask[..., None], scores, 0.0)
    tokens = mask.sum(axis=1).astype(jnp.float32)
    if scope == 'global':
        share = router.load / jnp.maximum(router.load.sum(), 1.0)
    else:
        chosen = router.expert_ids[..., None] == jnp.arange(num_experts)
        load = jnp.where(mask[..., None, None], chosen, False).sum(axis=(1, 2)).astype(jnp.float32)
        share = load / jnp.maximum(load.sum(axis=-1, keepdims=True), 1.0)
    total = num_experts * (jax.lax.stop_gradient(share) * scores.sum(axis=1)).sum()
    return total, tokens.sum()


def router_z_loss(
    router: RouterOutput, mask: Bool[Array, 'B T']
) -> tuple[Float[Array, ''], Float[Array, '']]:
    """Penalises large router logits: `logsumexp(logits)^2` for each token.

    Args:
        router: one layer's routing.
        mask: True counts.

    Returns:
        `(sum, weight)`: the loss summed over unmasked tokens, in nats squared, and how many there
        are.

    Source: ST-MoE (arXiv 2202.08906, eq. 5).
    """
    log_z = jax.nn.logsumexp(router.router_logits.astype(jnp.float32), axis=-1)
    return jnp.where(mask, log_z**2, 0.0).sum(), mask.sum().astype(jnp.float32)


def updated_bias(
    bias: Float[Array, '...'], load: Float[Array, '...'], *, rate: float
) -> Float[Array, '...']:
    """Raises the selection bias of experts under the mean load and lowers that of the others.

        bias + rate * sign(mean(load) - load)

    Args:
        bias: what was added to the scores when `load` was counted.
        load: assignments per expert, summed over shards and micro-batches first.
        rate: step in units of the score, at least 0; 0.001 in the paper.

    Returns:
        The new bias, of the type of the old.

    Source: arXiv 2408.15664, algorithm 1.
    """
    step = jnp.sign(load.mean(axis=-1, keepdims=True) - load)
    return bias + rate * step.astype(bias.dtype)


def load_statistics(
    load: Float[Array, 'E'], dropped: Float[Array, ''] | float = 0.0
) -> dict[str, Float[Array, '']]:
    """Describes how evenly experts are used.

    Args:
        load: assignments per expert, summed over shards and micro-batches first.
        dropped: assignments among them that found no slot.

    Returns:
        `max_violation`: (max - mean) / mean load, 0 when balanced (MaxVio); `entropy`: of the
        shares of load, divided by log E, in [0, 1], 1 when balanced; `dead_experts`: how many
        received nothing; `drop_fraction`: dropped / all assignments. Scalars, float32; of an empty
        batch max_violation, entropy and drop_fraction are 0.

    Source: MaxVio from arXiv 2408.15664, eq. 4.
    """
    num_experts = load.shape[-1]
    total = jnp.maximum(load.sum(), 1.0)
    share = load / total
    nats = -jnp.where(load > 0, share * jnp.log(jnp.where(load > 0, share, 1.0)), 0.0).sum()
    return {
        'max_violation': jnp.where(load.sum() > 0, share.max() * num_experts - 1.0, 0.0),
        'entropy': nats / jnp.log(num_experts) if num_experts > 1 else jnp.ones(()),
        'dead_experts': (load == 0).sum().astype(jnp.float32),
        'drop_fraction': jnp.asarray(dropped, jnp.float32) / total,
    }
