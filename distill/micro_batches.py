"""Micro-batches: the parts of a batch, what is summed over them, and the model on one of them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from distill.foreign_teacher import SharedCounts
from distill.projectors import without_projectors
from distill.recipe import Recipe
from distill.types import Batch, TrainState
from moe.mtp import same_segment_ahead
from moe.types import ModelOutput


@flax.struct.dataclass
class Part:
    """One micro-batch and its number."""

    batch: Batch
    number: Int[Array, '']


@flax.struct.dataclass
class Whole:
    """What a micro-batch's share of the loss takes from the whole batch.

    Attributes:
        tokens: unmasked, at least 1.
        routed: tokens that are not padding, at least 1.
        load: assignments to each expert; None where no loss needs it.
        written: unmasked tokens by each writer; None where all is text.
        shared: with a teacher of another tokenizer; None without one.
    """

    tokens: Float[Array, '']
    routed: Float[Array, '']
    load: Float[Array, 'layers E'] | None
    written: Float[Array, 'writers'] | None
    shared: SharedCounts | None


@flax.struct.dataclass
class Totals:
    """Sums over the tokens of one micro-batch, or of a whole batch."""

    loss: Float[Array, '']
    pairs: dict[str, tuple[Float[Array, ''], Float[Array, '']]]
    load: Float[Array, 'layers E'] | None = None
    dropped: Float[Array, 'layers'] | None = None
    confidence: tuple[Float[Array, 'layers'], Float[Array, 'layers']] | None = None


def over_parts(function: Callable[[Part], tuple[Any, Any]], parts: Part) -> tuple[Any, Any]:
    """Sums the first of what the function returns of a micro-batch, one of them at a time.

    Of the second it takes the maximum.
    """
    first = jax.tree.map(lambda x: x[0], parts)
    if parts.number.size == 1:
        return function(first)
    sums, maxima = jax.eval_shape(function, first)
    start = (
        jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums),
        jax.tree.map(lambda x: jnp.full(x.shape, -jnp.inf, x.dtype), maxima),
    )

    def add(total: tuple[Any, Any], part: Part) -> tuple[tuple[Any, Any], None]:
        sums, maxima = function(part)
        summed = jax.tree.map(jnp.add, total[0], sums)
        return (summed, jax.tree.map(jnp.maximum, total[1], maxima)), None

    return jax.lax.scan(add, start, parts)[0]


def forward(
    recipe: Recipe, params: Any, state: TrainState, part: Part, noted: Sequence[str]
) -> tuple[ModelOutput, Mapping[str, Any]]:
    """Runs the model on one micro-batch, with the noise that its routers are trained with.

    Returns:
        The output, and the collections that were to be noted, by name.
    """
    model, batch = recipe.model, part.batch
    rngs = {}
    if model.config.moe is not None and model.config.moe.router.jitter > 0:
        step_key = jax.random.fold_in(jax.random.key(recipe.seed), state.step)
        rngs = {'jitter': jax.random.fold_in(step_key, part.number)}
    result: Any = model.apply(
        {'params': without_projectors(params), 'routing': state.routing},
        batch.tokens,
        positions=batch.positions,
        segment_ids=batch.segment_ids,
        logits=False,
        mtp=model.config.mtp_depth > 0,
        rngs=rngs,
        mutable=list(noted) or False,
    )
    return result if noted else (result, {})


def router_masks(output: ModelOutput, segment_ids: Array) -> list[Array]:
    """Marks the tokens that each of `ModelOutput.all_routers` routed."""
    masks = [segment_ids > 0] * len(output.router)
    for distance, module in enumerate(output.ahead, start=1):
        masks += [same_segment_ahead(segment_ids, distance)] * len(module.router)
    return masks


def loads(output: ModelOutput) -> Float[Array, 'layers E']:
    return jnp.stack([router.load for router in output.all_routers])
