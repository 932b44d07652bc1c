"""What a student's routers add to its loss, over all of its MoE layers."""

from collections.abc import Sequence

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from distill.config import BalanceConfig
from moe.balance import load_balance_loss, router_confidence, router_z_loss
from moe.routing import ScoreFunction
from moe.types import RouterOutput

Pair = tuple[Float[Array, ''], Float[Array, '']]


@flax.struct.dataclass
class RouterLoss:
    """Sums over unmasked tokens, which add up over micro-batches.

    Attributes:
        loss: the weighted losses, over the number of layers.
        pairs: (sum, weight) of each loss by name, over tokens and layers.
        confidence: (sum, weight) of each layer; see `moe.balance.router_confidence`.
    """

    loss: Float[Array, '']
    pairs: dict[str, Pair]
    confidence: tuple[Float[Array, 'layers'], Float[Array, 'layers']]


def router_loss(
    routers: Sequence[RouterOutput],
    masks: Sequence[Bool[Array, 'B T']],
    balance: BalanceConfig,
    *,
    score: ScoreFunction,
    load: Float[Array, 'layers E'] | None = None,
) -> RouterLoss:
    """Weighs the load-balance loss and the z-loss of every MoE layer, and sums them over tokens.

    Args:
        routers: one for each MoE layer, at least one.
        masks: of each, True for tokens that were routed.
        balance: weights, and whose load a token is judged by.
        score: the routers' score function.
        load: over all micro-batches, for the scope 'global'; None where `routers` saw them all.

    Returns:
        The sums; `loss` to be divided by the number of unmasked tokens of all micro-batches.
    """
    loads = [None] * len(routers) if load is None else list(load)
    balanced = _sum_pairs(
        [
            load_balance_loss(
                router, mask, scope=balance.load_balance_scope, score=score, load=layer_load
            )
            for router, mask, layer_load in zip(routers, masks, loads, strict=True)
        ]
    )
    routed = [*zip(routers, masks, strict=True)]
    squared = _sum_pairs([router_z_loss(router, mask) for router, mask in routed])
    best = [router_confidence(router, mask, score=score) for router, mask in routed]
    sums, weights = zip(*best, strict=True)
    loss = balance.load_balance_weight * balanced[0] + balance.router_z_weight * squared[0]
    return RouterLoss(
        loss=loss / len(routers),
        pairs={'load_balance_loss': balanced, 'router_z_loss': squared},
        confidence=(jnp.stack(sums), jnp.stack(weights)),
    )


def _sum_pairs(pairs: list[Pair]) -> Pair:
    sums, weights = zip(*pairs, strict=True)
    return jnp.stack(sums).sum(), jnp.stack(weights).sum()
