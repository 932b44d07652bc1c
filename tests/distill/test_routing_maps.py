"""Counts of routing: by hand, against the routers' own records, and the pictures made of them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill import routing_pictures
from distill.data import EvaluationSet
from distill.routing_maps import (
    TOKEN_CLASSES,
    RoutingMaps,
    chosen_together,
    class_shares,
    co_activation,
    load_by_class,
    routing_maps,
    token_classes,
)
from distill.tokenizer import ByteTokenizer
from moe.config import AttentionConfig, MoEConfig, RouterConfig, TransformerConfig
from moe.sharding import MeshConfig, abstract_variables, make_mesh, variable_shardings
from moe.transformer import Transformer

IDS = jnp.array([[[0, 1], [1, 0], [2, 1]], [[1, 2], [3, 0], [3, 1]]])
MASK = jnp.array([[True, True, True], [True, True, False]])
CLASSES = jnp.array([[0, 2, 2], [0, 2, 1]])


def test_pairs_by_hand():
    # Pairs 01, 01, 12, 12, 03; the last token, 13, is masked.
    expected = [[3, 2, 0, 1], [2, 4, 2, 0], [0, 2, 2, 0], [1, 0, 0, 1]]
    assert chosen_together(IDS, MASK, 4).tolist() == expected


def test_load_by_class_by_hand():
    expected = [[1, 0, 2], [2, 0, 2], [1, 0, 1], [0, 0, 1]]
    assert load_by_class(IDS, MASK, CLASSES, 4, 3).tolist() == expected


def test_pairs_are_compared_with_what_loads_alone_would_give():
    # Of 10 pairs in all, counted from both sides. Loads 3, 4, 2, 1: products of different ones
    # sum to 10^2 - (9 + 16 + 4 + 1) = 70.
    ratios = co_activation(np.asarray(chosen_together(IDS, MASK, 4)))
    expected = np.array(
        [
            [np.nan, 2 / 12, 0, 1 / 3],
            [2 / 12, np.nan, 2 / 8, 0],
            [0, 2 / 8, np.nan, 0],
            [1 / 3, 0, 0, np.nan],
        ]
    )
    np.testing.assert_allclose(ratios, expected * 70 / 10)


def test_even_choice_of_three_is_chance_for_every_pair():
    """Each set of 3 of 5 experts once: every pair occurs 3 times, every expert 6 times."""
    sets = [[a, b, c] for a in range(5) for b in range(a) for c in range(b)]
    together = chosen_together(jnp.array([sets]), jnp.ones((1, 10), bool), 5)
    assert set(np.ravel(together).tolist()) == {3.0, 6.0}
    ratios = co_activation(np.stack([together, together]))
    np.testing.assert_allclose(ratios[:, ~np.eye(5, dtype=bool)], 1)


def test_what_is_never_chosen_has_no_ratio():
    ratios = co_activation(np.array([[2.0, 2, 0], [2, 2, 0], [0, 0, 0]]))
    assert ratios[0, 1] == 1
    assert np.isnan(ratios[:, 2]).all()


def test_shares_by_hand():
    shares = class_shares(np.array([[1, 3, 0], [0, 0, 0]]))
    np.testing.assert_array_equal(shares, [[0.25, 0.75, 0], [np.nan] * 3])


def test_every_token_has_a_class():
    texts = [' ', '\n\n', ' def', 'defer', '42', ' 7', '();', ' +=', 'x1', '_', 'é', '\ufffd', '']

    class Vocabulary:
        vocab_size = len(texts)

        def decode(self, ids):
            return texts[ids[0]]

    names = [TOKEN_CLASSES[i] for i in token_classes(Vocabulary(), len(texts) + 1, ('def',))]
    assert names == (
        ['whitespace'] * 2
        + ['keywords', 'letters']
        + ['digits'] * 2
        + ['punctuation'] * 2
        + ['mixed', 'punctuation', 'letters', 'mixed']
        + ['special'] * 2
    )
    of_bytes = token_classes(ByteTokenizer(), 259)
    kinds = [TOKEN_CLASSES[of_bytes[i]] for i in (*b' a7;', 200, ByteTokenizer.bos_id)]
    assert kinds == ['whitespace', 'letters', 'digits', 'punctuation', 'mixed', 'special']


V, R, T = 12, 6, 7
CONFIG = TransformerConfig(
    vocab_size=V,
    num_layers=3,
    embed_dim=8,
    mlp_dim=8,
    attention=AttentionConfig(4, 2, 4),
    moe=MoEConfig(RouterConfig(4, 2), expert_dim=8, dispatch='dense', first_dense_layers=1),
)
OF_TOKENS = np.arange(V) % 3


def held_out() -> EvaluationSet:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, V, (R, T), dtype=np.int32)
    segments = (np.arange(T) < rng.integers(3, T + 1, (R, 1))).astype(np.int32)
    positions = np.tile(np.arange(T, dtype=np.int32), (R, 1))
    rows = {
        'tokens': tokens,
        'labels': tokens,
        'mask': segments > 0,
        'segment_ids': segments,
        'positions': positions,
    }
    return EvaluationSet(rows, np.arange(R), np.ones(R), tuple('abcdef'))


@functools.cache
def variables():
    rng = np.random.default_rng(1)
    shapes = abstract_variables(Transformer(CONFIG))
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes)


def test_maps_count_what_the_routers_chose():
    rows, model = held_out().rows, Transformer(CONFIG)
    inputs = [jnp.asarray(rows[name]) for name in ('tokens', 'positions', 'segment_ids')]
    output = jax.jit(model.apply)(variables(), *inputs)
    together, by_class = np.zeros((2, 4, 4)), np.zeros((2, 4, len(TOKEN_CLASSES)))
    for layer, router in enumerate(output.router):
        for row, t in np.argwhere(rows['segment_ids']):
            for e in np.asarray(router.expert_ids)[row, t]:
                by_class[layer, e, OF_TOKENS[rows['tokens'][row, t]]] += 1
                for f in np.asarray(router.expert_ids)[row, t]:
                    together[layer, e, f] += 1
        np.testing.assert_array_equal(np.diagonal(together[layer]), router.load)
    # Four rows a batch: the second is filled up with rows that do not count.
    maps = routing_maps(model, variables(), held_out(), OF_TOKENS, batch_size=4)
    np.testing.assert_array_equal(maps.together, together)
    np.testing.assert_array_equal(maps.by_class, by_class)
    assert (maps.layers, maps.classes) == ((1, 2), TOKEN_CLASSES)
    mesh = make_mesh(MeshConfig(data=2, expert=2, tensor=2))
    placed = jax.device_put(variables(), variable_shardings(Transformer(CONFIG), mesh))
    sharded = routing_maps(Transformer(CONFIG, mesh), placed, held_out(), OF_TOKENS, batch_size=8)
    np.testing.assert_array_equal(sharded.together, together)
    np.testing.assert_array_equal(sharded.by_class, by_class)


def test_a_dense_model_has_no_maps():
    dense = Transformer(dataclasses.replace(CONFIG, moe=None))
    assert routing_maps(dense, {}, held_out(), OF_TOKENS, batch_size=4) is None


MAPS = RoutingMaps(
    layers=(1, 3),
    together=np.array([[[6.0, 4, 2], [4, 5, 1], [2, 1, 3]], [[2, 2, 0], [2, 2, 0], [0, 0, 0]]]),
    by_class=np.array([[[1.0, 3, 0], [2, 2, 0]], [[0, 4, 0], [0, 0, 0]]]),
    classes=('letters', 'digits', 'mixed'),
)


def test_maps_are_read_as_they_were_written(tmp_path):
    MAPS.save(tmp_path / 'routing.npz')
    read = RoutingMaps.load(tmp_path / 'routing.npz')
    assert (read.layers, read.classes) == (MAPS.layers, MAPS.classes)
    np.testing.assert_array_equal(read.together, MAPS.together)
    np.testing.assert_array_equal(read.by_class, MAPS.by_class)
    assert [file.name for file in tmp_path.iterdir()] == ['routing.npz']


def test_pairs_are_drawn_on_a_scale_of_powers_of_two():
    figure = routing_pictures.experts_together(MAPS.together, MAPS.layers)
    first, second, bar = figure.axes
    assert [axes.get_title(loc='left') for axes in (first, second)] == ['Layer 1', 'Layer 3']
    shown = np.ma.filled(first.images[0].get_array(), np.nan)
    # Of 14 pairs; the products of different loads sum to 14^2 - (36 + 25 + 9) = 126.
    np.testing.assert_allclose(shown[0, 1], np.log2(4 / (6 * 5) * 126 / 14), rtol=1e-6)
    assert np.isnan(shown[[0, 1, 2], [0, 1, 2]]).all()
    assert bar.get_ylabel() == 'Chosen together, against chance'
    assert [text.get_text() for text in second.texts] == ['1.0', '1.0']


def test_bars_divide_the_load_of_each_expert():
    axes = routing_pictures.experts_by_class(MAPS.by_class, MAPS.classes, MAPS.layers).axes
    # Classes that never occur have no bar: two of three do, over 'all' and both experts.
    letters, digits = ([bar.get_height() for bar in container] for container in axes[0].containers)
    assert letters == pytest.approx([3 / 8, 1 / 4, 1 / 2])
    assert digits == pytest.approx([5 / 8, 3 / 4, 1 / 2])
    assert [bar.get_height() for bar in axes[1].containers[1]] == [1, 1, 0]
    legend = axes[0].figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ['letters', 'digits']


def test_of_many_layers_some_are_shown():
    together = np.tile(MAPS.together[:1], (12, 1, 1))
    figure = routing_pictures.experts_together(together, range(1, 13))
    titles = [axes.get_title(loc='left') for axes in figure.axes[:-1]]
    assert titles == [f'Layer {i}' for i in (1, 3, 5, 8, 10, 12)]
