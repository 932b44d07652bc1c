"""One update, as a pure function: micro-batches, loss, gradients, optimizer, router balance."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from distill.config import BalanceConfig, TrainConfig
from distill.feature_match import Inside, features_loss, require_features
from distill.features import activations_of
from distill.foreign_teacher import ForeignTeacher, SharedCounts, foreign_loss, require_foreign
from distill.mtp_loss import mtp_loss, require_weight
from distill.objective import Objective
from distill.panel import TeacherPanel, panel_loss, require_panel
from distill.partwise import PartwiseTeacher, split_rows
from distill.projectors import (
    PROJECTORS,
    initial_projectors,
    projector_shapes,
    without_projectors,
)
from distill.rollout import Author, Rolled, Rollout, initial_replay, roll_out, rollout_key
from distill.router_loss import router_loss
from distill.schedules import value_at
from distill.teacher import OnlineTeacher, Teacher
from distill.types import Batch, TrainState
from distill.writers import STUDENT, TEACHER, require_writers, tokens_by_writer
from distill.written_loss import written_loss
from moe.errors import InputError
from moe.mtp import same_segment_ahead
from moe.qk_clip import MAX_LOGITS, clip_heads, require_clippable
from moe.routing import require_causal
from moe.selection_bias import update_selection_bias
from moe.transformer import Transformer, output_head
from moe.types import ModelOutput
from moe.validation import require

# Folded into a seed that steps are folded into as well: beyond any of them.
_PROJECTOR_KEY = 2**31 + 1


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
        qk_clip: after each update, heads whose largest attention logit of the step exceeded this
            are clipped, see `moe.qk_clip.clip_heads`; None for no clip, and no measurement.
        rollout: how rows are written anew before each update; None where all is text.
        ema_decay: of the student's own average, which then is the teacher; in [0, 1). None for
            another teacher.
        seen: makes of the trained parameters those that the model is run with, such as
            `distill.straight_through` does; None for themselves.
    """

    model: Transformer
    objective: Objective
    optimizer: optax.GradientTransformation
    train: TrainConfig
    balance: BalanceConfig
    teacher: Teacher | None = None
    seed: int = 0
    qk_clip: float | None = None
    rollout: Rollout | None = None
    ema_decay: float | None = None
    seen: Callable[[Any], Any] | None = None

    def __post_init__(self) -> None:
        moe, balance = self.model.config.moe, self.balance
        biased = moe is not None and moe.router.selection_bias
        if balance.selection_bias_rate > 0 and not biased:
            raise InputError(
                f'selection_bias_rate={balance.selection_bias_rate} needs a model whose routers '
                'have selection_bias=True; received one without. Set it, or set the rate to 0.'
            )
        if self.qk_clip is not None:
            require(self.qk_clip > 0, 'qk_clip', 'positive, or None', self.qk_clip)
            require_clippable(self.model.config)
        require_weight(self.model.config, self.objective)
        if self.ema_decay is not None:
            require(0 <= self.ema_decay < 1, 'ema_decay', 'in [0, 1), or None', self.ema_decay)
            if getattr(self.teacher, 'model', None) != self.model:
                raise InputError(
                    'A student taught by its own average needs a teacher of its own architecture; '
                    f'received {self.teacher!r}. Give OnlineTeacher(model).'
                )
        require_features(self.objective.features, self.model.config, self.teacher)
        if isinstance(self.teacher, TeacherPanel):
            require_panel(
                self.teacher, writes=self.rollout is not None, ahead=self.objective.uses_mtp
            )
        require_writers(self.objective, self.rollout and self.rollout.config)
        require_foreign(self.objective, self.teacher, writes=self.rollout is not None)
        if self.rollout is not None:
            self._require_authors(self.rollout)
        own = self.teacher
        whole = own.teacher if isinstance(own, PartwiseTeacher) else own
        if self.objective.return_weight > 0 and not isinstance(whole, OnlineTeacher):
            raise InputError(
                'return_weight needs the whole distribution of a teacher that runs beside the '
                f'student; received {type(whole).__name__}. Use targets of kind hidden.'
            )

    def forward_params(self, params: Any) -> Any:
        """Returns the parameters that the model is run with."""
        return params if self.seen is None else self.seen(params)

    @property
    def projectors(self) -> dict[str, Any]:
        """The shapes of what is trained beside the model, see `distill.projector_shapes`."""
        if not (self.objective.features or self.objective.dual):
            return {}
        teacher: Any = self.teacher
        both = self.model.config, teacher.model.config
        return projector_shapes(self.objective.features, *both, dual=self.objective.dual)

    def _require_authors(self, rollout: Rollout) -> None:
        """Refuses writers that cannot write, and a teacher that cannot judge what is new."""
        author = getattr(self.teacher, 'model', None)
        if self.teacher is not None and author is None:
            raise InputError(
                'Sequences that a model writes in training need a teacher that runs beside the '
                f'student; received {type(self.teacher).__name__}, who spoke before they were '
                'written. Use an online teacher, or leave the rollout out.'
            )
        if rollout.config.teacher_share > 0 and author is None:
            raise InputError(
                f'rollout.teacher_share={rollout.config.teacher_share} needs a teacher; received '
                'none. Set it to 0, or give one.'
            )
        for model in (self.model, author):
            if model is not None and model.config.moe is not None:
                require_causal(model.config.moe.router, 'Writing sequences in training')


def initial_state(
    recipe: Recipe, variables: dict[str, Any], shape: tuple[int, int] | None = None
) -> TrainState:
    """Returns the state before the first update of the given (unboxed) variables.

    Projectors of the objective's features are drawn, from the recipe's seed.

    Args:
        recipe: of the updates.
        variables: 'params' and, where there are any, 'routing'.
        shape: rows and tokens of a batch; needed where what the student writes is kept.
    """
    replay = None
    if recipe.rollout is not None and recipe.rollout.config.staleness > 0:
        if shape is None:
            raise ValueError('a rollout with staleness needs the shape of its batches')
        replay = initial_replay(recipe.rollout.config, *shape)
    routing = variables.get('routing', {})
    own = {'params': variables['params'], 'routing': routing}
    key = jax.random.fold_in(jax.random.key(recipe.seed), _PROJECTOR_KEY)
    params = {**variables['params'], **initial_projectors(recipe.projectors, key)}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        routing=routing,
        opt_state=recipe.optimizer.init(params),
        skipped=jnp.zeros((), jnp.int32),
        replay=replay,
        # A copy: what is donated to an update may not stand in two places.
        ema=None if recipe.ema_decay is None else jax.tree.map(jnp.copy, own),
    )


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
        gradients, totals, max_logits = _gradients(recipe, state, teacher, batch)
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
        written: unmasked tokens by each writer; None where all is text.
        shared: with a teacher of another tokenizer; None without one.
    """

    tokens: Float[Array, '']
    routed: Float[Array, '']
    load: Float[Array, 'layers E'] | None
    written: Float[Array, 'writers'] | None
    shared: SharedCounts | None


@flax.struct.dataclass
class _Totals:
    """Sums over the tokens of one micro-batch, or of a whole batch."""

    loss: Float[Array, '']
    pairs: dict[str, tuple[Float[Array, ''], Float[Array, '']]]
    load: Float[Array, 'layers E'] | None = None
    dropped: Float[Array, 'layers'] | None = None
    confidence: tuple[Float[Array, 'layers'], Float[Array, 'layers']] | None = None


def _gradients(
    recipe: Recipe, state: TrainState, teacher: Any, batch: Batch
) -> tuple[Any, _Totals, Any]:
    """Returns the whole batch's gradients, sums and largest logits, one micro-batch at a time."""
    count = recipe.train.micro_batches
    parts = _Part(split_rows(batch, count), jnp.arange(count))
    # A batch of padding alone has nothing to average over, and a loss of zero.
    whole = _Whole(
        tokens=jnp.maximum(jnp.sum(batch.mask, dtype=jnp.float32), 1),
        routed=jnp.maximum(jnp.sum(batch.segment_ids > 0, dtype=jnp.float32), 1),
        load=_whole_load(recipe, state, parts),
        written=None if batch.writers is None else tokens_by_writer(batch),
        shared=SharedCounts.of(batch) if isinstance(recipe.teacher, ForeignTeacher) else None,
    )

    def share(params: Any, part: _Part) -> tuple[Array, tuple[_Totals, Any]]:
        return _loss(recipe, params, state, teacher, part, whole)

    def measure(part: _Part) -> tuple[Any, Any]:
        gradients, (totals, max_logits) = jax.grad(share, has_aux=True)(state.params, part)
        return (gradients, totals), max_logits

    (gradients, totals), max_logits = _over_parts(measure, parts)
    return gradients, totals, max_logits


def _whole_load(recipe: Recipe, state: TrainState, parts: _Part) -> Array | None:
    """Counts each expert's assignments in all micro-batches, where a loss needs them first."""
    balance = recipe.balance
    needed = balance.load_balance_weight > 0 and balance.load_balance_scope == 'global'
    if recipe.model.config.moe is None or parts.number.size == 1 or not needed:
        return None

    def measure(part: _Part) -> tuple[Array, None]:
        params = recipe.forward_params(state.params)
        return _loads(_forward(recipe, params, state, part, ())[0]), None

    return _over_parts(measure, parts)[0]


def _over_parts(function: Callable[[_Part], tuple[Any, Any]], parts: _Part) -> tuple[Any, Any]:
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

    def add(total: tuple[Any, Any], part: _Part) -> tuple[tuple[Any, Any], None]:
        sums, maxima = function(part)
        summed = jax.tree.map(jnp.add, total[0], sums)
        return (summed, jax.tree.map(jnp.maximum, total[1], maxima)), None

    return jax.lax.scan(add, start, parts)[0]


def _forward(
    recipe: Recipe, params: Any, state: TrainState, part: _Part, noted: Sequence[str]
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


def _router_masks(output: ModelOutput, segment_ids: Array) -> list[Array]:
    """Marks the tokens that each of `ModelOutput.all_routers` routed."""
    masks = [segment_ids > 0] * len(output.router)
    for distance, module in enumerate(output.ahead, start=1):
        masks += [same_segment_ahead(segment_ids, distance)] * len(module.router)
    return masks


def _loads(output: ModelOutput) -> Float[Array, 'layers E']:
    return jnp.stack([router.load for router in output.all_routers])


def _loss(
    recipe: Recipe, params: Any, state: TrainState, teacher: Any, part: _Part, whole: _Whole
) -> tuple[Array, tuple[_Totals, Any]]:
    """Returns one micro-batch's share of the loss, divided by the whole batch's counts.

    And with it what adds up over micro-batches, and each head's largest logit.
    """
    model, batch, params = recipe.model, part.batch, recipe.forward_params(params)
    clipped = () if recipe.qk_clip is None else (MAX_LOGITS,)
    activations = activations_of(recipe.objective.features)
    output, noted = _forward(recipe, params, state, part, (*activations, *clipped))
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
        return loss, (_Totals(loss, pairs), max_logits)
    routers = router_loss(
        output.all_routers,
        _router_masks(output, batch.segment_ids),
        recipe.balance,
        score=model.config.moe.router.score,
        load=whole.load,
    )
    loss += routers.loss / whole.routed
    totals = _Totals(
        loss=loss,
        pairs=pairs | routers.pairs,
        load=_loads(output),
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
