"""Experts of a token or two, as in decoding: no sorting, and no weight read but those chosen."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int

from moe.config import Activation
from moe.expert_mlp import ExpertBiases, weighted_hidden
from moe.quantised import Kernel, Quantised, dequantised, joined, product

FEW_TOKENS = 2  # of more, tokens share experts often enough that grouping them reads less


def chosen_experts(
    x: Float[Array, 'N D'],
    ids: Int[Array, 'N K'],
    weights: Float[Array, 'N K'],
    gate_up: Kernel,
    down: Kernel,
    activation: Activation,
    biases: ExpertBiases | None = None,
) -> Float[Array, 'N D']:
    """Sums the weighted outputs of each token's experts, one assignment after the other.

    Args:
        x: the tokens.
        ids: their experts; `E` for none.
        weights: of the experts.
        gate_up: gate (index 0) and up projections, [E, D, 2, F].
        down: down projections, [E, F, D].
        activation: of the gate.
        biases: of the projections; None for none.

    Returns:
        The sums, made in float32, in the dtype of `x`.
    """
    experts = (joined(gate_up), down, biases)

    def one_by_one(x: Array, ids: Array, weights: Array, experts: tuple) -> Array:
        return _one_by_one(x, ids, weights, *experts, activation=activation)

    def at_once(x: Array, ids: Array, weights: Array, experts: tuple) -> Array:
        return _at_once(x, ids, weights, *experts, activation=activation)

    return jax.lax.platform_dependent(x, ids, weights, experts, cpu=one_by_one, default=at_once)


def _one_by_one(
    x: Array,
    ids: Array,
    weights: Array,
    gate_up: Kernel,
    down: Kernel,
    biases: ExpertBiases | None,
    activation: Activation,
) -> Array:
    """For CPUs: the product reads its expert where it lies, where a gather would copy it first."""
    (N, K), E = ids.shape, down.shape[0]

    def add(number: Array, y: Array) -> Array:
        token, chosen = number // K, ids.reshape(-1)[number]
        expert = jnp.minimum(chosen, E - 1)
        weight = weights.reshape(-1)[number]
        both = _times(x[token], gate_up, expert)
        if biases is not None:
            both += biases.gate_up[expert].reshape(-1)
        out = _times(weighted_hidden(both, weight, activation), down, expert)
        if biases is not None:
            out += weight.astype(out.dtype) * biases.down[expert]
        return y.at[token].add(jnp.where(chosen < E, out, 0).astype(jnp.float32))

    y = jnp.zeros_like(x, jnp.float32)
    return jax.lax.fori_loop(0, N * K, add, y).astype(x.dtype)


def _at_once(
    x: Array,
    ids: Array,
    weights: Array,
    gate_up: Kernel,
    down: Kernel,
    biases: ExpertBiases | None,
    activation: Activation,
) -> Array:
    E = down.shape[0]
    experts = jnp.minimum(ids, E - 1)
    both = jnp.einsum('nd,nkdf->nkf', x, _chosen(gate_up, experts, x.dtype))
    if biases is not None:
        both += biases.gate_up[experts].reshape(both.shape)
    hidden = weighted_hidden(both, weights[..., None], activation)
    out = jnp.einsum('nkf,nkfd->nkd', hidden, _chosen(down, experts, x.dtype))
    if biases is not None:
        out += weights[..., None].astype(out.dtype) * biases.down[experts]
    out = jnp.where((ids < E)[..., None], out, 0)
    return out.sum(axis=1, dtype=jnp.float32).astype(x.dtype)


def _times(
    x: Float[Array, 'inputs'], weights: Kernel, expert: Int[Array, '']
) -> Float[Array, 'outputs']:
    own = jax.tree.map(lambda leaf: leaf[expert], weights)
    return product(x[None], own)[0] if isinstance(own, Quantised) else x @ own


def _chosen(weights: Kernel, experts: Int[Array, 'N K'], dtype: DTypeLike) -> Array:
    return dequantised(jax.tree.map(lambda leaf: leaf[experts], weights), dtype)
