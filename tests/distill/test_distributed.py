"""Joining processes: two real ones over loopback, and settings that cannot work."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from distill.distributed import (
    any_process,
    barrier,
    data_share,
    first_of_share,
    global_batch,
    initialize,
    is_writer,
    local_rows,
)
from moe.errors import InputError
from moe.sharding import MeshConfig, batch_sharding, make_mesh

ROOT = Path(__file__).parents[2]
RUN_SECONDS = 150

WORKER = """
import json, pathlib, sys, time
import jax
import jax.numpy as jnp
import numpy as np

jax.config.update('jax_num_cpu_devices', 4)
from distill.distributed import (
    any_process, barrier, data_share, first_of_share, global_batch, initialize, is_writer,
    local_rows,
)
from moe.sharding import MeshConfig, batch_sharding, make_mesh

settings, shared = json.loads(sys.argv[1]), pathlib.Path(sys.argv[2])
initialize(**settings, timeout_seconds=60)
initialize(**settings)
process = jax.process_index()
mesh = make_mesh(MeshConfig(data=-1, tensor=2))
local = {'tokens': np.arange(8).reshape(4, 2) + 100 * process, 'mask': np.arange(4) < 2 + process}
batch = global_batch(local, batch_sharding(mesh))
total = jax.jit(lambda b: jnp.sum(b['tokens'] * b['mask'][:, None]))(batch)
# Rows that both processes hold, and half of the rows of each: one batch all the same.
split = batch_sharding(make_mesh(MeshConfig(tensor=8)))
whole = global_batch(np.arange(6).reshape(3, 2), split)
shares = [data_share(batch_sharding(mesh)), data_share(split)]
firsts = [first_of_share(batch_sharding(mesh)), first_of_share(split)]
flags = [any_process(process == 1), any_process(False)]
back = local_rows(batch)
kept = all(np.array_equal(back[name], local[name]) for name in local)
if process == 1:
    time.sleep(1)
    (shared / 'late').write_text('written before the barrier')
barrier('written')
late = (shared / 'late').exists()
if is_writer():
    (shared / f'writer-{process}').touch()
result = json.dumps({
    'process': process, 'count': jax.process_count(), 'devices': jax.device_count(),
    'shape': batch['tokens'].shape, 'total': int(total), 'late': late,
    'shares': shares, 'firsts': firsts, 'flags': flags, 'kept': kept,
    'whole': whole.shape, 'sum': int(jax.jit(jnp.sum)(whole)),
})
(shared / f'result-{process}.json').write_text(result)
barrier('end')
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def run_two(shared: Path, settings: list[dict], variables: list[dict]) -> list[dict]:
    """Runs the worker twice at once and returns what each wrote."""
    workers = [
        subprocess.Popen(
            [sys.executable, '-c', WORKER, json.dumps(given), str(shared)],
            cwd=ROOT,
            env={**os.environ, **extra},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for given, extra in zip(settings, variables, strict=True)
    ]
    try:
        outputs = [worker.communicate(timeout=RUN_SECONDS) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, (output, _) in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, output[-3000:]
    return [json.loads((shared / f'result-{i}.json').read_text()) for i in range(2)]


@pytest.mark.parametrize('found', ['given', 'slurm'])
def test_two_processes_are_one(tmp_path: Path, found: str) -> None:
    port = free_port()
    if found == 'given':
        address = f'127.0.0.1:{port}'
        settings = [
            {'coordinator_address': address, 'num_processes': 2, 'process_id': i} for i in range(2)
        ]
        variables = [{}, {}]
    else:
        settings = [{}, {}]
        variables = [
            {
                'SLURM_JOB_ID': '1',
                'SLURM_STEP_NODELIST': 'localhost',
                'SLURM_NTASKS': '2',
                'SLURM_PROCID': str(i),
                'SLURM_LOCALID': str(i),
                'JAX_COORDINATOR_PORT': str(port),
            }
            for i in range(2)
        ]
    results = run_two(tmp_path, settings, variables)
    assert [result['process'] for result in results] == [0, 1]
    for result in results:
        assert (result['count'], result['devices']) == (2, 8)
        assert result['shape'] == [8, 2]
        # Rows 0, 1 of process 0 (0..3), and rows 0, 1, 2 of process 1 (100..105).
        assert result['total'] == sum(range(4)) + sum(range(100, 106))
        assert result['shares'] == [[result['process'], 2], [0, 1]]
        assert (result['whole'], result['sum']) == ([3, 2], sum(range(6)))
        assert result['firsts'] == [True, result['process'] == 0]
        assert (result['flags'], result['kept']) == ([True, False], True)
        assert result['late'], 'the barrier did not wait for process 1'
    assert [path.name for path in tmp_path.glob('writer-*')] == ['writer-0']


def test_alone_does_nothing() -> None:
    initialize()
    initialize(coordinator_address='localhost:1', num_processes=1, process_id=0)
    assert not jax.distributed.is_initialized()
    assert is_writer()
    barrier('nobody else')


@pytest.mark.parametrize(
    ('settings', 'missing'),
    [
        ({'coordinator_address': 'host:1'}, 'num_processes, process_id missing'),
        ({'num_processes': 2}, 'coordinator_address, process_id missing'),
        ({'coordinator_address': 'host:1', 'num_processes': 2}, 'process_id missing'),
        ({'num_processes': 2, 'process_id': 0}, 'coordinator_address missing'),
    ],
)
def test_half_given_settings(settings: dict, missing: str) -> None:
    with pytest.raises(InputError, match=f'{missing}. Give all three, or none'):
        initialize(**settings)


@pytest.mark.parametrize(('processes', 'process'), [(2, 2), (2, -1), (0, 0)])
def test_process_out_of_range(processes: int, process: int) -> None:
    with pytest.raises(InputError, match=rf'process_id={process}, num_processes={processes}'):
        initialize(coordinator_address='host:1', num_processes=processes, process_id=process)


@pytest.mark.parametrize('address', ['host', ':80', 'host:', 'host:http'])
def test_address_without_port(address: str) -> None:
    with pytest.raises(InputError, match="must be 'host:port'"):
        initialize(coordinator_address=address, num_processes=2, process_id=0)


def test_global_batch_places_rows() -> None:
    sharding = batch_sharding(make_mesh(MeshConfig(data=4, tensor=2)))
    rows = np.arange(24, dtype=np.int32).reshape(8, 3)
    batch = global_batch((rows, rows[:, 0] > 5), sharding)
    np.testing.assert_array_equal(batch[0], rows)
    np.testing.assert_array_equal(batch[1], rows[:, 0] > 5)
    assert batch[0].sharding == sharding
    assert {shard.data.shape for shard in batch[0].addressable_shards} == {(2, 3)}


@pytest.mark.parametrize('mesh', [MeshConfig(data=8), MeshConfig(data=2, expert=2, tensor=2)])
def test_local_rows_undo_global_batch(mesh: MeshConfig) -> None:
    rows = np.arange(48).reshape(16, 3)
    tree = {'a': rows, 'b': rows[:, 0] > 5}
    back = local_rows(global_batch(tree, batch_sharding(make_mesh(mesh))))
    assert all(isinstance(array, np.ndarray) for array in back.values())
    np.testing.assert_array_equal(back['a'], rows)
    np.testing.assert_array_equal(back['b'], tree['b'])


def test_alone_a_flag_is_its_own() -> None:
    assert any_process(True)
    assert not any_process(False)
    assert first_of_share(batch_sharding(make_mesh(MeshConfig(data=8))))


def test_one_process_reads_everything() -> None:
    for mesh in (MeshConfig(data=8), MeshConfig(data=2, tensor=4), MeshConfig(tensor=8)):
        assert data_share(batch_sharding(make_mesh(mesh))) == (0, 1)


def test_global_batch_that_does_not_divide() -> None:
    sharding = batch_sharding(make_mesh(MeshConfig(data=4, tensor=2)))
    with pytest.raises(InputError, match='6 rows of the batch for 4 shards'):
        global_batch(np.zeros((6, 3)), sharding)
