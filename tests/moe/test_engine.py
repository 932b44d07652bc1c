"""An engine writes what each request would get alone, whatever comes, goes and stands beside it."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.attention_kinds import empty_cache
from moe.cache_layout import cache_shardings
from moe.config import (
    AttentionConfig,
    LatentAttentionConfig,
    LinearAttentionConfig,
    MoEConfig,
    RouterConfig,
    TransformerConfig,
)
from moe.decode import write
from moe.engine import Engine
from moe.errors import InputError
from moe.requests import CacheUse, EngineConfig, QueueFullError, Request
from moe.sampling import Sampling
from moe.sharding import MeshConfig, make_mesh, variable_shardings
from moe.transformer import Transformer

KINDS = {
    'grouped': AttentionConfig(4, 2, 8),
    'window': AttentionConfig(4, 2, 8, window=5, sinks=True),
    'latent': LatentAttentionConfig(4, 6, 8, 4, 4),
    'linear': LinearAttentionConfig(4, 4, 6, 3),
}
EVERY = tuple(KINDS.values())
SETTINGS = EngineConfig(max_rows=3, max_length=40, chunk=4, max_waiting=3, max_top=4)
FEW_PROGRAMS = EngineConfig(max_rows=3, max_length=32, chunk=16, max_waiting=3, max_top=2)
RNG = np.random.default_rng(3)


def prompt_of(length: int) -> tuple[int, ...]:
    return tuple(RNG.integers(0, 24, length).tolist())


REQUESTS = [
    Request(prompt_of(3), 9, Sampling(), seed=1, top_log_probs=1),
    Request(prompt_of(9), 6, Sampling(0.0), seed=2, top_log_probs=2),
    Request(prompt_of(4), 5, Sampling(1.3, 8, 0.9, 0.01, 1.2), seed=3, top_log_probs=1),
    Request(prompt_of(1), 12, Sampling(), stop_ids=(1, 2, 3), seed=4, top_log_probs=1),
    Request(prompt_of(14), 7, Sampling(), seed=5, top_log_probs=2),
    Request(prompt_of(6), 3, Sampling(), seed=6, top_log_probs=1),
]


@functools.cache
def model_of(*kinds: str) -> Transformer:
    attention = tuple(KINDS[kind] for kind in kinds)
    moe = MoEConfig(RouterConfig(4, 2, selection_bias=True), 6, layers=(len(kinds) - 1,))
    return Transformer(
        TransformerConfig(24, len(kinds), 16, 12, attention, moe, scan_layers=len(kinds) == 1)
    )


@functools.cache
def variables_of(model: Transformer):
    drawn = jax.jit(lambda key: nn.unbox(model.init(key, jnp.ones((1, 1), jnp.int32))))
    # Larger weights, so that no draw hangs on rounding.
    return jax.tree.map(lambda leaf: leaf * 3.0, drawn(jax.random.key(0)))


def finish(engine: Engine) -> list:
    events = []
    while not engine.idle:
        events += engine.step()
    return events


def texts_of(events: list) -> dict[int, list]:
    texts: dict[int, list] = {}
    for event in events:
        texts.setdefault(event.request, []).extend([event.token] if event.token else [])
    return texts


def assert_as_alone(model: Transformer, request: Request, tokens: list) -> None:
    # One program for all requests: padded to one length, cut off where each of them ends.
    prompt = np.zeros((1, 16), int)
    prompt[0, 16 - len(request.prompt) :] = request.prompt
    alone = write(
        model,
        variables_of(model),
        prompt,
        prompt_mask=np.arange(16)[None] >= 16 - len(request.prompt),
        max_new_tokens=12,
        sampling=request.sampling,
        key=jax.random.key(request.seed)[None],
    )
    expected = alone.tokens[0, : request.max_new_tokens].tolist()
    ends = [at for at, token in enumerate(expected) if token in request.stop_ids]
    expected = expected[: ends[0] + 1] if ends else expected
    assert [token.id for token in tokens] == expected
    found = [token.log_prob for token in tokens]
    np.testing.assert_allclose(found, alone.log_probs[0, : len(expected)], atol=2e-4)


@pytest.mark.parametrize('kinds', [('grouped',), ('window', 'linear', 'latent', 'grouped')])
def test_every_request_is_written_as_it_would_be_alone(kinds):
    model = model_of(*kinds)
    # Of the mixed one in small chunks, in a cache that grows and shrinks.
    small = dataclasses.replace(SETTINGS, max_length=24, chunk=8)
    settings = FEW_PROGRAMS if len(kinds) == 1 else small
    engine = Engine(model, variables_of(model), settings)
    numbers = [engine.submit(request) for request in REQUESTS]
    texts = texts_of(finish(engine))
    for number, request in zip(numbers, REQUESTS, strict=True):
        assert_as_alone(model, request, texts[number])
    assert engine.cache_use == CacheUse(0, 0, 0)


def test_texts_end_as_they_say_and_rows_are_refilled():
    model = model_of('grouped')
    engine = Engine(model, variables_of(model), FEW_PROGRAMS)
    numbers = [engine.submit(request) for request in REQUESTS]
    events, busiest = [], 0
    while not engine.idle:
        events += engine.step()
        busiest = max(busiest, engine.running)
    assert busiest == 3
    finishes = {event.request: event.finish for event in events if event.finish}
    texts = texts_of(events)
    for number, request in zip(numbers, REQUESTS, strict=True):
        stopped = texts[number][-1].id in request.stop_ids
        assert finishes[number] == ('stop' if stopped else 'length')
        assert stopped or len(texts[number]) == request.max_new_tokens


def test_cancelling_frees_a_row_and_leaves_the_others_as_they_are():
    model = model_of('grouped')
    engine = Engine(model, variables_of(model), FEW_PROGRAMS)
    numbers = [engine.submit(request) for request in REQUESTS]
    events = [event for _ in range(5) for event in engine.step()]
    assert engine.running == 3
    assert engine.cache_use.pages_in_use == 3
    assert engine.cancel(numbers[0])
    assert engine.cache_use.pages_in_use == 2
    assert engine.cancel(numbers[5])  # it waits
    assert not engine.cancel(numbers[0])
    events += finish(engine)
    texts = texts_of(events)
    assert len(texts[numbers[0]]) < 9
    assert numbers[5] not in texts
    for at in (1, 2, 3, 4):
        assert_as_alone(model, REQUESTS[at], texts[numbers[at]])
    assert engine.cache_use == CacheUse(0, 0, 0)


def test_a_prompt_cancelled_while_it_is_read_is_never_written():
    model = model_of('grouped')
    engine = Engine(model, variables_of(model), SETTINGS)
    number = engine.submit(REQUESTS[4])
    engine.step()
    assert engine.running == 1
    assert engine.cancel(number)
    assert finish(engine) == []
    assert engine.idle


def test_prompts_are_scored_by_the_full_forward():
    model = model_of('window', 'linear', 'latent', 'grouped')
    engine = Engine(model, variables_of(model), SETTINGS)
    request = Request(prompt_of(11), 0, seed=1, score_prompt=True, top_log_probs=3)
    engine.submit(request)
    (event,) = finish(engine)
    forward = jax.jit(model.apply)
    logits = forward(variables_of(model), jnp.asarray([request.prompt])).logits[0]
    expected = np.asarray(jax.nn.log_softmax(logits))
    assert event.finish == 'length'
    assert event.token is None
    assert tuple(token.id for token in event.prompt) == request.prompt
    assert event.prompt[0].log_prob is None
    for at, token in enumerate(event.prompt[1:]):
        np.testing.assert_allclose(token.log_prob, expected[at, token.id], atol=1e-4)
        best = np.argsort(-expected[at])[:3]
        assert [id_ for id_, _ in token.top] == best.tolist()
        np.testing.assert_allclose([v for _, v in token.top], expected[at, best], atol=1e-4)


def test_short_rows_beside_a_long_one_take_no_more_than_their_own_pages():
    model = model_of('grouped')
    settings = EngineConfig(max_rows=8, max_length=128, chunk=16)
    engine = Engine(model, variables_of(model), settings)
    engine.submit(Request(prompt_of(60), 20))
    for _ in range(7):
        engine.submit(Request(prompt_of(1), 12))
    while len(engine.step()) < 8:
        pass
    # Of the long row five pages, one of each short row: more than eight, so sixteen and page 0.
    page = 2 * 16 * 2 * 8 * 4  # keys and values of sixteen slots, two heads of eight float32
    segments, lengths, table = 8 * 8 * 16 * 4, 8 * 4, 8 * 8 * 4
    size = 17 * page + segments + lengths + table
    assert engine.cache_use == CacheUse(size, pages=16, pages_in_use=12)
    while engine.running > 1:
        engine.step()
    assert engine.cache_use.pages_in_use == 5
    finish(engine)
    assert engine.cache_use == CacheUse(0, 0, 0)


def test_a_request_waits_for_pages_that_others_may_yet_need():
    model = model_of('grouped')
    engine = Engine(model, variables_of(model), dataclasses.replace(FEW_PROGRAMS, max_pages=3))
    numbers = [engine.submit(request) for request in REQUESTS]
    events, together = [], []
    while not engine.idle:
        events += engine.step()
        assert engine.cache_use.pages_in_use <= 3
        together.append((engine.running, engine.waiting))
    # The fifth may need two pages: it waits for two rows to end, and the sixth behind it.
    assert (3, 3) in together
    assert (2, 2) in together
    texts = texts_of(events)
    for number, request in zip(numbers, REQUESTS, strict=True):
        assert_as_alone(model, request, texts[number])


def test_what_cannot_be_written_is_refused_in_words():
    model = model_of('grouped')
    engine = Engine(model, variables_of(model), SETTINGS)
    good = REQUESTS[0]
    for change, message in (
        ({'prompt': ()}, 'at least one id'),
        ({'prompt': (24,)}, r'ids in \[0, 24\)'),
        ({'stop_ids': (-1,)}, r'ids in \[0, 24\)'),
        ({'max_new_tokens': 0}, 'max_new_tokens must be at least 1'),
        ({'max_new_tokens': 38}, 'together must be at most 40 tokens; received 3 . 38'),
        ({'top_log_probs': 5}, 'top_log_probs must be from 0 to 4'),
        ({'seed': -1}, 'seed must be in'),
    ):
        with pytest.raises(InputError, match=message):
            engine.submit(dataclasses.replace(good, **change))
    for _ in range(6):
        engine.submit(good)
    with pytest.raises(QueueFullError, match='6 requests wait'):
        engine.submit(good)
    with pytest.raises(InputError, match=r'engine\.chunk'):
        EngineConfig(chunk=0)
    with pytest.raises(InputError, match=r'max_pages must be at least 10.*received 9'):
        dataclasses.replace(SETTINGS, max_pages=9)


MESH = MeshConfig(data=2, fsdp=2, tensor=2)


def test_on_a_mesh_every_request_is_written_as_on_one_device():
    plain = model_of('window', 'linear', 'latent', 'grouped')
    mesh = make_mesh(MESH)
    model = plain.clone(mesh=mesh)
    placed = jax.device_put(variables_of(plain), variable_shardings(model, mesh))
    with pytest.raises(InputError, match='max_rows must be a multiple of 4'):
        Engine(model, placed, FEW_PROGRAMS)
    engine = Engine(model, placed, dataclasses.replace(FEW_PROGRAMS, max_rows=4))
    numbers = [engine.submit(request) for request in REQUESTS]
    events = [event for _ in range(5) for event in engine.step()]
    cache = engine._rows.cache
    expected = cache_shardings(plain.config, cache, mesh)
    for leaf, sharding in zip(jax.tree.leaves(cache), jax.tree.leaves(expected), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    texts = texts_of(events + finish(engine))
    for number, request in zip(numbers, REQUESTS, strict=True):
        assert_as_alone(plain, request, texts[number])


def test_a_cache_is_split_by_rows_and_heads():
    config = model_of('window', 'linear', 'latent', 'grouped').config
    mesh = make_mesh(MESH)
    cache = jax.eval_shape(lambda: empty_cache(config, 8, 16))
    shardings = cache_shardings(config, cache, mesh)
    pieces = jax.tree.map(lambda leaf, sharding: sharding.shard_shape(leaf.shape), cache, shardings)
    window, linear, latent, grouped = pieces.layers
    assert window.keys == (2, 1, 8, 5)
    assert linear.state == (2, 2, 4, 6)
    assert linear.conv == (2, 3, 2, 14)
    assert latent.latents == (2, 16, 10)
    assert grouped.values == (2, 1, 16, 8)
    assert pieces.segment_ids == (2, 16)
    with pytest.raises(InputError, match='multiple of 4'):
        cache_shardings(config, jax.eval_shape(lambda: empty_cache(config, 6, 16)), mesh)
