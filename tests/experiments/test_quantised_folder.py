"""A quantised model's folder: read without floats, writes the same text, and is refused by name."""

import json
import shutil

import jax
import numpy as np
import pytest
from launching import Launcher
from stage import CONFIG, make_stage

from distill.manifest import write_manifest
from experiments.loading import load_model_of, load_stage, with_weights
from experiments.quantised_folder import save_quantised
from moe.engine import Engine
from moe.errors import InputError
from moe.quantised import FORMATS
from moe.requests import EngineConfig, Request
from moe.sampling import Sampling
from moe.sharding import MeshConfig

MESH = MeshConfig(fsdp=4, expert=2)


@pytest.fixture(scope='module')
def stage(tmp_path_factory):
    return make_stage(tmp_path_factory.mktemp('study'))


@pytest.fixture(scope='module')
def folders(stage, tmp_path_factory):
    """The stage as quantised folders, by their weights."""
    out = tmp_path_factory.mktemp('quantised')
    for weights in FORMATS:
        save_quantised(out / weights, with_weights(load_stage(stage), weights))
    return out


@pytest.mark.parametrize('weights', FORMATS)
def test_it_is_the_model_that_is_quantised_on_loading(stage, folders, weights):
    here = with_weights(load_stage(stage), weights)
    loaded = load_model_of(folders / weights)
    assert loaded.weights == weights
    assert loaded.model.config == here.model.config
    assert loaded.tokenizer.fingerprint == here.tokenizer.fingerprint
    assert jax.tree.structure(loaded.variables) == jax.tree.structure(here.variables)
    leaves = (jax.tree.leaves_with_path(each.variables) for each in (loaded, here))
    for (path, found), (_, expected) in zip(*leaves, strict=True):
        assert found.dtype == expected.dtype, path
        np.testing.assert_array_equal(found.astype(np.float32), expected.astype(np.float32))
    assert with_weights(loaded, weights) is loaded


@pytest.mark.parametrize('weights', FORMATS)
def test_on_a_mesh_each_part_is_read_onto_its_devices(stage, folders, weights):
    here = with_weights(load_stage(stage, mesh=MESH), weights)
    loaded, alone = load_model_of(folders / weights, mesh=MESH), load_model_of(folders / weights)
    assert loaded.model.mesh.size == 8
    trees = (each.variables for each in (loaded, here, alone))
    leaves = zip(*map(jax.tree.leaves_with_path, trees), strict=True)
    for (path, found), (_, computed), (_, expected) in leaves:
        assert found.sharding.is_equivalent_to(computed.sharding, found.ndim), path
        for array in (found, computed):
            np.testing.assert_array_equal(np.asarray(array, np.float32), np.float32(expected))
    moe = loaded.variables['quantised']['layer_1']['moe']
    # Of 4 experts 2, of 16 channels 4.
    assert moe['gate_up']['values'].sharding.shard_shape((4, 2, 6, 16)) == (2, 2, 6, 4)


def test_on_a_mesh_it_writes_the_text_of_one_device(folders):
    request = Request((3, 1, 4), max_new_tokens=3, sampling=Sampling(0.0))
    texts = []
    for mesh in (MESH, None):
        each = load_model_of(folders / 'int8', mesh=mesh)
        engine = Engine(each.model, each.variables, EngineConfig(8, 16, chunk=4))
        engine.submit(request)
        texts.append([event.token.id for _ in range(4) for event in engine.step()])
    assert texts[0] == texts[1]
    assert len(texts[0]) == 3


def test_it_takes_fewer_bytes_the_fewer_bits_there_are(stage, folders):
    whole = sum(file.stat().st_size for file in (stage / 'model').rglob('*') if file.is_file())
    sizes = {name: (folders / name / 'model.safetensors').stat().st_size for name in FORMATS}
    assert sizes['int4_experts'] < sizes['int8'] < whole
    assert sizes['fp8'] == pytest.approx(sizes['int8'], rel=0.05)


def test_its_dtype_may_be_another(folders):
    loaded = load_model_of(folders / 'int8', dtype='bfloat16')
    assert (loaded.model.config.dtype, loaded.model.config.param_dtype) == ('bfloat16', 'float32')


def test_what_does_not_fit_is_refused_by_name(folders, tmp_path):
    with pytest.raises(InputError, match="quantised to 'int8' already; received --weights=fp8"):
        with_weights(load_model_of(folders / 'int8'), 'fp8')
    other = shutil.copytree(folders / 'int8', tmp_path / 'other')
    record = json.loads((other / 'quantised.json').read_text())
    record['model']['mlp_dim'] = CONFIG.mlp_dim + 1
    (other / 'quantised.json').write_text(json.dumps(record))
    with pytest.raises(InputError, match=r'every checksum right.*\n.*quantised\.json'):
        load_model_of(other)
    (other / 'manifest.json').unlink()
    write_manifest(other)
    with pytest.raises(
        InputError, match=r'quantised/layer_0/mlp/gate_up/values: must be int8\[2, 13'
    ):
        load_model_of(other)
    (other / 'manifest.json').unlink()
    with pytest.raises(InputError, match=r'manifest\.json: missing'):
        load_model_of(other)


def test_the_command_writes_it_and_says_what_it_needs(launcher: Launcher, stage, folders, tmp_path):
    flags = [f'--checkpoint={stage}', '--weights=int8', f'--out={tmp_path / "int8"}']

    def run(*argv):
        return launcher.run(*argv, command='quantise', devices=1)

    finished = run(*flags)
    assert finished.status == 0, finished.output
    for name in ('model.safetensors', 'quantised.json'):
        assert (tmp_path / 'int8' / name).read_bytes() == (folders / 'int8' / name).read_bytes()
    assert 'holds something already' in run(*flags).output
    assert '--weights=KIND is required' in run(flags[0], flags[2]).output
