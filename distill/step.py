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
from distill.router_loss import router_loss
from distill.teacher import Teacher
from distill.types import Batch, TrainState
from moe.errors import InputError
from moe.selection_bias import update_selection_bias
from moe.transformer import Transformer, output_head
from moe.types import ModelOutput


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
        seed: of the routers' jitter. The noise follows from it, the step and the micro-batch, so a
            resumed run draws the same; it is the one thing that a split into micro-batches changes
            whatever the balance.
    """

    model: Transformer
    objective: Objective
    optimizer: optax.GradientTransformation
    train: TrainConfig
    balance: BalanceConfig
    teacher: Teacher | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        moe, balance = self.model.config.moe, self.balance
        biased = moe is not None and moe.router.selection_bias
        if balance.selection_bias_rate > 0 and not biased:
            raise InputError(
                f'selection_bias_rate={balance.selection_bias_rate} needs a model whose routers '
                'have selection_bias=True; received one without. Set it, or set the rate to 0.'
            )


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
          + load_balance_weight * (sum over sequences and MoE layers of the load-balance loss) / R L
          + router_z_weight * (sum over tokens and MoE layers of the z-loss) / R L,

    so neither it nor its gradient depends on how the batch is split: sequences add up, and where
    the load of the whole batch matters (`load_balance_scope='global'`) a first pass over the
    micro-batches counts it. Only `load_balance_scope='micro_batch'` and jitter look at parts.

    Where the loss or the gradients' norm is not finite, parameters, optimizer state and biases stay
    as they are and `skipped` counts up. The teacher gets no gradient.
    """

    def train_step(state: TrainState, teacher: Any, batch: Batch) -> tuple[TrainState, StepMetrics]:
        gradients, totals = _gradients(recipe, state, teacher, batch)
        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(totals.loss) & jnp.isfinite(norm)
        state = _update(recipe, state, gradients, totals.load, finite)
        one = jnp.ones(())
        pairs = totals.pairs | {'loss': (totals.loss, one), 'gradient_norm': (norm, one)}
        return state, StepMetrics(
            pairs, state.skipped, totals.load, totals.dropped, totals.confidence
        )

    return train_step


def _update(
    recipe: Recipe, state: TrainState, gradients: Any, load: Array | None, finite: Array
) -> TrainState:
    """Applies the gradients and moves the selection biases, or skips both where not finite."""
    updates, opt_state = recipe.optimizer.update(gradients, state.opt_state, state.params)
    rate = recipe.balance.selection_bias_rate
    routing = state.routing
    if rate > 0 and load is not None:
        rule = recipe.balance.selection_bias_rule
        routing = update_selection_bias(recipe.model.config, routing, load, rate=rate, rule=rule)
    updated = dataclasses.replace(
        state,
        params=optax.apply_updates(state.params, updates),
        routing=routing,
        opt_state=opt_state,
        skipped=jnp.zeros((), jnp.int32),
    )
    kept = dataclasses.replace(state, skipped=state.skipped + 1)
    chosen = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, kept)
    return dataclasses.replace(chosen, step=state.step + 1)


@flax.struct.dataclass
class _Part:
    """One micro-batch and its number."""

    batch: Batch
    number: Int[Array, '']


@flax.struct.dataclass
class _Whole:
    """What a micro-batch's share of the loss takes from the whole batch.

    Attributes:
        tokens: unmasked, at least 1.
        routed: tokens that are not padding, at least 1.
        load: assignments to each expert; None where no loss needs it.
    """

    tokens: Float[Array, '']
    routed: Float[Array, '']
    load: Float[Array, 'layers E'] | None


@flax.struct.dataclass
class _Totals:
    """Sums over the tokens of one micro-batch, or of a whole batch."""

    loss: Float[Array, '']
    pairs: dict[str, tuple[Float[Array, ''], Float[Array, '']]]
    load: Float[Array, 'layers E'] | None = None
    dropped: Float[Array, 'layers'] | None = None
    confidence: Float[Array, 'layers'] | None = None


def _gradients(
    recipe: Recipe, state: TrainState, teacher: Any, batch: Batch
) -> tuple[Any, _Totals]:
    """Returns the gradients and sums of the whole batch, one micro-batch at a time."""
    count = recipe.train.micro_batches
    parts = _Part(_split(batch, count), jnp.arange(count))
    # A batch of padding alone has nothing to average over, and a loss of zero.
    whole = _Whole(
        tokens=jnp.maximum(jnp.sum(batch.mask, dtype=jnp.float32), 1),
        routed=jnp.maximum(jnp.sum(batch.segment_ids > 0, dtype=jnp.float32), 1),
        load=_whole_load(recipe, state, parts),
    )

    def share(params: Any, part: _Part) -> tuple[Array, _Totals]:
        return _loss(recipe, params, state, teacher, part, whole)

    return _sum_over(lambda part: jax.grad(share, has_aux=True)(state.params, part), parts)


def _whole_load(recipe: Recipe, state: TrainState, parts: _Part) -> Array | None:
    """Counts each expert's assignments in all micro-batches, where a loss needs them first."""
    balance = recipe.balance
    needed = balance.load_balance_weight > 0 and balance.load_balance_scope == 'global'
    if recipe.model.config.moe is None or parts.number.size == 1 or not needed:
        return None
    return _sum_over(lambda part: _loads(_forward(recipe, state.params, state, part)), parts)


def _sum_over(function: Callable[[_Part], Any], parts: _Part) -> Any:
    """Sums what the function returns over the micro-batches, one at a time."""
    first = jax.tree.map(lambda x: x[0], parts)
    if parts.number.size == 1:
        return function(first)
    shapes = jax.eval_shape(function, first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def add(total: Any, part: _Part) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, function(part)), None

    return jax.lax.scan(add, zeros, parts)[0]


def _forward(recipe: Recipe, params: Any, state: TrainState, part: _Part) -> ModelOutput:
    """Runs the model on one micro-batch, with the noise that its routers are trained with."""
    model, batch = recipe.model, part.batch
    rngs = {}
    if model.config.moe is not None and model.config.moe.router.jitter > 0:
        step_key = jax.random.fold_in(jax.random.key(recipe.seed), state.step)
        rngs = {'jitter': jax.random.fold_in(step_key, part.number)}
    output: Any = model.apply(
        {'params': params, 'routing': state.routing},
        batch.tokens,
        positions=batch.positions,
        segment_ids=batch.segment_ids,
        logits=False,
        rngs=rngs,
    )
    return output


def _loads(output: ModelOutput) -> Float[Array, 'layers E']:
    return jnp.stack([router.load for router in output.router])


def _loss(
    recipe: Recipe, params: Any, state: TrainState, teacher: Any, part: _Part, whole: _Whole
) -> tuple[Array, _Totals]:
    """Returns one micro-batch's share of the loss, divided by the whole batch's counts."""
    model, batch = recipe.model, part.batch
    output = _forward(recipe, params, state, part)
    loss, pairs = fused_distillation_loss(
        output.hidden,
        output_head(model.config, params).astype(output.hidden.dtype),
        None if recipe.teacher is None else recipe.teacher.targets(teacher, batch),
        recipe.objective.at(state.step),
        labels=batch.labels,
        mask=batch.mask,
        normalizer=whole.tokens,
        chunk_size=recipe.train.chunk_size,
        mesh=model.mesh,
    )
    if model.config.moe is None:
        return loss, _Totals(loss, pairs)
    routed, score = batch.segment_ids > 0, model.config.moe.router.score
    routers = router_loss(output.router, routed, recipe.balance, score=score, load=whole.load)
    loss += routers.loss / whole.routed
    return loss, _Totals(
        loss=loss,
        pairs=pairs | routers.pairs,
        load=_loads(output),
        dropped=jnp.stack([router.dropped for router in output.router]),
        confidence=routers.confidence / whole.routed,
    )


def _split(batch: Batch, parts: int) -> Batch:
    """Splits rows into equal parts, each of every `parts`-th row, so that row shards stay local."""

    def split(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)

    return jax.tree.map(split, batch)
