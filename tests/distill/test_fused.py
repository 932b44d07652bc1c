"""The fused loss against a naive float64 one, on one device and on every mesh."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import distill
from distill import (
    DenseTargets,
    HiddenTargets,
    SampledTargets,
    Schedule,
    Term,
    TopKTargets,
    fused_distillation_loss,
)
from distill.objective import metric_names
from moe.errors import InputError

B, T, D, Dt, V = 8, 7, 8, 6, 24
EVERY_TERM = (
    Term('cross_entropy', weight=0.7),
    Term('forward_kl', weight=0.5, temperature=2.0, scale_by_temperature_squared=True),
    Term('reverse_kl', temperature=0.9),
    Term('jsd', beta=0.3, weight=1.5),
    Term('skew_forward_kl', temperature=2.0),
    Term('skew_reverse_kl', lam=0.4, weight=0.2),
    Term('total_variation', temperature=1.5),
)
# Those that the naive loss leaves to the plain functions, which have references of their own.
MORE_TERMS = (
    Term('jeffreys', temperature=2.0),
    Term('alpha_divergence', alpha=0.3, weight=0.4),
    Term('adaptive_kl', mu=0.4),
    Term('hinge', k=5, temperature=1.5),
    Term('ranking', k=4, weight=2.0),
    Term('skew_forward_kl', standardize=True, temperature=0.7, scale_by_temperature_squared=True),
    Term('cross_entropy', temperature=1.3),
)
OF_TOP_K = (
    Term('cross_entropy', weight=0.7, temperature=1.5),
    *(Term(name) for name in ('forward_kl', 'reverse_kl', 'jsd', 'skew_reverse_kl')),
    *(Term(name) for name in ('jeffreys', 'alpha_divergence', 'adaptive_kl', 'total_variation')),
    Term('hinge', k=5, weight=0.3),
)
OF_SAMPLES = (Term('forward_kl', weight=0.8), Term('cross_entropy', weight=0.2))
FORMS = {
    'hidden': MORE_TERMS,
    'dense': MORE_TERMS,
    'top_k': OF_TOP_K,
    'sampled': OF_SAMPLES,
}
MESHES = [(8, 1, 1, 1), (1, 8, 1, 1), (1, 1, 1, 8), (2, 2, 1, 2), (1, 2, 2, 2), (1, 1, 4, 2)]


@functools.cache
def problem():
    rng = np.random.default_rng(0)
    return {
        'hidden': rng.standard_normal((B, T, D)),
        'head': rng.standard_normal((D, V)) / 2,
        'teacher_hidden': rng.standard_normal((B, T, Dt)),
        'teacher_head': rng.standard_normal((Dt, V)) / 2,
        'labels': rng.integers(0, V, (B, T)),
        'mask': rng.random((B, T)) < 0.7,
    }


def naive_term(term, student, teacher, labels):
    """The definitions, written plainly; JAX differentiates them."""
    log_p = jax.nn.log_softmax(student / term.temperature)
    log_q = jax.nn.log_softmax(teacher / term.temperature)
    p, q = jnp.exp(log_p), jnp.exp(log_q)

    def kl(a, b):
        return jnp.sum(a * (jnp.log(a) - jnp.log(b)), -1)

    beta = lam = term.parameter
    values = {
        'cross_entropy': lambda: -jnp.take_along_axis(log_p, labels[..., None], -1)[..., 0],
        'forward_kl': lambda: kl(q, p),
        'reverse_kl': lambda: kl(p, q),
        'jsd': lambda: (
            beta * kl(q, beta * q + (1 - beta) * p) + (1 - beta) * kl(p, beta * q + (1 - beta) * p)
        ),
        'skew_forward_kl': lambda: kl(q, lam * q + (1 - lam) * p),
        'skew_reverse_kl': lambda: kl(p, lam * p + (1 - lam) * q),
        'total_variation': lambda: jnp.abs(p - q).sum(-1) / 2,
    }[term.name]()
    return values * (term.temperature**2 if term.scale_by_temperature_squared else 1)


def naive_loss(hidden, head, teacher, terms, labels, mask):
    """The weighted mean over unmasked tokens, and each term's unweighted sum."""
    sums = [
        jnp.sum(jnp.where(mask, naive_term(t, hidden @ head, teacher, labels), 0)) for t in terms
    ]
    return sum(t.weight * s for t, s in zip(terms, sums, strict=True)) / mask.sum(), sums


@functools.cache
def expected(terms, masked=True):
    """Loss, sums and gradients of the naive loss in float64, on one device."""
    x = problem()
    mask = x['mask'] if masked else np.ones((B, T), bool)
    with jax.enable_x64(True):
        teacher = jnp.asarray(x['teacher_hidden']) @ jnp.asarray(x['teacher_head'])
        f = jax.jit(
            jax.value_and_grad(
                lambda h, w: naive_loss(h, w, teacher, terms, x['labels'], mask),
                argnums=(0, 1),
                has_aux=True,
            )
        )
        return jax.tree.map(np.asarray, f(jnp.asarray(x['hidden']), jnp.asarray(x['head'])))


def targets_of(form):
    x = problem()
    logits = x['teacher_hidden'] @ x['teacher_head']
    if form == 'top_k':
        log_q = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        ids = np.argsort(-log_q, -1)[..., :6]
        kept = np.take_along_axis(log_q, ids, -1)
        tail = np.log(1 - np.exp(kept).sum(-1))
        return TopKTargets(jnp.asarray(ids), jnp.float32(kept), jnp.float32(tail))
    if form == 'sampled':
        ids = np.random.default_rng(1).integers(0, V, (B, T, 6))
        return SampledTargets(jnp.asarray(ids), jnp.asarray(ids % 4))
    if form == 'hidden':
        return HiddenTargets(*(jnp.float32(x[k]) for k in ('teacher_hidden', 'teacher_head')))
    return DenseTargets(jnp.float32(x['teacher_hidden'] @ x['teacher_head']))


def fused(terms, form='hidden', **options):
    """A jitted function of hidden, head and targets: ((loss, metrics), gradients)."""
    x = problem()
    options = {'labels': jnp.asarray(x['labels']), 'mask': jnp.asarray(x['mask'])} | options

    def loss(hidden, head, targets):
        return fused_distillation_loss(hidden, head, targets, terms, **options)

    f = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    return f(jnp.float32(x['hidden']), jnp.float32(x['head']), targets_of(form))


@functools.cache
def expected_by_plain(form):
    """Loss, sums and gradients by the plain functions of the logits, on one device."""
    x, terms, targets = problem(), FORMS[form], targets_of(form)

    def loss(hidden, head):
        sums = []
        for term in terms:
            parameter = distill.algebra.SPECS[term.name].parameter
            values = getattr(distill, f'{term.name}_per_token')(
                hidden @ head,
                targets if term.needs_teacher else jnp.asarray(x['labels']),
                mask=jnp.asarray(x['mask']),
                temperature=term.temperature,
                scale_by_temperature_squared=term.scale_by_temperature_squared,
                standardize=term.standardize,
                **({} if parameter is None else {parameter: term.parameter}),
            )
            sums.append(values.sum())
        weighed = sum(t.weight * s for t, s in zip(terms, sums, strict=True))
        return weighed / x['mask'].sum(), sums

    f = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    return jax.tree.map(np.asarray, f(jnp.float32(x['hidden']), jnp.float32(x['head'])))


def assert_equal(result, reference, terms, count):
    (loss, metrics), gradients = result
    (expected_loss, expected_sums), expected_gradients = reference
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    names = metric_names(terms, sampled='teacher_cross_entropy' in metrics)
    assert set(metrics) == set(names)
    for name, expected_sum in zip(names, expected_sums, strict=True):
        total, weight = metrics[name]
        np.testing.assert_allclose(total, expected_sum, rtol=1e-5)
        assert weight == count
    for actual, wanted in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize('term', EVERY_TERM, ids=lambda term: term.name)
def test_each_term_alone(term):
    # 24 tokens a chunk are 3 positions of 8 rows: chunks of 3, 3 and 3, the last overlapping.
    result = fused((term,), chunk_size=24)
    assert list(result[0][1]) == [term.name]
    assert_equal(result, expected((term,)), (term,), problem()['mask'].sum())


@pytest.mark.parametrize('chunk_size', [1, 17, 32, 48, 10_000])
def test_every_chunk_size_and_several_terms_in_one_pass(chunk_size):
    result = fused(EVERY_TERM, chunk_size=chunk_size)
    assert_equal(result, expected(EVERY_TERM), EVERY_TERM, problem()['mask'].sum())


def test_dense_targets_and_no_mask():
    result = fused(EVERY_TERM, 'dense', chunk_size=17, mask=None)
    assert_equal(result, expected(EVERY_TERM, masked=False), EVERY_TERM, B * T)


@pytest.mark.parametrize(
    ('shape', 'form'),
    [*((shape, 'hidden') for shape in MESHES), *((shape, 'dense') for shape in MESHES[2:4])],
    ids=str,
)
def test_every_mesh_equals_one_device(shape, form):
    axes = ('data', 'fsdp', 'expert', 'tensor')
    mesh = jax.make_mesh(shape, axes, axis_types=(AxisType.Auto,) * 4)
    result = fused(EVERY_TERM, form, chunk_size=3, mesh=mesh)
    assert_equal(result, expected(EVERY_TERM), EVERY_TERM, problem()['mask'].sum())
    # Every device must hold the same of what is replicated.
    for shard in result[0][0].addressable_shards:
        np.testing.assert_array_equal(shard.data, result[0][0])


@pytest.mark.parametrize('form', list(FORMS))
@pytest.mark.parametrize('shape', [None, (2, 2, 1, 2)], ids=str)
def test_every_form_and_divergence_equals_the_plain_ones(shape, form):
    mesh = None
    if shape is not None:
        axes = ('data', 'fsdp', 'expert', 'tensor')
        mesh = jax.make_mesh(shape, axes, axis_types=(AxisType.Auto,) * 4)
    result = fused(FORMS[form], form, chunk_size=3 if mesh else 24, mesh=mesh)
    assert_equal(result, expected_by_plain(form), FORMS[form], problem()['mask'].sum())
    for shard in result[0][0].addressable_shards:
        np.testing.assert_array_equal(shard.data, result[0][0])


def test_what_samples_tell_of_forward_kl_has_the_name_of_what_it_is():
    (_, metrics), _ = fused(OF_SAMPLES, 'sampled')
    assert set(metrics) == {'teacher_cross_entropy', 'cross_entropy'}


def test_unsound_pairs_are_refused():
    x = problem()
    arrays = (jnp.float32(x['hidden']), jnp.float32(x['head']))
    with pytest.raises(InputError, match='reverse_kl is not sound on sampled targets'):
        fused_distillation_loss(*arrays, targets_of('sampled'), (Term('reverse_kl'),))
    with pytest.raises(InputError, match='temperature of forward_kl on top_k'):
        fused_distillation_loss(
            *arrays, targets_of('top_k'), (Term('forward_kl', temperature=2.0),)
        )
    with pytest.raises(InputError, match=r'k=7 .* received 6'):
        fused_distillation_loss(*arrays, targets_of('top_k'), (Term('ranking', k=7),))


def test_parameters_may_be_traced():
    x = problem()

    @jax.jit
    def loss(beta, lam):
        terms = (Term('jsd', beta=beta), Term('skew_reverse_kl', lam=lam, weight=0.5))
        arrays = (jnp.float32(x[k]) for k in ('hidden', 'head'))
        mask = jnp.asarray(x['mask'])
        return fused_distillation_loss(*arrays, targets_of('hidden'), terms, mask=mask)[0]

    terms = (Term('jsd', beta=0.2), Term('skew_reverse_kl', lam=0.3, weight=0.5))
    np.testing.assert_allclose(loss(0.2, 0.3), expected(terms)[0][0], rtol=1e-5)
    ends = (Term('reverse_kl'), Term('reverse_kl', weight=0.5))
    np.testing.assert_allclose(loss(1.0, 0.0), expected(ends)[0][0], rtol=1e-5)


def test_a_chunk_exchanges_numbers_a_token_and_the_head_gradient_is_sharded():
    mesh = jax.make_mesh(
        (2, 2, 1, 2), ('data', 'fsdp', 'expert', 'tensor'), axis_types=(AxisType.Auto,) * 4
    )
    rows, head = P(('data', 'fsdp', 'expert')), P('fsdp', 'tensor')

    def loss(hidden, head, targets):
        return fused_distillation_loss(
            hidden, head, targets, (Term('forward_kl'),), chunk_size=2, mesh=mesh
        )[0]

    def abstract(shape, spec):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))

    targets = HiddenTargets(abstract((B, T, Dt), rows), abstract((Dt, V), head))
    compiled = (
        jax.jit(jax.grad(loss, argnums=(0, 1)))
        .lower(abstract((B, T, D), rows), abstract((D, V), head), targets)
        .compile()
    )
    exchange = re.compile(r'= (.*?) (?:all-gather|all-reduce|reduce-scatter)(?:-start)?\(')
    results = [
        match.group(1)
        for line in compiled.as_text().splitlines()
        if 'while/body' in line and (match := exchange.search(line))
    ]
    assert results, 'the vocabulary is split: its sums must be exchanged chunk by chunk'
    for shape in re.findall(r'f32\[([\d,]*)\]', ' '.join(results)):
        assert np.prod([int(n) for n in shape.split(',') if n]) <= B
    assert compiled.output_shardings[1].is_equivalent_to(NamedSharding(mesh, head), 2)


def test_micro_batches_add_up():
    x = problem()
    count = jnp.float32(x['mask'].sum())

    @jax.jit
    def halves(hidden, head, teacher_hidden, teacher_head):
        def loss(hidden, head, rows):
            return fused_distillation_loss(
                hidden[rows],
                head,
                HiddenTargets(teacher_hidden[rows], teacher_head),
                EVERY_TERM,
                labels=jnp.asarray(x['labels'][rows]),
                mask=jnp.asarray(x['mask'][rows]),
                normalizer=count,
                chunk_size=4,
            )

        f = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        parts = [f(hidden, head, rows) for rows in (slice(0, 3), slice(3, 8))]
        return jax.tree.map(lambda a, b: a + b, *parts)

    arrays = (x[k] for k in ('hidden', 'head', 'teacher_hidden', 'teacher_head'))
    total = halves(*(jnp.float32(a) for a in arrays))
    assert_equal(total, expected(EVERY_TERM), EVERY_TERM, count)


def test_weights_and_temperatures_may_be_traced():
    x = problem()

    @jax.jit
    def loss(weight, temperature):
        terms = (
            Term('forward_kl', weight=weight, temperature=temperature),
            Term('jsd', temperature=temperature, scale_by_temperature_squared=True),
        )
        arrays = (jnp.float32(x[k]) for k in ('hidden', 'head'))
        mask = jnp.asarray(x['mask'])
        return fused_distillation_loss(*arrays, targets_of('hidden'), terms, mask=mask)[0]

    for weight, temperature in ((0.5, 2.0), (3.0, 0.8)):
        terms = (
            Term('forward_kl', weight=weight, temperature=temperature),
            Term('jsd', temperature=temperature, scale_by_temperature_squared=True),
        )
        np.testing.assert_allclose(loss(weight, temperature), expected(terms)[0][0], rtol=1e-5)


def test_repeated_terms_have_names_of_their_own():
    terms = (Term('jsd', beta=0.0), Term('jsd', beta=1.0), Term('forward_kl'), Term('reverse_kl'))
    (_, metrics), _ = fused(terms)
    assert set(metrics) == {'jsd', 'jsd_2', 'forward_kl', 'reverse_kl'}
    assert metrics['jsd'][0] == metrics['forward_kl'][0]
    assert metrics['jsd_2'][0] == metrics['reverse_kl'][0]


def test_masked_positions_may_hold_anything():
    x = problem()
    bad = ~x['mask'][..., None]
    hidden = jnp.where(bad, jnp.nan, jnp.float32(x['hidden']))
    labels = jnp.where(bad[..., 0], -100, x['labels'])
    dense = jnp.where(bad, jnp.inf, targets_of('dense').logits)
    spoilt = targets_of('hidden')
    spoilt = spoilt.replace(hidden=jnp.where(bad, jnp.nan, spoilt.hidden))
    for targets in (spoilt, DenseTargets(dense)):
        f = jax.value_and_grad(
            lambda h, w, t=targets: fused_distillation_loss(
                h, w, t, EVERY_TERM, labels=labels, mask=jnp.asarray(x['mask']), chunk_size=17
            ),
            argnums=(0, 1),
            has_aux=True,
        )
        result = jax.jit(f)(hidden, jnp.float32(x['head']))
        assert_equal(result, expected(EVERY_TERM), EVERY_TERM, x['mask'].sum())
        np.testing.assert_array_equal(np.asarray(result[1][0])[~x['mask']], 0)


def test_no_gradient_flows_to_the_teacher_or_from_the_metrics():
    x = problem()
    hidden, head = jnp.float32(x['hidden']), jnp.float32(x['head'])

    def loss(targets, hidden):
        return fused_distillation_loss(hidden, head, targets, (Term('reverse_kl'),))

    gradient = jax.grad(lambda t: loss(t, hidden)[0])(targets_of('hidden'))
    for leaf in jax.tree.leaves(gradient):
        np.testing.assert_array_equal(leaf, 0)
    of_metric = jax.grad(lambda h: loss(targets_of('hidden'), h)[1]['reverse_kl'][0])(hidden)
    np.testing.assert_array_equal(of_metric, 0)


def test_infinite_terms_say_so_unless_they_weigh_nothing():
    x = problem()
    targets = targets_of('dense')
    targets = targets.replace(logits=targets.logits.at[..., 0].set(-jnp.inf))

    def loss(weight, hidden):
        terms = (Term('reverse_kl', weight=weight), Term('forward_kl'))
        return fused_distillation_loss(hidden, jnp.float32(x['head']), targets, terms)[0]

    f = jax.value_and_grad(loss, argnums=1)
    for weight in (1.0, 0.0):
        value, gradient = f(weight, jnp.float32(x['hidden']))
        assert np.isinf(value) == (weight > 0)
        assert np.isfinite(gradient).all()


def test_bfloat16_inputs_keep_float32_sums():
    x = problem()
    rounded = {
        k: jnp.asarray(x[k], jnp.bfloat16)
        for k in ('hidden', 'head', 'teacher_hidden', 'teacher_head')
    }
    terms = (Term('forward_kl'), Term('cross_entropy'))

    def run(a):
        targets = HiddenTargets(a['teacher_hidden'], a['teacher_head'])
        return jax.value_and_grad(
            lambda h, w: fused_distillation_loss(
                h, w, targets, terms, labels=jnp.asarray(x['labels'])
            )[0],
            argnums=(0, 1),
        )(a['hidden'], a['head'])

    loss, gradients = run(rounded)
    wide_loss, wide_gradients = run({k: a.astype(jnp.float32) for k, a in rounded.items()})
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, wide_loss, rtol=1e-5)
    for gradient, wide in zip(gradients, wide_gradients, strict=True):
        assert gradient.dtype == jnp.bfloat16
        np.testing.assert_allclose(
            gradient.astype(jnp.float32), wide, rtol=0.02, atol=0.01 * float(jnp.abs(wide).max())
        )


def compiled_text(fused_loss, differentiate=True):
    """The compiled program of a loss with 4 x 64 tokens and 300 words: 4 * 64 * 300 = 76,800."""
    shapes = [(4, 64, 8), (8, 300), (4, 64, 6), (6, 300)]
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    terms = (Term('forward_kl'), Term('cross_entropy'), Term('jsd', temperature=2.0))
    labels = jnp.zeros((4, 64), int)

    def loss(h, w, ht, wt):
        if fused_loss:
            targets = HiddenTargets(ht, wt)
            return fused_distillation_loss(h, w, targets, terms, labels=labels, chunk_size=16)[0]
        return naive_loss(h, w, ht @ wt, terms, labels, jnp.ones((4, 64), bool))[0]

    f = jax.value_and_grad(loss, argnums=(0, 1)) if differentiate else loss
    return jax.jit(f).lower(*arguments).compile().as_text()


def largest_array(text):
    shapes = re.findall(r'(?:f|bf|s|u|pred)\d*\[([\d,]+)\]', text)
    return max(np.prod([int(n) for n in shape.split(',')]) for shape in shapes)


def test_no_array_of_tokens_by_vocabulary():
    tokens_by_vocabulary = 4 * 64 * 300
    assert largest_array(compiled_text(fused_loss=False)) >= tokens_by_vocabulary
    # One chunk, 16 tokens by 300 words, is the largest.
    assert largest_array(compiled_text(fused_loss=True)) == 16 * 300


@pytest.mark.parametrize('form', ['hidden', 'top_k', 'sampled'])
def test_no_array_of_tokens_by_vocabulary_with_any_target(form):
    def abstract(shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    ids, kept = abstract((4, 64, 6), jnp.int32), abstract((4, 64, 6))
    targets = {
        'hidden': HiddenTargets(abstract((4, 64, 6)), abstract((6, 300))),
        'top_k': TopKTargets(ids, kept, abstract((4, 64))),
        'sampled': SampledTargets(ids, ids),
    }[form]

    def loss(hidden, head, targets, labels):
        return fused_distillation_loss(
            hidden, head, targets, FORMS[form], labels=labels, chunk_size=16
        )[0]

    arguments = abstract((4, 64, 8)), abstract((8, 300)), targets, abstract((4, 64), jnp.int32)
    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*arguments).compile()
    # A copy of the scattered-to gradient may carry the trip count of a loop over its rows.
    assert largest_array(compiled.as_text()) == 16 * 300


def test_evaluation_computes_no_gradient():
    def products(differentiate):
        return len(
            re.findall(r' dot\(|__onednn|custom-call.*matmul', compiled_text(True, differentiate))
        )

    # Student's and teacher's logits; then the gradients in hidden and head as well.
    assert products(False) == 2
    assert products(True) == 4


def test_bad_input_is_refused():
    x = problem()
    hidden, head = jnp.float32(x['hidden']), jnp.float32(x['head'])
    kl, ce = (Term('forward_kl'),), (Term('cross_entropy'),)
    targets = targets_of('hidden')
    narrow = DenseTargets(targets_of('dense').logits[..., :20])
    ramp = (Term('forward_kl', weight=Schedule('linear', 0.0, 1.0, 10)),)
    axes = ('data', 'fsdp', 'expert', 'tensor')
    meshes = {
        shape: jax.make_mesh(shape, axes, axis_types=(AxisType.Auto,) * 4)
        for shape in ((8, 1, 1, 1), (1, 1, 1, 8))
    }
    cases = [
        ((hidden, head, None, kl), {}, 'targets for forward_kl'),
        ((hidden, head, targets, ce), {}, 'labels for cross_entropy'),
        ((hidden, head, narrow, kl), {}, 'vocabulary'),
        ((hidden, head[:5], targets, kl), {}, r'\[D, V\]'),
        ((hidden, head, targets, kl), {'mask': jnp.ones((2, 2), bool)}, 'mask'),
        ((hidden, head, targets, kl), {'chunk_size': 0}, 'chunk_size'),
        ((hidden, head, targets, ramp), {}, 'Objective.at'),
        (
            (hidden, head[:, :20], narrow, kl),
            {'mesh': meshes[1, 1, 1, 8]},
            'V to be a multiple of 8',
        ),
        (
            (hidden[:4], head, DenseTargets(targets_of('dense').logits[:4]), kl),
            {'mesh': meshes[8, 1, 1, 1]},
            'B to be a multiple of 8',
        ),
    ]
    for arguments, options, message in cases:
        with pytest.raises(InputError, match=message):
            fused_distillation_loss(*arguments, **options)
