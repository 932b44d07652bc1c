"""Experts of a token or two, as in decoding: no sorting, and no weight read but those chosen."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe.config import Activation
from moe.expert_mlp import ExpertBiases, weighted_hidden

FEW_TOKENS = 2  # of more, tokens share experts often enough that grouping them reads less


def chosen_experts(
    x: Float[Array, 'N D'],
    ids: Int[Array, 'N K'],
    weights: Float[Array, 'N K'],
    gate_up: Float[Array, 'E D 2 F'],
    down: Float[Array, 'E F D'],
    activation: Activation,
    biases: ExpertBiases | None = None,
) -> Float[Array, 'N D']:
    """Sums the weighted outputs of each token's experts, one assignment after the other.

    Args:
        x: the tokens.
        ids: their experts; `E` for none.
        weights: of the experts.
        gate_up: gate (index 0) and up projections.
        down: down projections.
        activation: of the gate.
        biases: of the projections; None for none.

    Returns:
        The sums, made in float32, in the dtype of `x`.
    """
    experts = (gate_up, down, biases)

    def one_by_one(x: Array, ids: Array, weights: Array, experts: tuple) -> Array:
        return _one_by_one(x, ids, weights, *experts, activation=activation)

    def at_once(x: Array, ids: Array, weights: Array, experts: tuple) -> Array:
        return _at_once(x, ids, weights, *experts, activation=activation)

    return jax.lax.platform_dependent(x, ids, weights, experts, cpu=one_by_one, default=at_once)


def _one_by_one(
    x: Array,
    ids: Array,
    weights: Array,
    gate_up: Array,
    down: Array,
    biases: ExpertBiases | None,
    activation: Activation,
) -> Array:
    """For CPUs: the product reads its expert where it lies, where a gather would copy it first."""
    (N, K), (E, D) = ids.shape, gate_up.shape[:2]
    gate_up = gate_up.reshape(E, D, -1)

    def add(number: Array, y: Array) -> Array:
        token, chosen = number // K, ids.reshape(-1)[number]
        expert = jnp.minimum(chosen, E - 1)
        weight = weights.reshape(-1)[number]
        both = x[token] @ gate_up[expert]
        if biases is not None:
            both += biases.gate_up[expert].reshape(-1)
        out = weighted_hidden(both, weight, activation) @ down[expert]
        if biases is not None:
            out += weight.astype(out.dtype) * biases.down[expert]
        return y.at[token].add(jnp.where(chosen < E, out, 0).astype(jnp.float32))

    y = jnp.zeros_like(x, jnp.float32)
    return jax.lax.fori_loop(0, N * K, add, y).astype(x.dtype)


def _at_once(
    x: Array,
    ids: Array,
    weights: Array,
    gate_up: Array,
    down: Array,
    biases: ExpertBiases | None,
    activation: Activation,
) -> Array:
    E = gate_up.shape[0]
    experts = jnp.minimum(ids, E - 1)
    both = jnp.einsum('nd,nkdgf->nkgf', x, gate_up[experts])
    if biases is not None:
        both += biases.gate_up[experts]
    both = both.reshape(*ids.shape, -1)
    hidden = weighted_hidden(both, weights[..., None], activation)
    out = jnp.einsum('nkf,nkfd->nkd', hidden, down[experts])
    if biases is not None:
        out += weights[..., None].astype(out.dtype) * biases.down[experts]
    out = jnp.where((ids < E)[..., None], out, 0)
    return out.sum(axis=1, dtype=jnp.float32).astype(x.dtype)
