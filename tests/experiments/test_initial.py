"""A student starts from a trained model: alike on every mesh, after every kill, or not at all."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from launching import KILL, MESH, Launcher, assert_bitwise_equal, checkpoint_arrays, metric_rows
from tiny import get_config

from distill.checkpoint import complete_steps
from distill.load_history import LOAD_HISTORY, read_load_history
from experiments.context import Context
from experiments.initial import initial_variables, require_source, started_from
from experiments.signals import StopSignal
from experiments.teaching import load_teacher
from moe.errors import InputError
from moe.sharding import variable_shardings
from moe.transformer import Transformer

KEY = jax.random.key(5)
UPCYCLE = '--config.student.init.method=upcycle'
NOISE = '--config.student.init.noise=0.05'


@pytest.fixture(scope='module')
def config(launcher: Launcher, uninterrupted: pathlib.Path) -> ml_collections.ConfigDict:
    """The tiny study, its teacher trained already."""
    config = get_config()
    config.data.source = launcher.source
    config.teacher.update(source='checkpoint', checkpoint=str(uninterrupted / 'teacher'))
    return config


def context_of(
    config: ml_collections.ConfigDict, folder: pathlib.Path, mesh: dict[str, int], **init: object
) -> Context:
    config = config.copy_and_resolve_references()
    config.mesh.update(mesh)
    config.student.init.update(init)
    return Context(config, str(folder), command='test', stop=StopSignal())


SPLIT = dict(data=2, fsdp=2, expert=2)
WHOLE = dict(data=8)


@pytest.mark.parametrize(
    'init',
    [dict(noise=0.1), dict(router='centroids', router_std=0.5, calibration_rows=3)],
    ids=['drawn', 'centroids'],
)
def test_every_mesh_starts_from_the_same_bits(
    config: ml_collections.ConfigDict, tmp_path: pathlib.Path, init: dict[str, object]
):
    contexts = [context_of(config, tmp_path, m, method='upcycle', **init) for m in (SPLIT, WHOLE)]
    split, whole = (initial_variables(context, KEY) for context in contexts)
    jax.tree.map(np.testing.assert_array_equal, split, whole)
    model = contexts[0].model(contexts[0].study.student.model)
    expected = variable_shardings(model, contexts[0].mesh)
    assert jax.tree.map(lambda leaf: leaf.sharding, split) == expected
    again = initial_variables(contexts[0], KEY)
    jax.tree.map(np.testing.assert_array_equal, split, again)
    # Whatever is drawn hangs on the key.
    other = initial_variables(contexts[0], jax.random.key(6))
    kernel = [each['params']['layer_0']['moe']['router']['kernel'] for each in (split, other)]
    assert np.abs(np.asarray(kernel[0]) - np.asarray(kernel[1])).max() > 0


def test_an_upcycled_student_starts_as_its_teacher(
    config: ml_collections.ConfigDict, tmp_path: pathlib.Path
):
    context = context_of(config, tmp_path, SPLIT, method='upcycle', router='centroids')
    student = Transformer(context.study.student.model)
    teacher, variables = load_teacher(context)
    tokens = jnp.asarray(context.training_rows(4).tokens)
    expected = jax.jit(Transformer(teacher.config).apply)(jax.device_get(variables), tokens).logits
    made = jax.jit(student.apply)(jax.device_get(initial_variables(context, KEY)), tokens).logits
    np.testing.assert_allclose(made, expected, atol=1e-5)
    start = started_from(context)
    assert start['options'] == {'router': 'centroids'}
    assert start['calibration_tokens'] == 32 * 16


def test_a_student_of_a_checkpoint_is_pruned_on_text_of_the_train_split(
    config: ml_collections.ConfigDict, uninterrupted: pathlib.Path, tmp_path: pathlib.Path
):
    config = config.copy_and_resolve_references()
    student = config.student
    student.model = config.teacher.model.copy_and_resolve_references()
    student.balance.selection_bias_rate = 0.0
    student.model.mlp_dim = 24
    source = dict(source='checkpoint', checkpoint=str(uninterrupted / 'teacher'))
    contexts = [context_of(config, tmp_path, m, method='prune', **source) for m in (SPLIT, WHOLE)]
    require_source(contexts[0])
    split, whole = (initial_variables(context, KEY) for context in contexts)
    jax.tree.map(np.testing.assert_array_equal, split, whole)
    _, variables = load_teacher(contexts[0])
    old, new = (np.asarray(each['params']['layer_0']['mlp']['down']) for each in (variables, split))
    kept = [row for row in old if (row == new).all(axis=1).any()]
    np.testing.assert_array_equal(np.stack(kept), new)
    assert started_from(contexts[0])['source'] == 'checkpoint'


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'student.init.checkpoint': '/nowhere/teacher'}, 'Give config.student.init.checkpoint'),
        (
            {'student.model.embed_dim': 32},
            "method='upcycle' cannot make config.student.model .* the checkpoint.* keeps embed_dim",
        ),
        (
            {'data.tokenizer': 'bpe', 'data.vocab_size': 280, 'teacher.source': 'train'},
            'must have the tokenizer of the study',
        ),
        ({'seed': 1}, 'held-out documents were training text'),
    ],
)
def test_a_checkpoint_that_cannot_be_started_from_is_refused_before_anything_trains(
    config: ml_collections.ConfigDict,
    uninterrupted: pathlib.Path,
    tmp_path: pathlib.Path,
    changes: dict[str, object],
    message: str,
):
    config = config.copy_and_resolve_references()
    source = dict(source='checkpoint', checkpoint=str(uninterrupted / 'teacher'))
    config.student.init.update(method='upcycle', **source)
    config.update_from_flattened_dict(changes)
    if config.teacher.source == 'train':
        config.teacher.checkpoint = None
    context = context_of(config, tmp_path / 'study', SPLIT)
    with pytest.raises(InputError, match=message):
        require_source(context)
    assert not (tmp_path / 'study' / 'config.json').exists()


@pytest.fixture(scope='module')
def upcycled(
    launcher: Launcher, uninterrupted: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> pathlib.Path:
    """The tiny study from a given teacher, its student upcycled from it, on eight devices."""
    workdir = tmp_path_factory.mktemp('upcycled') / 'study'
    finished = launcher.run(*launcher.flags(workdir, *taught(uninterrupted), *MESH))
    assert finished.status == 0, finished.output
    assert "start from the teacher, by 'upcycle' (noise=0.05)" in finished.output
    return workdir


def taught(uninterrupted: pathlib.Path) -> tuple[str, ...]:
    return (
        UPCYCLE,
        NOISE,
        '--config.student.model.moe.dispatch=dense',
        '--config.teacher.source=checkpoint',
        f'--config.teacher.checkpoint={uninterrupted / "teacher"}',
    )


def test_the_summary_says_how_student_and_control_started(upcycled: pathlib.Path):
    summary = json.loads((upcycled / 'summary.json').read_text())
    start = summary['student_start']
    assert len(start.pop('source_sha256')) == 64
    assert start == {'method': 'upcycle', 'source': 'teacher', 'options': {'noise': 0.05}}
    assert 'start from the teacher' in (upcycled / 'report.html').read_text()
    history = read_load_history(upcycled / 'student' / LOAD_HISTORY)
    rows = metric_rows(upcycled, 'student')
    assert history.steps.tolist() == [row['step'] for row in rows]
    violations = [[row['moe_0/max_violation_global']] for row in rows]
    np.testing.assert_allclose(history.load.max(-1) - 1, violations, atol=2e-3)
    assert (upcycled / 'pictures' / 'load_over_steps.png').exists()
    # From the same variables, on the same first batch: cross-entropies are equal.
    first = [metric_rows(upcycled, stage)[0]['cross_entropy'] for stage in ('student', 'control')]
    assert first[0] == pytest.approx(first[1], rel=1e-6)


def test_killed_before_its_first_checkpoint_it_starts_again_from_the_same(
    launcher: Launcher, uninterrupted: pathlib.Path, upcycled: pathlib.Path, tmp_path: pathlib.Path
):
    stages = '--stages=teacher,student'
    flags = launcher.flags(tmp_path, *taught(uninterrupted), stages, *MESH)
    finished = launcher.run(*flags, event=('step', 'student', 2, KILL))
    assert finished.status == -KILL, finished.output
    assert not complete_steps(tmp_path / 'student' / 'checkpoints')
    finished = launcher.run(*flags)
    assert finished.status == 0, finished.output
    assert_bitwise_equal(
        checkpoint_arrays(tmp_path, 'student'), checkpoint_arrays(upcycled, 'student')
    )
    assert metric_rows(tmp_path, 'student') == metric_rows(upcycled, 'student')
    histories = [folder / 'student' / LOAD_HISTORY for folder in (tmp_path, upcycled)]
    assert histories[0].read_text() == histories[1].read_text()


def test_one_device_trains_to_the_same_parameters(
    launcher: Launcher, uninterrupted: pathlib.Path, upcycled: pathlib.Path, tmp_path: pathlib.Path
):
    flags = launcher.flags(tmp_path, *taught(uninterrupted), '--stages=teacher,student')
    finished = launcher.run(*flags, devices=1)
    assert finished.status == 0, finished.output
    one, eight = (checkpoint_arrays(folder, 'student') for folder in (tmp_path, upcycled))
    for name in one:
        rounding = 1e-4 * np.abs(one[name]).max()
        np.testing.assert_allclose(eight[name], one[name], rtol=0, atol=rounding, err_msg=name)


def test_a_run_is_not_resumed_from_another_start(
    launcher: Launcher, uninterrupted: pathlib.Path, upcycled: pathlib.Path, tmp_path: pathlib.Path
):
    workdir = shutil.copytree(upcycled, tmp_path / 'study')
    other = (*taught(uninterrupted), '--stages=student', '--config.student.init.noise=0.1')
    finished = launcher.run(*launcher.flags(workdir, *other, *MESH))
    assert finished.status == 2
    assert 'student.init.noise: 0.05 there, 0.1 now' in finished.output
    # Nor where the folder no longer says whose it is.
    (workdir / 'config.json').unlink()
    (workdir / 'student' / 'result.json').unlink()
    finished = launcher.run(*launcher.flags(workdir, *other, *MESH))
    assert finished.status == 2
    assert 'start.options.noise: 0.05 there, 0.1 here' in finished.output
