"""A teacher that is quantised while it teaches, and is told from the one in floats."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_study import built

from experiments import teaching
from moe.quantised import FORMATS
from moe.sharding import MeshConfig, init_sharded, make_mesh
from moe.transformer import Transformer


@pytest.fixture(scope='module')
def loaded():
    config = dataclasses.replace(built().teacher.model, num_layers=1)
    model = Transformer(config, make_mesh(MeshConfig(data=2), jax.devices()[:2]))
    return model, init_sharded(model, jax.random.key(0), model.mesh)


def of(weights):
    return types.SimpleNamespace(study=built(teacher__weights=weights))


def test_it_teaches_from_fewer_bytes(monkeypatch, loaded):
    monkeypatch.setattr(teaching, 'load_teacher', lambda context, mesh=None: loaded)
    assert teaching.load_teaching(of(None))[1] is loaded[1]
    # Beside the student too.
    assert teaching.online_teacher(of(None))[1] is loaded[1]
    assert 'quantised' in teaching.online_teacher(of('int8'))[1]
    for weights, forms in FORMATS.items():
        variables = teaching.load_teaching(of(weights))[1]
        head = variables['quantised']['head']['kernel']
        assert head['values'].dtype == jnp.dtype(forms['other'].dtype)
        whole = np.asarray(head['values'], np.float32) * np.asarray(head['scales'])
        floats = loaded[1]['params']
        kernel = floats['head']['kernel'] if 'head' in floats else floats['embed']['embedding'].T
        np.testing.assert_allclose(whole.T, kernel, atol=float(jnp.abs(kernel).max()) / 15)


def test_targets_of_other_weights_are_another_teachers(monkeypatch):
    known = {'sha256': 'abc', 'provenance': {}}
    monkeypatch.setattr(teaching, '_facts_of', lambda context, config: dict(known))
    facts = {teaching.teacher_facts(of(w))['sha256'] for w in (None, *FORMATS)}
    assert 'abc' in facts
    assert len(facts) == 1 + len(FORMATS)
