"""Divergences on top ids with a tail, and on samples, against float64 references and statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_divergences import (
    CASES,
    IDS,
    adaptive_share,
    log_softmax,
    logits_pair,
    order_reference,
    reference,
)

import distill
from distill import DenseTargets, SampledTargets, TopKTargets
from distill.pairs import FORMS, PAIRS, require_sound
from moe.errors import InputError

V, K = 9, 3


def top_k(teacher, k=K, temperature=1.0):
    """The k most probable ids in a scrambled order, and the log of what is left."""
    log_q = log_softmax(teacher, temperature)
    ids = np.argsort(-log_q, -1)[..., :k][..., ::-1].copy()
    kept = np.take_along_axis(log_q, ids, -1)
    with np.errstate(divide='ignore'):
        tail = (
            np.log(np.maximum(1 - np.exp(kept).sum(-1), 0))
            if k < V
            else np.full(log_q.shape[:-1], -np.inf)
        )
    return TopKTargets(ids, np.float32(kept), np.float32(tail), temperature)


def in_buckets(logits, ids, temperature=1.0):
    """Float64 log-probabilities of the ids and, last, of the rest."""
    log_p = log_softmax(logits, temperature)
    rest = log_p.copy()
    np.put_along_axis(rest, ids, -np.inf, -1)
    with np.errstate(divide='ignore'):
        tail = np.log(np.exp(rest).sum(-1, keepdims=True))
    return np.concatenate([np.take_along_axis(log_p, ids, -1), tail], -1)


def value_and_gradient(name, student, targets, **options):
    def total(student):
        values = getattr(distill, f'{name}_per_token')(student, targets, **options)
        return values.sum(), values

    (_, values), gradient = jax.value_and_grad(total, has_aux=True)(jnp.asarray(student))
    return np.asarray(values), np.asarray(gradient)


@pytest.mark.parametrize(('name', 'options'), CASES, ids=IDS)
@pytest.mark.parametrize('temperature', [1.0, 2.0])
def test_top_k_is_exact_on_its_buckets(name, options, temperature):
    student, teacher = logits_pair(0, (2, 3, V))
    targets = top_k(teacher, temperature=temperature)
    values, gradient = value_and_gradient(
        name, student, targets, temperature=temperature, **options
    )
    theirs = in_buckets(teacher, targets.ids, temperature)
    share = {}
    if name == 'adaptive_kl':
        ours = in_buckets(student, targets.ids, temperature)
        share = {'share': adaptive_share(ours, theirs, options['mu'])}

    def expected(student):
        ours = in_buckets(student, targets.ids, temperature)
        return reference(name, ours, theirs, **options, **share)

    np.testing.assert_allclose(values, expected(student), rtol=2e-5, atol=1e-6)
    wide = student.astype(np.float64)
    for v in range(V):
        step = np.eye(V)[v] * 1e-5
        slope = (expected(wide + step) - expected(wide - step)) / 2e-5
        np.testing.assert_allclose(gradient[..., v], slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(('name', 'options'), CASES, ids=IDS)
def test_top_k_of_the_whole_vocabulary_is_dense(name, options):
    student, teacher = logits_pair(1, (2, 3, V))
    dense = value_and_gradient(name, student, DenseTargets(teacher), **options)
    for a, b in zip(
        value_and_gradient(name, student, top_k(teacher, V), **options), dense, strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6)


def test_top_k_by_hand():
    # q = (1/2, 1/4 | 1/4), p = (1/4, 1/4 | 1/2): KL = ln(2)/2 - ln(2)/4, h = p - q by bucket, and
    # the tail's -1/4... + 1/2 is shared by its two words as the student shares it, 3 to 1.
    student = np.log(np.array([[[1 / 4, 3 / 8, 1 / 4, 1 / 8]]], np.float32))
    targets = TopKTargets(
        np.array([[[0, 2]]]), np.log(np.float32([[[1 / 2, 1 / 4]]])), np.log(np.float32([[1 / 4]]))
    )
    value, gradient = value_and_gradient('forward_kl', student, targets)
    np.testing.assert_allclose(value, np.log(2) / 4, rtol=1e-5)
    np.testing.assert_allclose(gradient[0, 0], [-1 / 4, 3 / 16, 0, 1 / 16], atol=1e-6)


@pytest.mark.parametrize('name', ['forward_kl', 'reverse_kl', 'jsd'])
def test_a_small_tail_keeps_its_digits(name):
    # The student leaves e^-40 to the tail, which 1 - sum would lose.
    student = np.array([[[0.0, -1.0, -40.0, -41.0]]], np.float32)
    log_q = log_softmax(np.array([[[0.0, -2.0, -3.0, -3.0]]]))
    ids = np.array([[[1, 0]]])
    targets = TopKTargets(
        ids,
        np.float32(np.take_along_axis(log_q, ids, -1)),
        np.float32(np.log(np.exp(log_q[..., 2:]).sum(-1))),
    )
    options = {'beta': 0.3} if name == 'jsd' else {}
    values, gradient = value_and_gradient(name, student, targets, **options)
    theirs, ours = in_buckets(np.array([[[0.0, -2.0, -3.0, -3.0]]]), ids), in_buckets(student, ids)
    np.testing.assert_allclose(values, reference(name, ours, theirs, **options), rtol=1e-5)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize(('name', 'options'), CASES, ids=IDS)
def test_unused_slots_and_masked_tokens_may_hold_anything(name, options):
    student, teacher = logits_pair(2, (2, 3, V))
    targets = top_k(teacher)
    clean = value_and_gradient(name, student, targets, **options)
    spare = np.full((2, 3, 2), -np.inf, np.float32)
    # One spare id repeats a used one, and one is no word at all.
    ids = np.concatenate([targets.ids, targets.ids[..., :1], np.full((2, 3, 1), 10**6)], -1)
    wide = targets.replace(ids=ids, log_probs=np.concatenate([targets.log_probs, spare], -1))
    mask = np.array([[True, False, True], [True, True, False]])
    wide.log_probs[~mask], wide.tail_log_prob[~mask], wide.ids[~mask] = np.nan, np.nan, -7
    student = np.where(mask[..., None], student, np.nan)
    values, gradient = value_and_gradient(name, student, wide, mask=mask, **options)
    np.testing.assert_allclose(values, np.where(mask, clean[0], 0), rtol=1e-5, atol=1e-7)
    expected = np.where(mask[..., None], clean[1], 0)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-7)


def test_top_k_is_never_negative_and_finite_in_its_gradient():
    for seed in range(4):
        student, teacher = logits_pair(seed, (4, 8, V), scale=(1e-4, 1.0, 30.0, 300.0)[seed])
        student[..., 1] = teacher[..., 2] = -np.inf
        for name, options in CASES:
            values, gradient = value_and_gradient(name, student, top_k(teacher), **options)
            assert (values >= 0).all(), (name, values)
            assert np.isfinite(gradient).all(), name


@pytest.mark.parametrize('name', ['hinge', 'ranking'])
def test_top_ids_have_the_order_of_logits(name):
    student, teacher = logits_pair(3, (2, 3, V))
    targets = top_k(teacher, 5)
    values, gradient = value_and_gradient(name, student, targets, k=4)
    wide = student.astype(np.float64), teacher.astype(np.float64)
    np.testing.assert_allclose(values, order_reference(name, *wide, 4), rtol=1e-4, atol=1e-6)
    dense = value_and_gradient(name, student, DenseTargets(teacher), k=4)
    np.testing.assert_allclose(gradient, dense[1], rtol=1e-5, atol=1e-6)


def draw(rng, log_q, draws, slots):
    """Counts of `draws` independent draws by id, in `slots` slots of which some stay unused."""
    counts = rng.multinomial(draws, np.exp(log_q))
    ids = np.argsort(-counts, -1, kind='stable')[..., :slots]
    return SampledTargets(ids, np.take_along_axis(counts, ids, -1))


def test_samples_by_hand():
    # Drawn: word 0 twice, word 2 once (in two slots: 0 and 1 more), a spare slot with a bad id.
    student, _ = logits_pair(4, (1, 2, V))
    ids = np.array([[[0, 2, 2, -5], [1, 1, 3, 10**6]]])
    counts = np.array([[[2, 0, 1, 0], [0, 0, 0, 0]]])
    log_p = log_softmax(student)
    values, gradient = value_and_gradient('forward_kl', student, SampledTargets(ids, counts))
    expected = -(2 * log_p[0, 0, 0] + log_p[0, 0, 2]) / 3
    # A token without draws teaches nothing.
    np.testing.assert_allclose(values, [[expected, 0]], rtol=1e-5)
    slope = np.exp(log_p)
    slope[0, 0, 0] -= 2 / 3
    slope[0, 0, 2] -= 1 / 3
    slope[0, 1] = 0
    np.testing.assert_allclose(gradient, slope, atol=1e-6)
    again = value_and_gradient('cross_entropy', student, SampledTargets(ids, counts))
    np.testing.assert_array_equal(again[0], values)


def test_samples_are_unbiased_and_a_renormalised_top_k_is_not():
    rng = np.random.default_rng(5)
    runs, draws = 4000, 6
    student, teacher = logits_pair(6, (1, 1, V), scale=1.5)
    log_q = log_softmax(teacher)[0, 0]
    many = np.broadcast_to(student, (1, runs, V))
    samples = draw(rng, np.broadcast_to(log_q, (1, runs, V)), draws, draws)
    values, gradients = value_and_gradient('forward_kl', many, samples)
    exact_value, exact = value_and_gradient('forward_kl', student, DenseTargets(teacher))
    entropy = -(np.exp(log_q) * log_q).sum()

    def deviations(estimates, truth):
        """How many standard errors of the mean the mean is away."""
        error = estimates.std(0) / runs**0.5
        return np.abs(estimates.mean(0) - truth) / error

    # Of ten Gaussians, one in 10^4 tests would have any beyond 4.3.
    assert deviations(gradients[0], exact[0, 0]).max() < 4.3
    assert deviations(values[0], exact_value[0, 0] + entropy) < 4.3
    error = gradients[0].std(0) / runs**0.5

    # The same teacher cut to its first words, with their probabilities scaled up to 1.
    kept = np.where(np.argsort(np.argsort(-log_q)) < K, log_q, -np.inf)
    _, cut = value_and_gradient('forward_kl', student, DenseTargets(np.float32(kept)[None, None]))
    assert (np.abs(cut - exact)[0, 0] / error).max() > 10
    # Nor are samples whose counts are forgotten.
    once = samples.replace(counts=np.minimum(samples.counts, 1))
    _, forgetful = value_and_gradient('forward_kl', many, once)
    assert deviations(forgetful[0], exact[0, 0]).max() > 10


def test_every_pair_is_in_the_table_and_the_library_keeps_to_it():
    student, teacher = logits_pair(7, (1, 2, V))
    targets = {
        'dense': DenseTargets(teacher),
        'top_k': top_k(teacher, 4),
        'sampled': SampledTargets(np.zeros((1, 2, 3), int), np.ones((1, 2, 3), int)),
    }
    assert set(FORMS.values()) == set(PAIRS) == {'hidden', *targets}
    for form, targets_of_form in targets.items():
        assert set(PAIRS[form]) == set(distill.algebra.DIVERGENCES)
        for name, pair in PAIRS[form].items():
            divergence = getattr(distill, name)
            options = {'k': 3} if name in ('hinge', 'ranking') else {}
            if pair.kind != 'refused':
                assert np.isfinite(divergence(student, targets_of_form, **options))
                continue
            terms = (distill.Term(name),)
            for refused in (
                lambda d=divergence, t=targets_of_form, o=options: d(student, t, **o),
                lambda t=terms, f=form: require_sound(t, f),
            ):
                with pytest.raises(
                    InputError, match=f'{name} is not sound on sampled targets: .* '
                ):
                    refused()
            assert pair.note
            assert 'forward_kl on these samples' in pair.instead


@pytest.mark.parametrize(
    ('terms', 'form', 'options', 'message'),
    [
        ((distill.Term('jsd', temperature=2.0),), 'top_k', {}, 'temperature of jsd .* 1.0 .* 2.0'),
        ((distill.Term('forward_kl'),), 'sampled', {'temperature': 2.0}, 'must be the 2.0'),
        (
            (distill.Term('forward_kl', temperature=distill.Schedule('linear', 1.0, 2.0, 5)),),
            'top_k',
            {},
            'Schedule',
        ),
        ((distill.Term('forward_kl', standardize=True),), 'top_k', {}, 'standardize=True needs'),
        ((distill.Term('hinge', k=9),), 'top_k', {'kept': 8}, 'k=9 .* received 8'),
        ((distill.Term('cross_entropy'), distill.Term('hinge')), 'sampled', {}, 'hinge is not'),
    ],
)
def test_what_was_recorded_cannot_be_changed(terms, form, options, message):
    with pytest.raises(InputError, match=message):
        require_sound(terms, form, **options)


def test_sound_terms_pass():
    labels = distill.Term('cross_entropy', temperature=3.0)
    require_sound((labels, distill.Term('forward_kl', temperature=2.0)), 'top_k', temperature=2.0)
    require_sound((labels, distill.Term('forward_kl')), 'sampled')
    require_sound((distill.Term('jsd', temperature=0.5, standardize=True),), 'hidden')


def test_shapes_that_do_not_match_are_refused():
    student, teacher = logits_pair(8, (2, 3, V))
    targets = top_k(teacher)
    for bad, name in (
        (targets.replace(ids=targets.ids[:, :2]), 'ids'),
        (targets.replace(log_probs=targets.log_probs[..., :1]), 'log_probs'),
        (targets.replace(tail_log_prob=targets.tail_log_prob[..., None]), 'tail_log_prob'),
        (SampledTargets(targets.ids, targets.ids[..., :1]), 'counts'),
    ):
        with pytest.raises(InputError, match=f'The {name} of the targets'):
            distill.forward_kl(student, bad)
