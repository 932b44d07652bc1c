"""One update, as a pure function: micro-batches, loss, gradients, optimizer, router balance."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from distill.config import BalanceConfig, TrainConfig
from distill.fused import fused_distillation_loss
from distill.objective import Objective
from distill.teacher import OnlineTeacher
from distill.types import Batch, TrainState
from moe.balance import load_balance_loss, router_z_loss
from moe.transformer import Transformer, output_head, update_selection_bias


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What one update of a student is made of.

    Attributes:
        model: the trained model.
        objective: the terms of its loss.
        optimizer: the optimizer chain.
        train: micro-batches and chunk size.
        balance: weights of the routers' losses and the rate of the bias update.
        teacher: where targets come from; None where no term needs them.
    """

    model: Transformer
    objective: Objective
    optimizer: optax.GradientTransformation
    train: TrainConfig
    balance: BalanceConfig
    teacher: OnlineTeacher | None = None


def initial_state(recipe: Recipe, variables: dict[str, Any]) -> TrainState:
    """Returns the state before the first update of the given (unboxed) variables."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables['params'],
        routing=variables.get('routing', {}),
        opt_state=recipe.optimizer.init(variables['params']),
        skipped=jnp.zeros((), jnp.int32),
    )


@flax.struct.dataclass
class StepMetrics:
    """What one update measured, over the whole batch.

    Attributes:
        pairs: (sum, weight) by name; losses in nats per unmasked token.
        skipped: updates skipped in a row, this one included; int32.
        load: assignments to each expert of each MoE layer; None without experts.
        dropped: assignments among them that found no slot; None without experts.
    """

    pairs: dict[str, tuple[Float[Array, ''], Float[Array, '']]]
    skipped: Int[Array, '']
    load: Float[Array, 'layers E'] | None
    dropped: Float[Array, 'layers'] | None


def make_train_step(
    recipe: Recipe,
) -> Callable[[TrainState, Any, Batch], tuple[TrainState, StepMetrics]]:
    """Returns the pure update `(state, teacher_variables, batch) -> (state, metrics)`.

    With `M` unmasked tokens and `R` tokens that are not padding in the whole batch, the loss is

        sum over micro-batches of
            (sum over unmasked tokens of the terms) / M
          + load_balance_weight * (sum over sequences and MoE layers of the load-balance loss) / R L
          + router_z_weight * (sum over tokens and MoE layers of the z-loss) / R L,

    a sum over sequences, so neither it nor its gradient depends on how the batch is split. Where the
    loss or the gradients' norm is not finite, parameters, optimizer state and biases stay as they
    are and `skipped` counts up. The teacher gets no gradient.
    """

    def train_step(state: TrainState, teacher: Any, batch: Batch) -> tuple[TrainState, StepMetrics]:
        gradients, totals = _gradients(recipe, state, teacher, batch)
        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(totals.loss) & jnp.isfinite(norm)
        state = _update(recipe, state, gradients, totals.load, finite)
        one = jnp.ones(())
        pairs = totals.pairs | {'loss': (totals.loss, one), 'gradient_norm': (norm, one)}
        return state, StepMetrics(pairs, state.skipped, totals.load, totals.dropped)

    return train_step


def _update(
    recipe: Recipe, state: TrainState, gradients: Any, load: Array | None, finite: Array
) -> TrainState:
    """Applies the gradients and moves the selection biases, or skips both where not finite."""
    updates, opt_state = recipe.optimizer.update(gradients, state.opt_state, state.params)
    rate = recipe.balance.selection_bias_rate
    routing = state.routing
    if rate > 0 and load is not None:
        routing = update_selection_bias(recipe.model.config, routing, load, rate=rate)
    updated = state.replace(
        params=optax.apply_updates(state.params, updates),
        routing=routing,
        opt_state=opt_state,
        skipped=jnp.zeros((), jnp.int32),
    )
    kept = state.replace(skipped=state.skipped + 1)
    chosen = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, kept)
    return chosen.replace(step=state.step + 1)


@flax.struct.dataclass
class _Totals:
    """Sums over the tokens of one micro-batch, or of a whole batch."""

    loss: Float[Array, '']
    pairs: dict[str, tuple[Float[Array, ''], Float[Array, '']]]
    load: Float[Array, 'layers E'] | None
    dropped: Float[Array, 'layers'] | None


def _gradients(
    recipe: Recipe, state: TrainState, teacher: Any, batch: Batch
) -> tuple[Any, _Totals]:
    """Returns the gradients and sums of the whole batch, one micro-batch at a time."""
    tokens = jnp.sum(batch.mask, dtype=jnp.float32)
    routed = jnp.sum(batch.segment_ids > 0, dtype=jnp.float32)
    # A batch of padding alone has nothing to average over, and a loss of zero.
    counts = jnp.maximum(tokens, 1), jnp.maximum(routed, 1)

    def share(params: Any, micro_batch: Batch) -> tuple[Array, _Totals]:
        return _loss(recipe, params, state, teacher, micro_batch, *counts)

    gradient = jax.grad(share, has_aux=True)
    if recipe.train.micro_batches == 1:
        return gradient(state.params, batch)
    parts = _split(batch, recipe.train.micro_batches)

    def add(total: Any, micro_batch: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient(state.params, micro_batch)), None

    first = jax.tree.map(lambda x: x[0], parts)
    shapes = jax.eval_shape(gradient, state.params, first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(add, zeros, parts)[0]


def _loss(
    recipe: Recipe,
    params: Any,
    state: TrainState,
    teacher: Any,
    batch: Batch,
    tokens: Array,
    routed: Array,
) -> tuple[Array, _Totals]:
    """Returns one micro-batch's share of the loss, divided by the whole batch's counts."""
    model = recipe.model
    output = model.apply(
        {'params': params, 'routing': state.routing},
        batch.tokens,
        positions=batch.positions,
        segment_ids=batch.segment_ids,
        logits=False,
    )
    loss, pairs = fused_distillation_loss(
        output.hidden,
        output_head(model.config, params).astype(output.hidden.dtype),
        None if recipe.teacher is None else recipe.teacher.targets(teacher, batch),
        recipe.objective.at(state.step),
        labels=batch.labels,
        mask=batch.mask,
        normalizer=tokens,
        chunk_size=recipe.train.chunk_size,
        mesh=model.mesh,
    )
    if not output.router:
        return loss, _Totals(loss, pairs, None, None)
    mask = batch.segment_ids > 0
    score = model.config.moe.router.score
    balanced = _sum_pairs(
        [load_balance_loss(router, mask, score=score) for router in output.router]
    )
    squared = _sum_pairs([router_z_loss(router, mask) for router in output.router])
    layers = len(output.router)
    loss += recipe.balance.load_balance_weight * balanced[0] / (routed * layers)
    loss += recipe.balance.router_z_weight * squared[0] / (routed * layers)
    return loss, _Totals(
        loss=loss,
        pairs=pairs | {'load_balance_loss': balanced, 'router_z_loss': squared},
        load=jnp.stack([router.load for router in output.router]),
        dropped=jnp.stack([router.dropped for router in output.router]),
    )


def _sum_pairs(pairs: list[tuple[Array, Array]]) -> tuple[Array, Array]:
    sums, weights = zip(*pairs, strict=True)
    return sum(sums), sum(weights)


def _split(batch: Batch, parts: int) -> Batch:
    """Splits rows into equal parts, each of every `parts`-th row, so that row shards stay local."""

    def split(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)

    return jax.tree.map(split, batch)
