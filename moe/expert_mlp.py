"""What every form of dispatch shares: the biases of experts, and their hidden activations."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from moe.config import Activation
from moe.layers import gated_activation


class ExpertBiases(NamedTuple):
    """What every expert adds after its projections.

    Attributes:
        gate_up: after the gate (index 0) and up projections.
        down: after the down projection.
    """

    gate_up: Float[Array, 'E 2 F']
    down: Float[Array, 'E D']


def weighted_hidden(
    both: Float[Array, '...'], weights: Float[Array, '...'], activation: Activation
) -> Float[Array, '...']:
    """Returns `weights * act(gate) * up`, in float32 or wider, in the dtype of `both`."""
    gate, up = jnp.split(both.astype(jnp.promote_types(both.dtype, jnp.float32)), 2, axis=-1)
    return (weights * gated_activation(activation)(gate, up)).astype(both.dtype)
