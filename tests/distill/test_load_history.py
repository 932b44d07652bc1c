"""Balance over training: loads written and read, and the pictures of them."""

import json

import numpy as np
import pytest

from distill import balance_pictures
from distill.load_history import LoadHistory, encode_load, read_load_history
from distill.metrics import JsonlWriter
from moe.errors import InputError


def test_loads_are_read_as_they_were_written_over_their_mean(tmp_path):
    path = tmp_path / 'run' / 'expert_load.jsonl'
    writer = JsonlWriter(path)
    writer.write(1, encode_load(np.array([[4, 0, 2, 2], [0, 0, 0, 0]])))
    writer.write(10, encode_load(np.array([[1, 1, 1, 3], [1000, 1, 0, 0]])))
    writer.close()
    history = read_load_history(path)
    assert history is not None
    assert history.steps.tolist() == [1, 10]
    assert history.load.dtype == np.float32
    # Means 2, 0, 1.5 and 250.25; a float16 has 11 bits.
    np.testing.assert_allclose(history.load[0], [[2, 0, 1, 1], [0, 0, 0, 0]])
    expected = [[2 / 3, 2 / 3, 2 / 3, 2], [1000 / 250.25, 1 / 250.25, 0, 0]]
    np.testing.assert_allclose(history.load[1], expected, rtol=2.0**-11)


def test_a_line_takes_under_three_bytes_an_expert():
    loads = np.random.default_rng(0).integers(0, 5000, (60, 384))
    assert len(json.dumps({'step': 123_456, **encode_load(loads)})) < 3 * loads.size


def test_a_stage_without_experts_has_no_history(tmp_path):
    assert read_load_history(tmp_path / 'expert_load.jsonl') is None


@pytest.mark.parametrize(
    ('second', 'message'),
    [
        ('{"step": 2, "routers": 1, "load"', 'line 2, must hold step, routers and load'),
        ('{"step": 2, "routers": 1, "load": "?"}', 'line 2, must hold'),
        ('{"step": 2, "routers": 3, "load": "AAAAAA=="}', 'line 2, must hold'),
        ('{"step": 2, "routers": 2, "load": "AAAAAA=="}', r'shapes \[\(1, 2\), \(2, 1\)\]'),
    ],
)
def test_what_is_no_history_is_refused(tmp_path, second, message):
    first = json.dumps({'step': 1, **encode_load(np.ones((1, 2)))})
    (tmp_path / 'expert_load.jsonl').write_text(f'{first}\n{second}\n')
    with pytest.raises(InputError, match=message):
        read_load_history(tmp_path / 'expert_load.jsonl')


def test_every_experts_load_is_drawn_over_the_updates():
    load = np.array([[[0.5, 1.5], [1, 1]], [[1, 1], [0, 2]], [[0.25, 1.75], [1, 1]]], np.float32)
    figure = balance_pictures.load_over_steps(LoadHistory(np.array([10, 20, 40]), load), [3])
    *panels, bar = figure.axes
    assert [axes.get_title(loc='left') for axes in panels] == ['Layer 3', 'MTP 1']
    for router, axes in enumerate(panels):
        drawn = axes.collections[0]
        np.testing.assert_array_equal(drawn.get_array(), load[:, router].T)
        assert drawn.get_coordinates()[0, :, 0].tolist() == [5, 15, 30, 50]
        assert drawn.get_clim() == (0, 2)
    assert bar.get_ylabel() == 'Load, 1 = balanced'
    many = LoadHistory(np.array([1, 2]), np.ones((2, 12, 4), np.float32))
    titles = [
        axes.get_title(loc='left')
        for axes in balance_pictures.load_over_steps(many, range(1, 13)).axes[:-1]
    ]
    assert titles == [f'Layer {i}' for i in (1, 3, 5, 8, 10, 12)]


def test_a_statistic_over_training_is_drawn_layer_by_layer():
    key = balance_pictures.BALANCE
    curve = [
        {'step': 10, f'moe_0/{key}': 1.5, f'moe_1/{key}': 0.5},
        {'step': 15, 'loss': 2.0},
        {'step': 20, f'moe_0/{key}': None, f'moe_1/{key}': 0.25},
        {'step': 40, f'moe_0/{key}': 0.0, f'moe_1/{key}': 0.125},
    ]
    steps, values = balance_pictures.over_steps(curve, key)
    assert steps.tolist() == [10, 20, 40]
    np.testing.assert_array_equal(values, [[1.5, np.nan, 0], [0.5, 0.25, 0.125]])
    axes, bar = balance_pictures.balance_over_steps(curve, [3]).axes
    drawn = axes.collections[0]
    np.testing.assert_array_equal(np.ma.filled(drawn.get_array(), np.nan), values)
    # Cells reach half way to their neighbours.
    assert drawn.get_coordinates()[0, :, 0].tolist() == [5, 15, 30, 50]
    assert [label.get_text() for label in axes.get_yticklabels()] == ['3', 'MTP 1']
    assert bar.get_ylabel() == 'MaxVio, 0 = balanced'
