"""Activations that a pass over a model notes where they are asked for: a collection for each.

With `scan_layers` those of all layers are stacked, and so kept, whichever are used.
"""

from typing import Any, Literal

import flax.linen as nn
from jaxtyping import Array, Float

from moe.config import TransformerConfig
from moe.stacking import layer_paths, unstack

Activation = Literal['residual', 'queries', 'keys', 'values']
# The collections that a pass fills where they are mutable.
ACTIVATIONS: tuple[Activation, ...] = ('residual', 'queries', 'keys', 'values')
_LEAF = 'noted'


def asked_for(module: nn.Module, activation: Activation) -> bool:
    """Whether this pass notes an activation."""
    return not module.is_initializing() and module.is_mutable_collection(activation)


def note(module: nn.Module, **values: Array) -> None:
    """Notes those of the values whose collections are mutable; gradients flow through them.

    A pass that asks for none is as if this were not there.

    Args:
        module: that they are of, bound.
        **values: by the name of their activation: 'residual' [B, T, D], the stream after a layer
            (or of the embedding); 'queries' [B, T, H, Dk], 'keys' and 'values' [B, T, Hkv, Dk],
            after norms and rotations, as they are attended with.
    """
    for activation, value in values.items():
        if asked_for(module, activation):  # type: ignore[arg-type]
            module.put_variable(activation, _LEAF, value)


def noted_embedding(noted: Any) -> Float[Array, 'B T D']:
    """Returns the embedding of the tokens: what a pass noted of 'residual' before any layer."""
    return noted[_LEAF]


def noted_layers(config: TransformerConfig, noted: Any) -> list[Array | None]:
    """Returns what a pass noted, layer by layer.

    Args:
        config: the model's, scanned or not.
        noted: one of the collections of `ACTIVATIONS`, as the pass returned it.

    Returns:
        An array for each layer; None where the layer has no such activation.
    """
    repeats: dict[tuple[str, ...], list[Array]] = {}
    layers: list[Array | None] = []
    for path, index in layer_paths(config):
        leaf = _leaf(noted, path)
        if leaf is None or index is None:
            layers.append(leaf)
            continue
        if path not in repeats:
            repeats[path] = unstack(leaf)
        layers.append(repeats[path][index])
    return layers


def _leaf(noted: Any, path: tuple[str, ...]) -> Array | None:
    """Finds the one array of a block: its own, or its attention's."""
    for name in path:
        noted = noted.get(name, {})
    return noted.get(_LEAF, noted.get('attention', {}).get(_LEAF))
