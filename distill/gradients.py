"""The gradients of a whole batch, one micro-batch at a time."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from distill.foreign_teacher import ForeignTeacher, SharedCounts
from distill.micro_batches import Part, Totals, Whole, forward, loads, over_parts
from distill.part_loss import part_loss
from distill.partwise import split_rows
from distill.recipe import Recipe
from distill.types import Batch, TrainState
from distill.writers import tokens_by_writer


def batch_gradients(
    recipe: Recipe, state: TrainState, teacher: Any, batch: Batch
) -> tuple[Any, Totals, Any]:
    """Returns the whole batch's gradients, sums and largest logits, one micro-batch at a time."""
    count = recipe.train.micro_batches
    parts = Part(split_rows(batch, count), jnp.arange(count))
    # A batch of padding alone has nothing to average over, and a loss of zero.
    whole = Whole(
        tokens=jnp.maximum(jnp.sum(batch.mask, dtype=jnp.float32), 1),
        routed=jnp.maximum(jnp.sum(batch.segment_ids > 0, dtype=jnp.float32), 1),
        load=_whole_load(recipe, state, parts),
        written=None if batch.writers is None else tokens_by_writer(batch),
        shared=SharedCounts.of(batch) if isinstance(recipe.teacher, ForeignTeacher) else None,
    )

    def share(params: Any, part: Part) -> tuple[Array, tuple[Totals, Any]]:
        return part_loss(recipe, params, state, teacher, part, whole)

    def measure(part: Part) -> tuple[Any, Any]:
        gradients, (totals, max_logits) = jax.grad(share, has_aux=True)(state.params, part)
        return (gradients, totals), max_logits

    (gradients, totals), max_logits = over_parts(measure, parts)
    return gradients, totals, max_logits


def _whole_load(recipe: Recipe, state: TrainState, parts: Part) -> Array | None:
    """Counts each expert's assignments in all micro-batches, where a loss needs them first."""
    balance = recipe.balance
    needed = balance.load_balance_weight > 0 and balance.load_balance_scope == 'global'
    if recipe.model.config.moe is None or parts.number.size == 1 or not needed:
        return None

    def measure(part: Part) -> tuple[Array, None]:
        params = recipe.forward_params(state.params)
        return loads(forward(recipe, params, state, part, ())[0]), None

    return over_parts(measure, parts)[0]
