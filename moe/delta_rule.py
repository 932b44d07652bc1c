"""The gated delta rule: an associative memory that forgets by channel and overwrites by key.

The recurrence is the definition. The chunked form says the same with matrix products: tokens within
a chunk meet through triangular matrices, chunks through the state that a scan carries.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

CHUNK_SIZE = 64


def recurrent_delta_rule(
    queries: Float[Array, 'B T H Dk'],
    keys: Float[Array, 'B T H Dk'],
    values: Float[Array, 'B T H Dv'],
    log_decay: Float[Array, 'B T H #Dk'],
    beta: Float[Array, 'B T H'],
    state: Float[Array, 'B H Dk Dv'] | None = None,
) -> tuple[Float[Array, 'B T H Dv'], Float[Array, 'B H Dk Dv']]:
    """Runs the recurrence a token at a time.

    `S_t = (I - beta_t k_t k_t^T) Diag(exp(log_decay_t)) S_{t-1} + beta_t k_t v_t^T`, read out as
    `S_t^T q_t`: the memory decays, then its answer to `k_t` moves by the share `beta_t` to `v_t`.

    Args:
        queries: scaled by the caller.
        keys: at most of length one, or the state may grow without bound where beta is near 1.
        values: what is stored.
        log_decay: zero or less; one for each key channel, or one for a whole head (last axis 1).
            -inf forgets all that came before: a new document.
        beta: the step, in [0, 1]; 0 writes nothing.
        state: before the first token; None is all zeros.

    Returns:
        The outputs in the dtype of `values`, and the state after the last token, float32 at least.

    Source: arXiv 2510.26692, section 3 (Kimi Delta Attention); with one decay a head, arXiv
        2412.06464, equation 10 (Gated DeltaNet).
    """
    inputs, state = _promote(queries, keys, values, log_decay, beta, state=state)

    def step(state: Array, token: tuple[Array, ...]) -> tuple[Array, Array]:
        q, k, v, g, b = token
        state = jnp.exp(g)[..., None] * state
        error = v - jnp.einsum('bhkv,bhk->bhv', state, k)
        state = state + jnp.einsum('bhk,bhv->bhkv', k, b[..., None] * error)
        return state, jnp.einsum('bhkv,bhk->bhv', state, q)

    state, outputs = jax.lax.scan(step, state, tuple(jnp.moveaxis(x, 1, 0) for x in inputs))
    return jnp.moveaxis(outputs, 0, 1).astype(values.dtype), state


def chunked_delta_rule(
    queries: Float[Array, 'B T H Dk'],
    keys: Float[Array, 'B T H Dk'],
    values: Float[Array, 'B T H Dv'],
    log_decay: Float[Array, 'B T H #Dk'],
    beta: Float[Array, 'B T H'],
    state: Float[Array, 'B H Dk Dv'] | None = None,
    *,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Float[Array, 'B T H Dv'], Float[Array, 'B H Dk Dv']]:
    """Computes what `recurrent_delta_rule` does, with matrix products and `T / C` sequential steps.

    Within a chunk let `G_t` be the log decay summed up to t, `u_t` what token t writes at `k_t`,
    and `S` the state before it. With `A_tj = beta_t k_t^T Diag(exp(G_t - G_j)) k_j` for j < t,

        (I + A) U = Diag(beta) (V - (exp(G) * K) S)
        O = (exp(G) * Q) S + P U,    P_tj = q_t^T Diag(exp(G_t - G_j)) k_j for j <= t
        S' = Diag(exp(G_C)) S + (exp(G_C - G) * K)^T U

    No exponent is ever positive, and none is a difference of sums: see `decayed_products`.

    Args:
        queries: as in `recurrent_delta_rule`, like all the arrays.
        keys: likewise.
        values: likewise.
        log_decay: likewise.
        beta: likewise.
        state: likewise.
        chunk_size: `C`, a power of two; a shorter row takes a smaller one. Any `T` will do.

    Returns:
        As `recurrent_delta_rule`. The backward pass recomputes what is within the chunks.

    Raises:
        ValueError: where `chunk_size` is not a power of two.

    Source: arXiv 2510.26692, section 3, and arXiv 2412.06464, equations 6 to 9 (UT transform). The
        first divides keys by `exp(G_j)`, and needs chunks within chunks to keep that in range.
    """
    if chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise ValueError(f'chunk_size must be a power of two; received {chunk_size}.')
    T = values.shape[1]
    inputs, state = _promote(queries, keys, values, log_decay, beta, state=state)
    size = min(chunk_size, 1 << (T - 1).bit_length())
    chunks = jax.checkpoint(_within_chunks)(*(_split(x, size) for x in inputs))

    def step(state: Array, chunk: tuple[Array, ...]) -> tuple[Array, Array]:
        written, answered, products, decayed_queries, decayed_keys, decay = chunk
        written = written - answered @ state
        outputs = decayed_queries @ state + products @ written
        state = jnp.exp(decay)[..., None] * state + decayed_keys.mT @ written
        return state, outputs

    state, outputs = jax.lax.scan(step, state, chunks)
    outputs = outputs.transpose(1, 0, 3, 2, 4)  # [N, B, H, C, Dv] -> [B, N, C, H, Dv]
    outputs = outputs.reshape(outputs.shape[0], -1, *outputs.shape[3:])
    return outputs[:, :T].astype(values.dtype), state


def _promote(*inputs: Array, state: Array | None) -> tuple[list[Array], Array]:
    """Casts all to float32, or to what is wider, and fills in the state."""
    queries, _, values = inputs[:3]
    dtype = jnp.promote_types(jnp.result_type(*inputs), jnp.float32)
    if state is None:
        B, _, H, Dk = queries.shape
        state = jnp.zeros((B, H, Dk, values.shape[-1]), dtype)
    return [x.astype(dtype) for x in inputs], state.astype(dtype)


def _split(x: Float[Array, 'B T H *rest'], size: int) -> Float[Array, 'N B H C *rest']:
    """Parts the tokens into chunks; the zeros that fill the last one neither decay nor write."""
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 2))
    x = x.reshape(x.shape[0], -1, size, *x.shape[2:])
    return x.transpose(1, 0, 3, 2, *range(4, x.ndim))


def _within_chunks(
    queries: Float[Array, '*N C Dk'],
    keys: Float[Array, '*N C Dk'],
    values: Float[Array, '*N C Dv'],
    log_decay: Float[Array, '*N C #Dk'],
    beta: Float[Array, '*N C'],
) -> tuple[Array, ...]:
    """Computes for every chunk at once what does not depend on the state."""
    steps = beta[..., None]
    (answers, overlaps), before, after = decayed_products((queries, steps * keys), keys, log_decay)
    products = lower_triangle(answers, jnp.sum(queries * keys, axis=-1))
    inverse = unit_lower_inverse(overlaps, beta)
    decayed_queries, decayed_keys = (jnp.exp(before) * x for x in (queries, keys))
    written = inverse @ (steps * values)
    answered = inverse @ (steps * decayed_keys)
    return written, answered, products, decayed_queries, jnp.exp(after) * keys, before[..., -1, :]


def decayed_products(
    rows: tuple[Float[Array, '*N C Dk'], ...],
    keys: Float[Array, '*N C Dk'],
    log_decay: Float[Array, '*N C #Dk'],
) -> tuple[
    list[list[Float[Array, '*N n h h']]], Float[Array, '*N C #Dk'], Float[Array, '*N C #Dk']
]:
    """Multiplies rows by earlier keys, with the decay between the two.

    The pairs j < t are covered by blocks that double in size: of 2 h adjacent tokens, the last h
    are rows and the first h are keys. A row decays by the sum from the middle to itself, a key by
    the sum from itself to the middle. Both sums are of numbers that are zero or less, and neither
    is a difference of longer sums: nothing overflows, no digits cancel, and -inf is as good as any.

    Args:
        rows: of each kind, one for each token.
        keys: of the same tokens.
        log_decay: zero or less.

    Returns:
        For each kind of rows, blocks of `row_t^T Diag(exp(sum of log_decay over j < s <= t)) key_j`
        for h = 1, 2, ... C / 2, `n = C / 2 h` of each; the log decay from the start of the chunk
        through each token; and the log decay after each token to the end of the chunk.
    """
    before, after = _blocks(log_decay, 1), _blocks(jnp.zeros_like(log_decay), 1)
    # One product for each kind: XLA for CPUs crashes in the transpose of a stacked one (jax 0.10).
    products: list[list[Array]] = [[] for _ in rows]
    while (h := before.shape[-2]) < keys.shape[-2]:
        (before_first, before_second), (after_first, after_second) = _pairs(before), _pairs(after)
        early = (_pairs(_blocks(keys, h))[0] * jnp.exp(after_first)).mT
        for of_kind, kind in zip(products, rows, strict=True):
            late = _pairs(_blocks(kind, h))[1] * jnp.exp(before_second)
            of_kind.append(late @ early)
        first, second = before_first[..., -1:, :], before_second[..., -1:, :]
        before = jnp.concatenate([before_first, first + before_second], axis=-2)
        after = jnp.concatenate([after_first + second, after_second], axis=-2)
    return products, before[..., 0, :, :], after[..., 0, :, :]


def lower_triangle(
    blocks: list[Float[Array, '*N n h h']], diagonal: Float[Array, '*N C']
) -> Float[Array, '*N C C']:
    """Builds the lower triangular matrix of a diagonal and of the blocks below it.

    Args:
        blocks: for h = 1, 2, ... C / 2 the `n = C / 2 h` lower left quarters of the blocks of width
            2 h along the diagonal.
        diagonal: of the matrix.
    """
    matrix = diagonal[..., None, None]
    for block in blocks:
        first, second = _pairs(matrix)
        matrix = _join(first, block, second)
    return matrix[..., 0, :, :]


def unit_lower_inverse(
    blocks: list[Float[Array, '*N n h h']], like: Float[Array, '*N C']
) -> Float[Array, '*N C C']:
    """Inverts a matrix of ones on the diagonal and, below it, the blocks of `lower_triangle`.

    `[[L, 0], [X, M]]^-1 = [[L^-1, 0], [-M^-1 X L^-1, M^-1]]`, from blocks of width one upwards:
    matrix products alone, `log2 C` pairs of them in a row, where substitution takes `C` steps.

    Args:
        blocks: as in `lower_triangle`.
        like: whose shape and dtype the diagonal has.
    """
    inverse = jnp.ones_like(like)[..., None, None]
    for block in blocks:
        first, second = _pairs(inverse)
        inverse = _join(first, -(second @ block @ first), second)
    return inverse[..., 0, :, :]


def _blocks(x: Float[Array, '*N C d'], h: int) -> Float[Array, '*N n h d']:
    return x.reshape(*x.shape[:-2], -1, h, x.shape[-1])


def _pairs(x: Float[Array, '*N n h d']) -> tuple[Array, Array]:
    """Takes adjacent blocks apart: the first and the second of each two."""
    pairs = x.reshape(*x.shape[:-3], -1, 2, *x.shape[-2:])
    return pairs[..., 0, :, :], pairs[..., 1, :, :]


def _join(
    upper_left: Float[Array, '*N n h h'],
    lower_left: Float[Array, '*N n h h'],
    lower_right: Float[Array, '*N n h h'],
) -> Float[Array, '*N n w w']:
    upper = jnp.concatenate([upper_left, jnp.zeros_like(upper_left)], axis=-1)
    lower = jnp.concatenate([lower_left, lower_right], axis=-1)
    return jnp.concatenate([upper, lower], axis=-2)
