"""The evaluate stage: quality on held-out text, load of the experts, cost, samples of text."""

import keyword
import math
from typing import Any

import jax
import numpy as np
from absl import logging

from distill import distributed
from distill.calibration import agreement_rows, reliability_rows
from distill.cost import (
    chip_price,
    measure_prefill,
    teacher_to_student,
    usd_per_million_tokens,
)
from distill.evaluate import Evaluation, compare, evaluate, expert_statistics, summarize
from distill.exposure import exposure
from distill.routing_maps import routing_maps, token_classes
from experiments.circumstances import circumstances
from experiments.context import Context
from experiments.samples import write_samples
from experiments.watch import progress_line
from moe.accounting import bytes_per_token, flops_per_token, parameter_report
from moe.processors import processors
from moe.sharding import batch_sharding
from moe.transformer import Transformer

Models = dict[str, tuple[Transformer, Any]]
# In the workdir: counts of the student's routing, for the report's pictures.
ROUTING_MAPS = 'evaluate/routing.npz'


def evaluate_models(context: Context, models: Models) -> dict[str, Any]:
    """Measures teacher, student and control on the same held-out text and this machine.

    A teacher that is not here is not measured, nor is what compares with it.

    Returns:
        `models`, `comparison` and `experts` of the summary, the student's expert `load`, the
        `samples` of every model, and the circumstances of the measurement.
    """
    with progress_line('evaluate', len(models)) as line:
        evaluations, samples, tokens = {}, {}, 0
        for done, name in enumerate(models):
            line.update(done, tokens=tokens)
            evaluations[name] = _quality(context, models, name)
            samples[name] = write_samples(context, name, *models[name])
            tokens += int(evaluations[name].tokens.sum())
        line.update(len(models), tokens=tokens)
        line.say('student: routing')
        _save_routing(context, *models['student'])
        line.say('throughput')
        speeds = measure_prefill(
            {name: (*model, _prefill_tokens(context, name)) for name, model in models.items()}
        )
    rows: dict[str, dict[str, Any]] = {
        name: summarize(evaluation, seed=context.study.seed)
        | _by_bin(evaluation, context.study.seed)
        | _own_text(context, models, name)
        | _cost(context, models[name][0], speeds[name])
        for name, evaluation in evaluations.items()
    }
    return {
        'models': rows,
        'comparison': compare(
            **{name: evaluations[name] for name in evaluations if _alike(context, name)},
            seed=context.study.seed,
        )
        | _costs(rows),
        'experts': expert_statistics(evaluations['student']),
        'load': evaluations['student'].load.tolist(),
        'samples': samples,
        'circumstances': circumstances(),
    }


def _costs(rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """How many times more the teacher costs, where it was measured."""
    if 'teacher' not in rows:
        return {}
    teacher, student = rows['teacher'], rows['student']
    return teacher_to_student(
        teacher_flops=teacher['flops_per_token'],
        student_flops=student['flops_per_token'],
        teacher_usd=_dollars(teacher),
        student_usd=_dollars(student),
    )


def _alike(context: Context, name: str) -> bool:
    """Whether a model reads the tokens that the student reads."""
    return context.read_by(name)[1] is context.held_out


def _quality(context: Context, models: Models, name: str) -> Evaluation:
    """Evaluates one model, and compares it with a teacher that reads the same tokens."""
    model, variables = models[name]
    others = {} if name == 'teacher' or not _alike(context, 'teacher') else models
    teacher, teacher_variables = others.get('teacher', (None, None))
    return evaluate(
        model,
        variables,
        context.read_by(name)[1],
        teacher=teacher,
        teacher_variables=teacher_variables,
        batch_size=context.study.evaluate.batch_size,
    )


def _by_bin(evaluation: Evaluation, seed: int) -> dict[str, Any]:
    """Describes accuracy by confidence, and agreement with the teacher by position."""
    rows: dict[str, Any] = {}
    if evaluation.reliability is not None:
        rows['reliability'] = reliability_rows(evaluation.reliability, seed=seed)
    if evaluation.agree_at is not None:
        rows['agreement_by_position'] = agreement_rows(evaluation.agree_at, seed=seed)
    return rows


def _own_text(context: Context, models: Models, name: str) -> dict[str, dict[str, float]]:
    """Measures a student on what it writes, in a study where models write."""
    rollout = context.rollout
    if rollout is None or name == 'teacher':
        return {}
    teacher, teacher_variables = models['teacher']
    estimate = exposure(
        *models[name],
        context.held_out,
        teacher=teacher,
        teacher_variables=teacher_variables,
        rollout=rollout,
        batch_size=context.study.evaluate.batch_size,
        seed=context.study.seed,
    )
    return {'kl_on_own_text': estimate.to_dict()}


def _save_routing(context: Context, model: Transformer, variables: Any) -> None:
    """Counts which experts are chosen together and for which tokens, where there are experts."""
    # Text that a study brings along is taken to be no program.
    keywords = keyword.kwlist if context.study.data.source == 'python' else ()
    classes = token_classes(context.tokenizer, model.config.vocab_size, keywords)
    maps = routing_maps(
        model,
        variables,
        context.held_out,
        classes,
        batch_size=context.study.evaluate.batch_size,
    )
    file = context.workdir.stage('evaluate').parent / ROUTING_MAPS
    if maps is not None and distributed.is_writer():
        maps.save(file)


def _cost(context: Context, model: Transformer, speed: float) -> dict[str, Any]:
    """Counts what a token costs, and prices it by the measured tokens per second."""
    config, length = context.study.evaluate, context.study.evaluate.context_length
    parameters = parameter_report(model.config)
    return {
        'parameters': {'total': parameters.total, 'active': parameters.active},
        'flops_per_token': flops_per_token(model.config, context_length=length).total,
        'bytes_per_token': bytes_per_token(model.config, batch=1, context_length=length).total,
        'tokens_per_second': speed,
        **_price(config.chip, speed),
    }


def _price(chip: str, tokens_per_second: float) -> dict[str, Any]:
    """Prices the measured throughput, where it was measured on the chip that is charged."""
    price, device = chip_price(chip), jax.devices()[0]
    if not price.is_of(device.device_kind):
        logging.warning(
            'evaluate.chip=%s is another kind of device than the %r that was measured: no price '
            'is given. Choose the chip, or add its price to distill/cost.py.',
            chip,
            device.device_kind,
        )
        return {}
    chips = _small_machines() if device.platform == 'cpu' else jax.device_count()
    return {
        'usd_per_million_tokens': dict(
            usd_per_million_tokens(tokens_per_second, price, chips=chips)
        )
    }


def _small_machines() -> int:
    """How many machines of two virtual CPUs are as many as the processes may use.

    Within a family of machines the list price is in proportion to them.
    """
    return jax.process_count() * math.ceil(processors() / 2)


def _dollars(row: dict[str, Any]) -> float | None:
    price = row.get('usd_per_million_tokens')
    return None if price is None else price['value']


def _prefill_tokens(context: Context, name: str) -> jax.Array:
    """Fills a batch with held-out text, end to end, and puts each row where the mesh has it."""
    config, length = context.study.evaluate, context.study.evaluate.context_length
    rows = context.read_by(name)[1].rows
    text = rows['tokens'][rows['mask']]
    tokens = np.resize(text, (config.prefill_batch, length)).astype(np.int32)
    sharding = batch_sharding(context.mesh)
    return jax.make_array_from_callback(tokens.shape, sharding, lambda index: tokens[index])
