"""Divergences against hand-worked numbers and a NumPy float64 reference of their definitions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

import distill
from distill import DenseTargets, HiddenTargets
from moe import errors

# Name, options, and what the options mean to the reference.
CASES = [
    ('cross_entropy', {}),
    ('forward_kl', {}),
    ('reverse_kl', {}),
    ('jsd', {'beta': 0.3}),
    ('skew_forward_kl', {'lam': 0.1}),
    ('skew_reverse_kl', {'lam': 0.4}),
    ('jeffreys', {}),
    ('alpha_divergence', {'alpha': 0.3}),
    ('adaptive_kl', {'mu': 0.6}),
    ('total_variation', {}),
]
IDS = [name for name, _ in CASES]
# Total variation has kinks, and the gradient of adaptive KL leaves its weights out.
SMOOTH = set(IDS) - {'adaptive_kl', 'total_variation'}


def log_softmax(logits, temperature=1.0):
    scaled = np.asarray(logits, np.float64) / temperature
    shifted = scaled - scaled.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def kl(log_a, log_b):
    """KL(a || b) in float64, with 0 log 0 = 0."""
    a = np.exp(log_a)
    with np.errstate(invalid='ignore'):
        return np.where(a > 0, a * (log_a - log_b), 0).sum(-1)


def mixture(log_a, log_b, share):
    return np.logaddexp(log_a + np.log(share), log_b + np.log(1 - share))


def adaptive_share(log_p, log_q, mu):
    """The share of |p - q| on the teacher's head, by sorting; probabilities are distinct."""
    p, q = np.exp(log_p), np.exp(log_q)
    order = np.argsort(-q, -1)
    gaps, sorted_q = (np.take_along_axis(x, order, -1) for x in (np.abs(p - q), q))
    head = np.cumsum(sorted_q, -1) <= mu
    head[..., 0] = True
    return np.where(head, gaps, 0).sum(-1) / gaps.sum(-1)


def reference(
    name,
    student,
    teacher,
    *,
    temperature=1.0,
    beta=None,
    lam=None,
    alpha=None,
    mu=None,
    share=None,
):
    p, q = log_softmax(student, temperature), log_softmax(teacher, temperature)
    if name == 'jeffreys':
        return kl(q, p) + kl(p, q)
    if name == 'alpha_divergence':
        return (1 - np.exp(alpha * q + (1 - alpha) * p).sum(-1)) / (alpha * (1 - alpha))
    if name == 'adaptive_kl':
        share = adaptive_share(p, q, mu) if share is None else share
        return share * kl(q, p) + (1 - share) * kl(p, q)
    if name == 'cross_entropy':
        return kl(q, p) - kl(q, np.zeros_like(q))
    if name == 'forward_kl':
        return kl(q, p)
    if name == 'reverse_kl':
        return kl(p, q)
    if name == 'jsd':
        m = mixture(q, p, beta)
        return beta * kl(q, m) + (1 - beta) * kl(p, m)
    if name == 'skew_forward_kl':
        return kl(q, mixture(q, p, lam))
    if name == 'skew_reverse_kl':
        return kl(p, mixture(p, q, lam))
    return np.abs(np.exp(p) - np.exp(q)).sum(-1) / 2


def reference_gradient(name, student, teacher, **options):
    """Central differences of the reference, 0 where a student logit is -inf."""
    gradient = np.zeros(student.shape)
    if name == 'adaptive_kl':
        temperature = options.get('temperature', 1.0)
        logs = log_softmax(student, temperature), log_softmax(teacher, temperature)
        options = options | {'share': adaptive_share(*logs, options['mu'])}
    for v in range(student.shape[-1]):
        step = np.zeros(student.shape[-1])
        step[v] = 1e-5
        up = reference(name, student + step, teacher, **options)
        down = reference(name, student - step, teacher, **options)
        gradient[..., v] = np.where(np.isfinite(student[..., v]), (up - down) / 2e-5, 0)
    return gradient


def value_and_gradient(name, student, teacher, **options):
    """The per-token values, and their gradients in the student's logits."""
    per_token = getattr(distill, f'{name}_per_token')

    def total(student):
        values = per_token(student, DenseTargets(teacher), **options)
        return values.sum(), values

    (_, values), gradient = jax.value_and_grad(total, has_aux=True)(jnp.asarray(student))
    return np.asarray(values), np.asarray(gradient)


def logits_pair(seed=0, shape=(2, 3, 7), scale=3.0):
    rng = np.random.default_rng(seed)
    student, teacher = scale * rng.standard_normal((2, *shape))
    return student.astype(np.float32), teacher.astype(np.float32)


log = math.log
# Teacher q = (3/4, 1/4), student p = (1/2, 1/2).
WORKED = [
    ('cross_entropy', {}, log(2)),
    ('forward_kl', {}, 0.75 * log(3 / 2) + 0.25 * log(1 / 2)),
    ('reverse_kl', {}, 0.5 * log(2 / 3) + 0.5 * log(2)),
    # m = (5/8, 3/8)
    (
        'jsd',
        {'beta': 0.5},
        0.5 * (0.75 * log(6 / 5) + 0.25 * log(2 / 3)) + 0.25 * (log(4 / 5) + log(4 / 3)),
    ),
    # m = (1/4) q + (3/4) p = (9/16, 7/16): beta is the teacher's share
    (
        'jsd',
        {'beta': 0.25},
        0.25 * (0.75 * log(4 / 3) + 0.25 * log(4 / 7)) + 0.375 * (log(8 / 9) + log(8 / 7)),
    ),
    # m = (1/5) q + (4/5) p = (11/20, 9/20)
    ('skew_forward_kl', {'lam': 0.2}, 0.75 * log(15 / 11) + 0.25 * log(5 / 9)),
    # m = (1/5) p + (4/5) q = (7/10, 3/10)
    ('skew_reverse_kl', {'lam': 0.2}, 0.5 * log(5 / 7) + 0.5 * log(5 / 3)),
    ('total_variation', {}, 0.25),
    ('jeffreys', {}, 0.25 * log(3)),
    # 4 (1 - (sqrt(3/8) + sqrt(1/8)))
    ('alpha_divergence', {'alpha': 0.5}, 4 * (1 - (3 / 8) ** 0.5 - (1 / 8) ** 0.5)),
    ('alpha_divergence', {'alpha': 1.0}, 0.75 * log(3 / 2) + 0.25 * log(1 / 2)),
    ('alpha_divergence', {'alpha': 0.0}, 0.5 * log(2 / 3) + 0.5 * log(2)),
    # The head is the first word alone, and the gaps are 1/4 and 1/4: half of Jeffreys.
    ('adaptive_kl', {'mu': 0.8}, 0.125 * log(3)),
    # One pair; the teacher's gap is ln 3, the student's 0.
    ('hinge', {'k': 2}, log(3)),
    ('ranking', {'k': 2}, log(2)),
]


@pytest.mark.parametrize(('name', 'options', 'expected'), WORKED)
def test_hand_worked(name, options, expected):
    student = jnp.zeros((1, 1, 2))
    targets = DenseTargets(jnp.log(jnp.array([[[3.0, 1.0]]])))
    loss = getattr(distill, name)(student, targets, **options)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    # At T = 2 the logits (ln 9, 0) say the same as (ln 3, 0) at T = 1; T^2 = 4.
    squared = {'temperature': 2.0, 'scale_by_temperature_squared': True}
    targets = DenseTargets(jnp.log(jnp.array([[[9.0, 1.0]]])))
    loss = getattr(distill, name)(student, targets, **options, **squared)
    np.testing.assert_allclose(loss, 4 * expected, rtol=1e-5)


def test_defaults_are_those_of_the_papers():
    student, teacher = logits_pair()
    targets = DenseTargets(teacher)
    jsd = distill.jsd_per_token(student, targets)
    np.testing.assert_allclose(jsd, reference('jsd', student, teacher, beta=0.5), rtol=1e-4)
    for name in ('skew_forward_kl', 'skew_reverse_kl'):
        skew = getattr(distill, f'{name}_per_token')(student, targets)
        np.testing.assert_allclose(skew, reference(name, student, teacher, lam=0.1), rtol=1e-4)


@pytest.mark.parametrize(('name', 'options'), CASES, ids=IDS)
@pytest.mark.parametrize('temperature', [0.7, 1.0, 3.0])
def test_equals_reference(name, options, temperature):
    student, teacher = logits_pair()
    options = options | {'temperature': temperature}
    values, gradient = value_and_gradient(name, student, teacher, **options)
    np.testing.assert_allclose(
        values, reference(name, student, teacher, **options), rtol=2e-5, atol=1e-6
    )
    expected = reference_gradient(name, student, teacher, **options)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(('name', 'options'), CASES, ids=IDS)
def test_half_precision_is_computed_in_float32(name, options):
    student, teacher = (jnp.asarray(x, jnp.bfloat16) for x in logits_pair(1))
    values, gradient = value_and_gradient(name, student, teacher, **options)
    wide = np.asarray(student, np.float64), np.asarray(teacher, np.float64)
    assert values.dtype == np.float32
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(values, reference(name, *wide, **options), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(('name', 'options'), CASES[1:], ids=IDS[1:])
def test_zero_at_equality_with_zero_gradient(name, options):
    student, _ = logits_pair(2)
    student[..., 3] = -np.inf
    values, gradient = value_and_gradient(name, student, student.copy(), **options)
    np.testing.assert_array_less(values, 1e-12)
    np.testing.assert_allclose(gradient, 0, atol=1e-7)


def test_jsd_ends_are_kls_and_its_middle_is_symmetric():
    student, teacher = logits_pair(3)
    for beta, name in ((0.0, 'forward_kl'), (1.0, 'reverse_kl')):
        end = value_and_gradient('jsd', student, teacher, beta=beta)
        for a, b in zip(end, value_and_gradient(name, student, teacher), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)
    there = distill.jsd(student, DenseTargets(teacher), beta=0.5)
    back = distill.jsd(teacher, DenseTargets(student), beta=0.5)
    np.testing.assert_allclose(there, back, rtol=1e-6)
    one_way = distill.jsd(student, DenseTargets(teacher), beta=0.2)
    swapped = distill.jsd(teacher, DenseTargets(student), beta=0.8)
    np.testing.assert_allclose(one_way, swapped, rtol=1e-6)
    assert abs(one_way - there) > 1e-3


def test_skew_without_skew_is_kl():
    student, teacher = logits_pair(4)
    for name in ('forward_kl', 'reverse_kl'):
        skew = value_and_gradient(f'skew_{name}', student, teacher, lam=0.0)
        for a, b in zip(skew, value_and_gradient(name, student, teacher), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize(('name', 'options'), CASES, ids=IDS)
def test_masked_positions_may_hold_anything(name, options):
    student, teacher = logits_pair(5, (2, 4, 5))
    expected = reference(name, student, teacher, **options)
    mask = np.array([[True, False, True, False], [False, False, False, True]])
    student[0, 1], teacher[0, 3], student[1, 0] = np.nan, np.nan, np.inf
    teacher[1, 1], student[1, 2], teacher[1, 2] = np.inf, -np.inf, -np.inf
    loss = getattr(distill, name)(student, DenseTargets(teacher), mask=mask, **options)
    np.testing.assert_allclose(loss, expected[mask].mean(), rtol=2e-5)
    values, gradient = value_and_gradient(name, student, teacher, mask=mask, **options)
    np.testing.assert_array_equal(values[~mask], 0)
    np.testing.assert_array_equal(gradient[~mask], 0)
    assert np.isfinite(gradient).all()
    assert np.abs(gradient[mask]).max() > 0


def test_nothing_unmasked_is_zero():
    student, teacher = logits_pair(5)
    nothing = np.zeros((2, 3), bool)
    assert distill.forward_kl(student, DenseTargets(teacher), mask=nothing) == 0


@pytest.mark.parametrize(('name', 'options'), CASES, ids=IDS)
def test_minus_infinity_on_both_sides(name, options):
    # A vocabulary padded on both sides: the padding is as if it were not there.
    student, teacher = logits_pair(6)
    student[..., -2:] = teacher[..., -2:] = -np.inf
    values, gradient = value_and_gradient(name, student, teacher, **options)
    short = student[..., :-2], teacher[..., :-2]
    np.testing.assert_allclose(values, reference(name, *short, **options), rtol=2e-5, atol=1e-6)
    np.testing.assert_array_equal(gradient[..., -2:], 0)
    expected = reference_gradient(name, *short, **options)
    np.testing.assert_allclose(gradient[..., :-2], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(('name', 'options'), CASES, ids=IDS)
@pytest.mark.parametrize('side', ['student', 'teacher'])
def test_minus_infinity_on_one_side(name, options, side):
    student, teacher = logits_pair(7)
    (student if side == 'student' else teacher)[..., 2] = -np.inf
    values, gradient = value_and_gradient(name, student, teacher, **options)
    expected = reference(name, student, teacher, **options)
    # The student denies what the teacher says, or says what the teacher denies.
    denied = name in (
        ('forward_kl', 'cross_entropy', 'jeffreys', 'adaptive_kl')
        if side == 'student'
        else ('reverse_kl', 'jeffreys', 'adaptive_kl')
    )
    assert np.isinf(expected).all() == denied
    np.testing.assert_allclose(values, expected, rtol=2e-5)
    assert np.isfinite(gradient).all()
    if not denied:
        slope = reference_gradient(name, student, teacher, **options)
        np.testing.assert_allclose(gradient, slope, rtol=1e-4, atol=1e-6)


def test_alpha_goes_from_reverse_to_forward_kl():
    student, teacher = logits_pair(13)
    for alpha, name in ((0.0, 'reverse_kl'), (1.0, 'forward_kl')):
        end = value_and_gradient('alpha_divergence', student, teacher, alpha=alpha)
        for a, b in zip(end, value_and_gradient(name, student, teacher), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)
        near = value_and_gradient('alpha_divergence', student, teacher, alpha=abs(alpha - 1e-3))
        np.testing.assert_allclose(near[0], end[0], rtol=0.05)


@pytest.mark.parametrize(
    ('name', 'parameter', 'values'),
    [
        ('jsd', 'beta', (0.0, 0.3, 1.0)),
        ('skew_forward_kl', 'lam', (0.0, 0.4)),
        ('skew_reverse_kl', 'lam', (0.0, 0.4)),
        ('alpha_divergence', 'alpha', (0.0, 0.3, 1.0)),
    ],
)
def test_parameters_may_be_traced_ends_included(name, parameter, values):
    student, teacher = logits_pair(14)
    traced = jax.jit(lambda x: value_and_gradient_traced(name, student, teacher, parameter, x))
    for value in values:
        static = value_and_gradient(name, student, teacher, **{parameter: value})
        for a, b in zip(traced(value), static, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-7)


def value_and_gradient_traced(name, student, teacher, parameter, value):
    def total(student):
        per_token = getattr(distill, f'{name}_per_token')
        values = per_token(student, DenseTargets(teacher), **{parameter: value})
        return values.sum(), values

    (_, values), gradient = jax.value_and_grad(total, has_aux=True)(jnp.asarray(student))
    return values, gradient


def test_the_head_of_adaptive_kl():
    # q = (0.5, 0.3, 0.15, 0.05), p = (0.4, 0.1, 0.2, 0.3): gaps 0.1, 0.2, 0.05, 0.25.
    q, p = np.array([0.5, 0.3, 0.15, 0.05]), np.array([0.4, 0.1, 0.2, 0.3])
    forward, reverse = (q * np.log(q / p)).sum(), (p * np.log(p / q)).sum()
    # Words of the head by mu: the first whatever it holds, then what fits.
    for mu, inside in ((0.3, 0.1), (0.51, 0.1), (0.81, 0.3), (0.96, 0.35)):
        share = inside / 0.6
        value = distill.adaptive_kl(
            np.log(p)[None, None].astype(np.float32),
            DenseTargets(np.log(q)[None, None].astype(np.float32)),
            mu=mu,
        )
        np.testing.assert_allclose(value, share * forward + (1 - share) * reverse, rtol=1e-5)


def order_reference(name, student, teacher, k, temperature=1.0):
    """The mean over the pairs of the teacher's k first words, one by one."""
    values = np.zeros(student.shape[:2])
    for at in np.ndindex(*student.shape[:2]):
        first = np.argsort(-teacher[at])[:k]
        losses = []
        for a in range(k):
            for b in range(a + 1, k):
                i, j = first[a], first[b]
                s = (student[at][i] - student[at][j]) / temperature
                t = (teacher[at][i] - teacher[at][j]) / temperature
                losses.append(max(0, t - s) if name == 'hinge' else np.log1p(np.exp(-s)))
        values[at] = np.mean(losses)
    return values


@pytest.mark.parametrize('name', ['hinge', 'ranking'])
def test_losses_of_order(name):
    student, teacher = (x.astype(np.float64) for x in logits_pair(15))
    for options in ({'k': 4}, {'k': 7, 'temperature': 2.5}):
        values, gradient = value_and_gradient(name, *logits_pair(15), **options)
        expected = order_reference(name, student, teacher, **options)
        np.testing.assert_allclose(values, expected, rtol=1e-5)
        slope = np.zeros(student.shape)
        for v in range(7):
            step = np.eye(7)[v] * 1e-6
            up = order_reference(name, student + step, teacher, **options)
            down = order_reference(name, student - step, teacher, **options)
            slope[..., v] = (up - down) / 2e-6
        np.testing.assert_allclose(gradient, slope, rtol=1e-4, atol=1e-6)
    # Only what the teacher holds possible is in an order; equal logits are in none.
    teacher = np.array([[[2.0, -np.inf, 2.0, 0.0]]], np.float32)
    student = np.array([[[1.0, 9.0, 0.5, -np.inf]]], np.float32)
    values, gradient = value_and_gradient(name, student, teacher, k=4)
    np.testing.assert_array_equal(values, 0)
    np.testing.assert_allclose(gradient, 0, atol=1e-7)


@pytest.mark.parametrize('name', ['forward_kl', 'jsd', 'hinge'])
def test_standardized_logits(name):
    student, teacher = logits_pair(16)
    options = {'k': 4} if name == 'hinge' else {'beta': 0.3} if name == 'jsd' else {}

    def expected(student, teacher):
        def z(x):
            return (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)

        s, t = (z(np.asarray(x, np.float64)) for x in (student, teacher))
        if name == 'hinge':
            return order_reference(name, s, t, temperature=0.5, **options)
        return reference(name, s, t, temperature=0.5, **options)

    values, gradient = value_and_gradient(
        name, student, teacher, temperature=0.5, standardize=True, **options
    )
    np.testing.assert_allclose(values, expected(student, teacher), rtol=1e-4)
    # Neither side's scale and level matter.
    moved, _ = value_and_gradient(
        name, 3 * student + 1, teacher / 7, temperature=0.5, standardize=True, **options
    )
    np.testing.assert_allclose(moved, values, rtol=1e-4)
    wide = student.astype(np.float64)
    for v in range(7):
        step = np.eye(7)[v] * 1e-5
        slope = (expected(wide + step, teacher) - expected(wide - step, teacher)) / 2e-5
        np.testing.assert_allclose(gradient[..., v], slope, rtol=1e-3, atol=1e-5)
    # A padded vocabulary is no part of the mean.
    pad = [(0, 0), (0, 0), (0, 2)]
    padded = [np.pad(x, pad, constant_values=-np.inf) for x in (student, teacher)]
    again, pulled = value_and_gradient(name, *padded, temperature=0.5, standardize=True, **options)
    np.testing.assert_allclose(again, values, rtol=1e-5)
    np.testing.assert_allclose(pulled[..., :7], gradient, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(pulled[..., 7:], 0)


def test_disjoint_supports():
    # p = (1, 0), q = (0, 1): m = (1/2, 1/2), so JSD = ln 2; the KLs are infinite; TV = 1.
    student = jnp.array([[[0.0, -jnp.inf]]])
    targets = DenseTargets(jnp.array([[[-jnp.inf, 0.0]]]))
    np.testing.assert_allclose(distill.jsd(student, targets), math.log(2), rtol=1e-6)
    assert distill.total_variation(student, targets) == 1
    assert distill.forward_kl(student, targets) == jnp.inf
    assert distill.reverse_kl(student, targets) == jnp.inf
    # m = (9/10, 1/10) and (1/10, 9/10): both skews are -ln 0.1.
    for name in ('skew_forward_kl', 'skew_reverse_kl'):
        np.testing.assert_allclose(getattr(distill, name)(student, targets), log(10), rtol=1e-6)


@pytest.mark.parametrize(('name', 'options'), CASES, ids=IDS)
@pytest.mark.parametrize('temperature', [1e-3, 1e3])
def test_extreme_temperatures(name, options, temperature):
    # At 1e-3 distributions are points; at 1e3 the KLs are near 1e-6, sums of far larger terms.
    student, teacher = logits_pair(8, (2, 3, 40))
    options = options | {'temperature': temperature}
    values, gradient = value_and_gradient(name, student, teacher, **options)
    np.testing.assert_allclose(values, reference(name, student, teacher, **options), rtol=2e-3)
    assert np.isfinite(gradient).all()
    if temperature > 1:
        # Central differences in float64 resolve 1e-12; the gradients are near 1e-8.
        slope = reference_gradient(name, student, teacher, **options)
        np.testing.assert_allclose(gradient, slope, atol=2e-2 * np.abs(slope).max())


def test_cross_entropy_of_labels_and_of_a_teacher():
    student, _ = logits_pair(9)
    labels = np.array([[0, 6, 2], [3, 3, 5]])
    expected = -np.take_along_axis(log_softmax(student, 1.3), labels[..., None], -1)[..., 0]
    values = distill.cross_entropy_per_token(student, labels, temperature=1.3)
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    gradient = jax.grad(lambda s: distill.cross_entropy_per_token(s, labels).sum())(student)
    np.testing.assert_allclose(
        gradient, np.exp(log_softmax(student)) - np.eye(7)[labels], atol=1e-6
    )
    mask = np.array([[True, True, True], [True, False, True]])
    labels[1, 1] = -100
    loss = distill.cross_entropy(student, labels, mask=mask, temperature=1.3)
    np.testing.assert_allclose(loss, expected[mask].mean(), rtol=1e-5)


def test_no_gradient_flows_to_the_teacher():
    student, teacher = map(jnp.asarray, logits_pair(10))
    for name in IDS:
        divergence = getattr(distill, name)
        gradient = jax.grad(lambda t, f=divergence: f(student, DenseTargets(t)))(teacher)
        np.testing.assert_array_equal(gradient, 0)


def test_hidden_targets_are_their_logits():
    student, _ = logits_pair(11)
    rng = np.random.default_rng(0)
    hidden, head = rng.standard_normal((2, 3, 4)), rng.standard_normal((4, 7))
    targets = HiddenTargets(jnp.asarray(hidden, jnp.float32), jnp.asarray(head, jnp.float32))
    values = distill.jsd_per_token(student, targets, beta=0.3, temperature=2.0)
    expected = reference('jsd', student, hidden @ head, beta=0.3, temperature=2.0)
    np.testing.assert_allclose(values, expected, rtol=1e-4)


def test_gradients_in_both_modes_to_float64():
    with jax.enable_x64(True):
        student, teacher = (jnp.asarray(x, jnp.float64) for x in logits_pair(12, (1, 1, 3), 1.0))

        @jax.jit
        def losses(student):
            options = {'targets': DenseTargets(teacher), 'temperature': 1.7}
            smooth = [(name, o) for name, o in CASES if name in SMOOTH]
            return [getattr(distill, name)(student, **options, **o) for name, o in smooth]

        check_grads(losses, (student,), order=1, atol=1e-6, rtol=1e-6)


@given(
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([1e-4, 1.0, 30.0, 300.0]),
    temperature=st.sampled_from([0.01, 1.0, 100.0]),
    holes=st.booleans(),
)
@settings(max_examples=8, deadline=None)
def test_never_negative_never_nan(seed, scale, temperature, holes):
    student, teacher = logits_pair(seed, (1, 2, 6), scale)
    if holes:
        student[..., 1] = student[..., 2] = teacher[..., 2] = teacher[..., 4] = -np.inf
    for name, options in CASES:
        values, gradient = value_and_gradient(
            name, student, teacher, temperature=temperature, **options
        )
        assert (values >= 0).all(), (name, values)
        assert np.isfinite(gradient).all(), (name, gradient)


def test_bad_input_is_refused():
    student, teacher = logits_pair()
    cases = [
        (lambda: distill.forward_kl(student, DenseTargets(teacher[..., :6])), 'pad the smaller'),
        (lambda: distill.forward_kl(student, DenseTargets(teacher[:1])), r'\(1, 3, 7\)'),
        (lambda: distill.cross_entropy(student, np.zeros((2, 2), int)), r'\(2, 2, 7\)'),
        (
            lambda: distill.forward_kl(student, DenseTargets(teacher), mask=np.ones((3, 2), bool)),
            'mask',
        ),
        (lambda: distill.forward_kl(student, DenseTargets(teacher), temperature=0), 'temperature'),
        (lambda: distill.jsd(student, DenseTargets(teacher), beta=1.5), 'beta'),
        (lambda: distill.skew_forward_kl(student, DenseTargets(teacher), lam=1.0), 'lam'),
        (lambda: distill.adaptive_kl(student, DenseTargets(teacher), mu=1.0), r'mu .* in \(0, 1\)'),
        (lambda: distill.alpha_divergence(student, DenseTargets(teacher), alpha=2.0), 'alpha'),
        (lambda: distill.hinge(student, DenseTargets(teacher), k=1), '2 or more'),
        (lambda: distill.hinge(student, DenseTargets(teacher), k=8), 'k=8 .* received 7'),
    ]
    for call, message in cases:
        with pytest.raises(errors.InputError, match=message):
            call()
