"""What is kept of a teacher, against float64 softmax and the distribution that was drawn from."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import distill
from distill.distributed import global_batch
from distill.draws import draw_sorted, run_lengths
from distill.estimators import SampledEstimator, TopKEstimator, TruncatedEstimator, draws_for
from distill.types import Batch, HiddenTargets
from moe.errors import InputError
from moe.sharding import MeshConfig, batch_sharding, make_mesh

B, T, D, V = 8, 6, 8, 1000


def rows(seed: int = 0) -> Batch:
    tokens = np.random.default_rng(seed).integers(0, V, (B, T)).astype(np.int32)
    ones = np.ones((B, T), np.int32)
    return Batch(tokens, tokens, ones.astype(bool), ones, ones)


def teacher(scale: float = 2.0) -> HiddenTargets:
    keys = jax.random.split(jax.random.key(0))
    hidden = jax.random.normal(keys[0], (B, T, D))
    return HiddenTargets(hidden, jax.random.normal(keys[1], (D, V)) * scale / D**0.5)


def estimated(estimator, targets: HiddenTargets, batch: Batch, **options):
    return jax.jit(functools.partial(estimator.estimate, **options))(targets, batch)


def reference(targets: HiddenTargets, temperature: float = 1.0) -> np.ndarray:
    hidden, head = (np.asarray(x, np.float64) for x in (targets.hidden, targets.head))
    logits = hidden @ head / temperature
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize('chunk_size', [1, 17, 10_000])
@pytest.mark.parametrize('temperature', [1.0, 2.5])
def test_top_k_is_the_float64_top_k_with_its_tail(chunk_size: int, temperature: float):
    log_probs = reference(teacher(), temperature)
    found = estimated(TopKEstimator(5, temperature), teacher(), rows(), chunk_size=chunk_size)
    order = np.argsort(-log_probs, axis=-1)[..., :5]
    np.testing.assert_array_equal(found.ids, order)
    expected = np.take_along_axis(log_probs, order, -1)
    np.testing.assert_allclose(found.log_probs, expected, atol=2e-5)
    tail = np.log1p(-np.exp(expected).sum(-1))
    np.testing.assert_allclose(found.tail_log_prob, tail, atol=2e-5)
    assert found.temperature == temperature


def test_a_tiny_tail_keeps_its_digits():
    head = np.full((1, 4), -40.0, np.float32)
    head[0, 0], head[0, 1] = 0, -1
    found = TopKEstimator(2).estimate(HiddenTargets(jnp.ones((1, 1, 1)), jnp.array(head)), rows())
    # 2 exp(-40) / (1 + exp(-1)): 1 - (sum of the top) is zero in float32.
    np.testing.assert_allclose(
        found.tail_log_prob, np.log(2) - 40 - np.log1p(np.exp(-1)), rtol=1e-6
    )


def test_truncated_is_the_top_scaled_up_to_one_with_no_tail():
    # Probabilities 1/2, 1/4, 1/8, 1/8: the first two are 2/3 and 1/3 of their sum.
    head = -jnp.log(2.0) * jnp.array([[3.0, 1.0, 3.0, 2.0]])
    found = TruncatedEstimator(2).estimate(HiddenTargets(jnp.ones((1, 1, 1)), head), rows())
    np.testing.assert_array_equal(found.ids, [[[1, 3]]])
    np.testing.assert_allclose(np.exp(found.log_probs), [[[2 / 3, 1 / 3]]], rtol=1e-6)
    np.testing.assert_array_equal(found.tail_log_prob, [[-np.inf]])


def test_a_truncated_target_asks_for_nothing_outside_of_it():
    log_probs = reference(teacher())
    found = estimated(TruncatedEstimator(3), teacher(), rows())
    order = np.argsort(-log_probs, axis=-1)[..., :3]
    kept = np.exp(np.take_along_axis(log_probs, order, -1))
    kept /= kept.sum(-1, keepdims=True)
    student = np.random.default_rng(5).normal(size=log_probs.shape)
    p = np.exp(student) / np.exp(student).sum(-1, keepdims=True)
    q = np.zeros_like(p)
    np.put_along_axis(q, order, kept, -1)

    gradient = jax.grad(lambda logits: distill.forward_kl_per_token(logits, found).sum())(
        jnp.asarray(student, jnp.float32)
    )
    # Of a forward KL: the student's probabilities less the target's.
    np.testing.assert_allclose(gradient, p - q, atol=1e-5)


def test_ties_and_the_whole_vocabulary():
    flat = HiddenTargets(jnp.ones((1, 1, 1)), jnp.zeros((1, 4)))
    found = TopKEstimator(3).estimate(flat, rows())
    np.testing.assert_allclose(np.exp(found.log_probs), 0.25, rtol=1e-6)
    np.testing.assert_allclose(np.exp(found.tail_log_prob), 0.25, rtol=1e-6)
    assert len(set(np.asarray(found.ids).ravel())) == 3
    whole = TopKEstimator(4).estimate(flat, rows())
    np.testing.assert_array_equal(whole.tail_log_prob, -np.inf)
    with pytest.raises(InputError, match='at most the vocabulary, 4; received 5'):
        TopKEstimator(5).estimate(flat, rows())


@pytest.mark.parametrize(('temperature', 'proposal'), [(1.0, 1.0), (2.0, 1.0), (1.0, 2.0)])
def test_draws_have_the_teachers_distribution(temperature: float, proposal: float):
    """The share of each id over 48 tokens of one distribution, against float64."""
    targets = teacher(1.0)
    alike = HiddenTargets(jnp.broadcast_to(targets.hidden[:1, :1], (B, T, D)), targets.head)
    q, r = (np.exp(reference(alike, x)[0, 0]) for x in (temperature, temperature * proposal))
    draws = 500
    found = estimated(SampledEstimator(draws, temperature, proposal), alike, rows())
    counts = np.asarray(found.counts, np.float64)
    shares = counts / counts.sum(-1, keepdims=True) / (B * T)
    mean = np.bincount(np.asarray(found.ids).ravel(), shares.ravel(), minlength=V)
    score = (mean - q) / np.sqrt(q**2 / r / (draws * B * T))
    common = q > 1e-3
    assert np.abs(score[common]).max() < 5
    assert 0.8 < np.std(score[common]) < 1.2
    # Without weights, draws of a proposal are of another distribution, and this would see it.
    assert (np.abs((r - q) / np.sqrt(q / (draws * B * T))).max() > 8) == (proposal != 1)


def test_draws_follow_from_a_rows_content_alone():
    estimator, batch, targets = SampledEstimator(20, seed=3), rows(), teacher()
    found = estimated(estimator, targets, batch)
    order = np.array([5, 2])
    some = jax.tree.map(lambda x: x[order], batch)
    moved = HiddenTargets(targets.hidden[order], targets.head)
    again = estimated(estimator, moved, some, chunk_size=3)
    np.testing.assert_array_equal(again.ids, found.ids[order])
    np.testing.assert_array_equal(again.counts, found.counts[order])
    other = estimated(SampledEstimator(20, seed=4), targets, batch)
    assert (np.asarray(other.ids) != found.ids).mean() > 0.5
    alike = HiddenTargets(jnp.broadcast_to(targets.hidden[:1], (B, T, D)), targets.head)
    ids = np.asarray(estimated(estimator, alike, batch).ids)
    assert (ids[0] != ids[1]).any(), 'rows of other tokens draw for themselves'


def test_what_is_impossible_is_never_drawn():
    logits = jnp.array([-jnp.inf, 0.0, -jnp.inf, -30.0, -jnp.inf, -jnp.inf])
    uniforms = jnp.array([0.0, 0.5, 1 - 2**-24])
    np.testing.assert_array_equal(draw_sorted(logits, uniforms, 2), [1, 1, 1])
    half = jnp.array([0.0, -jnp.inf, 0.0, -jnp.inf])
    np.testing.assert_array_equal(
        draw_sorted(half, jnp.array([0.0, 0.49, 0.51, 0.99]), 2), [0, 0, 2, 2]
    )


def test_run_lengths():
    ids = jnp.array([[3, 3, 3, 5, 7, 7], [1, 2, 3, 4, 5, 6]])
    np.testing.assert_array_equal(run_lengths(ids), [[3, 0, 0, 1, 2, 0], [1, 1, 1, 1, 1, 1]])


def test_draws_for_a_number_of_distinct_ids():
    """Four equal ids: n draws give 4 (1 - (3/4)^n); 2.3125 with three, 2.734 with four."""
    flat = HiddenTargets(jnp.ones((B, T, 1)), jnp.zeros((1, 4)))
    assert draws_for(2.3, flat, rows()) == 3
    assert draws_for(2.4, flat, rows()) == 4


@pytest.mark.parametrize('mesh', [MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=8)])
@pytest.mark.parametrize('estimator', [TopKEstimator(5), SampledEstimator(9)])
def test_a_mesh_changes_nothing(mesh: MeshConfig, estimator):
    devices = make_mesh(mesh)
    sharding = batch_sharding(devices)
    batch = global_batch(rows(), sharding)
    vocab = jax.sharding.NamedSharding(devices, jax.sharding.PartitionSpec(None, 'tensor'))
    plain = estimated(estimator, teacher(), rows())
    split = HiddenTargets(
        jax.device_put(teacher().hidden, sharding), jax.device_put(teacher().head, vocab)
    )
    found = estimated(estimator, split, batch)
    np.testing.assert_array_equal(found.ids, plain.ids)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda: TopKEstimator(0), 'targets.k must be at least 1'),
        (lambda: TopKEstimator(4, 0.0), 'targets.temperature must be positive'),
        (lambda: SampledEstimator(0), 'targets.draws must be between 1 and 4096'),
        (lambda: SampledEstimator(9, proposal_temperature=-1.0), 'proposal_temperature'),
    ],
)
def test_refuses(make, message: str):
    with pytest.raises(InputError, match=message):
        make()
