"""Soft experts: each computes weighted means of a row's tokens, each token takes means of those.

    slot[e, p] = sum_t into[t, e, p] x[t]           into: softmax over the unmasked tokens of a row
    y[t] = sum_ep back[t, e, p] expert[e](slot[e, p])       back: softmax over all slots

Nothing is chosen or dropped, and every gradient is exact; but a token's output depends on every
token of its row, later ones and other documents included: see `moe.routing.RouterConfig`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe.config import Activation
from moe.dispatch import ExpertBiases, slotted_mlp
from moe.types import RouterOutput

# Finite, so that a row without unmasked tokens has no 0 / 0.
MASKED = -1e30


def soft_weights(
    logits: Float[Array, 'B T E P'], mask: Bool[Array, 'B T']
) -> tuple[Float[Array, 'B T E P'], Float[Array, 'B T E P']]:
    """Returns the weights of tokens in slots and of slots in tokens.

    Args:
        logits: of each token for each of the `P` slots of each expert, float32.
        mask: False is in no slot and gets none.

    Returns:
        `into`, which sums to 1 over the unmasked tokens of a row, and `back`, which sums to 1 over
        all slots; both are zero for masked tokens.
    """
    kept = mask[..., None, None]
    into = jax.nn.softmax(jnp.where(kept, logits, MASKED), axis=1)
    back = jax.nn.softmax(logits, axis=(2, 3))
    return jnp.where(kept, into, 0), jnp.where(kept, back, 0)


def soft_dispatch(
    x: Float[Array, 'B T D'],
    logits: Float[Array, 'B T E P'],
    mask: Bool[Array, 'B T'],
    gate_up: Float[Array, 'E D 2 F'],
    down: Float[Array, 'E F D'],
    *,
    activation: Activation,
    scale: float = 1.0,
    biases: ExpertBiases | None = None,
) -> tuple[Float[Array, 'B T D'], RouterOutput]:
    """Passes every token through every expert, softly.

    On a mesh this runs under plain jit, and XLA places the exchange.

    Args:
        x: tokens, in the dtype of the products.
        logits: of each token for each of the `P` slots of each expert, float32.
        mask: False takes no part; its output and every gradient are zero.
        gate_up: gate (index 0) and up projections of every expert.
        down: down projections of every expert.
        activation: of the gate.
        scale: multiplies what the slots give back.
        biases: of the experts' projections; None for none.

    Returns:
        The outputs, in the dtype of `x`, and a `RouterOutput` of `K = E` columns: the logits are
        the log-sum-exp over an expert's slots, the weights the sums of `back` times `scale`, and
        `load` is the sum over unmasked tokens of those sums, in tokens rather than assignments.

    Source: arXiv 2308.00951, equations 1 to 3.
    """
    rows, _, experts, _ = logits.shape
    into, back = soft_weights(logits, mask)
    clean = jnp.where(mask[..., None], x, 0)
    slots = jnp.einsum('btep,btd->ebpd', into.astype(x.dtype), clean)
    slots = slots.reshape(experts, -1, x.shape[-1])
    ones = jnp.ones((*slots.shape[:2], 1), jnp.float32)
    out = slotted_mlp(slots, ones, gate_up, down, activation, biases)
    out = out.reshape(experts, rows, -1, x.shape[-1])
    y = jnp.einsum('btep,ebpd->btd', (scale * back).astype(x.dtype), out)
    share = back.sum(axis=-1)
    weights, ids = jax.lax.top_k(share, experts)
    per_expert = jax.nn.logsumexp(logits, axis=-1)
    load = share.sum(axis=(0, 1))
    return y, RouterOutput(per_expert, ids, scale * weights, load, jnp.zeros((), jnp.float32))
