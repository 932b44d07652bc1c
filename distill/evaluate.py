"""Held-out quality of a model, document by document, and the load of its experts.

The device returns sums of each row, never averages; the host adds rows up by document in float64.
So any statistic of the corpus, and its bootstrap over documents, can be formed afterwards.
"""

import dataclasses
import math
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from distill.calibration import calibration_error
from distill.data import EvaluationSet
from distill.eval_step import make_eval_step
from distill.statistics import Estimate, paired_difference, paired_quotient, ratio
from moe.balance import load_statistics
from moe.errors import InputError
from moe.sharding import batch_sharding
from moe.transformer import Transformer

# Any tree of arrays whose first axis is rows.
Rows = TypeVar('Rows')

# Of those that `load_statistics` computes, what a summary has.
EXPERT_STATISTICS = ('max_violation', 'entropy', 'gini', 'drop_fraction')


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured, one entry for each document (`n` of them), float64.

    Attributes:
        names: of the documents.
        bytes: of each document's text in UTF-8.
        tokens: predicted tokens.
        nats: cross-entropy summed over them.
        correct: tokens whose most probable prediction was right.
        kl: KL(teacher || model) summed, nats; None without a teacher.
        agree: tokens where the most probable predictions of teacher and model agree; likewise.
        expert_layers: index in the model of each MoE layer.
        load: assignments of the whole set to each expert, `[MoE layers, E]`.
        dropped: those that found no slot, `[MoE layers]`.
        confidence: mean over routed tokens of each router's largest score, `[MoE layers]`; None
            where it was not measured, as the next.
        batch_violation: mean over batches of `max_violation` of each one's load, `[MoE layers]`.
        reliability: for each bin of confidence its tokens, their confidence, and how many are
            correct, `[n, M, 3]`; None where it was not measured.
        agree_at: for each bucket of positions its tokens, and how many agree with the teacher,
            `[n, P, 2]`; likewise.
    """

    names: tuple[str, ...]
    bytes: np.ndarray
    tokens: np.ndarray
    nats: np.ndarray
    correct: np.ndarray
    kl: np.ndarray | None
    agree: np.ndarray | None
    expert_layers: tuple[int, ...]
    load: np.ndarray
    dropped: np.ndarray
    confidence: np.ndarray | None = None
    batch_violation: np.ndarray | None = None
    reliability: np.ndarray | None = None
    agree_at: np.ndarray | None = None


def evaluate(
    model: Transformer,
    variables: Any,
    evaluation_set: EvaluationSet,
    *,
    teacher: Transformer | None = None,
    teacher_variables: Any = None,
    batch_size: int,
    chunk_size: int = 1024,
) -> Evaluation:
    """Measures a model on held-out documents.

    Args:
        model: the model that is judged, with the mesh that its variables lie on.
        variables: unboxed.
        evaluation_set: the same documents and tokens for every model that is to be compared.
        teacher: measures KL(teacher || model) and agreement; None leaves them out.
        teacher_variables: unboxed; required with `teacher`.
        batch_size: rows a step, over all devices; a multiple of the mesh's batch axes.
        chunk_size: tokens whose logits exist at one time.

    Returns:
        Sums for each document, and the expert load of the whole set.

    Raises:
        InputError: where the vocabularies differ or the mesh does not divide the batch.
    """
    if (teacher is None) != (teacher_variables is None):
        raise ValueError('teacher and teacher_variables come together')
    _require_divisible(batch_size, model.mesh)
    step = make_eval_step(model, teacher, chunk_size=chunk_size)
    documents = len(evaluation_set.names)
    metrics = ['tokens', 'nats', 'correct', 'reliability']
    metrics += ['kl', 'agree', 'agree_at'] if teacher is not None else []
    totals: dict[str, Any] = {}
    experts: list[np.ndarray] = []
    for batch, document in evaluation_set.batches(batch_size):
        sums = step(variables, teacher_variables, placed(batch, model.mesh))
        real = document >= 0
        for name in metrics:
            rows = np.asarray(getattr(sums, name), np.float64)
            total = totals.setdefault(name, np.zeros((documents, *rows.shape[1:])))
            np.add.at(total, document[real], rows[real])
        layers = zip(sums.load, sums.dropped, sums.confidence, strict=True)
        experts.append(np.array([_expert_row(*layer) for layer in layers], np.float64))
    load, dropped, confidence, violation = _expert_sums(experts)
    measured: Any = {'kl': None, 'agree': None} | totals
    return Evaluation(
        names=tuple(evaluation_set.names),
        bytes=np.asarray(evaluation_set.byte_counts, np.float64),
        **measured,
        expert_layers=tuple(np.flatnonzero(model.config.moe_layers).tolist()),
        load=load,
        dropped=dropped,
        confidence=confidence,
        batch_violation=violation,
    )


def _expert_row(load: Array, dropped: Array, confidence: tuple[Array, Array]) -> list[float]:
    """One batch's sums for one layer: the load, and after it what else adds up over batches."""
    counts = np.asarray(load, np.float64)
    violation = counts.max() / counts.mean() - 1 if counts.any() else 0.0
    return [*counts, float(dropped), *map(float, confidence), violation]


def _expert_sums(
    batches: list[np.ndarray],
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns load and drops of all batches, and the means of confidence and violation."""
    total = np.sum(batches, 0)
    if not total.size:
        return np.zeros((0, 0)), np.zeros(0), np.zeros(0), np.zeros(0)
    load, (dropped, confident, routed, violation) = total[:, :-4], total[:, -4:].T
    return load, dropped, confident / np.maximum(routed, 1), violation / len(batches)


def _require_divisible(batch_size: int, mesh: jax.sharding.Mesh | None) -> None:
    shards = 1 if mesh is None else math.prod(mesh.shape[a] for a in batch_sharding(mesh).spec[0])
    if batch_size < 1 or batch_size % shards:
        raise InputError(
            f'The evaluation batch must be a positive multiple of {shards}, the rows that the mesh '
            f'splits it into; received {batch_size}. Change the batch size or the mesh.'
        )


def placed(batch: Rows, mesh: jax.sharding.Mesh | None) -> Rows:
    """Puts a batch that every process holds whole onto the mesh, each device its own rows."""
    if mesh is None:
        return batch
    sharding = batch_sharding(mesh)

    def place(x: Any) -> Array:
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(place, batch)


def summarize(evaluation: Evaluation, *, seed: int = 0) -> dict[str, dict[str, float]]:
    """Reduces an evaluation to corpus metrics with 95 % bootstrap intervals over documents.

    `bits_per_byte = nats / ln 2 / bytes`; the others are sums over predicted tokens divided by
    their count: `cross_entropy` and `kl_from_teacher` in nats, `accuracy` and `top1_agreement` in
    [0, 1]. `calibration_error` is that of `distill.calibration`, in [0, 1].

    Args:
        evaluation: of one model.
        seed: of the resampling.

    Returns:
        `{metric: {'value', 'low', 'high'}}`, without the metrics that were not measured, and
        without the ends of the interval where there is but one document.
    """
    metrics = {
        'bits_per_byte': ratio(evaluation.nats / math.log(2), evaluation.bytes, seed=seed),
        'cross_entropy': ratio(evaluation.nats, evaluation.tokens, seed=seed),
        'accuracy': ratio(evaluation.correct, evaluation.tokens, seed=seed),
    }
    if evaluation.kl is not None and evaluation.agree is not None:
        metrics['kl_from_teacher'] = ratio(evaluation.kl, evaluation.tokens, seed=seed)
        metrics['top1_agreement'] = ratio(evaluation.agree, evaluation.tokens, seed=seed)
    if evaluation.reliability is not None:
        metrics['calibration_error'] = calibration_error(evaluation.reliability, seed=seed)
    return {name: estimate.to_dict() for name, estimate in metrics.items()}


def expert_statistics(evaluation: Evaluation) -> list[dict[str, float | int]]:
    """Describes the load of each MoE layer over the whole set.

    Args:
        evaluation: of one model.

    Returns:
        For each MoE layer its `layer` in the model, and `max_violation`, `entropy`, `gini`,
        `dead_experts` and `drop_fraction` of the whole set, as `moe.balance.load_statistics`
        defines them; where they were measured `max_violation_batch`, its mean over batches, and
        `confidence`. [] for a dense model.
    """
    rows: list[dict[str, float | int]] = []
    layers = zip(evaluation.expert_layers, evaluation.load, evaluation.dropped, strict=True)
    for row, (layer, load, dropped) in enumerate(layers):
        statistics = load_statistics(jnp.asarray(load, jnp.float32), float(dropped))
        numbers = {name: float(statistics[name]) for name in EXPERT_STATISTICS}
        if evaluation.batch_violation is not None:
            numbers['max_violation_batch'] = float(evaluation.batch_violation[row])
        if evaluation.confidence is not None:
            numbers['confidence'] = float(evaluation.confidence[row])
        rows.append({'layer': layer, **numbers, 'dead_experts': int(statistics['dead_experts'])})
    return rows


def compare(
    student: Evaluation,
    control: Evaluation | None = None,
    teacher: Evaluation | None = None,
    *,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Compares a student with its control and its teacher, paired by document.

    Args:
        student: the distilled model.
        control: the same model trained without a teacher; None leaves its comparison out.
        teacher: None leaves the retained accuracy out.
        seed: of the resampling.

    Returns:
        `control_minus_student_bits_per_byte` (positive where distillation helped) and
        `retained_accuracy` (the student's accuracy over the teacher's), each
        `{'value', 'low', 'high'}`.

    Raises:
        ValueError: where the evaluations are not of the same tokens.
    """
    comparison: dict[str, Estimate] = {}
    if control is not None:
        _require_same_tokens(student, control)
        comparison['control_minus_student_bits_per_byte'] = paired_difference(
            control.nats / math.log(2), student.nats / math.log(2), student.bytes, seed=seed
        )
    if teacher is not None:
        _require_same_tokens(student, teacher)
        # A teacher that never hits leaves nothing to retain: not measured, rather than infinite.
        if teacher.correct.any():
            comparison['retained_accuracy'] = paired_quotient(
                student.correct, teacher.correct, student.tokens, seed=seed
            )
    return {name: estimate.to_dict() for name, estimate in comparison.items()}


def _require_same_tokens(first: Evaluation, second: Evaluation) -> None:
    same = first.names == second.names and np.array_equal(first.tokens, second.tokens)
    if not same or not np.array_equal(first.bytes, second.bytes):
        raise ValueError('paired evaluations must be of the same documents and tokens')
