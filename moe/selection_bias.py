"""The loss-free balance update of a whole model's selection biases."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe.balance import BiasRule, updated_bias
from moe.config import TransformerConfig
from moe.stacking import layer_paths, module_kind, module_names


def update_selection_bias(
    config: TransformerConfig,
    routing: Any,
    load: Float[Array, 'layers E'],
    *,
    rate: float,
    rule: BiasRule = 'sign',
) -> Any:
    """Moves every MoE layer's selection bias towards balance by its load; see `updated_bias`.

    Args:
        config: the model's.
        routing: the unboxed `routing` collection; an empty one is returned as it is.
        load: of each MoE layer over the whole step, summed over micro-batches; then of each
            multi-token-prediction module whose layer has experts.
        rate: the step of the bias, in units of the router's score.
        rule: 'sign' or 'proportional'.

    Returns:
        The new collection.
    """
    loads: dict[tuple[str, ...], list[Array]] = {}
    places = zip(layer_paths(config), config.moe_layers, strict=True)
    moe_paths = [path for (path, _), has_experts in places if has_experts]
    if module_kind(config).has_experts:
        moe_paths += [(name,) for name in module_names(config)]
    for path, layer in zip(moe_paths, load, strict=True):
        loads.setdefault(path, []).append(layer)

    def update(path: Any, bias: Array) -> Array:
        names = tuple(key.key for key in path)
        stacked = jnp.stack(loads[next(p for p in loads if names[: len(p)] == p)])
        return updated_bias(bias, stacked.reshape(bias.shape), rate=rate, rule=rule)

    return jax.tree_util.tree_map_with_path(update, routing)
