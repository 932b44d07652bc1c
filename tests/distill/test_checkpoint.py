"""Checkpoints: bit-exact, on any mesh, and never damaged without a word."""

import logging
import os
import pathlib
import random
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from distill.checkpoint import (
    CheckpointManager,
    CheckpointWriteError,
    complete_steps,
    latest_good_step,
    read_metadata,
)
from distill.types import TrainState
from moe.errors import InputError

DATA_STATE = {'position': 7, 'sources': [{'next': 3}]}
METADATA = {'fingerprint': 'abc', 'config': {'dim': 4}}


def _mesh(shape, names):
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names))


def _place(tree, mesh, spec_of):
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, spec_of(x))), tree)


def _abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def _state(seed=0):
    """Every dtype that a run may hold, NaN payloads and -0.0 among the values, and empty nodes."""
    numbers = np.random.default_rng(seed)
    params = {
        'embed': {'embedding': jnp.asarray(numbers.standard_normal((16, 8)), jnp.float32)},
        'block': {
            'half': jnp.asarray(numbers.standard_normal((8, 8)), jnp.bfloat16),
            'odd.name': jnp.asarray([0.0, -0.0, np.nan, np.inf], jnp.float32),
            'nothing': {},
        },
    }
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(1.0, 0.0, 9))
    )
    routing = {'bytes': jnp.arange(8, dtype=jnp.uint8), 'flag': jnp.asarray([True, False])}
    return TrainState(
        step=jnp.asarray(3, jnp.int32),
        params=params,
        routing=routing,
        opt_state=jax.tree.map(lambda x: x + 2, optimizer.init(params)),
        skipped=jnp.asarray(0, jnp.int32),
    )


def _small(value):
    return {'w': jnp.full((4, 4), value, jnp.float32), 'step': jnp.asarray(value, jnp.int32)}


def _save(manager, step, state=None, **keywords):
    keywords = {'data_state': DATA_STATE, 'metadata': METADATA, **keywords}
    manager.save(step, _small(step) if state is None else state, **keywords)
    manager.wait()


def _saved(directory, steps, **keywords):
    manager = CheckpointManager(directory, **keywords)
    for step in steps:
        _save(manager, step)
    return manager


def _assert_same_bits(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def _files(directory):
    """Every file that holds data; empty ones have no byte to flip."""
    return sorted(p for p in directory.rglob('*') if p.is_file() and p.stat().st_size)


def _flip(path, position=None):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if position is None else position] ^= 1
    path.write_bytes(content)


def test_round_trip_is_bit_exact_and_on_another_mesh(tmp_path):
    line, square = _mesh((8,), ('a',)), _mesh((2, 4), ('x', 'y'))
    saved = _place(_state(), line, lambda x: PartitionSpec('a') if x.ndim == 2 else PartitionSpec())
    manager = CheckpointManager(tmp_path)
    _save(manager, 3, saved)

    other = _place(
        _state(seed=1),
        square,
        lambda x: PartitionSpec('y', 'x') if x.ndim == 2 else PartitionSpec(),
    )
    abstract = _abstract(other)
    state, data_state, metadata, step = CheckpointManager(tmp_path).restore(abstract)
    _assert_same_bits(state, saved)
    assert (data_state, metadata, step) == (DATA_STATE, METADATA, 3)
    for restored, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert restored.sharding == wanted.sharding
    assert state.params['embed']['embedding'].addressable_shards[0].data.shape == (4, 4)


def test_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state = {'w': jnp.zeros((256, 256)), 'v': jnp.zeros(4096)}
    manager = CheckpointManager(tmp_path)
    manager.save(1, state, data_state={}, metadata={})
    for _ in range(20):
        state = step(state)
    manager.wait()
    restored, *_ = manager.restore(_abstract(state))
    assert all(float(jnp.abs(x).max()) == 0 for x in jax.tree.leaves(restored))


@pytest.mark.parametrize('harm', ['flip', 'truncate', 'remove'])
def test_any_harmed_file_is_said_and_the_older_step_used(tmp_path, caplog, harm):
    _saved(tmp_path, [1, 2])
    abstract = _abstract(_small(0))
    for path in _files(tmp_path / '2'):
        content = path.read_bytes()
        if harm == 'flip':
            _flip(path)
        elif harm == 'truncate':
            path.write_bytes(content[:-1])
        else:
            path.unlink()
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger='absl'):
            state, _, _, step = CheckpointManager(tmp_path).restore(abstract)
        assert step == 1, path
        assert float(state['w'][0, 0]) == 1.0
        assert str(tmp_path / '2') in caplog.text
        assert 'cut off' in caplog.text or path.name in caplog.text
        path.write_bytes(content)
    assert CheckpointManager(tmp_path).restore(abstract)[3] == 2


def test_flipped_byte_anywhere_in_an_array_file_is_noticed(tmp_path):
    _saved(tmp_path, [1])
    array_file = max(_files(tmp_path / '1' / 'state'), key=lambda path: path.stat().st_size)
    size = array_file.stat().st_size
    for position in [0, 1, size // 3, size - 1]:
        _flip(array_file, position)
        with pytest.raises(InputError, match=f'{array_file.name}: checksum differs'):
            latest_good_step(tmp_path)
        _flip(array_file, position)
    assert latest_good_step(tmp_path) == 1


def test_no_good_step_is_an_error_that_names_the_files(tmp_path):
    manager = _saved(tmp_path, [1, 2])
    for step in ('1', '2'):
        _flip(tmp_path / step / 'checkpoint.json')
    with pytest.raises(InputError) as raised:
        manager.restore(_abstract(_small(0)))
    for step in (1, 2):
        assert f'{tmp_path}/{step}/checkpoint.json: checksum differs' in str(raised.value)
    with pytest.raises(InputError, match='found none'):
        CheckpointManager(tmp_path / 'empty').restore(_abstract(_small(0)))
    assert latest_good_step(tmp_path / 'empty') is None


def test_step_that_is_named_is_not_replaced_by_another(tmp_path):
    manager = _saved(tmp_path, [1, 2])
    assert manager.restore(_abstract(_small(0)), step=1)[3] == 1
    _flip(tmp_path / '2' / 'checkpoint.json')
    with pytest.raises(InputError, match='checksum differs'):
        manager.restore(_abstract(_small(0)), step=2)
    with pytest.raises(InputError, match=r'of step 5 .* found those of steps \[1, 2\]'):
        manager.restore(_abstract(_small(0)), step=5)


def test_run_goes_on_past_a_damaged_step_and_replaces_it(tmp_path):
    _saved(tmp_path, [1, 2])
    _flip(tmp_path / '2' / 'checkpoint.json')
    manager = CheckpointManager(tmp_path, keep_latest=1)
    manager.restore(_abstract(_small(0)))
    _save(manager, 2, _small(20))
    assert complete_steps(tmp_path) == (2,)
    assert float(manager.restore(_abstract(_small(0)))[0]['w'][0, 0]) == 20.0


def test_damaged_step_never_counts_as_one_to_keep(tmp_path):
    _saved(tmp_path, [1, 4])
    _flip(tmp_path / '4' / 'checkpoint.json')
    manager = CheckpointManager(tmp_path, keep_latest=1)
    manager.restore(_abstract(_small(0)))
    _save(manager, 2)
    assert complete_steps(tmp_path) == (2,)


def test_later_steps_of_another_run_are_refused(tmp_path):
    _saved(tmp_path, [5])
    with pytest.raises(InputError, match='it holds step 5'):
        _save(CheckpointManager(tmp_path), 5)
    manager = CheckpointManager(tmp_path)
    manager.restore(_abstract(_small(0)))
    _save(manager, 5, _small(9))  # already there: SIGTERM just after a periodic save
    assert float(manager.restore(_abstract(_small(0)))[0]['w'][0, 0]) == 5.0


def test_latest_and_best_are_kept_and_the_rest_deleted(tmp_path):
    manager = CheckpointManager(tmp_path, keep_latest=2, keep_best=1)
    metrics = {1: 3.0, 2: 1.0, 3: float('nan'), 4: 2.0, 5: None, 6: 1.5}
    for step, metric in metrics.items():
        _save(manager, step, metric=metric)
    assert complete_steps(tmp_path) == (2, 5, 6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['2', '5', '6']
    assert [read_metadata(tmp_path, step=step).metric for step in (2, 5, 6)] == [1.0, None, 1.5]
    _save(manager, 7, metric=0.5)
    assert complete_steps(tmp_path) == (6, 7)


def test_what_differs_from_the_abstract_state_is_named(tmp_path):
    manager = _saved(tmp_path, [1])
    good = _abstract(_small(0))

    def changed(dtype, shape):
        return {**good, 'w': jax.ShapeDtypeStruct(shape, dtype, sharding=good['w'].sharding)}

    with pytest.raises(InputError, match=r'w: required bfloat16 \(4, 4\), saved float32 \(4, 4\)'):
        manager.restore(changed(jnp.bfloat16, (4, 4)))
    with pytest.raises(InputError, match=r'w: required float32 \(4, 5\), saved float32 \(4, 4\)'):
        manager.restore(changed(jnp.float32, (4, 5)))
    with pytest.raises(InputError, match=r'extra: required float32 \(4, 4\), saved absent'):
        manager.restore({**good, 'extra': good['w']})
    with pytest.raises(InputError, match=r'w: required absent, saved float32 \(4, 4\)'):
        manager.restore({'step': good['step']})
    with pytest.raises(ValueError, match=r"sharding for every array: \['w'\]"):
        manager.restore({**good, 'w': jax.ShapeDtypeStruct((4, 4), jnp.float32)})


def test_metadata_is_read_without_the_arrays(tmp_path):
    _saved(tmp_path, [1])
    for path in _files(tmp_path / '1' / 'state'):
        path.unlink()
    info = read_metadata(tmp_path)
    assert (info.step, info.data_state, info.metadata) == (1, DATA_STATE, METADATA)
    assert info.arrays == {'w': ['float32', [4, 4]], 'step': ['int32', []]}
    _flip(tmp_path / '1' / 'checkpoint.json')
    with pytest.raises(InputError, match=r'checkpoint\.json: checksum differs'):
        read_metadata(tmp_path)
    with pytest.raises(InputError, match='of step 4 is required'):
        read_metadata(tmp_path, step=4)


def test_data_state_that_json_would_change_is_refused(tmp_path):
    manager = CheckpointManager(tmp_path)
    for data_state in ({'position': (1, 2)}, {1: 2}):
        with pytest.raises(TypeError, match='gives back unchanged'):
            _save(manager, 1, data_state=data_state)
    assert complete_steps(tmp_path) == ()


def test_relative_directory_is_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    manager = CheckpointManager('run/checkpoints')
    monkeypatch.chdir('/')
    _save(manager, 1)
    assert complete_steps(tmp_path / 'run' / 'checkpoints') == (1,)
    with pytest.raises(InputError, match='Mount the bucket'):
        CheckpointManager('gs://bucket/run')


@pytest.mark.parametrize('keep', [{'keep_latest': 0}, {'keep_best': -1}, {'keep_latest': 1.5}])
def test_bad_retention_is_refused(tmp_path, keep):
    with pytest.raises(InputError, match=next(iter(keep))):
        CheckpointManager(tmp_path, **keep)


class _SignalingThread(threading.Thread):
    """Named as orbax names the threads in which it writes."""


def _write_late(directory):
    time.sleep(0.5)
    directory.mkdir(exist_ok=True)
    (directory / 'late').write_text('')


def test_full_disk_is_an_error_and_the_earlier_checkpoint_is_intact(tmp_path, caplog):
    """A limit on file sizes stands in for a full disk: the write system call fails in both.

    Another of orbax's threads still writes when the first has failed.
    """
    manager = _saved(tmp_path, [1])
    straggler = _SignalingThread(target=_write_late, args=(tmp_path / '2',))
    large = {'w': jnp.asarray(np.random.default_rng(0).standard_normal(40_000))}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        straggler.start()
        with pytest.raises(CheckpointWriteError) as raised:
            _save(manager, 2, large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert isinstance(raised.value, OSError)
    assert isinstance(raised.value, InputError)
    message = str(raised.value)
    for part in ('step 2', str(tmp_path), 'File too large', 'Make room', 'steps [1]'):
        assert part in message
    assert '_SignalingThread' not in caplog.text
    straggler.join()
    assert sorted(path.name for path in tmp_path.iterdir()) == ['1']
    assert manager.restore(_abstract(_small(0)))[3] == 1
    _save(manager, 2)
    assert complete_steps(tmp_path) == (1, 2)


def test_unwritable_directory_is_an_error_with_a_remedy(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(CheckpointWriteError, match='Not a directory'):
        _save(CheckpointManager(tmp_path / 'file'), 1)


def test_sigkill_during_saves_loses_no_completed_checkpoint(tmp_path, caplog):
    """A child saves as fast as it can; whatever it said was complete must be there, bit for bit."""
    script = textwrap.dedent("""
        import itertools, sys
        import jax
        jax.config.update('jax_platforms', 'cpu')
        import jax.numpy as jnp
        from distill.checkpoint import CheckpointManager, complete_steps
        manager = CheckpointManager(sys.argv[1])
        done = max(complete_steps(sys.argv[1]), default=0)
        if done:
            abstract = {'w': jnp.zeros((64, 64)), 'n': jnp.zeros((4,), jnp.int32)}
            state, _, _, done = manager.restore(abstract)
            assert (state['w'] == done).all() and (state['n'] == done).all()
        for step in itertools.count(done + 1):
            state = {'w': jnp.full((64, 64), step, jnp.float32), 'n': jnp.full((4,), step)}
            manager.save(step, state, data_state={'position': step}, metadata={})
            print(step - 1, flush=True)
    """)
    environment = {**os.environ, 'PYTHONPATH': str(pathlib.Path(__file__).parents[2])}
    delays = random.Random(0)
    said = 0
    for _ in range(3):
        child = subprocess.Popen(
            [sys.executable, '-c', script, str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for _ in range(2):
            line = child.stdout.readline()
            assert line, child.stderr.read()
        time.sleep(delays.uniform(0, 0.15))
        child.send_signal(signal.SIGKILL)
        rest, _ = child.communicate()
        last = int((line + rest).split()[-1])
        assert last > said
        said = last
    (tmp_path / '999').mkdir()  # cut off before anything was written, whatever the kills hit
    with caplog.at_level(logging.WARNING, logger='absl'):
        good = latest_good_step(tmp_path)
    assert f'{tmp_path}/999 was cut off' in caplog.text
    assert good >= said
    abstract = _abstract({'w': jnp.zeros((64, 64)), 'n': jnp.zeros((4,), jnp.int32)})
    manager = CheckpointManager(tmp_path, keep_latest=1)
    state, data_state, _, step = manager.restore(abstract)
    assert step == good
    assert data_state == {'position': good}
    assert np.asarray(state['w']).tolist() == [[float(good)] * 64] * 64
    _save(manager, good + 1, state)
    assert [path.name for path in tmp_path.iterdir()] == [str(good + 1)]
