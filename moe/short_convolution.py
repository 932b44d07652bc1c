"""A short causal convolution that stays within documents, and where those documents start."""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@flax.struct.dataclass
class Documents:
    """Where documents start among the new tokens.

    Attributes:
        real: False for padding.
        starts: True for the first token of a document that the cache does not hold.
        run: how many documents have started by then: 0 for the one that the cache holds.
        last: the segment id of the last document; padding leaves it as it is.
    """

    real: Bool[Array, 'B T']
    starts: Bool[Array, 'B T']
    run: Int[Array, 'B T']
    last: Int[Array, 'B']


def find_documents(segment_ids: Int[Array, 'B T'], previous: Int[Array, 'B']) -> Documents:
    """Finds the tokens whose segment is not that of the last token before them, padding aside.

    Args:
        segment_ids: of the new tokens; 0 for padding.
        previous: of the document before them; 0 for none.
    """
    ids = jnp.concatenate([previous[:, None], segment_ids], axis=1)
    index = jnp.where(ids > 0, jnp.arange(ids.shape[1]), 0)
    filled = jnp.take_along_axis(ids, jax.lax.cummax(index, axis=1), axis=1)
    real = segment_ids > 0
    starts = real & (segment_ids != filled[:, :-1])
    return Documents(real, starts, jnp.cumsum(starts, axis=1), filled[:, -1])


def short_convolution(
    x: Float[Array, 'B T *channels'],
    past: Float[Array, 'B past *channels'],
    weight: Float[Array, 'W *channels'],
    documents: Documents,
) -> tuple[Float[Array, 'B T *channels'], Float[Array, 'B past *channels']]:
    """Sums the last `W` tokens of the same document, each channel by itself.

    `y_t = sum over i < W of weight_i x_{t - i}`. A tap on another document or on padding adds
    nothing.

    Args:
        x: zero where padded. Within one call, padding does not stand between two tokens of one
            document.
        past: the `W - 1` tokens before these, of the document that run 0 continues.
        weight: `weight[0]` multiplies the token itself.
        documents: of the tokens of `x`.

    Returns:
        `y`, and the last `W - 1` tokens that are not padding, zero where not of the last document.
    """
    (B, T), W = x.shape[:2], weight.shape[0]
    channels = (1,) * (x.ndim - 2)
    extended = jnp.concatenate([past.astype(x.dtype), x], axis=1)
    runs = jnp.pad(documents.run, ((0, 0), (W - 1, 0)))
    y = jnp.zeros_like(x)
    for i in range(W):
        tap = slice(W - 1 - i, W - 1 - i + T)
        same = (runs[:, tap] == documents.run).reshape(B, T, *channels)
        y += weight[i].astype(x.dtype) * jnp.where(same, extended[:, tap], 0)
    real = jnp.pad(documents.real, ((0, 0), (W - 1, 0)), constant_values=True)
    slots = jax.lax.top_k(jnp.where(real, jnp.arange(W - 1 + T), -1), W - 1)[0][:, ::-1]
    kept = jnp.take_along_axis(extended, slots.reshape(B, W - 1, *channels), axis=1)
    same = jnp.take_along_axis(runs, slots, axis=1) == runs[:, -1:]
    return y, jnp.where(same.reshape(B, W - 1, *channels), kept, 0).astype(past.dtype)
