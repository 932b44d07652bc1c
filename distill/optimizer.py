"""The optimizer chain: clipping, AdamW or Muon, decay masks and schedules, all of them optax's."""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe.config import require

Name = Literal['adamw', 'muon']
Schedule = Literal['cosine', 'wsd', 'constant']
Axes = tuple[str | None, ...]

_STACKING_AXES = ('layers', 'experts')
_HEAD_AXES = ('heads', 'kv_heads')


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How parameters are updated.

    Attributes:
        learning_rate: the peak, of AdamW and of Muon (whose updates are scaled to AdamW's RMS).
        name: 'adamw' for every parameter; 'muon' for the matrices between embedding and head whose
            sides both have a logical axis (each layer's, expert's, gate's and up-projection's by
            itself) and AdamW for the rest: the router, convolutions and low-rank factors too.
        warmup_steps: updates of linear warm-up; update s, from 0, uses (s + 1) / warmup_steps.
        schedule: after the warm-up: 'cosine' to the end, 'wsd' (warm-up, stable, decay: constant,
            then linear) or 'constant'.
        decay_fraction: the share of all steps in which 'wsd' decays; used by 'wsd' alone.
        final_fraction: of the peak, where 'cosine' and 'wsd' end.
        weight_decay: decoupled, multiplied by the learning rate. Matrices decay, the head and the
            router with them; norm scales, biases, sinks and rates do not, nor embeddings, whose
            rare rows would shrink at every step and be pulled back at few.
        b1: decay of AdamW's first moment.
        b2: decay of AdamW's second moment.
        eps: added to denominators.
        clip_norm: the largest norm of the gradient, over all parameters; None for no clipping.
        muon_momentum: decay of Muon's (Nesterov) momentum.
        muon_iterations: Newton-Schulz iterations.
        muon_rms: the RMS that an orthogonalised update is scaled to; 0.2 is about AdamW's.
        qk_clip: the largest attention logit (tau): heads that exceeded it get smaller query and key
            weights after the update, see `moe.qk_clip`; 100 in Kimi K2. None for no clip. Not part
            of the chain: it needs what the step measured, see `distill.recipe.Recipe`.
    """

    learning_rate: float
    name: Name = 'adamw'
    warmup_steps: int = 0
    schedule: Schedule = 'cosine'
    decay_fraction: float = 0.2
    final_fraction: float = 0.1
    weight_decay: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    clip_norm: float | None = 1.0
    muon_momentum: float = 0.95
    muon_iterations: int = 5
    muon_rms: float = 0.2
    qk_clip: float | None = None

    def __post_init__(self) -> None:
        def check(field: str, valid: bool, required: str) -> None:
            require(valid, f'optimizer.{field}', required, getattr(self, field))

        check('name', self.name in ('adamw', 'muon'), "'adamw' or 'muon'")
        schedules = ('cosine', 'wsd', 'constant')
        check('schedule', self.schedule in schedules, f'one of {schedules}')
        for field in ('learning_rate', 'eps', 'muon_rms'):
            check(field, 0 < getattr(self, field) < math.inf, 'positive and finite')
        check('warmup_steps', _is_integer(self.warmup_steps, 0), 'an integer, zero or more')
        check('muon_iterations', _is_integer(self.muon_iterations, 1), 'a positive integer')
        check('decay_fraction', 0 < self.decay_fraction <= 1, 'in (0, 1]')
        check('final_fraction', 0 <= self.final_fraction <= 1, 'in [0, 1]')
        check('weight_decay', 0 <= self.weight_decay < math.inf, 'zero or more, and finite')
        for field in ('b1', 'b2', 'muon_momentum'):
            check(field, 0 <= getattr(self, field) < 1, 'in [0, 1)')
        for field in ('clip_norm', 'qk_clip'):
            value = getattr(self, field)
            check(field, value is None or value > 0, 'positive, or None')


def _is_integer(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def learning_rate_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Builds the learning rate as a function of the number of updates made before.

    Args:
        config: the peak and the shape.
        total_steps: updates in the whole run; after them the rate stays at its end.

    Returns:
        A function from the update's index, from 0, to the learning rate.

    Raises:
        InputError: where warm-up and decay do not fit in `total_steps`.

    Source: 'wsd' is MiniCPM's (arXiv 2404.06395), with a linear decay as in arXiv 2405.18392.
    """
    require(_is_integer(total_steps, 1), 'total_steps', 'a positive integer', total_steps)
    peak, warmup = config.learning_rate, config.warmup_steps
    fits = f'less than total_steps={total_steps}'
    require(warmup < total_steps, 'optimizer.warmup_steps', fits, warmup)
    constant = optax.constant_schedule(peak)
    parts, boundaries = [constant], []
    if config.schedule == 'cosine':
        parts = [optax.cosine_decay_schedule(peak, total_steps - warmup, config.final_fraction)]
    elif config.schedule == 'wsd':
        decay = max(1, round(config.decay_fraction * total_steps))
        share = f'at most 1 - warmup_steps / total_steps = {1 - warmup / total_steps:.4g}'
        fits = warmup + decay <= total_steps
        require(fits, 'optimizer.decay_fraction', share, config.decay_fraction)
        parts.append(optax.linear_schedule(peak, peak * config.final_fraction, decay))
        boundaries = [total_steps - decay]
    if warmup:
        ramp = optax.linear_schedule(peak / warmup, peak * (warmup + 1) / warmup, warmup)
        parts, boundaries = [ramp, *parts], [warmup, *boundaries]
    return optax.join_schedules(parts, boundaries)


def make_optimizer(
    config: OptimizerConfig, total_steps: int, axes: Any
) -> optax.GradientTransformation:
    """Chains clipping by global norm, AdamW or Muon, decoupled weight decay and the schedule.

    Args:
        config: see `OptimizerConfig`.
        total_steps: updates in the whole run.
        axes: shaped like the parameters, with a tuple of logical axis names for each
            (`moe.sharding.logical_axes(model)['params']`): what is a matrix, and what a stack of
            matrices, is read from the names.

    Returns:
        The transformation; its `update` needs the parameters.

    Source: Muon is Keller Jordan's, as `optax.contrib.scale_by_muon`; the scale to a constant RMS
        and the weight decay are Liu et al.'s (arXiv 2502.16982).
    """
    rate = learning_rate_schedule(config, total_steps)
    adamw = optax.adamw(
        rate,
        config.b1,
        config.b2,
        config.eps,
        weight_decay=config.weight_decay,
        mask=_map_axes(_decays, axes),
    )
    update = adamw
    if config.name == 'muon':
        labels = _map_axes(lambda names: 'muon' if _orthogonalised(names) else 'adamw', axes)
        update = optax.partition({'muon': _muon(config, rate, axes), 'adamw': adamw}, labels)
    if config.clip_norm is None:
        return update
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), update)


def _muon(config: OptimizerConfig, rate: optax.Schedule, axes: Any) -> optax.GradientTransformation:
    dimensions = _map_axes(_muon_dimensions, axes)

    def scale_to_rms(updates: Any, _: Any) -> Any:
        def scaled(update: jax.Array, sides: tuple[tuple[int, ...], ...]) -> jax.Array:
            widest = max(math.prod(update.shape[axis] for axis in side) for side in sides)
            return update * jnp.asarray(config.muon_rms * math.sqrt(widest), update.dtype)

        return jax.tree.map(scaled, updates, dimensions)

    return optax.chain(
        optax.contrib.scale_by_muon(
            ns_steps=config.muon_iterations,
            beta=config.muon_momentum,
            eps=config.eps,
            weight_dimension_numbers=dimensions,
        ),
        optax.stateless(scale_to_rms),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(rate),
    )


def _map_axes(function: Any, axes: Any) -> Any:
    return jax.tree.map(function, axes, is_leaf=lambda node: isinstance(node, tuple))


def _sides(axes: Axes) -> tuple[tuple[int, ...], ...]:
    """The axes of one matrix (two sides) or vector (one): heads and head_dim are one side.

    Layers and experts stack matrices; so does the gate/up axis, the unnamed one before 'mlp'.
    """
    sides: list[tuple[int, ...]] = []
    for index, name in enumerate(axes):
        is_gate_up = name is None and axes[index + 1 : index + 2] == ('mlp',)
        if name in _STACKING_AXES or is_gate_up:
            continue
        if name == 'head_dim' and index > 0 and axes[index - 1] in _HEAD_AXES:
            sides[-1] += (index,)
        else:
            sides.append((index,))
    if len(sides) > 2:
        raise ValueError(f'A parameter must be a stack of matrices or vectors; received {axes}.')
    return tuple(sides)


def _decays(axes: Axes) -> bool:
    sides = _sides(axes)
    return len(sides) == 2 and axes[sides[0][0]] != 'vocab'


def _orthogonalised(axes: Axes) -> bool:
    sides = _sides(axes)
    return len(sides) == 2 and not {None, 'vocab'} & {axes[side[0]] for side in sides}


def _muon_dimensions(axes: Axes) -> optax.contrib.MuonDimensionNumbers | optax.MaskedNode:
    if not _orthogonalised(axes):
        return optax.MaskedNode()
    return optax.contrib.MuonDimensionNumbers(*_sides(axes))


def optimizer_state_shardings(
    optimizer: optax.GradientTransformation, params_shapes: Any, params_shardings: Any, mesh: Mesh
) -> Any:
    """Derives the optimizer state's shardings: what mirrors a parameter lies as it does.

    Args:
        optimizer: a transformation whose state for a parameter has the parameter's shape.
        params_shapes: parameters, or their `jax.ShapeDtypeStruct`s.
        params_shardings: shaped like them, a sharding for each.
        mesh: on which the rest, counters and constants, is replicated.

    Returns:
        Shardings shaped like `optimizer.init(params)`.
    """

    def of_leaf(leaf: Any, sharding: Any) -> Any:
        return leaf if isinstance(leaf, optax.MaskedNode) else sharding

    return optax.tree_map_params(
        optimizer,
        of_leaf,
        jax.eval_shape(optimizer.init, params_shapes),
        params_shardings,
        transform_non_params=lambda _: NamedSharding(mesh, PartitionSpec()),
        is_leaf=lambda node: isinstance(node, optax.MaskedNode),
    )
