"""Directions in which the tokens that reach a layer differ: where a router's columns may start."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from moe.errors import InputError
from moe.observe import Calibration, Call, Path, observe
from moe.transformer import Transformer
from moe.unstacked import Tree

ROUNDS = 16


def input_centroids(
    model: Transformer,
    variables: Tree,
    calibration: Calibration,
    num_clusters: int,
    *,
    key: PRNGKeyArray,
) -> dict[int, Float[Array, 'C D']]:
    """Clusters what each dense MLP reads, by direction.

    The mean direction of all tokens is taken out first. A router whose columns are the centroids
    therefore gives every expert the same mean logit, and sends a token to the expert of its own
    cluster: experts start with about as many tokens as their clusters hold, of one kind each.

    Args:
        model: whose MLPs are dense.
        variables: unboxed.
        calibration: the batch.
        num_clusters: `C`; at most the number of unmasked tokens.
        key: draws the tokens that the clusters start from.

    Returns:
        For each layer with a dense MLP, by its index, unit vectors.

    Raises:
        InputError: for fewer tokens than clusters.

    Source: spherical k-means, Dhillon and Modha (2001). Experts by clusters of documents: c-BTM,
        arXiv 2303.14177; clusters of a layer's inputs are ours.
    """
    segments = calibration.segment_ids
    tokens = calibration.tokens.size if segments is None else int((segments > 0).sum())
    if tokens < num_clusters:
        raise InputError(
            f'{num_clusters} clusters need as many tokens at least; the calibration batch has '
            f'{tokens}. Give it more rows.'
        )
    measure = functools.partial(_measure_inputs, num_clusters=num_clusters, key=key)
    seen = observe(model, variables, calibration, measure)
    return {int(path[0].removeprefix('layer_')): found for path, found in seen.items()}


def _measure_inputs(
    path: Path, call: Call, mask: Array, *, num_clusters: int, key: PRNGKeyArray
) -> Any:
    if path[1:] != ('mlp',):
        return None
    x = call.args[0].astype(jnp.float32)
    layer = int(path[0].removeprefix('layer_'))
    key = jax.random.fold_in(key, layer)
    return spherical_means(x.reshape(-1, x.shape[-1]), mask.reshape(-1), num_clusters, key)


def spherical_means(
    x: Float[Array, 'N D'], mask: Bool[Array, 'N'], num_clusters: int, key: PRNGKeyArray
) -> Float[Array, 'C D']:
    """Clusters vectors by their cosine, without their mean direction.

    Args:
        x: any lengths.
        mask: those that count.
        num_clusters: `C`.
        key: draws the vectors that the clusters start from.

    Returns:
        Unit vectors, orthogonal to the mean of the unmasked `x`.
    """
    mean = _unit(jnp.sum(jnp.where(mask[:, None], x, 0.0), axis=0))
    units = _unit(x - (x @ mean)[:, None] * mean) * mask[:, None]
    drawn = jnp.where(mask, jax.random.uniform(key, mask.shape), -1.0)
    first = units[jax.lax.top_k(drawn, num_clusters)[1]]

    def improved(_: int, centroids: Float[Array, 'C D']) -> Float[Array, 'C D']:
        nearest = jnp.argmax(units @ centroids.T, axis=-1)
        sums = jax.ops.segment_sum(units, nearest, num_clusters)
        # A cluster that lost all its vectors stays where it was.
        alive = jnp.linalg.norm(sums, axis=-1, keepdims=True) > 0
        return jnp.where(alive, _unit(sums), centroids)

    return jax.lax.fori_loop(0, ROUNDS, improved, first)


def _unit(x: Float[Array, '... D']) -> Float[Array, '... D']:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-20)
