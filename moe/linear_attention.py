"""Kimi Delta Attention: attention whose memory is one matrix a head, whatever the length."""

import functools
import math
from collections.abc import Callable
from typing import Protocol

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moe.config import DType
from moe.delta_rule import chunked_delta_rule
from moe.layers import RMSNorm, kernel_init, linear, partitioned
from moe.linear_config import LinearAttentionConfig
from moe.quantised import Kernel, stored_kernel
from moe.sharding import LogicalAxes, constrain
from moe.short_convolution import Documents, find_documents, short_convolution

HEADS = ('batch', 'length', 'heads', 'head_dim')
L2_EPS = 1e-6


@flax.struct.dataclass
class LinearCache:
    """What one layer keeps of the tokens so far; its size does not grow with them.

    Attributes:
        state: the memory of the last document, float32.
        conv: the last inputs of the short convolution, oldest first; zeros before the document.
        segment: id of the last document; 0 before the first token.
    """

    state: Float[Array, 'B H Dk Dv']
    conv: Float[Array, 'B past H conv']
    segment: Int[Array, 'B']


class SegmentContext(Protocol):
    """What the layer reads of the context that all layers share."""

    @property
    def segment_ids(self) -> Int[Array, 'B T'] | None:
        """Documents of the new tokens, 0 for padding; None where a row is one document."""


def empty_linear_cache(config: LinearAttentionConfig, batch: int, dtype: DTypeLike) -> LinearCache:
    """Returns one layer's cache before the first token.

    Args:
        config: the layer's.
        batch: `B`.
        dtype: of the activations.
    """
    H, Dk, Dv = config.num_heads, config.key_dim, config.value_dim
    return LinearCache(
        state=jnp.zeros((batch, H, Dk, Dv), jnp.float32),
        conv=jnp.zeros((batch, config.conv_width - 1, H, 2 * Dk + Dv), dtype),
        segment=jnp.zeros(batch, jnp.int32),
    )


def unit_vectors(x: Float[Array, '*batch d']) -> Float[Array, '*batch d']:
    """Divides by the Euclidean length over the last axis, in float32."""
    wide = x.astype(jnp.float32)
    return wide * jax.lax.rsqrt(jnp.sum(jnp.square(wide), axis=-1, keepdims=True) + L2_EPS)


def log_rate(key: Array, shape: tuple[int, ...], dtype: DType) -> Array:
    """Draws logarithms of rates that are uniform in [1, 16): heads forget at different speeds."""
    return jnp.log(jax.random.uniform(key, shape, minval=1.0, maxval=16.0)).astype(dtype)


def step_bias(key: Array, shape: tuple[int, ...], dtype: DType) -> Array:
    """Draws biases whose softplus lies in [0.001, 0.1), uniform in its logarithm.

    Times the rates, a new memory fades over 1 to 1000 tokens.

    Source: arXiv 2405.21060 (Mamba-2).
    """
    uniform = jax.random.uniform(key, shape, minval=math.log(0.001), maxval=math.log(0.1))
    step = jnp.exp(uniform)
    return (step + jnp.log(-jnp.expm1(-step))).astype(dtype)


class LinearAttention(nn.Module):
    """Writes each token's value into a memory at its key, and reads it at its query.

    Queries, keys and values pass a short convolution and SiLU; queries and keys are then divided by
    their length. Key channel c of head h decays by
    `exp(-exp(log_rate_h) softplus(x decay_in decay_out + decay_bias)_hc)`, and beta is
    `sigmoid(x beta)`. What is read is normalised, each head by itself, and multiplied by
    `sigmoid(x gate_in gate_out)`. There are no positions: the decay tells the order.

    Attributes:
        config: the layer's.
        norm_eps: of the output norm.
        param_dtype: of the stored parameters; the recurrence itself is float32.
        mesh: constrains heads where given.

    Source: arXiv 2510.26692, section 4.
    """

    config: LinearAttentionConfig
    norm_eps: float
    param_dtype: DType = 'float32'
    mesh: jax.sharding.Mesh | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, 'B T D'], cache: LinearCache | None, context: SegmentContext
    ) -> tuple[Float[Array, 'B T D'], LinearCache | None]:
        B, T, D = x.shape
        H, Dv = self.config.num_heads, self.config.value_dim
        segments = context.segment_ids
        if segments is None:
            segments = jnp.ones((B, T), jnp.int32)
        past = empty_linear_cache(self.config, B, x.dtype) if cache is None else cache
        documents = find_documents(segments, past.segment)
        x = jnp.where(documents.real[..., None], x, 0)
        queries, keys, values, conv = self._convolved(x, past.conv, documents)
        log_decay, beta = self._gates(x, documents)
        read, state = chunked_delta_rule(queries, keys, values, log_decay, beta, past.state)
        read = constrain(read.astype(x.dtype), HEADS, self.mesh)
        normed = RMSNorm(self.norm_eps, self.param_dtype, ('head_dim',), name='o_norm')(read)
        gated = normed * jax.nn.sigmoid(self._low_rank(x, 'gate', Dv))
        gated = jnp.where(documents.real[..., None, None], gated, 0)
        kernel = self._matrix('o', kernel_init((0, 1), 2), (H, Dv, D), (*HEADS[2:], 'embed'), 1)
        if cache is not None:
            state = constrain(state, ('batch', 'heads', None, None), self.mesh)
            cache = LinearCache(state, conv, documents.last)
        return linear(gated, kernel), cache

    def _convolved(
        self, x: Array, past: Array, documents: Documents
    ) -> tuple[Array, Array, Array, Array]:
        """Projects to queries, keys and values, and convolves all three at once."""
        H, Dk, Dv = self.config.num_heads, self.config.key_dim, self.config.value_dim
        widths = {'q': Dk, 'k': Dk, 'v': Dv}
        projected = jnp.concatenate([self._project(x, n, w) for n, w in widths.items()], axis=-1)
        shape = (self.config.conv_width, H, 2 * Dk + Dv)
        weight = self._kernel('conv', kernel_init(0, (), (1, 2)), shape, (None, *HEADS[2:]))
        mixed, past = short_convolution(projected, past, weight, documents)
        queries, keys, values = jnp.split(jax.nn.silu(mixed), (Dk, 2 * Dk), axis=-1)
        return unit_vectors(queries) * Dk**-0.5, unit_vectors(keys), values, past

    def _gates(self, x: Array, documents: Documents) -> tuple[Array, Array]:
        """Returns log decay and beta; padding neither decays nor writes, a new document forgets."""
        H, Dk = self.config.num_heads, self.config.key_dim
        rate = self._kernel('log_rate', log_rate, (H,), ('heads',))
        bias = self._kernel('decay_bias', step_bias, (H, Dk), HEADS[2:])
        steps = self._low_rank(x, 'decay', Dk).astype(jnp.float32) + bias.astype(jnp.float32)
        log_decay = -jnp.exp(rate.astype(jnp.float32))[:, None] * jax.nn.softplus(steps)
        log_decay = jnp.where(documents.real[..., None, None], log_decay, 0)
        log_decay = jnp.where(documents.starts[..., None, None], -jnp.inf, log_decay)
        beta = linear(
            x, self._matrix('beta', kernel_init(0, 1), (x.shape[-1], H), ('embed', 'heads'), 1)
        )
        beta = jnp.where(documents.real[..., None], jax.nn.sigmoid(beta.astype(jnp.float32)), 0)
        return log_decay, beta

    def _project(self, x: Array, name: str, width: int) -> Array:
        shape = (x.shape[-1], self.config.num_heads, width)
        kernel = self._matrix(name, kernel_init(0, (1, 2)), shape, ('embed', *HEADS[2:]), 2)
        return constrain(linear(x, kernel), HEADS, self.mesh)

    def _low_rank(self, x: Array, name: str, width: int) -> Array:
        rank = self.config.gate_rank
        shape = (rank, self.config.num_heads, width)
        inner = (x.shape[-1], rank)
        down = self._matrix(f'{name}_in', kernel_init(0, 1), inner, ('embed', None), 1)
        up = self._matrix(f'{name}_out', kernel_init(0, (1, 2)), shape, (None, *HEADS[2:]), 2)
        return constrain(linear(linear(x, down), up), HEADS, self.mesh)

    def _kernel(
        self,
        name: str,
        init: Callable[..., Array],
        shape: tuple[int, ...],
        axes: LogicalAxes,
    ) -> Array:
        return self.param(name, partitioned(init, axes), shape, self.param_dtype)

    def _matrix(
        self,
        name: str,
        init: Callable[..., Array],
        shape: tuple[int, ...],
        axes: LogicalAxes,
        outputs: int,
    ) -> Kernel:
        read = functools.partial(self._kernel, name, init, shape, axes)
        return stored_kernel(self, name, read, outputs)
