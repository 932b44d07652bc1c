"""How much each expert does on a calibration batch."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from moe.config import RouterConfig
from moe.errors import InputError
from moe.observe import Calibration, Call, Path, observe, token_mean
from moe.transformer import Transformer
from moe.unstacked import Tree


@flax.struct.dataclass
class ExpertSaliency:
    """How much each expert of each MoE layer does.

    Attributes:
        frequency: share of the unmasked tokens that choose the expert; sums to `K`.
        weight: mean over all unmasked tokens of the weight that it gets.
        activation: mean over the tokens that choose it of weight times output norm; 0 for an expert
            that none chooses.
        output: its mean output over all unmasked tokens, chosen or not.
    """

    frequency: Float[Array, 'layers E']
    weight: Float[Array, 'layers E']
    activation: Float[Array, 'layers E']
    output: Float[Array, 'layers E D']


def expert_saliency(
    model: Transformer, variables: Tree, calibration: Calibration
) -> ExpertSaliency:
    """Measures how much each expert does on a batch, running every expert on every token.

    Args:
        model: with experts.
        variables: unboxed.
        calibration: the batch.

    Returns:
        One row for each MoE layer, in order.

    Raises:
        InputError: for a dense model.

    Source: `activation` is the router-weighted expert activation of REAP, arXiv 2510.13999;
        `output` is what HC-SMoE, arXiv 2410.08589, compares experts by.
    """
    if model.config.moe is None:
        raise InputError('expert_saliency needs a model with experts; received a dense one.')
    seen = observe(model, variables, calibration, _measure_experts)
    layers = np.flatnonzero(model.config.moe_layers)
    rows = [seen[f'layer_{i}', 'moe'] for i in layers]
    return jax.tree.map(lambda *parts: jnp.stack(parts), *rows)


def _measure_experts(path: Path, call: Call, mask: Array) -> ExpertSaliency | None:
    if path[1:] != ('moe',):
        return None
    router = call.output[1]
    E = router.router_logits.shape[-1]
    assigned = jnp.where(
        router.expert_ids[..., None] == jnp.arange(E), router.expert_weights[..., None], 0.0
    ).sum(axis=2)
    chosen = (router.expert_ids[..., None] == jnp.arange(E)).any(axis=2)
    # Of both, [E, B, T]: the map below walks over the experts.
    weights, chosen = (jnp.moveaxis(x, -1, 0) for x in (assigned, chosen))
    alone = _one_expert(call)

    def measure(inputs: tuple[Array, Array, Tree]) -> tuple[Array, ...]:
        weight, chosen, expert = inputs
        output = alone(expert).astype(jnp.float32)
        weighted = weight * jnp.linalg.norm(output, axis=-1)
        frequency = token_mean(chosen, mask)
        activation = token_mean(weighted, mask) / jnp.where(frequency > 0, frequency, 1.0)
        return frequency, token_mean(weight, mask), activation, token_mean(output, mask)

    return ExpertSaliency(*jax.lax.map(measure, (weights, chosen, routed(call.params))))


def routed(params: Tree) -> Tree:
    """Returns the parameters of a MoE layer that have a leading axis of experts."""
    return {name: value for name, value in params.items() if name not in ('router', 'shared')}


def _one_expert(call: Call) -> Callable[[Tree], Float[Array, 'B T D']]:
    """Makes of a MoE layer one of a single expert, of weight one, to be given as an argument."""
    module: Any = call.module
    config = dataclasses.replace(
        module.config, router=RouterConfig(1, 1, normalize='none'), shared_dim=0, dispatch='dense'
    )
    layer = module.clone(config=config, mesh=None)
    x, mask = call.args[:2]
    kernel = jnp.zeros((x.shape[-1], 1), call.params['router']['kernel'].dtype)

    def apply(expert: Tree) -> Array:
        stacked = jax.tree.map(lambda leaf: leaf[None], expert)
        return layer.apply({'params': {'router': {'kernel': kernel}, **stacked}}, x, mask)[0]

    return apply
