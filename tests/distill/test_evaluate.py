"""What evaluation sums up, against log-softmax in float64, and what it makes of the sums."""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill.data import EvaluationSet
from distill.eval_step import _chunk_sums, make_eval_step
from distill.evaluate import Evaluation, compare, evaluate, expert_statistics, summarize
from distill.types import Batch
from moe.config import AttentionConfig, MoEConfig, RouterConfig, TransformerConfig
from moe.errors import InputError
from moe.sharding import MeshConfig, make_mesh, variable_shardings
from moe.transformer import Transformer

R, T, V = 6, 11, 10
DOCUMENT = np.array([0, 0, 1, 1, 1, 2])

DENSE = TransformerConfig(
    vocab_size=V,
    num_layers=1,
    embed_dim=12,
    mlp_dim=16,
    attention=AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=6),
    tie_embeddings=True,
)
SPARSE = TransformerConfig(
    vocab_size=V,
    num_layers=3,
    embed_dim=8,
    mlp_dim=16,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=4),
    # Few slots, so that some assignments are dropped and counted.
    moe=MoEConfig(
        router=RouterConfig(num_experts=4, experts_per_token=2),
        expert_dim=8,
        dispatch='capacity',
        capacity_factor=0.75,
        first_dense_layers=1,
    ),
)


@functools.cache
def held_out() -> EvaluationSet:
    """Rows of two documents and some padding; that rows hold several must not matter here."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, V, (R, T + 1), dtype=np.int32)
    first, total = rng.integers(2, 5, (R, 1)), rng.integers(7, T + 1, (R, 1))
    index = np.arange(T)
    segment_ids = np.where(index < first, 1, 2) * (index < total)
    rows = {
        'tokens': tokens[:, :T],
        'labels': tokens[:, 1:],
        'mask': (segment_ids > 0) & (index != first - 1) & (index != total - 1),
        'segment_ids': segment_ids.astype(np.int32),
        'positions': np.where(index < first, index, index - first).astype(np.int32),
    }
    return EvaluationSet(rows, DOCUMENT, np.array([30, 40, 20]), ('a', 'b', 'c'))


@functools.cache
def variables(config: TransformerConfig):
    """Initial variables with logits far from uniform."""
    seed = 2 if config == DENSE else 4
    init = jax.jit(lambda key: nn.unbox(Transformer(config).init(key, jnp.zeros((1, 2), int))))
    return jax.tree.map(lambda leaf: 2 * leaf, init(jax.random.key(seed)))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@functools.cache
def model_output(config: TransformerConfig):
    """Log-probabilities of every row in float64, and the routers' outputs."""
    rows = held_out().rows
    apply = jax.jit(Transformer(config).apply)
    output = apply(
        variables(config),
        rows['tokens'],
        positions=rows['positions'],
        segment_ids=rows['segment_ids'],
    )
    return log_softmax(np.asarray(output.logits, np.float64)), jax.device_get(output.router)


@functools.cache
def reference(student: TransformerConfig, teacher: TransformerConfig) -> dict[str, np.ndarray]:
    """Sums of each row, position by position."""
    rows = held_out().rows
    q, p = model_output(student)[0], model_output(teacher)[0]
    names = ('tokens', 'nats', 'correct', 'kl', 'reverse_kl', 'agree')
    sums = {name: np.zeros(R) for name in names}
    sums['reliability'], sums['agree_at'] = np.zeros((R, 15, 3)), np.zeros((R, 5, 2))
    for row, position in np.argwhere(rows['mask']):
        label = rows['labels'][row, position]
        log_q, log_p = q[row, position], p[row, position]
        sums['tokens'][row] += 1
        sums['nats'][row] -= log_q[label]
        sums['correct'][row] += np.argmax(log_q) == label
        sums['kl'][row] += np.sum(np.exp(log_p) * (log_p - log_q))
        sums['reverse_kl'][row] += np.sum(np.exp(log_q) * (log_q - log_p))
        sums['agree'][row] += np.argmax(log_q) == np.argmax(log_p)
        sure = np.exp(log_q.max())
        at = next(b for b in range(15) if b / 15 < sure <= (b + 1) / 15)
        sums['reliability'][row, at] += (1, sure, np.argmax(log_q) == label)
        bucket = len(f'{rows["positions"][row, position]:b}'.lstrip('0'))
        sums['agree_at'][row, bucket] += (1, np.argmax(log_q) == np.argmax(log_p))
    return sums


def by_document(rows: np.ndarray) -> np.ndarray:
    """Adds rows up: documents a, b and c have two, three and one."""
    return np.array([rows[0] + rows[1], rows[2] + rows[3] + rows[4], rows[5]])


def assert_measured(evaluation: Evaluation, student: TransformerConfig, teacher: TransformerConfig):
    wanted = reference(student, teacher)
    for name in ('tokens', 'correct', 'agree', 'agree_at'):
        np.testing.assert_array_equal(getattr(evaluation, name), by_document(wanted[name]), name)
    for name in ('nats', 'kl', 'reliability'):
        np.testing.assert_allclose(
            getattr(evaluation, name), by_document(wanted[name]), rtol=2e-5, err_msg=name
        )


def test_the_reference_tells_the_metrics_apart():
    """No sum is trivially zero or full, and the two directions of KL are far from each other."""
    for pair in ((SPARSE, DENSE), (DENSE, SPARSE)):
        sums = {name: rows.sum() for name, rows in reference(*pair).items()}
        assert 0 < sums['correct'] < sums['tokens']
        assert 0 < sums['agree'] < sums['tokens']
        assert sums['correct'] != sums['agree']
        assert abs(sums['kl'] - sums['reverse_kl']) > 0.05 * sums['kl']
        for name in ('reliability', 'agree_at'):
            # Two bins at least have some tokens that count and some that do not.
            tokens, hits = reference(*pair)[name].sum(0)[:, [0, -1]].T
            assert ((hits > 0) & (hits < tokens)).sum() > 1


@pytest.mark.parametrize(
    ('student', 'teacher', 'chunk_size'), [(SPARSE, DENSE, 1), (DENSE, SPARSE, 4 * R + 5)]
)
def test_row_sums_are_those_of_log_softmax_in_float64(student, teacher, chunk_size):
    """In chunks of one position, and of four, which do not divide eleven."""
    step = make_eval_step(Transformer(student), Transformer(teacher), chunk_size=chunk_size)
    sums = step(variables(student), variables(teacher), Batch(**held_out().rows))
    wanted = reference(student, teacher)
    for name in ('tokens', 'correct', 'agree', 'agree_at'):
        np.testing.assert_array_equal(getattr(sums, name), wanted[name], name)
    for name in ('nats', 'kl', 'reliability'):
        np.testing.assert_allclose(getattr(sums, name), wanted[name], rtol=2e-5, err_msg=name)


def test_without_a_teacher_nothing_is_said_of_one():
    step = make_eval_step(Transformer(DENSE))
    sums = step(variables(DENSE), None, Batch(**held_out().rows))
    assert sums.kl is None
    assert sums.agree is None
    assert sums.agree_at is None
    np.testing.assert_allclose(sums.nats, reference(DENSE, DENSE)['nats'], rtol=2e-5)


def test_the_divergence_of_two_coins():
    """KL(teacher || student) of a 3:1 coin from a fair one, worked by hand."""
    fair, biased = jnp.log(jnp.array([[[0.5, 0.5]]])), jnp.log(jnp.array([[[0.75, 0.25]]]))
    sums = _chunk_sums([fair, biased], jnp.array([[1]]), jnp.array([[True]]), jnp.array([[0]]), 1)
    assert float(sums['kl'][0]) == pytest.approx(0.75 * math.log(1.5) - 0.25 * math.log(2))
    assert float(sums['nats'][0]) == pytest.approx(math.log(2))
    # What both exclude costs nothing, and what is masked does not count even where it is no number.
    certain = jnp.array([[[0.0, -jnp.inf], [jnp.nan, jnp.nan]]])
    mask = jnp.array([[True, False]])
    sums = _chunk_sums([certain, certain], jnp.array([[0, 0]]), mask, jnp.array([[1, 0]]), 2)
    assert {name: np.asarray(value[0]).tolist() for name, value in sums.items()} == {
        'tokens': 1,
        'nats': 0,
        'correct': 1,
        'reliability': [[0, 0, 0]] * 14 + [[1, 1, 1]],
        'kl': 0,
        'agree': 1,
        'agree_at': [[0, 0], [1, 1]],
    }


def test_documents_add_up_and_filler_rows_do_not_count():
    """Six rows in batches of four: the second batch is filled with two copies of its last row."""
    evaluation = evaluate(
        Transformer(SPARSE),
        variables(SPARSE),
        held_out(),
        teacher=Transformer(DENSE),
        teacher_variables=variables(DENSE),
        batch_size=4,
    )
    assert_measured(evaluation, SPARSE, DENSE)
    assert evaluation.names == ('a', 'b', 'c')
    np.testing.assert_array_equal(evaluation.bytes, [30, 40, 20])
    assert_expert_load(evaluation)


def assert_expert_load(evaluation: Evaluation):
    """Compares the load with a count of the choices at every position that is not padding."""
    real = held_out().rows['segment_ids'] > 0
    routers = model_output(SPARSE)[1]
    load = [np.bincount(router.expert_ids[real].ravel(), minlength=4) for router in routers]
    np.testing.assert_array_equal(evaluation.load, load)
    # A row and expert have ceil(11 * 2 / 4 * 0.75) = 5 slots.
    dropped = []
    for router in routers:
        counts = [
            np.bincount(ids[kept].ravel(), minlength=4)
            for ids, kept in zip(router.expert_ids, real, strict=True)
        ]
        dropped.append(np.maximum(np.array(counts) - 5, 0).sum())
    assert min(dropped) > 0
    np.testing.assert_array_equal(evaluation.dropped, dropped)
    assert evaluation.expert_layers == (1, 2)
    batches = (slice(0, 4), slice(4, 6))
    for layer, router in enumerate(routers):
        best = np.asarray(jax.nn.softmax(router.router_logits)).max(-1)[real]
        np.testing.assert_allclose(evaluation.confidence[layer], best.mean(), rtol=1e-5)
        parts = [
            np.bincount(router.expert_ids[rows][real[rows]].ravel(), minlength=4)
            for rows in batches
        ]
        violation = np.mean([part.max() / part.mean() - 1 for part in parts])
        np.testing.assert_allclose(evaluation.batch_violation[layer], violation, rtol=1e-6)


def test_eight_devices_measure_what_one_does():
    """Rows over data and expert, experts over expert, heads and vocabulary over tensor."""
    mesh = make_mesh(MeshConfig(data=2, expert=2, tensor=2))
    models = {config: Transformer(config, mesh) for config in (SPARSE, DENSE)}
    placed = {
        config: jax.device_put(variables(config), variable_shardings(model, mesh))
        for config, model in models.items()
    }
    evaluation = evaluate(
        models[SPARSE],
        placed[SPARSE],
        held_out(),
        teacher=models[DENSE],
        teacher_variables=placed[DENSE],
        batch_size=4,
        chunk_size=20,
    )
    assert_measured(evaluation, SPARSE, DENSE)
    assert_expert_load(evaluation)
    with pytest.raises(InputError, match=r'positive multiple of 4.*received 6'):
        evaluate(models[SPARSE], placed[SPARSE], held_out(), batch_size=6)


def test_a_dense_model_has_no_experts():
    evaluation = evaluate(Transformer(DENSE), variables(DENSE), held_out(), batch_size=R)
    assert evaluation.kl is None
    assert evaluation.agree is None
    assert evaluation.expert_layers == ()
    assert evaluation.load.size == 0
    assert expert_statistics(evaluation) == []
    measured = {'bits_per_byte', 'cross_entropy', 'accuracy', 'calibration_error'}
    assert set(summarize(evaluation)) == measured


def test_what_cannot_be_evaluated_is_refused():
    other = dataclasses.replace(DENSE, vocab_size=V + 1)
    with pytest.raises(InputError, match='teacher of 11 tokens and a student of 10'):
        make_eval_step(Transformer(DENSE), Transformer(other))
    with pytest.raises(ValueError, match='chunk_size'):
        make_eval_step(Transformer(DENSE), chunk_size=0)
    with pytest.raises(ValueError, match='come together'):
        evaluate(Transformer(DENSE), {}, held_out(), teacher=Transformer(DENSE), batch_size=1)
    with pytest.raises(InputError, match='positive multiple of 1'):
        evaluate(Transformer(DENSE), {}, held_out(), batch_size=0)


def two_documents(nats: tuple[float, float], correct: tuple[int, int], **changes) -> Evaluation:
    """Documents of 10 and 30 tokens, 40 and 60 bytes."""
    fields = {
        'names': ('x', 'y'),
        'bytes': np.array([40.0, 60.0]),
        'tokens': np.array([10.0, 30.0]),
        'nats': np.array(nats),
        'correct': np.array(correct, float),
        'kl': None,
        'agree': None,
        'expert_layers': (),
        'load': np.zeros((0, 0)),
        'dropped': np.zeros(0),
    }
    return Evaluation(**{**fields, **changes})


def test_a_summary_divides_sums_over_the_corpus():
    evaluation = two_documents(
        (20.0, 90.0), (1, 9), kl=np.array([2.0, 6.0]), agree=np.array([5.0, 30.0])
    )
    summary = summarize(evaluation)
    assert {name: estimate['value'] for name, estimate in summary.items()} == pytest.approx(
        {
            'bits_per_byte': 110 / math.log(2) / 100,
            'cross_entropy': 110 / 40,
            'accuracy': 10 / 40,
            'kl_from_teacher': 8 / 40,
            'top1_agreement': 35 / 40,
        }
    )
    # With two documents the interval reaches from one to the other.
    assert summary['cross_entropy'] == pytest.approx({'value': 2.75, 'low': 2.0, 'high': 3.0})
    assert summary['bits_per_byte']['low'] == pytest.approx(20 / math.log(2) / 40)
    assert summary['bits_per_byte']['high'] == pytest.approx(90 / math.log(2) / 60)


def test_a_uniform_model_of_bytes_needs_eight_bits_each():
    evaluation = two_documents(
        (40 * math.log(256), 60 * math.log(256)), (0, 0), tokens=np.array([40.0, 60.0])
    )
    assert summarize(evaluation)['bits_per_byte'] == pytest.approx(
        {'value': 8, 'low': 8, 'high': 8}
    )


def test_the_gain_is_positive_where_the_control_needs_more_bits():
    student, control = two_documents((20.0, 60.0), (0, 0)), two_documents((28.0, 66.0), (0, 0))
    # By document 8 nats of 40 bytes and 6 of 60; of the corpus 14 of 100.
    gain = compare(student, control)['control_minus_student_bits_per_byte']
    bits = {'value': 0.14 / math.log(2), 'low': 0.1 / math.log(2), 'high': 0.2 / math.log(2)}
    assert gain == pytest.approx(bits)
    loss = compare(control, student)['control_minus_student_bits_per_byte']
    assert loss == pytest.approx(
        {'value': -bits['value'], 'low': -bits['high'], 'high': -bits['low']}
    )


def test_retained_accuracy_is_the_students_over_the_teachers():
    student, teacher = two_documents((1.0, 1.0), (3, 6)), two_documents((1.0, 1.0), (4, 20))
    comparison = compare(student, teacher=teacher)
    assert list(comparison) == ['retained_accuracy']
    assert comparison['retained_accuracy'] == pytest.approx(
        {'value': 9 / 24, 'low': 6 / 20, 'high': 3 / 4}
    )


def test_what_was_not_measured_is_not_compared():
    student = two_documents((1.0, 2.0), (1, 2))
    assert compare(student) == {}
    # A teacher that never hits leaves nothing to retain.
    assert compare(student, teacher=two_documents((1.0, 2.0), (0, 0))) == {}


@pytest.mark.parametrize(
    'changes',
    [
        {'names': ('x', 'z')},
        {'tokens': np.array([11.0, 30.0])},
        {'bytes': np.array([40.0, 61.0])},
    ],
)
def test_only_the_same_documents_and_tokens_are_paired(changes):
    student, other = two_documents((1.0, 2.0), (1, 2)), two_documents((1.0, 2.0), (1, 2), **changes)
    with pytest.raises(ValueError, match='same documents and tokens'):
        compare(student, other)
    with pytest.raises(ValueError, match='same documents and tokens'):
        compare(student, teacher=other)


def test_expert_statistics_describe_each_layer():
    evaluation = two_documents(
        (1.0, 1.0),
        (0, 0),
        expert_layers=(1, 3),
        load=np.array([[5.0, 5.0, 5.0, 5.0], [16.0, 16.0, 0.0, 0.0]]),
        dropped=np.array([0.0, 8.0]),
        confidence=np.array([0.75, 0.5]),
        batch_violation=np.array([0.5, 1.25]),
    )
    balanced, uneven = expert_statistics(evaluation)
    assert balanced == pytest.approx(
        {
            'layer': 1,
            'max_violation': 0,
            'entropy': 1,
            'gini': 0,
            'dead_experts': 0,
            'drop_fraction': 0,
            'max_violation_batch': 0.5,
            'confidence': 0.75,
        }
    )
    # Half of the experts take all: the largest load is twice the mean, and ln 2 / ln 4 is a half.
    assert uneven == pytest.approx(
        {
            'layer': 3,
            'max_violation': 1,
            'entropy': 0.5,
            'gini': 0.5,
            'dead_experts': 2,
            'drop_fraction': 0.25,
            'max_violation_batch': 1.25,
            'confidence': 0.5,
        }
    )
