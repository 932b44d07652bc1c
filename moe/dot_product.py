"""Scaled dot-product attention that keeps no [T, S] array for its backward pass.

Queries are taken in blocks. A causal block leaves out the keys after its last query, so about half
of the products are never made; the backward pass recomputes the weights of a block from their
log-normaliser, so memory between the passes grows with T, not with T * S.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

MIN_BLOCK = 64  # smaller blocks skip more keys, but their products are too small to be fast
MAX_BLOCKS = 8  # each is compiled by itself

Residuals = tuple[Array, ...]


def dot_product_attention(
    queries: Float[Array, 'B T H Dh'],
    keys: Float[Array, 'B S Hkv Dh'],
    values: Float[Array, 'B S Hkv Dh'],
    allowed: Bool[Array, '#B T S'],
    *,
    causal: bool,
) -> Float[Array, 'B T H Dh']:
    """Returns `softmax(q k^T / sqrt(Dh)) v`, query head h reading key-value head h // (H / Hkv).

    Keys and values are not repeated for the heads that share them. The softmax is float32.

    Args:
        queries: after RoPE.
        keys: after RoPE.
        values: of the same positions.
        allowed: True where a query may look; every query needs at least one key.
        causal: promises that T = S and that `allowed` is False wherever s > t.

    Returns:
        Weighted values, in the dtype of `queries`.

    Source: arXiv 2305.13245 (grouped queries); arXiv 2205.14135, appendix B (recomputation).
    """
    B, T, H, Dh = queries.shape
    Hkv = keys.shape[2]
    grouped = (queries * Dh**-0.5).reshape(B, T, Hkv, H // Hkv, Dh).transpose(0, 2, 3, 1, 4)
    keys, values = (x.transpose(0, 2, 1, 3) for x in (keys, values))
    attended: Any = _attend(grouped, keys, values, allowed, causal)
    return attended.transpose(0, 3, 1, 2, 4).reshape(B, T, H, Dh)


def _blocks(T: int, S: int, causal: bool) -> Iterator[tuple[slice, slice]]:
    """Yields blocks of queries, each with the keys that it may look at."""
    size = max(MIN_BLOCK, -(-T // MAX_BLOCKS))
    for start in range(0, T, size):
        stop = min(start + size, T)
        yield slice(start, stop), slice(0, stop if causal else S)


def _rows(x: Float[Array, 'B Hkv G T X'], rows: slice) -> Float[Array, 'B Hkv GT X']:
    """Takes a block of queries and flattens it with the heads that share keys: plain matrices."""
    block = x[:, :, :, rows]
    return block.reshape(*block.shape[:2], -1, block.shape[-1])


def _product(spec: str, left: Array, right: Array) -> Array:
    return jnp.einsum(spec, left, right, preferred_element_type=jnp.float32)


def _scores(
    queries: Float[Array, 'B Hkv GT Dh'], keys: Float[Array, 'B Hkv S Dh'], allowed: Array
) -> Float[Array, 'B Hkv GT S']:
    scores = _product('bkqd,bksd->bkqs', queries, keys)
    allowed = jnp.tile(allowed, (1, queries.shape[2] // allowed.shape[1], 1))
    return jnp.where(allowed[:, None], scores, jnp.finfo(jnp.float32).min)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(
    queries: Float[Array, 'B Hkv G T Dh'],
    keys: Float[Array, 'B Hkv S Dh'],
    values: Float[Array, 'B Hkv S Dh'],
    allowed: Bool[Array, '#B T S'],
    causal: bool,
) -> Float[Array, 'B Hkv G T Dh']:
    return _attend_forward(queries, keys, values, allowed, causal)[0]


def _attend_forward(
    queries: Array, keys: Array, values: Array, allowed: Array, causal: bool
) -> tuple[Array, Residuals]:
    shape = (*queries.shape[:3], -1)
    outputs, log_normalisers = [], []
    for rows, columns in _blocks(queries.shape[3], keys.shape[2], causal):
        k, v = keys[:, :, columns], values[:, :, columns]
        scores = _scores(_rows(queries, rows), k, allowed[:, rows, columns])
        highest = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - highest)
        total = weights.sum(axis=-1, keepdims=True)
        output = _product('bkqs,bksd->bkqd', weights.astype(v.dtype), v) / total
        outputs.append(output.astype(v.dtype).reshape(*shape, v.shape[-1]))
        log_normalisers.append((highest + jnp.log(total)).reshape(*shape, 1))
    output = jnp.concatenate(outputs, axis=3)
    log_normaliser = jnp.concatenate(log_normalisers, axis=3)
    return output, (queries, keys, values, allowed, output, log_normaliser)


def _attend_backward(
    causal: bool, residuals: Residuals, cotangent: Array
) -> tuple[Array, Array, Array, None]:
    queries, keys, values, allowed, output, log_normaliser = residuals
    inner = cotangent.astype(jnp.float32) * output.astype(jnp.float32)
    inner = inner.sum(axis=-1, keepdims=True)
    d_queries = []
    d_keys = jnp.zeros(keys.shape, jnp.float32)
    d_values = jnp.zeros(values.shape, jnp.float32)
    for rows, columns in _blocks(queries.shape[3], keys.shape[2], causal):
        k, v = keys[:, :, columns], values[:, :, columns]
        q, d_output = _rows(queries, rows), _rows(cotangent, rows)
        scores = _scores(q, k, allowed[:, rows, columns])
        weights = jnp.exp(scores - _rows(log_normaliser, rows))
        d_weights = _product('bkqd,bksd->bkqs', d_output, v)
        d_scores = (weights * (d_weights - _rows(inner, rows))).astype(q.dtype)
        d_query = _product('bkqs,bksd->bkqd', d_scores, k)
        d_queries.append(d_query.reshape(*queries.shape[:3], -1, q.shape[-1]))
        d_keys = d_keys.at[:, :, columns].add(_product('bkqs,bkqd->bksd', d_scores, q))
        weights = weights.astype(v.dtype)
        d_values = d_values.at[:, :, columns].add(_product('bkqs,bkqd->bksd', weights, d_output))
    d_query = jnp.concatenate(d_queries, axis=3).astype(queries.dtype)
    return d_query, d_keys.astype(keys.dtype), d_values.astype(values.dtype), None


_attend.defvjp(_attend_forward, _attend_backward)
