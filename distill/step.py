"""One update, as a pure function: what is written anew, gradients, optimizer, router balance."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from distill.gradients import batch_gradients
from distill.partwise import PartwiseTeacher
from distill.projectors import without_projectors
from distill.recipe import Recipe
from distill.rollout import Author, Rolled, roll_out, rollout_key
from distill.types import Batch, TrainState
from distill.writers import STUDENT, TEACHER
from moe.qk_clip import clip_heads
from moe.selection_bias import update_selection_bias


@flax.struct.dataclass
class StepMetrics:
    """What one update measured, over the whole batch.

    Attributes:
        pairs: (sum, weight) by name; losses in nats per unmasked token.
        skipped: updates skipped in a row, this one included; int32.
        load: assignments to each expert of each MoE layer, after the model's own those of its
            multi-token-prediction modules; None without experts.
        dropped: assignments among them that found no slot; None without experts.
        confidence: the mean over routed tokens of each router's largest score, see
            `moe.balance.router_confidence`; None without experts.
    """

    pairs: dict[str, tuple[Float[Array, ''], Float[Array, '']]]
    skipped: Int[Array, '']
    load: Float[Array, 'layers E'] | None
    dropped: Float[Array, 'layers'] | None
    confidence: Float[Array, 'layers'] | None


def make_train_step(
    recipe: Recipe,
) -> Callable[[TrainState, Any, Batch], tuple[TrainState, StepMetrics]]:
    """Returns the pure update `(state, teacher_variables, batch) -> (state, metrics)`.

    With `M` unmasked tokens and `R` tokens that are not padding in the whole batch, the loss is

        sum over micro-batches of
            (sum over unmasked tokens of the terms) / M
          + mtp_weight * (the same of the tokens further ahead, see `distill.mtp_loss`)
          + return_weight * (the surrogate of `distill.returns`, over the student's tokens)
          + (sum over features of weight * sum over tokens of what they lie apart) / R
          + weight * (sum over spans that a teacher of another tokenizer shares) / (their number),
            or the loss of `distill.dual_space`
          + load_balance_weight * (sum over sequences and MoE layers of the load-balance loss) / R L
          + router_z_weight * (sum over tokens and MoE layers of the z-loss) / R L,

    so neither it nor its gradient depends on how the batch is split: sequences add up, and where
    the load of the whole batch matters (`load_balance_scope='global'`) a first pass over the
    micro-batches counts it. Only `load_balance_scope='micro_batch'` and jitter look at parts.

    Where the loss or the gradients' norm is not finite, parameters, optimizer state and biases stay
    as they are and `skipped` counts up. The teacher gets no gradient.

    Where there is a rollout, its share of the rows is written first, by the parameters of before
    the update: see `distill.rollout`. What is drawn is data to the gradient. A term on some of the
    sequences is divided by their tokens instead of `M`.
    """

    def train_step(state: TrainState, teacher: Any, batch: Batch) -> tuple[TrainState, StepMetrics]:
        if recipe.ema_decay is not None:
            teacher = state.ema
        batch, replay, written = _rolled_out(recipe, state, teacher, batch)
        if isinstance(recipe.teacher, PartwiseTeacher):
            batch = recipe.teacher.ahead(teacher, batch)
        gradients, totals, max_logits = batch_gradients(recipe, state, teacher, batch)
        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(totals.loss) & jnp.isfinite(norm)
        state = _update(recipe, state, gradients, totals.load, max_logits, finite)
        # What was written is data: it stays, whatever became of the update.
        state = dataclasses.replace(state, replay=replay)
        one = jnp.ones(())
        pairs = totals.pairs | written | {'loss': (totals.loss, one), 'gradient_norm': (norm, one)}
        if max_logits is not None:
            largest = [leaf.max() for leaf in jax.tree.leaves(max_logits)]
            pairs['max_attention_logit'] = (jnp.stack(largest).max(), one)
        confidence = totals.confidence
        if confidence is not None:
            confidence = confidence[0] / jnp.maximum(confidence[1], 1)
        return state, StepMetrics(pairs, state.skipped, totals.load, totals.dropped, confidence)

    return train_step


def _rolled_out(recipe: Recipe, state: TrainState, teacher: Any, batch: Batch) -> Rolled:
    """Lets models write their shares of the batch's rows, where they have any."""
    rollout = recipe.rollout
    if rollout is None:
        return Rolled(batch, None, {})
    authors = {}
    if rollout.config.lmbda > 0:
        params = recipe.forward_params(without_projectors(state.params))
        variables = {'params': params, 'routing': state.routing}
        authors[STUDENT] = Author(recipe.model, variables)
    if rollout.config.teacher_share > 0:
        model: Any = getattr(recipe.teacher, 'model', None)
        authors[TEACHER] = Author(model, teacher)
    key = rollout_key(recipe.seed, state.step)
    return roll_out(rollout, authors, batch, key, step=state.step, replay=state.replay)


def _update(
    recipe: Recipe,
    state: TrainState,
    gradients: Any,
    load: Array | None,
    max_logits: Any,
    finite: Array,
) -> TrainState:
    """Applies gradients, clips heads and moves selection biases, or nothing where not finite."""
    updates, opt_state = recipe.optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    if recipe.qk_clip is not None:
        params = clip_heads(recipe.model.config, params, max_logits, recipe.qk_clip)
    rate = recipe.balance.selection_bias_rate
    routing = state.routing
    if rate > 0 and load is not None:
        rule = recipe.balance.selection_bias_rule
        routing = update_selection_bias(recipe.model.config, routing, load, rate=rate, rule=rule)
    updated = dataclasses.replace(
        state,
        params=params,
        routing=routing,
        opt_state=opt_state,
        skipped=jnp.zeros((), jnp.int32),
        ema=_average(
            recipe.ema_decay,
            state.ema,
            {'params': without_projectors(params), 'routing': routing},
        ),
    )
    kept = dataclasses.replace(state, skipped=state.skipped + 1)
    chosen = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, kept)
    return dataclasses.replace(chosen, step=state.step + 1)


def _average(decay: float | None, average: Any, new: Any) -> Any:
    """Moves an average towards the new: `decay average + (1 - decay) new`; None where none is.

    Source: mean teacher, arXiv 1703.01780, section 2; without its ramp-up of the decay.
    """
    if decay is None:
        return None
    return jax.tree.map(lambda old, new: old + (1 - decay) * (new - old), average, new)
