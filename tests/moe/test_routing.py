import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.errors import InputError
from moe.routing import RouterConfig, expert_load, require_causal, route, router_scores


def logits_of(scores: list[float]) -> jax.Array:
    """Softmax logits of one token whose scores are given."""
    return jnp.log(jnp.array(scores, jnp.float32))[None, None]


@pytest.mark.parametrize(
    ('normalize', 'expected'),
    [('none', [0.5, 0.3]), ('before', [0.5, 0.3]), ('after', [0.625, 0.375])],
)
def test_softmax_weights_by_hand(normalize, expected):
    config = RouterConfig(4, 2, normalize=normalize, scale=2.0)
    ids, weights = route(logits_of([0.15, 0.5, 0.05, 0.3]), config)
    np.testing.assert_array_equal(ids[0, 0], [1, 3])
    np.testing.assert_allclose(weights[0, 0], 2.0 * np.array(expected), rtol=1e-6)


@pytest.mark.parametrize(
    ('normalize', 'expected'),
    [
        ('none', [0.8, 0.6]),
        ('before', [0.8 / 2.25, 0.6 / 2.25]),
        ('after', [0.8 / 1.65, 0.6 / 1.65]),
    ],
)
def test_sigmoid_weights_by_hand(normalize, expected):
    scores = np.array([0.6, 0.1, 0.8, 0.5])
    config = RouterConfig(4, 2, score='sigmoid', normalize=normalize, eps=0.25)
    ids, weights = route(jnp.array(np.log(scores / (1 - scores)))[None, None], config)
    np.testing.assert_array_equal(ids[0, 0], [2, 0])
    np.testing.assert_allclose(weights[0, 0], expected, rtol=1e-6)


def test_ties_go_to_the_lowest_id():
    ids, weights = route(jnp.zeros((1, 1, 5)), RouterConfig(5, 3))
    np.testing.assert_array_equal(ids[0, 0], [0, 1, 2])
    np.testing.assert_allclose(weights[0, 0], 1 / 3, rtol=1e-6)


def test_every_expert_chosen_gives_every_score():
    scores = [0.1, 0.2, 0.3, 0.4]
    ids, weights = route(logits_of(scores), RouterConfig(4, 4, normalize='none'))
    np.testing.assert_array_equal(ids[0, 0], [3, 2, 1, 0])
    np.testing.assert_allclose(weights[0, 0], scores[::-1], rtol=1e-6)


@pytest.mark.parametrize('score', ['softmax', 'sigmoid'])
@pytest.mark.parametrize(
    ('bias', 'chosen'),
    [
        ([0.0, 0.0, 1e9, 0.0], [2, 1]),
        ([0.0, -1e9, 0.0, 0.0], [3, 0]),
        ([-3.0, -4.0, -5.0, -6.0], [0, 1]),
    ],
)
def test_selection_bias_changes_the_choice_and_never_the_weights(score, bias, chosen):
    logits = jnp.array([[[0.3, 2.0, -1.0, 1.0]]])
    config = RouterConfig(4, 2, score=score, normalize='none')
    bias = jnp.array(bias)
    ids, weights = route(logits, config, selection_bias=bias)
    np.testing.assert_array_equal(ids[0, 0], chosen)
    unbiased = np.asarray(router_scores(logits, score))[0, 0]
    np.testing.assert_array_equal(weights[0, 0], unbiased[np.array(chosen)])

    def total(bias):
        return route(logits, config, selection_bias=bias)[1].sum()

    np.testing.assert_array_equal(jax.grad(total)(bias), np.zeros(4))


def test_gradient_of_the_weights_equals_finite_differences():
    rng = np.random.default_rng(0)
    logits, direction = rng.normal(size=(2, 3, 6)), rng.normal(size=(2, 3, 6))
    cotangent = rng.normal(size=(2, 3, 2))
    config = RouterConfig(6, 2, score='sigmoid', scale=1.5)

    def reference(logits):
        scores = 1 / (1 + np.exp(-logits))
        best = np.sort(scores, axis=-1)[..., :-3:-1]
        return (1.5 * best / best.sum(-1, keepdims=True) * cotangent).sum()

    slope = (reference(logits + 1e-6 * direction) - reference(logits - 1e-6 * direction)) / 2e-6
    gradient = jax.grad(lambda x: (route(x, config)[1] * cotangent).sum())(jnp.array(logits))
    np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=1e-4)


def test_half_precision_logits_are_scored_in_float32():
    logits = jnp.array([[[0.0, 1.0, 2.0]]], jnp.bfloat16)
    _, weights = route(logits, RouterConfig(3, 1, normalize='none'))
    assert weights.dtype == jnp.float32
    np.testing.assert_allclose(weights[0, 0, 0], np.e**2 / (1 + np.e + np.e**2), rtol=1e-6)


def test_expert_load_counts_unmasked_assignments():
    ids = jnp.array([[[0, 2], [2, 3], [2, 1]], [[3, 2], [0, 1], [0, 1]]])
    mask = jnp.array([[True, True, False], [True, False, False]])
    np.testing.assert_array_equal(expert_load(ids, mask, 5), [1, 0, 3, 2, 0])


def test_dropped_groups_lose_to_negative_scores():
    # All scores are 1/2. Best two biased of each group: -1.0, -0.5 and -1.0 (-4.5 + 3.5).
    bias = jnp.array([-1.0, -1.0, -0.6, -0.9, -5.0, 3.0])
    config = RouterConfig(6, 2, score='sigmoid', normalize='none', num_groups=3, groups_kept=1)
    ids, weights = route(jnp.zeros((1, 1, 6)), config, selection_bias=bias)
    np.testing.assert_array_equal(ids[0, 0], [2, 3])
    np.testing.assert_array_equal(weights[0, 0], [0.5, 0.5])


@pytest.mark.parametrize('bias_scale', [0.0, 0.3, -1e6])
def test_groups_equal_a_loop_over_tokens(bias_scale):
    rng = np.random.default_rng(3)
    logits, bias = rng.normal(size=(2, 9, 12)), bias_scale * rng.uniform(1, 2, size=12)
    config = RouterConfig(12, 3, score='sigmoid', num_groups=4, groups_kept=2, scale=2.5)
    ids, weights = route(jnp.array(logits), config, selection_bias=jnp.array(bias))
    for b, t in np.ndindex(2, 9):
        scores = (1 / (1 + np.exp(-np.float32(logits[b, t])))).astype(np.float32)
        biased = scores + np.float32(bias)
        best_two = [np.sort(biased[3 * g : 3 * g + 3])[1:].sum() for g in range(4)]
        kept = np.argsort(best_two)[2:]
        allowed = [e for e in range(12) if e // 3 in kept]
        chosen = sorted(allowed, key=lambda e: -biased[e])[:3]
        np.testing.assert_array_equal(ids[b, t], chosen)
        np.testing.assert_allclose(
            weights[b, t], 2.5 * scores[chosen] / scores[chosen].sum(), rtol=1e-5
        )


def test_tied_groups_go_to_the_first():
    config = RouterConfig(6, 3, num_groups=3, groups_kept=2)
    ids, _ = route(jnp.zeros((1, 1, 6)), config)
    np.testing.assert_array_equal(ids[0, 0], [0, 1, 2])


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        (dict(num_groups=3, groups_kept=1), 'groups_kept must be enough.* hold 2 experts'),
        (dict(num_groups=4, groups_kept=2), 'num_groups must be a divisor'),
        (dict(num_groups=6, groups_kept=6), 'num_groups must be a divisor.*two or more'),
        (dict(num_groups=2, groups_kept=3), 'groups_kept must be at most num_groups=2'),
        (dict(choice='hash', selection_bias=True), "selection_bias must be False unless.*'token'"),
        (dict(choice='expert', num_groups=2), "num_groups must be 1 unless choice='token'"),
        (dict(slots=2), "slots must be 1 unless choice='soft'"),
        (dict(hash_seed=1), "hash_seed must be 0 unless choice='hash'"),
        (dict(choice='soft'), "num_experts with choice='soft'"),
        (dict(choice='token_choice'), "choice must be one of 'token'"),
        (dict(jitter=1.0), r'jitter must be in \[0, 1\)'),
    ],
)
def test_specs_that_mean_nothing_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        RouterConfig(6, 3, **fields)


def test_switch_weighs_its_one_expert_by_its_probability():
    config = RouterConfig(3, 1, normalize='none')
    ids, weights = route(logits_of([0.2, 0.7, 0.1]), config)
    assert ids[0, 0, 0] == 1
    np.testing.assert_allclose(weights[0, 0, 0], 0.7, rtol=1e-6)
    slope = jax.grad(lambda x: route(x, config)[1].sum())(logits_of([0.2, 0.7, 0.1]))
    np.testing.assert_allclose(slope[0, 0], [-0.14, 0.21, -0.07], rtol=1e-5)


def test_normalising_after_a_softmax_is_a_softmax_over_the_chosen():
    logits = jnp.array([[[3.0, -80.0, 5.0, 4.0]]])
    _, weights = route(logits, RouterConfig(4, 2))
    np.testing.assert_allclose(weights[0, 0], jax.nn.softmax(jnp.array([5.0, 4.0])), rtol=1e-6)


def test_expert_choice_by_hand():
    # Two experts; four tokens, the third masked: each expert takes ceil(3 * 1 / 2) = 2.
    scores = jnp.array([[[0.9, 0.1], [0.8, 0.2], [1.0, 0.0], [0.7, 0.3]]])
    mask = jnp.array([[True, True, False, True]])
    config = RouterConfig(2, 1, normalize='none', choice='expert')
    ids, weights = route(jnp.log(scores), config, mask=mask)
    np.testing.assert_array_equal(ids, [[[0, 2], [0, 1], [2, 2], [1, 2]]])
    np.testing.assert_allclose(
        weights, [[[0.9, 0], [0.8, 0.2], [0, 0], [0.3, 0]]], rtol=1e-6, atol=1e-7
    )
    np.testing.assert_array_equal(expert_load(ids, mask, 2), [2, 2])


def test_expert_choice_fills_every_expert_alike_and_rows_do_not_compete():
    logits = jax.random.normal(jax.random.key(0), (3, 10, 4))
    mask = jnp.arange(10) < jnp.array([[10], [7], [0]])
    config = RouterConfig(4, 2, choice='expert')
    ids, weights = route(logits, config, mask=mask)
    for row, quota in enumerate((5, 4, 0)):
        load = expert_load(ids[row : row + 1], mask[row : row + 1], 4)
        np.testing.assert_array_equal(load, [quota] * 4)
        alone = route(logits[row : row + 1], config, mask=mask[row : row + 1])
        np.testing.assert_array_equal(ids[row], alone[0][0])
        np.testing.assert_array_equal(weights[row], alone[1][0])


def test_hash_follows_the_token_alone():
    tokens = jnp.arange(4000).reshape(4, 1000)
    config = RouterConfig(8, 2, normalize='none', choice='hash')
    logits = jax.random.normal(jax.random.key(0), (4, 1000, 8))
    ids, weights = route(logits, config, tokens=tokens)
    assert np.all(ids[..., 0] != ids[..., 1])
    again, _ = route(-logits[::-1, ::-1], config, tokens=tokens[::-1, ::-1])
    np.testing.assert_array_equal(again[::-1, ::-1], ids)
    expected = np.take_along_axis(np.asarray(jax.nn.softmax(logits)), np.asarray(ids), -1)
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
    # Each choice by itself is uniform: 500 tokens an expert, five standard deviations around.
    for choice in range(2):
        counts = np.bincount(np.ravel(ids[..., choice]), minlength=8)
        assert np.abs(counts - 500).max() < 5 * (4000 / 8 * 7 / 8) ** 0.5
    other = RouterConfig(8, 2, choice='hash', hash_seed=1)
    same = (route(logits, other, tokens=tokens)[0][..., 0] == ids[..., 0]).mean()
    assert 0.08 < same < 0.17


def test_hash_without_tokens_is_refused():
    with pytest.raises(InputError, match='received no tokens'):
        route(jnp.zeros((1, 1, 4)), RouterConfig(4, 1, choice='hash'))


def test_what_looks_ahead_is_refused_by_what_cannot():
    for choice, causal in {'token': True, 'hash': True, 'expert': False, 'soft': False}.items():
        config = RouterConfig(4, 4, choice=choice)
        assert config.causal == causal
        if causal:
            require_causal(config, 'Decoding')
            continue
        with pytest.raises(InputError, match=f"Decoding needs.*choice='{choice}'"):
            require_causal(config, 'Decoding')


def test_expert_choice_does_look_ahead_and_token_choice_does_not():
    logits = jax.random.normal(jax.random.key(0), (1, 6, 4))
    later = logits.at[:, 3:].set(-logits[:, 3:])
    for choice, same in (('token', True), ('expert', False)):
        config = RouterConfig(4, 2, choice=choice, score='sigmoid')
        ahead = [route(x, config)[1][:, :3] for x in (logits, later)]
        assert np.array_equal(*ahead) == same
