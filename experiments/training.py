"""Trains one model of a study to its last step: compiled, sharded, resumable."""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from distill import distributed
from distill.checkpoint import CheckpointManager, complete_steps, read_metadata
from distill.loop import Hooks, train
from distill.manifest import manifest_sha256
from distill.nested import flatten
from distill.optimizer import optimizer_state_shardings
from distill.projectors import projector_shardings, without_projectors
from distill.prompts import Sequences
from distill.recipe import Recipe, initial_state
from distill.replay import ReplayBuffer
from distill.step import StepMetrics, make_train_step
from distill.target_stream import Pipeline
from distill.types import Batch, TrainState
from experiments.signals import StopSignal
from experiments.watch import Watch
from moe.errors import InputError
from moe.exchange import compiler_options
from moe.sharding import abstract_variables, batch_sharding, variable_shardings
from moe.transformer import Transformer

CompiledStep = Callable[[TrainState, Any, Batch], tuple[TrainState, StepMetrics]]


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run of a stage.

    Attributes:
        stage: its name, on the progress line.
        folder: of its checkpoints and metrics.
        recipe: of one update.
        mesh: of all devices.
        teacher: variables of the frozen teacher, placed; {} where there is none.
        initial: makes the variables that the run starts from, placed; the same whenever called.
        identity: what a checkpoint must have been made with for the run to go on from it.
        shape: rows and tokens of a batch, padding included.
        place: puts a host batch onto the devices of the mesh; None for rows over its batch axes.
    """

    stage: str
    folder: pathlib.Path
    recipe: Recipe
    mesh: Mesh
    teacher: Any
    initial: Callable[[], Any]
    identity: dict[str, Any]
    shape: tuple[int, int]
    place: Callable[[Batch], Batch] | None = None

    @property
    def tokens_per_step(self) -> int:
        """Of a batch, padding included."""
        return math.prod(self.shape)


def train_model(run: Run, pipeline: Pipeline, stop: StopSignal) -> dict[str, Any]:
    """Trains to the last step, from the newest good checkpoint where there is one.

    Returns:
        What the stage reports: steps, tokens, and the seconds of its sessions before this one.
    """
    config = run.recipe.train
    shardings = state_shardings(run.recipe, run.mesh)
    manager = CheckpointManager(
        run.folder / 'checkpoints', keep_latest=config.keep_latest, keep_best=1
    )
    state, seconds_before = _start(run, manager, pipeline, shardings)
    step = _compile(run, shardings)
    watch = Watch(
        run.stage,
        run.folder,
        manager,
        config,
        run.identity,
        tokens_per_step=run.tokens_per_step,
        restored_step=int(state.step),
        seconds_before=seconds_before,
    )
    with watch:
        try:
            state = train(
                state,
                step=lambda state, batch: step(state, run.teacher, batch),
                batches=pipeline,
                place=run.place
                or functools.partial(distributed.global_batch, sharding=batch_sharding(run.mesh)),
                config=config,
                hooks=Hooks(watch.save, watch.observe, stop.agreed, watch.last_saved),
            )
        finally:
            manager.close()
    save_model(run.folder / 'model', state, run.identity)
    if state.ema is not None:
        average = dataclasses.replace(state, **state.ema)
        save_model(run.folder / 'ema', average, run.identity)
    return {
        'seconds_before': seconds_before,
        'steps': config.steps,
        'tokens': config.steps * run.tokens_per_step,
    }


def state_shardings(recipe: Recipe, mesh: Mesh) -> TrainState:
    """Returns the sharding of every leaf of the train state.

    Projectors are parameters. What the student wrote is split by rows, as a batch is; an average
    as what it is of.
    """
    variables = variable_shardings(recipe.model, mesh)
    shapes = abstract_variables(recipe.model)['params'] | recipe.projectors
    params = variables['params'] | projector_shardings(recipe.projectors, mesh)
    replicated: Any = NamedSharding(mesh, PartitionSpec())
    own = {'params': variables['params'], 'routing': variables.get('routing', {})}
    replay = None
    if recipe.rollout is not None and recipe.rollout.config.staleness > 0:
        by_row: Any = NamedSharding(mesh, PartitionSpec(None, *batch_sharding(mesh).spec))
        replay = ReplayBuffer(Sequences(by_row, by_row, by_row), replicated)
    return TrainState(
        step=replicated,
        params=params,
        routing=own['routing'],
        opt_state=optimizer_state_shardings(recipe.optimizer, shapes, params, mesh),
        skipped=replicated,
        replay=replay,
        ema=None if recipe.ema_decay is None else own,
    )


def save_model(folder: pathlib.Path, state: TrainState, identity: dict[str, Any]) -> None:
    """Saves what a model is used with, without what it was trained with."""
    if complete_steps(folder):
        return
    manager = CheckpointManager(folder, keep_latest=1)
    try:
        variables = {'params': without_projectors(state.params), 'routing': state.routing}
        manager.save(int(state.step), variables, data_state={}, metadata={'identity': identity})
    finally:
        manager.close()


def model_sha256(folder: pathlib.Path) -> str:
    """Identifies a saved model by the checksums of its files."""
    return manifest_sha256(folder / str(max(complete_steps(folder), default=0)))


def load_model(
    folder: pathlib.Path, model: Transformer, mesh: Mesh, identity: dict[str, Any]
) -> Any:
    """Loads variables that `save_model` wrote onto any mesh.

    Raises:
        InputError: where the folder holds none, or those of another model or tokenizer.
    """
    saved = read_metadata(folder).metadata['identity']
    # By whom a model was taught matters to who goes on training it, not to who uses it.
    require_identity({key: saved.get(key) for key in identity}, identity, folder)
    shapes, shardings = abstract_variables(model), variable_shardings(model, mesh)
    shapes, shardings = {'routing': {}} | shapes, {'routing': {}} | shardings
    manager = CheckpointManager(folder)
    try:
        return manager.restore(_abstract(shapes, shardings))[0]
    finally:
        manager.close()


def require_identity(saved: dict[str, Any], current: dict[str, Any], folder: pathlib.Path) -> None:
    """Refuses a checkpoint of another model or tokenizer, by the fields that differ."""
    there, here = flatten(saved), flatten(current)
    keys = sorted(key for key in there | here if there.get(key) != here.get(key))
    if keys:
        lines = [f'  {key}: {there.get(key)!r} there, {here.get(key)!r} here' for key in keys[:16]]
        raise InputError(
            '\n'.join(
                [
                    f'The checkpoint in {folder} was made with another:',
                    *lines,
                    'Use the config that it was made with, or another checkpoint.',
                ]
            )
        )


def _start(
    run: Run, manager: CheckpointManager, pipeline: Pipeline, shardings: TrainState
) -> tuple[TrainState, float]:
    """Returns the state to go on from and the seconds behind it; sets the pipeline's position."""
    initial = functools.partial(initial_state, run.recipe, shape=run.shape)
    if not complete_steps(manager.directory):
        return jax.jit(initial, out_shardings=shardings)(run.initial()), 0.0
    shapes = jax.eval_shape(initial, abstract_variables(run.recipe.model))
    state, position, metadata, _ = manager.restore(_abstract(shapes, shardings))
    require_identity(metadata['identity'], run.identity, manager.directory)
    pipeline.set_state(position)
    return state, metadata['seconds']


def _abstract(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def _compile(run: Run, shardings: TrainState) -> CompiledStep:
    """Jits the update with every sharding pinned, so that it compiles once."""
    replicated = NamedSharding(run.mesh, PartitionSpec())
    teacher = jax.tree.map(lambda leaf: leaf.sharding, run.teacher)
    return jax.jit(
        make_train_step(run.recipe),
        in_shardings=(shardings, teacher, batch_sharding(run.mesh)),
        out_shardings=(shardings, replicated),
        donate_argnums=0,
        compiler_options=compiler_options(run.mesh),
    )
