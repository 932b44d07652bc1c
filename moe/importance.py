"""How much channels, hidden units, heads and layers do on a calibration batch."""

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from moe.layers import gated_activation, linear, rms_norm
from moe.observe import Calibration, Call, Path, observe, token_mean
from moe.transformer import Transformer
from moe.unstacked import Tree

RESIDUAL_NORMS = ('attention_norm', 'mlp_norm', 'final_norm')


@flax.struct.dataclass
class Importance:
    """How much each part of a model does, averaged over unmasked tokens.

    Attributes:
        embed: mean magnitude of each channel after the norms, averaged over all norms.
        embed_energy: each channel's share of the residual stream's mean square, averaged likewise;
            sums to 1.
        mlp: mean magnitude of each hidden unit, for each layer; None for a layer of experts.
        heads: mean norm of what each head adds to the residual stream, for each layer.
        layers: block influence, 1 - cos(block's input, block's output).
    """

    embed: Float[Array, 'D']
    embed_energy: Float[Array, 'D']
    mlp: tuple[Float[Array, 'F'] | None, ...]
    heads: tuple[Float[Array, 'H'], ...]
    layers: Float[Array, 'L']


def importance(model: Transformer, variables: Tree, calibration: Calibration) -> Importance:
    """Measures how much channels, hidden units, heads and layers do on a batch.

    Args:
        model: dense, or with experts (whose hidden units are not measured).
        variables: unboxed.
        calibration: the batch.

    Returns:
        Means over the unmasked tokens: those of batches of equal size may be averaged.

    Source: Minitron, arXiv 2407.14679, with means of magnitudes over tokens throughout, and heads
        measured after the output projection; layers by ShortGPT, arXiv 2403.03853.
    """
    seen = observe(model, variables, calibration, _measure_importance)
    norms = [value for path, value in seen.items() if path[-1] in RESIDUAL_NORMS]
    names = [f'layer_{i}' for i in range(model.config.num_layers)]
    return Importance(
        embed=jnp.mean(jnp.stack([norm['magnitude'] for norm in norms]), axis=0),
        embed_energy=jnp.mean(jnp.stack([norm['energy'] for norm in norms]), axis=0),
        mlp=tuple(seen.get((name, 'mlp')) for name in names),
        heads=tuple(seen[name, 'attention'] for name in names),
        layers=jnp.stack([seen[(name,)] for name in names]),
    )


def of_layers(importance: Importance, keep: Sequence[int]) -> Importance:
    """Returns what belongs to the kept layers of a model, in their order."""
    return Importance(
        embed=importance.embed,
        embed_energy=importance.embed_energy,
        mlp=tuple(importance.mlp[i] for i in keep),
        heads=tuple(importance.heads[i] for i in keep),
        layers=importance.layers[np.asarray(keep)],
    )


def _measure_importance(path: Path, call: Call, mask: Array) -> Any:
    if len(path) == 1 and path[0].startswith('layer_'):
        return _block_influence(call, mask)
    if path[-1] in RESIDUAL_NORMS:
        return _channels(call, mask)
    if path[1:] == ('attention',):
        return _heads(call, mask)
    if path[1:] == ('mlp',):
        return _hidden_units(call, mask)
    return None


def _block_influence(call: Call, mask: Array) -> Float[Array, '']:
    before, after = (x.astype(jnp.float32) for x in (call.args[0], call.output[0]))
    norms = jnp.linalg.norm(before, axis=-1) * jnp.linalg.norm(after, axis=-1)
    cosine = jnp.sum(before * after, axis=-1) / jnp.maximum(norms, 1e-20)
    return 1 - token_mean(cosine, mask)


def _channels(call: Call, mask: Array) -> dict[str, Float[Array, 'D']]:
    x = call.args[0].astype(jnp.float32)
    energy = token_mean(jnp.square(rms_norm(x, jnp.ones(x.shape[-1]), 0.0)), mask)
    magnitude = token_mean(jnp.abs(call.output.astype(jnp.float32)), mask)
    return {'magnitude': magnitude, 'energy': energy / energy.sum()}


def _heads(call: Call, mask: Array) -> Float[Array, 'H']:
    """Takes the output apart by head: it is linear in the output projection."""

    def output(kernel: Array) -> Array:
        variables = {'params': {**call.params, 'o': kernel}}
        return call.module.apply(variables, *call.args, **call.kwargs)[0]

    kernel = call.params['o']
    _, contribution = jax.linearize(output, kernel)

    def norm(head: Array) -> Array:
        alone = jnp.where(jnp.arange(len(kernel))[:, None, None] == head, kernel, 0)
        return token_mean(jnp.linalg.norm(contribution(alone), axis=-1), mask)

    return jax.lax.map(norm, jnp.arange(len(kernel)))


def _hidden_units(call: Call, mask: Array) -> Float[Array, 'F']:
    module: Any = call.module
    x = call.args[0].astype(module.dtype)
    gate, up = (linear(x, call.params['gate_up'][:, i]) for i in (0, 1))
    return token_mean(jnp.abs(gated_activation(module.activation)(gate, up)), mask)
