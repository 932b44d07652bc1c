"""Measures the module calls of a forward pass: a model's activations, which it does not return."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe.transformer import Transformer
from moe.unstacked import Tree, relaid, unrolled


class Calibration(NamedTuple):
    """A batch to measure on.

    Attributes:
        tokens: ids [B, T].
        segment_ids: documents within a row, 0 for padding, which counts nowhere; None for rows
            that are one document each.
    """

    tokens: Int[Array, 'B T']
    segment_ids: Int[Array, 'B T'] | None = None


class Call(NamedTuple):
    """One module's call, as it happened: unbound module, its parameters, arguments, results."""

    module: nn.Module
    params: Tree
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


Path = tuple[str, ...]
Measure = Callable[[Path, Call, Bool[Array, 'B T']], Any]


def observe(
    model: Transformer, variables: Tree, calibration: Calibration, measure: Measure
) -> dict[Path, Any]:
    """Runs the model and measures the calls of its modules.

    Args:
        model: scanned or not; its layers run unrolled, and without a mesh.
        variables: unboxed.
        calibration: what it reads.
        measure: given a module's path (`layer_i` first), its call and the mask, returns arrays, or
            None to pass by.

    Returns:
        What `measure` returned, by path.
    """
    config = unrolled(model.config)
    variables = {
        name: relaid(model.config, config, collection) for name, collection in variables.items()
    }

    @jax.jit
    def run(variables: Tree, tokens: Array, segment_ids: Array | None) -> dict[Path, Any]:
        calls: dict[Path, Call] = {}

        def note(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            output = call(*args, **kwargs)
            path = context.module.path
            if context.method_name == '__call__' and path:
                params = variables['params']
                for name in path:
                    params = params.get(name, {})
                calls[path] = Call(context.module.clone(parent=None), params, args, kwargs, output)
            return output

        with nn.intercept_methods(note):
            Transformer(config).apply(variables, tokens, segment_ids=segment_ids, logits=False)
        mask = jnp.ones(tokens.shape, bool) if segment_ids is None else segment_ids > 0
        # Measured after the run: a measure may apply modules of its own.
        measured = {path: measure(path, call, mask) for path, call in calls.items()}
        return {path: value for path, value in measured.items() if value is not None}

    return run(variables, *calibration)


def token_mean(x: Float[Array, 'B T *dims'], mask: Bool[Array, 'B T']) -> Float[Array, '*dims']:
    """Averages over the unmasked tokens, in float32."""
    counted = mask.reshape(*mask.shape, *(1,) * (x.ndim - 2))
    total = jnp.where(counted, x.astype(jnp.float32), 0.0).sum(axis=(0, 1))
    return total / jnp.maximum(mask.sum(), 1)
