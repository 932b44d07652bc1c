"""One update, as a pure function: micro-batches, loss, gradients, optimizer, router balance."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from distill.config import BalanceConfig, TrainConfig
from distill.fused import fused_distillation_loss
from distill.objective import Objective
from distill.teacher import OnlineTeacher
from distill.types import Batch, TrainState
from moe import balance
from moe.transformer import Transformer, output_head, update_selection_bias

Metrics = dict[str, jax.Array]


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


def make_train_step(
    recipe: Recipe,
) -> Callable[[TrainState, Any, Batch], tuple[TrainState, Metrics]]:
    """Returns the pure update `(state, teacher_variables, batch) -> (state, metrics)`.

    With `M` unmasked tokens in the whole batch, the loss is

        sum over micro-batches of (sum over unmasked tokens of the terms) / M
          + load_balance_weight * mean over MoE layers of the load-balance loss
          + router_z_weight * mean over MoE layers of the z-loss,

    each of which is a sum over sequences, so neither the loss nor its gradient depends on how the
    batch is split. Where the loss or the gradients' norm is not finite, parameters, optimizer state
    and biases stay as they are and `skipped` counts up. The teacher gets no gradient.

    Metrics are float32 scalars, losses in nats per unmasked token, and `load [L_moe, E]`, the
    assignments of the whole batch.
    """

    def train_step(state: TrainState, teacher: Any, batch: Batch) -> tuple[TrainState, Metrics]:
        gradients, metrics = _gradients(recipe, state, teacher, batch)
        norm = optax.global_norm(gradients)
        finite = jnp.isfinite(metrics['loss']) & jnp.isfinite(norm)
        updates, opt_state = recipe.optimizer.update(gradients, state.opt_state, state.params)
        updated = state.replace(
            params=optax.apply_updates(state.params, updates),
            routing=update_selection_bias(
                recipe.model.config,
                state.routing,
                metrics.get('load'),
                rate=recipe.balance.selection_bias_rate,
            ),
            opt_state=opt_state,
            skipped=jnp.zeros((), jnp.int32),
        )
        kept = state.replace(skipped=state.skipped + 1)
        state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, kept)
        state = state.replace(step=state.step + 1)
        return state, metrics | {'gradient_norm': norm, 'skipped': state.skipped}

    return train_step


def _gradients(
    recipe: Recipe, state: TrainState, teacher: Any, batch: Batch
) -> tuple[Any, Metrics]:
    """Returns the gradients and metrics of the whole batch, one micro-batch at a time."""
    weights = _Weights(
        tokens=jnp.sum(batch.mask, dtype=jnp.float32),
        routed=jnp.sum(batch.segment_ids > 0, dtype=jnp.float32),
    )

    def part(params: Any, micro_batch: Batch) -> tuple[jax.Array, Metrics]:
        return _loss(recipe, params, state, teacher, micro_batch, weights)

    gradient = jax.grad(part, has_aux=True)
    if recipe.train.micro_batches == 1:
        return gradient(state.params, batch)
    parts = _split(batch, recipe.train.micro_batches)

    def add(total: Any, micro_batch: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient(state.params, micro_batch)), None

    first = jax.tree.map(lambda x: x[0], parts)
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, state.params, first)
    )
    return jax.lax.scan(add, zeros, parts)[0]


@dataclasses.dataclass(frozen=True)
class _Weights:
    """Counts over the whole batch that sums over micro-batches are divided by."""

    tokens: jax.Array
    routed: jax.Array


def _loss(
    recipe: Recipe,
    params: Any,
    state: TrainState,
    teacher: Any,
    batch: Batch,
    weights: _Weights,
) -> tuple[jax.Array, Metrics]:
    """Returns one micro-batch's share of the loss and of every metric."""
    model = recipe.model
    output = model.apply(
        {'params': params, 'routing': state.routing},
        batch.tokens,
        positions=batch.positions,
        segment_ids=batch.segment_ids,
        logits=False,
    )
    loss, metrics = fused_distillation_loss(
        output.hidden,
        output_head(model.config, params),
        None if recipe.teacher is None else recipe.teacher.targets(teacher, batch),
        recipe.objective.at(state.step),
        labels=batch.labels,
        mask=batch.mask,
        chunk_size=recipe.train.chunk_size,
        normalizer=weights.tokens,
        mesh=model.mesh,
    )
    if output.router:
        routed = batch.segment_ids > 0
        layers = len(output.router)
        sums = [
            (
                balance.load_balance_loss(router, routed)[0],
                balance.router_z_loss(router, routed)[0],
            )
            for router in output.router
        ]
        load_balance, router_z = (
            sum(layer) / (layers * weights.routed) for layer in zip(*sums, strict=True)
        )
        loss += recipe.balance.load_balance_weight * load_balance
        loss += recipe.balance.router_z_weight * router_z
        metrics |= {
            'load_balance_loss': load_balance,
            'router_z_loss': router_z,
            'load': jnp.stack([router.load for router in output.router]),
            'dropped': jnp.stack([router.dropped for router in output.router]),
        }
    return loss, metrics | {'loss': loss}


def _split(batch: Batch, parts: int) -> Batch:
    """Splits rows into equal parts, each of every `parts`-th row, so that row shards stay local."""

    def split(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)

    return jax.tree.map(split, batch)
