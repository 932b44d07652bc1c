"""The targets stage: the teacher runs once over the student's batches; what it says is kept."""

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding

from distill import distributed
from distill.cache import (
    MANIFEST,
    CachedTargets,
    TargetsWriter,
    estimator_of,
    make_manifest,
    read_manifest,
)
from distill.estimators import (
    Estimator,
    SampledEstimator,
    TopKEstimator,
    TruncatedEstimator,
    draws_for,
)
from distill.loop import Stopped
from distill.partwise import PartwiseTeacher
from distill.provenance import require_permission
from distill.teacher import EstimatedTeacher, OnlineTeacher
from distill.types import Batch
from experiments.context import Context
from experiments.watch import progress_line
from moe.sharding import batch_sharding
from moe.transformer import Transformer

Facts = dict[str, Any]


def targets_folder(context: Context) -> pathlib.Path:
    """Where the targets are: of this study, or of another."""
    path = context.study.targets.path
    return context.workdir.path / 'targets' if path is None else pathlib.Path(path)


def open_targets(context: Context, teacher: Facts) -> CachedTargets:
    """Opens targets to read, and refuses those of another teacher, text or estimator."""
    asked = context.study.targets
    estimator = {'kind': asked.kind, 'temperature': asked.temperature}
    if asked.kind == 'top_k':
        estimator |= {'k': asked.k}
    else:
        estimator |= {'proposal_temperature': asked.proposal_temperature}
        estimator |= {} if asked.draws is None else {'draws': asked.draws}
    # Rows are found by their content: their order, and so seed and batch size, may be others.
    data = {key: context.data_fingerprint[key] for key in ('source', 'tokenizer', 'seq_len')}
    expected = {
        'estimator': estimator,
        'vocab_size': context.study.vocab_size,
        'tokenizer': context.tokenizer.fingerprint,
        'data': data,
        'teacher': {'sha256': teacher['sha256']},
    }
    folder = targets_folder(context)
    targets = CachedTargets(folder, expected)
    require_permission(targets.manifest['teacher']['provenance'], f'The teacher of {folder}')
    return targets


def write_targets(
    context: Context, model: Transformer, variables: Any, teacher: Facts
) -> dict[str, Any]:
    """Writes the targets of every row of the student's first `steps` batches.

    Returns:
        What the stage reports: steps, rows, and tokens, padding included.
    """
    steps = context.study.target_steps
    sharding = batch_sharding(context.mesh)
    pipeline = context.pipeline()
    folder = context.workdir.stage('targets')
    estimator = _estimator(context, model, variables, folder)
    writer = _writer(context, estimator, folder, teacher, sharding)
    teacher_in_parts = PartwiseTeacher(
        EstimatedTeacher(OnlineTeacher(model), estimator), context.study.teacher.micro_batches or 1
    )
    estimate = jax.jit(
        lambda variables, batch: teacher_in_parts.ahead(variables, batch).targets,
        out_shardings=sharding,
    )
    pending: tuple[Batch, Any] | None = None
    tokens_per_step = context.study.data.batch_size * context.study.data.seq_len
    with progress_line('targets', steps) as line:
        try:
            for step in range(1, steps + 1):
                batch = next(pipeline)
                if distributed.any_process(_any_missing(writer, batch)):
                    said = estimate(variables, distributed.global_batch(batch, sharding))
                    _settle(writer, pending)
                    pending = (batch, said)
                line.update(step, tokens=step * tokens_per_step)
                if context.stop.agreed(step) and step < steps:
                    _settle(writer, pending)
                    pending = None
                    raise Stopped(f'with the targets of {step} of {steps} batches written')
            _settle(writer, pending)
        finally:
            if writer is not None:
                writer.close()
    distributed.barrier('targets: written')
    rows = len(CachedTargets(folder, {}))
    return {'steps': steps, 'rows': rows, 'tokens': rows * context.study.data.seq_len}


def online_estimator(
    context: Context, model: Transformer, variables: Any
) -> Estimator | TruncatedEstimator:
    """The estimator that would be cached, for a teacher that runs beside the student."""
    config = context.study.targets
    if config.kind == 'truncated':
        return TruncatedEstimator(config.k, config.temperature)
    return _estimator(context, model, variables, None)


def _any_missing(writer: TargetsWriter | None, batch: Batch) -> bool:
    return writer is not None and bool(writer.missing(batch).any())


def _settle(writer: TargetsWriter | None, pending: tuple[Batch, Any] | None) -> None:
    """Waits for one batch's targets, while the device works on the next, and passes them on."""
    if writer is not None and pending is not None:
        batch, said = pending
        writer.add(batch, distributed.local_rows(said))


def _estimator(
    context: Context, model: Transformer, variables: Any, folder: pathlib.Path | None
) -> Estimator:
    """The estimator that the config asks for; the number of draws is kept once it is found."""
    config = context.study.targets
    if config.kind == 'top_k':
        return TopKEstimator(config.k, config.temperature)
    saved = folder is not None and (folder / MANIFEST).exists()
    # Nobody may write the manifest before everybody has looked for it.
    distributed.barrier('targets: looked')
    if saved and config.draws is None:
        assert folder is not None
        found = estimator_of(read_manifest(folder))
        if isinstance(found, SampledEstimator):
            return found
    draws = config.draws
    if draws is None:
        draws = _draws(context, model, variables)
    return SampledEstimator(
        draws, config.temperature, config.proposal_temperature, context.study.seed
    )


def _draws(context: Context, model: Transformer, variables: Any) -> int:
    """Finds the draws that give the distinct ids asked for, on the first batch."""
    config, sharding = context.study.targets, batch_sharding(context.mesh)
    batch = distributed.global_batch(next(context.pipeline()), sharding)
    hidden = jax.jit(OnlineTeacher(model).targets)(variables, batch)
    return draws_for(
        config.distinct, hidden, batch, temperature=config.temperature * config.proposal_temperature
    )


def _writer(
    context: Context,
    estimator: Estimator,
    folder: pathlib.Path,
    teacher: Facts,
    sharding: NamedSharding,
) -> TargetsWriter | None:
    """The writer of this process; None where another one has the same rows."""
    manifest = make_manifest(
        estimator,
        vocab_size=context.study.vocab_size,
        seq_len=context.study.data.seq_len,
        teacher=teacher,
        tokenizer=context.tokenizer.fingerprint,
        data=context.data_fingerprint,
    )
    index, count = distributed.data_share(sharding)
    make: Callable[[], TargetsWriter] = functools.partial(
        TargetsWriter,
        folder,
        manifest,
        index=index,
        count=count,
        rows_per_shard=context.study.targets.rows_per_shard,
    )
    first = distributed.first_of_share(sharding)
    # One process makes the folder, and all have seen what is in it before one adds to it.
    writer = make() if distributed.is_writer() else None
    distributed.barrier('targets: made')
    writer = make() if writer is None and first else writer
    distributed.barrier('targets: opened')
    return writer
