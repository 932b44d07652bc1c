"""Multi-token prediction: what a module computes, what it may see, and how it is run alone."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.accounting import flops_per_token, parameter_report
from moe.config import (
    AttentionConfig,
    LatentAttentionConfig,
    LinearAttentionConfig,
    MoEConfig,
    RouterConfig,
    TransformerConfig,
)
from moe.errors import InputError
from moe.look_ahead import empty_module_cache, predict_ahead
from moe.mtp import ahead, same_segment_ahead
from moe.presets import preset
from moe.qk_clip import MAX_LOGITS, clip_heads
from moe.selection_bias import update_selection_bias
from moe.sharding import abstract_variables
from moe.transformer import Transformer
from moe.unstacked import relaid

T = 8
PLAIN = TransformerConfig(
    vocab_size=16,
    num_layers=2,
    embed_dim=8,
    mlp_dim=12,
    attention=AttentionConfig(2, 1, 4, rope_theta=None),
    mtp_depth=2,
)
SPARSE = dataclasses.replace(
    PLAIN,
    attention=AttentionConfig(2, 1, 4, 'head'),
    moe=MoEConfig(RouterConfig(4, 2, selection_bias=True), 6, dispatch='dense', shared_dim=4),
)
TOKENS = jax.random.randint(jax.random.key(7), (2, T), 0, 16)
SEGMENTS = jnp.array([[1, 1, 1, 1, 1, 2, 2, 0], [0, 1, 1, 1, 1, 1, 1, 1]])


@functools.cache
def variables_of(config: TransformerConfig):
    """Draws every parameter, norm scales around one: quicker than the model's initializers."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        scale = 1 if path[-1].key == 'scale' else 0
        return jnp.asarray(scale + 0.4 * rng.normal(size=leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, abstract_variables(Transformer(config)))


@functools.cache
def forward(config: TransformerConfig):
    return jax.jit(Transformer(config).apply, static_argnames=('mtp', 'logits'))


def test_ahead_by_hand():
    x = jnp.array([[1, 2, 3, 4]])
    assert ahead(x, 1).tolist() == [[2, 3, 4, 0]]
    assert ahead(x[..., None] > 2, 2)[..., 0].tolist() == [[True, True, False, False]]
    assert ahead(x, 6).tolist() == [[0, 0, 0, 0]]
    segments = jnp.array([[1, 1, 1, 2, 2, 1, 0, 0]])
    assert same_segment_ahead(segments, 1).tolist() == [[1, 1, 0, 1, 0, 0, 0, 0]]
    assert same_segment_ahead(segments, 2).tolist() == [[1, 0, 0, 0, 0, 0, 0, 0]]


def norm(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale


def reference_module(p, hidden, embedded, segments):
    """One document-masked pre-norm layer of two heads on one key-value head, in float64."""
    joined = np.concatenate(
        [
            norm(hidden, p['hidden_norm']['scale']),
            norm(embedded, p['embedding_norm']['scale']),
        ],
        -1,
    )
    x, block = joined @ p['projection'], p['block']
    attention, y = block['attention'], norm(x, block['attention_norm']['scale'])
    q, k, v = (np.einsum('td,dhc->thc', y, attention[name]) for name in 'qkv')
    scores = np.einsum('thc,sc->hts', q, k[:, 0]) / 2
    visible = np.tril(np.ones((T, T), bool)) & (segments[:, None] == segments)
    weights = np.where(visible, np.exp(scores), 0)
    weights /= weights.sum(-1, keepdims=True)
    x = x + np.einsum('hts,sc,hcd->td', weights, v[:, 0], attention['o'])
    y = norm(x, block['mlp_norm']['scale'])
    gate, up = y @ block['mlp']['gate_up'][:, 0], y @ block['mlp']['gate_up'][:, 1]
    x = x + (gate / (1 + np.exp(-gate)) * up) @ block['mlp']['down']
    return norm(x, p['final_norm']['scale'])


def test_modules_are_the_equations_of_the_paper_in_float64():
    variables = variables_of(PLAIN)
    out = forward(PLAIN)(variables, TOKENS, segment_ids=SEGMENTS, mtp=True)
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), variables['params'])
    for row in range(2):
        hidden = np.asarray(out.hidden[row], np.float64)
        tokens, segments = np.asarray(TOKENS[row]), np.asarray(SEGMENTS[row])
        for d in (1, 2):
            later = np.concatenate([tokens[d:], tokens[:d]])
            embedded = params['embed']['embedding'][later]
            hidden = reference_module(params[f'mtp_{d}'], hidden, embedded, segments)
            t = np.flatnonzero(same_segment_ahead(SEGMENTS, d)[row])
            assert len(t) >= 3
            np.testing.assert_allclose(out.ahead[d - 1].hidden[row, t], hidden[t], atol=2e-5)


@pytest.mark.parametrize('config', [PLAIN, SPARSE], ids=['dense', 'experts'])
def test_a_module_sees_nothing_beyond_its_token_and_no_other_document(config):
    tokens = jnp.arange(T)[None]
    segments = jnp.array([[1, 1, 1, 1, 2, 2, 2, 0]])
    variables = variables_of(config)

    def readings(embedding):
        params = {**variables['params'], 'embed': {'embedding': embedding}}
        out = Transformer(config).apply(
            {**variables, 'params': params}, tokens, segment_ids=segments, logits=False, mtp=True
        )
        return [jnp.square(module.hidden[0] - 1).sum(-1) for module in out.ahead]

    # Tokens are their own positions: a row of the embedding is one token of the text.
    jacobians = jax.jit(jax.jacrev(readings))(variables['params']['embed']['embedding'])
    at = np.arange(T)
    for d, jacobian in enumerate(jacobians, start=1):
        counted = np.asarray(same_segment_ahead(segments, d)[0])
        assert counted.sum() == 7 - 2 * d
        influence = np.abs(jacobian[:, :T]).sum(-1)[counted]
        allowed = (at[:, None] + d >= at) & np.equal.outer(segments[0], segments[0])
        assert (influence[~allowed[counted]] == 0).all()
        assert (influence[allowed[counted]] > 1e-6).all()


def test_the_model_itself_does_not_know_of_its_modules():
    config = dataclasses.replace(SPARSE, num_layers=1)
    without = dataclasses.replace(config, mtp_depth=0)
    init = jax.jit(lambda model, key: nn.unbox(model.init(key, TOKENS)), static_argnums=0)
    plain, more = (init(Transformer(c), jax.random.key(3)) for c in (without, config))
    assert set(more['params']) - set(plain['params']) == {'mtp_1', 'mtp_2'}
    for collection, tree in plain.items():
        common = {name: more[collection][name] for name in tree}
        jax.tree.map(np.testing.assert_array_equal, common, tree)
    expected = forward(without)(plain, TOKENS, segment_ids=SEGMENTS)
    for mtp in (False, True):
        actual = forward(config)(more, TOKENS, segment_ids=SEGMENTS, mtp=mtp)
        np.testing.assert_array_equal(actual.logits, expected.logits)
        assert len(actual.ahead) == (2 if mtp else 0)


def test_modules_route_only_tokens_that_count():
    out = forward(SPARSE)(variables_of(SPARSE), TOKENS, segment_ids=SEGMENTS, mtp=True)
    # Documents of 5, 2 and 7 tokens lose one each, then two.
    assert [float(module.router[0].load.sum()) for module in out.ahead] == [2 * 11, 2 * 8]


def test_layout_and_remat_change_nothing():
    variables = variables_of(SPARSE)
    expected = forward(SPARSE)(variables, TOKENS, segment_ids=SEGMENTS, mtp=True)
    for changes in ({'scan_layers': False}, {'remat': 'full'}):
        config = dataclasses.replace(SPARSE, **changes)
        moved = {name: relaid(SPARSE, config, tree) for name, tree in variables.items()}
        actual = forward(config)(moved, TOKENS, segment_ids=SEGMENTS, mtp=True)
        close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)
        jax.tree.map(close, actual, expected)


@pytest.mark.parametrize(
    'attention',
    [
        AttentionConfig(2, 1, 4, rope_theta=50.0),
        AttentionConfig(2, 2, 4, window=3, sinks=True),
        LatentAttentionConfig(2, 6, 4, 4, 4, 10),
        LinearAttentionConfig(2, 4, 6, 3),
    ],
    ids=['global', 'sliding', 'latent', 'linear'],
)
def test_a_module_alone_with_a_cache_equals_the_pass_over_the_text(attention):
    config = dataclasses.replace(PLAIN, attention=attention, num_layers=1, mtp_depth=1)
    model, variables = Transformer(config), variables_of(config)
    whole = forward(config)(variables, TOKENS, mtp=True)
    step = jax.jit(functools.partial(predict_ahead, model))
    (module,), cache = whole.ahead, empty_module_cache(model, 2, T)
    expected = jnp.einsum('btd,dv->btv', module.hidden, variables['params']['head']['kernel'])
    for t in range(T - 1):
        # The hidden state of t, and the token after it.
        out = step(variables, whole.hidden[:, t, None], TOKENS[:, t + 1, None], cache=cache)
        cache = out.cache
        np.testing.assert_allclose(out.hidden[:, 0], module.hidden[:, t], atol=3e-5)
        np.testing.assert_allclose(out.logits[:, 0], expected[:, t], atol=2e-4)


def test_a_module_of_any_depth_runs_alone():
    model, variables = Transformer(SPARSE), variables_of(SPARSE)
    whole = forward(SPARSE)(variables, TOKENS, segment_ids=SEGMENTS, mtp=True)
    first, second = whole.ahead
    later, counted = ahead(TOKENS, 2), same_segment_ahead(SEGMENTS, 2)
    alone = jax.jit(functools.partial(predict_ahead, model, depth=2, logits=False))
    out = alone(variables, first.hidden, later, segment_ids=SEGMENTS, mask=counted)
    np.testing.assert_allclose(out.hidden, second.hidden, atol=3e-5)
    np.testing.assert_array_equal(out.router[0].load, second.router[0].load)


def test_selection_biases_of_modules_follow_their_load():
    routing = jax.tree.map(jnp.zeros_like, variables_of(SPARSE)['routing'])
    load = jnp.array([[4.0, 0, 2, 2], [2, 2, 0, 4], [0, 4, 2, 2], [2, 2, 4, 0]])
    moved = update_selection_bias(SPARSE, routing, load, rate=0.5)
    bias = {name: jax.tree.leaves(tree)[0].tolist() for name, tree in moved.items()}
    assert bias == {
        'group_0': [[-0.5, 0.5, 0, 0], [0, 0, 0.5, -0.5]],
        'mtp_1': [0.5, -0.5, 0, 0],
        'mtp_2': [0, 0, -0.5, 0.5],
    }


def test_heads_of_modules_are_clipped_too():
    variables, model = variables_of(PLAIN), Transformer(PLAIN)
    run = jax.jit(lambda v: model.apply(v, TOKENS, mtp=True, mutable=[MAX_LOGITS])[1][MAX_LOGITS])
    highest = run(variables)
    module = highest['mtp_2']['block']['attention']['highest']
    threshold = float(module.min()) * 0.75
    clipped = clip_heads(PLAIN, variables['params'], highest, threshold)
    q, before = (
        tree['mtp_2']['block']['attention']['q'] for tree in (clipped, variables['params'])
    )
    # Both query heads share one key head, so all of the factor falls to the queries.
    np.testing.assert_allclose(q, before * (threshold / module)[:, None], rtol=1e-6)


def test_what_cannot_be_run_is_refused():
    model, variables = Transformer(PLAIN), variables_of(PLAIN)
    hidden = jnp.zeros((2, T, 8))
    with pytest.raises(InputError, match=r'depth must be in \[1, mtp_depth=2\]; received 3'):
        predict_ahead(model, variables, hidden, TOKENS, depth=3)
    with pytest.raises(InputError, match=r'\(2, 8, 8\).*received \(2, 7, 8\)'):
        predict_ahead(model, variables, hidden[:, 1:], TOKENS)
    with pytest.raises(InputError, match='received a cache too'):
        model.apply(variables, TOKENS, cache=empty_module_cache(model, 2, T), mtp=True)
    with pytest.raises(InputError, match=r'model\.mtp_depth must be zero or more'):
        dataclasses.replace(PLAIN, mtp_depth=-1)


def test_parameters_and_flops_by_hand():
    # A module: projection 2 * 8 * 8, four norms of the stream and one more, q k v o, the MLP.
    attention, mlp = 64 + 32 + 32 + 64, 3 * 8 * 12
    module = 128 + 5 * 8 + attention + mlp
    report, without = (
        parameter_report(c) for c in (PLAIN, dataclasses.replace(PLAIN, mtp_depth=0))
    )
    assert report.by_part['mtp'] == 2 * module
    assert (report.total, report.active) == (without.total + 2 * module, without.active)
    flops = flops_per_token(PLAIN, context_length=T, mtp=True)
    # Scores and values: 4 flops for each of 2 heads, 4 channels and 4.5 keys on average.
    assert flops.by_part['mtp'] == 2 * (2 * (128 + attention + mlp + 8 * 16) + 4 * 2 * 4 * 4.5)
    assert flops_per_token(PLAIN, context_length=T).by_part['mtp'] == 0


@pytest.mark.parametrize('config', [PLAIN, SPARSE], ids=['dense', 'experts'])
def test_parameters_are_those_of_the_model(config):
    params = abstract_variables(Transformer(config))['params']
    assert parameter_report(config).total == sum(x.size for x in jax.tree.leaves(params))


def test_deepseek_v3_has_the_published_counts():
    """671 billion, and 11.5 of the module alone (README_WEIGHTS of deepseek-ai/DeepSeek-V3)."""
    report = parameter_report(dataclasses.replace(preset('deepseek-v3'), mtp_depth=1))
    assert report.by_part['mtp'] == pytest.approx(11.5e9, rel=0.01)
    assert report.total - report.by_part['mtp'] == pytest.approx(671e9, rel=0.01)
    # Published as 14 billion more with the embedding and the head, which are the model's.
    assert report.total + report.embedding == pytest.approx(685e9, rel=0.01)
