"""Training that is aware of quantisation: the forward pass sees what will be served, by qwix.

    forward: W' = dequantize(quantize(W)),    backward: dL/dW = dL/dW'

The matrices are those that `moe.quantising.quantise` rounds, to the same numbers; the optimizer
keeps and moves the floats. qwix is the extra `quant`.

Source: straight-through estimator, arXiv 1308.3432, section 4. No number is outside of the range
that its scale is taken from, so no gradient is clipped.
"""

import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe.errors import InputError
from moe.quantised import FORMATS, Format, Matrix, Weights
from moe.quantising import matrix_shapes
from moe.transformer import Transformer

Params = Mapping[str, Any]


def straight_through(model: Transformer, weights: Weights) -> Callable[[Params], Params]:
    """Returns the map from trained parameters to those that a forward pass is to see.

    Args:
        model: whose parameters they are; its mesh may be any.
        weights: a key of `moe.quantised.FORMATS`.

    Returns:
        A pure function, differentiable straight through. Of a tied model it returns a head besides:
        logits see it rounded, while tokens look up the embedding as it is.

    Raises:
        InputError: where qwix is not installed, or experts are stored one by one.
    """
    qwix, matrices = require_qwix(), matrix_shapes(model)

    def seen(params: Params) -> Params:
        if model.config.tie_embeddings:
            params = {**params, 'head': {'kernel': params['embed']['embedding'].T}}
        return _over(params, matrices)

    def _over(params: Params, matrices: Params) -> Params:
        return {name: _one(leaf, matrices.get(name)) for name, leaf in params.items()}

    def _one(leaf: Any, matrix: Any) -> Any:
        if isinstance(matrix, Matrix):
            form = FORMATS[weights][matrix.kind]
            return _through(functools.partial(_rounded, qwix, form, matrix), leaf)
        return leaf if matrix is None else _over(leaf, matrix)

    return seen


def require_qwix() -> Any:
    """Returns the library, or says which extra it comes with."""
    try:
        return importlib.import_module('qwix')
    except ImportError as error:
        raise InputError(
            'Training that is aware of quantisation needs qwix, which is not installed; it comes '
            "with the extra 'quant': pip install 'fractional[quant]'."
        ) from error


def _rounded(
    qwix: Any, form: Format, matrix: Matrix, kernel: Float[Array, '*kernel']
) -> Float[Array, '*kernel']:
    """Rounds a kernel [*batch, *inputs, *outputs] that `matrix` stands for."""
    inputs = range(matrix.batch_axes, kernel.ndim - matrix.outputs)
    others = tuple(axis for axis in range(kernel.ndim) if axis not in inputs)
    count = matrix.floats.shape[-1]
    size = form.group_size(count)
    tiles = {} if size == count else {inputs[-1]: size}
    narrow = qwix.quantize(
        kernel.astype(jnp.float32),
        jnp.dtype(form.dtype),
        channelwise_axes=others,
        tiled_axes=tiles,
    )
    return qwix.dequantize(narrow).astype(kernel.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _through(function: Callable[[Array], Array], x: Array) -> Array:
    return function(x)


def _forward(function: Callable[[Array], Array], x: Array) -> tuple[Array, None]:
    return function(x), None


def _backward(function: Callable[[Array], Array], _: None, cotangent: Array) -> tuple[Array]:
    return (cotangent,)


_through.defvjp(_forward, _backward)
