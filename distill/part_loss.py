"""The loss of one micro-batch: its share of the whole batch's."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from distill.feature_match import Inside, features_loss
from distill.features import activations_of
from distill.foreign_teacher import ForeignTeacher, foreign_loss
from distill.micro_batches import Part, Totals, Whole, forward, loads, router_masks
from distill.mtp_loss import mtp_loss
from distill.panel import TeacherPanel, panel_loss
from distill.projectors import PROJECTORS
from distill.recipe import Recipe
from distill.router_loss import router_loss
from distill.schedules import value_at
from distill.types import Batch, TrainState
from distill.written_loss import written_loss
from moe.qk_clip import MAX_LOGITS
from moe.transformer import output_head


def part_loss(
    recipe: Recipe, params: Any, state: TrainState, teacher: Any, part: Part, whole: Whole
) -> tuple[Array, tuple[Totals, Any]]:
    """Returns one micro-batch's share of the loss, divided by the whole batch's counts.

    And with it what adds up over micro-batches, and each head's largest logit.
    """
    model, batch, params = recipe.model, part.batch, recipe.forward_params(params)
    clipped = () if recipe.qk_clip is None else (MAX_LOGITS,)
    activations = activations_of(recipe.objective.features)
    output, noted = forward(recipe, params, state, part, (*activations, *clipped))
    max_logits = noted.get(MAX_LOGITS)
    head = output_head(model.config, params).astype(output.hidden.dtype)
    targets, taught = _asked(recipe, teacher, batch)
    # What is said of other tokens is no target of the terms.
    own = None if isinstance(recipe.teacher, ForeignTeacher) else targets
    terms = recipe.objective.at(state.step)
    settings: Any = {
        'normalizer': whole.tokens,
        'chunk_size': recipe.train.chunk_size,
        'mesh': model.mesh,
    }
    if isinstance(recipe.teacher, TeacherPanel):
        shares = recipe.teacher.shares(batch)
        known: Any = {'labels': batch.labels, 'mask': batch.mask, 'shares': shares}
        loss, pairs = panel_loss(output.hidden, head, targets, terms, **known, **settings)
    else:
        loss, pairs = written_loss(
            output.hidden,
            head,
            own,
            terms,
            batch,
            return_weight=recipe.objective.return_weight,
            written=whole.written,
            **settings,
        )
    if output.ahead:
        further, more = mtp_loss(output.ahead, head, own, terms, batch, **settings)
        loss += value_at(recipe.objective.mtp_weight, state.step) * further
        pairs |= more
    if taught is not None:
        inside = Inside.of(model.config, output.router, noted)
        known = params.get(PROJECTORS, {}), batch.segment_ids, state.step
        apart, more = features_loss(recipe.objective.features, inside, taught, *known)
        loss += apart / whole.routed
        pairs |= more
    if isinstance(recipe.teacher, ForeignTeacher):
        apart, more = foreign_loss(
            recipe.objective.across,
            recipe.teacher,
            teacher,
            targets,
            batch,
            student=(model, params, output.hidden, head),
            shared=whole.shared,
            step=state.step,
            chunk_size=recipe.train.chunk_size,
        )
        loss += apart
        pairs |= more
    if model.config.moe is None:
        return loss, (Totals(loss, pairs), max_logits)
    routers = router_loss(
        output.all_routers,
        router_masks(output, batch.segment_ids),
        recipe.balance,
        score=model.config.moe.router.score,
        load=whole.load,
    )
    loss += routers.loss / whole.routed
    totals = Totals(
        loss=loss,
        pairs=pairs | routers.pairs,
        load=loads(output),
        dropped=jnp.stack([router.dropped for router in output.all_routers]),
        confidence=routers.confidence,
    )
    return loss, (totals, max_logits)


def _asked(recipe: Recipe, variables: Any, batch: Batch) -> tuple[Any, Inside | None]:
    """What the teacher says of a micro-batch, and what is inside of it where that is matched."""
    teacher: Any = recipe.teacher
    if teacher is None:
        return None, None
    features = recipe.objective.features
    if not features:
        return teacher.targets(variables, batch), None
    said = teacher.targets_and_inside(variables, batch, activations_of(features))
    return said[0], Inside.of(teacher.model.config, *said[1:])
