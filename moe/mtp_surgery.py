"""Multi-token-prediction modules taken off a model, and put on one that has fewer."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from moe.config import TransformerConfig
from moe.errors import InputError
from moe.stacking import module_names
from moe.transformer import Transformer
from moe.unstacked import Tree, split_layers


def refuse_modules(config: TransformerConfig) -> None:
    """Refuses a model whose modules' layers would be left behind by a change of its own.

    Raises:
        InputError: where `mtp_depth` is not 0.
    """
    if config.mtp_depth:
        raise InputError(
            'The modules of multi-token prediction would not fit the changed layers; received '
            f'mtp_depth={config.mtp_depth}. Take them off first, with '
            'moe.surgery.without_modules.'
        )


def without_modules(
    config: TransformerConfig, variables: Mapping[str, Tree]
) -> tuple[TransformerConfig, dict[str, Tree]]:
    """Takes all modules off: the model itself stays as it is.

    Args:
        config: the model's.
        variables: its unboxed collections.

    Returns:
        The config with `mtp_depth=0`, and the other variables.
    """
    names = module_names(config)
    kept = {
        collection: {name: subtree for name, subtree in tree.items() if name not in names}
        for collection, tree in variables.items()
    }
    return dataclasses.replace(config, mtp_depth=0), {
        key: tree for key, tree in kept.items() if tree
    }


def with_modules(
    config: TransformerConfig,
    variables: Mapping[str, Tree],
    *,
    key: PRNGKeyArray,
    old: Mapping[str, Tree] | None = None,
) -> dict[str, Tree]:
    """Puts modules on a model: those there are, and beyond them new ones.

    A new module starts with the model's last layer as its own; projection and norms are as
    `Transformer.init` makes them.

    Args:
        config: of the model to be, with its `mtp_depth`.
        variables: unboxed, of the same model without modules.
        key: draws the projections.
        old: unboxed collections that hold modules of the same shapes, of the first depths.

    Returns:
        The variables with `mtp_depth` modules, the new ones in the dtype of `config`.
    """
    if not config.mtp_depth:
        return dict(variables)
    plain, old = dataclasses.replace(config, mtp_depth=0), old or {}
    layer = {name: split_layers(plain, tree)[0][-1] for name, tree in variables.items()}
    made = {collection: dict(tree) for collection, tree in variables.items()}
    modules = {
        collection: {
            name: old.get(collection, {}).get(name, module | {'block': layer[collection]})
            for name, module in tree.items()
        }
        for collection, tree in _initial(config, key).items()
    }
    modules['params'] = jax.tree.map(lambda x: x.astype(config.param_dtype), modules['params'])
    for collection, tree in modules.items():
        made[collection] |= tree
    return made


def _initial(config: TransformerConfig, key: PRNGKeyArray) -> dict[str, Any]:
    """Initializes the modules alone: the compiler leaves out what is not returned."""
    names = module_names(config)

    def init(key: PRNGKeyArray) -> dict[str, Any]:
        variables: Any = nn.unbox(Transformer(config).init(key, jnp.zeros((1, 1), jnp.int32)))
        return {
            collection: {name: tree[name] for name in names if name in tree}
            for collection, tree in variables.items()
        }

    return jax.jit(init)(key)
