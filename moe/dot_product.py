"""Scaled dot-product attention that keeps nothing [T, S] for its backward pass but the mask.

Queries are taken in blocks. A causal block leaves out the keys after its last query, and those
before the window of its first, so about half of the products are never made, or more; the backward
pass recomputes the weights of a block from their log-normaliser, so memory between the passes grows
with T, not with T * S.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe.layers import soft_cap

MIN_BLOCK = 64  # smaller blocks skip more keys, but their products are too small to be fast
MAX_BLOCKS = 8  # each is compiled by itself

Residuals = tuple[Any, ...]


def dot_product_attention(
    queries: Float[Array, 'B T H Dk'],
    keys: Float[Array, 'B Hkv Dk S'],
    values: Float[Array, 'B Hkv S Dv'],
    allowed: Bool[Array, '#B T S'],
    *,
    causal: bool,
    scale: float | None = None,
    window: int | None = None,
    score_cap: float | None = None,
    sinks: Float[Array, 'H'] | None = None,
) -> Float[Array, 'B T H Dv']:
    """Returns `softmax(scale q k^T) v`; see `attention_and_highest`, whose first result this is."""
    settings = {'scale': scale, 'window': window, 'score_cap': score_cap, 'sinks': sinks}
    return attention_and_highest(queries, keys, values, allowed, causal=causal, **settings)[0]


def attention_and_highest(
    queries: Float[Array, 'B T H Dk'],
    keys: Float[Array, 'B Hkv Dk S'],
    values: Float[Array, 'B Hkv S Dv'],
    allowed: Bool[Array, '#B T S'],
    *,
    causal: bool,
    scale: float | None = None,
    window: int | None = None,
    score_cap: float | None = None,
    sinks: Float[Array, 'H'] | None = None,
) -> tuple[Float[Array, 'B T H Dv'], Float[Array, 'B T H']]:
    """Returns `softmax(scale q k^T) v`, query head h reading key-value head h // (H / Hkv).

    Keys and values are not repeated for the heads that share them. The softmax is float32.

    Args:
        queries: after RoPE.
        keys: after RoPE.
        values: of the same positions.
        allowed: True where a query may look; every query needs at least one key.
        causal: promises that T = S and that `allowed` is False wherever s > t.
        scale: of the scores; None for `Dk^-0.5`.
        window: promises, where `causal`, that `allowed` is False wherever s <= t - window.
        score_cap: scores become `score_cap tanh(scores / score_cap)`.
        sinks: for each head the logit of one more key, whose value is zero.

    Returns:
        Weighted values, in the dtype of `queries`; and the highest score of each query among the
        keys it may look at, without its sink, float32, which passes no gradient.

    Source: arXiv 2305.13245 (grouped queries); arXiv 2205.14135, appendix B (recomputation).
    """
    B, T, H, Dk = queries.shape
    Hkv = keys.shape[1]
    factor = Dk**-0.5 if scale is None else scale
    grouped = (queries * factor).reshape(B, T, Hkv, H // Hkv, Dk).transpose(0, 2, 3, 1, 4)
    if sinks is not None:
        sinks = sinks.astype(jnp.float32).reshape(Hkv, H // Hkv)
    shape = _Shape(causal, window, score_cap)
    both: Any = _attend(grouped, keys, values, sinks, allowed, shape)
    attended, highest = (x.transpose(0, 3, 1, 2, 4).reshape(B, T, H, -1) for x in both)
    return attended, highest[..., 0]


def laid_out(
    keys: Float[Array, 'B S Hkv Dk'], values: Float[Array, 'B S Hkv Dv']
) -> tuple[Float[Array, 'B Hkv Dk S'], Float[Array, 'B Hkv S Dv']]:
    """Lays keys and values out as the products take them, which otherwise turn them first."""
    return keys.transpose(0, 2, 3, 1), values.transpose(0, 2, 1, 3)


class _Shape(NamedTuple):
    """What is known of the scores when the products are compiled."""

    causal: bool
    window: int | None
    score_cap: float | None

    def blocks(self, T: int, S: int) -> Iterator[tuple[slice, slice]]:
        """Yields blocks of queries, each with the keys that it may look at."""
        size = max(MIN_BLOCK, -(-T // MAX_BLOCKS))
        for start in range(0, T, size):
            stop = min(start + size, T)
            first = 0 if self.window is None else max(0, start - self.window + 1)
            yield slice(start, stop), slice(first, stop) if self.causal else slice(0, S)

    def cap_slope(self, capped: Array) -> Array | float:
        """Returns the derivative of `capped` from its value."""
        return 1.0 if self.score_cap is None else 1.0 - jnp.square(capped / self.score_cap)


def _rows(x: Float[Array, 'B Hkv G T X'], rows: slice) -> Float[Array, 'B Hkv GT X']:
    """Takes a block of queries and flattens it with the heads that share keys: plain matrices."""
    block = x[:, :, :, rows]
    return block.reshape(*block.shape[:2], -1, block.shape[-1])


def _product(spec: str, left: Array, right: Array) -> Array:
    return jnp.einsum(spec, left, right, preferred_element_type=jnp.float32)


def _scores(
    queries: Float[Array, 'B Hkv GT Dk'],
    keys: Float[Array, 'B Hkv Dk S'],
    allowed: Array,
    shape: _Shape,
) -> tuple[Float[Array, 'B Hkv GT S'], Array | float]:
    """Returns the scores, and the derivative of each in the product it comes from."""
    scores = soft_cap(_product('bkqd,bkds->bkqs', queries, keys), shape.score_cap)
    masked = jnp.tile(allowed, (1, queries.shape[2] // allowed.shape[1], 1))[:, None]
    return jnp.where(masked, scores, jnp.finfo(jnp.float32).min), shape.cap_slope(scores)


def _sink_rows(sinks: Float[Array, 'Hkv G'], T: int) -> Float[Array, '1 Hkv GT 1']:
    """Repeats each head's sink for its rows in a block of `T` queries."""
    return jnp.repeat(sinks, T, axis=1)[None, :, :, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(
    queries: Float[Array, 'B Hkv G T Dk'],
    keys: Float[Array, 'B Hkv Dk S'],
    values: Float[Array, 'B Hkv S Dv'],
    sinks: Float[Array, 'Hkv G'] | None,
    allowed: Bool[Array, '#B T S'],
    shape: _Shape,
) -> tuple[Float[Array, 'B Hkv G T Dv'], Float[Array, 'B Hkv G T 1']]:
    return _attend_forward(queries, keys, values, sinks, allowed, shape)[0]


def _attend_forward(
    queries: Array,
    keys: Array,
    values: Array,
    sinks: Array | None,
    allowed: Array,
    shape: _Shape,
) -> tuple[tuple[Array, Array], Residuals]:
    heads = (*queries.shape[:3], -1)
    outputs, highests, log_normalisers = [], [], []
    for rows, columns in shape.blocks(queries.shape[3], values.shape[2]):
        k, v = keys[..., columns], values[:, :, columns]
        scores, _ = _scores(_rows(queries, rows), k, allowed[:, rows, columns], shape)
        highest = scores.max(axis=-1, keepdims=True)
        highests.append(highest.reshape(*heads, 1))
        if sinks is not None:
            sink = _sink_rows(sinks, rows.stop - rows.start)
            highest = jnp.maximum(highest, sink)
        weights = jnp.exp(scores - highest)
        total = weights.sum(axis=-1, keepdims=True)
        if sinks is not None:
            total += jnp.exp(sink - highest)
        output = _product('bkqs,bksd->bkqd', weights.astype(v.dtype), v) / total
        outputs.append(output.astype(v.dtype).reshape(*heads, v.shape[-1]))
        log_normalisers.append((highest + jnp.log(total)).reshape(*heads, 1))
    output = jnp.concatenate(outputs, axis=3)
    log_normaliser = jnp.concatenate(log_normalisers, axis=3)
    highest = jnp.concatenate(highests, axis=3)
    return (output, highest), (queries, keys, values, sinks, allowed, output, log_normaliser)


def _attend_backward(
    shape: _Shape, residuals: Residuals, cotangents: tuple[Array, Array]
) -> tuple[Array, Array, Array, Array | None, None]:
    queries, keys, values, sinks, allowed, output, log_normaliser = residuals
    cotangent, _ = cotangents
    inner = cotangent.astype(jnp.float32) * output.astype(jnp.float32)
    inner = inner.sum(axis=-1, keepdims=True)
    d_queries = []
    d_keys = jnp.zeros(keys.shape, jnp.float32)
    d_values = jnp.zeros(values.shape, jnp.float32)
    for rows, columns in shape.blocks(queries.shape[3], values.shape[2]):
        k, v = keys[..., columns], values[:, :, columns]
        q, d_output = _rows(queries, rows), _rows(cotangent, rows)
        scores, slope = _scores(q, k, allowed[:, rows, columns], shape)
        weights = jnp.exp(scores - _rows(log_normaliser, rows))
        d_weights = _product('bkqd,bksd->bkqs', d_output, v)
        d_scores = (weights * (d_weights - _rows(inner, rows)) * slope).astype(q.dtype)
        d_query = _product('bkqs,bkds->bkqd', d_scores, k)
        d_queries.append(d_query.reshape(*queries.shape[:3], -1, q.shape[-1]))
        d_keys = d_keys.at[..., columns].add(_product('bkqd,bkqs->bkds', q, d_scores))
        weights = weights.astype(v.dtype)
        d_values = d_values.at[:, :, columns].add(_product('bkqs,bkqd->bksd', weights, d_output))
    d_query = jnp.concatenate(d_queries, axis=3).astype(queries.dtype)
    d_sinks = None
    if sinks is not None:
        # The sink's value is zero: only its weight, which takes from all others, has a gradient.
        weights = jnp.exp(sinks[:, :, None, None] - log_normaliser)
        d_sinks = -(weights * inner).sum(axis=(0, 3, 4))
    return d_query, d_keys.astype(keys.dtype), d_values.astype(values.dtype), d_sinks, None


_attend.defvjp(_attend_forward, _attend_backward)
