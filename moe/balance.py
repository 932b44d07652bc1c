"""Balancing of expert load: auxiliary losses, the loss-free bias update and load statistics.

Losses come as `(sum, weight)`: the mean is `sum / weight`, and both add up over micro-batches.
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe.routing import ScoreFunction, router_scores
from moe.types import RouterOutput

Scope = Literal['sequence', 'micro_batch', 'global']
BiasRule = Literal['sign', 'proportional']


def load_balance_loss(
    router: RouterOutput,
    mask: Bool[Array, 'B T'],
    *,
    scope: Scope = 'sequence',
    score: ScoreFunction = 'softmax',
    load: Float[Array, 'E'] | None = None,
) -> tuple[Float[Array, ''], Float[Array, '']]:
    """Penalises load that is spread unevenly over the experts.

        loss = E * sum_e f_e * P_e

    where `f_e` is the share of the unmasked assignments that expert e received (they sum to 1: the
    loss is divided by `K`) and `P_e` the mean over unmasked tokens of the normalised score. It is 1
    where either is uniform. Its gradient flows through `P` alone.

    Args:
        router: one layer's routing.
        mask: True counts.
        scope: 'sequence' takes `f` and `P` of each sequence by itself; 'micro_batch' of all that
            the router saw at once, over every shard; 'global' takes `f` from `load`.
        score: the router's score function; scores are divided by their sum over the experts.
        load: assignments to each expert over all micro-batches, for 'global'; by default
            `router.load`, right where there is one micro-batch.

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
    if scope != 'sequence':
        load = router.load if load is None or scope == 'micro_batch' else load
        share = load / jnp.maximum(load.sum(), 1.0)
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


def router_confidence(
    router: RouterOutput, mask: Bool[Array, 'B T'], *, score: ScoreFunction = 'softmax'
) -> tuple[Float[Array, ''], Float[Array, '']]:
    """Measures how sure a router is: each token's largest score among the experts.

    Args:
        router: one layer's routing.
        mask: True counts.
        score: the router's score function; scores are divided by their sum over the experts.

    Returns:
        `(sum, weight)`: the largest score, in [1 / E, 1], summed over unmasked tokens, and how many
        there are.
    """
    scores = router_scores(router.router_logits, score)
    best = scores.max(axis=-1) / jnp.maximum(scores.sum(axis=-1), 1e-20)
    return jnp.where(mask, best, 0.0).sum(), mask.sum().astype(jnp.float32)


def updated_bias(
    bias: Float[Array, '...'], load: Float[Array, '...'], *, rate: float, rule: BiasRule = 'sign'
) -> Float[Array, '...']:
    """Raises the selection bias of experts under the mean load and lowers that of the others.

        bias + rate * sign(mean(load) - load)               'sign'
        bias + rate * (mean(load) - load) / mean(load)      'proportional'

    'proportional' moves less the nearer an expert is to balance, and by as much for a large batch
    as for a small one; an expert without load moves by `rate`, one with all of it by
    `-rate * (E - 1)`. Without any load the bias stays as it is.

    Args:
        bias: what was added to the scores when `load` was counted.
        load: assignments per expert, summed over shards and micro-batches first.
        rate: step in units of the score, at least 0; 0.001 in the paper.
        rule: 'sign' or 'proportional'.

    Returns:
        The new bias, of the type of the old.

    Source: arXiv 2408.15664, algorithm 1; the variant without the sign is divided by the mean here.
    """
    if rule not in get_args(BiasRule):
        raise ValueError(f'rule must be one of {get_args(BiasRule)}; received {rule!r}')
    mean = load.mean(axis=-1, keepdims=True)
    step = jnp.sign(mean - load)
    if rule == 'proportional':
        step = (mean - load) / jnp.where(mean > 0, mean, 1.0)
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
        shares of load, divided by log E, in [0, 1], 1 when balanced; `gini`: the mean absolute
        difference between two experts' loads over twice the mean load, 0 when balanced and
        1 - 1 / E when one expert takes all; `dead_experts`: how many received nothing;
        `drop_fraction`: dropped / all assignments. Scalars, float32; of an empty batch all but
        `dead_experts` are 0.

    Source: MaxVio from arXiv 2408.15664, eq. 4: 'batch' of one batch's load, 'global' of a sum over
        batches.
    """
    num_experts = load.shape[-1]
    total = jnp.maximum(load.sum(), 1.0)
    share = load / total
    nats = -jnp.where(load > 0, share * jnp.log(jnp.where(load > 0, share, 1.0)), 0.0).sum()
    return {
        'max_violation': jnp.where(load.sum() > 0, share.max() * num_experts - 1.0, 0.0),
        'entropy': nats / jnp.log(num_experts) if num_experts > 1 else jnp.ones(()),
        # Of sorted shares, the differences of all pairs are a weighted sum.
        'gini': (jnp.sort(share) * (2 * jnp.arange(num_experts) + 1 - num_experts)).sum()
        / num_experts,
        'dead_experts': (load == 0).sum().astype(jnp.float32),
        'drop_fraction': jnp.asarray(dropped, jnp.float32) / total,
    }
