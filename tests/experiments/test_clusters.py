"""The cluster files parse, and hand the launcher what it needs; nothing of a cluster is here."""

import os
import pathlib
import string
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[2]
CLUSTERS = ROOT / 'experiments' / 'clusters'
# A command that says what it was called with, one argument a line.
ECHO = '#!/usr/bin/env bash\nprintf "%s\\n" "$@"\necho "devices $JAX_LOCAL_DEVICE_IDS"\n'


def run(script: str, command: str, folder: pathlib.Path, *argv: str, **variables: str) -> list[str]:
    """Runs a script with a stand-in for the command that reaches the cluster."""
    stand_in = folder / command
    stand_in.write_text(ECHO)
    stand_in.chmod(0o755)
    environment = {'PATH': f'{folder}:{os.environ["PATH"]}', **variables}
    done = subprocess.run(
        ['bash', str(CLUSTERS / script), *argv],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def test_slurm_gives_a_process_all_devices_of_its_node(tmp_path: pathlib.Path) -> None:
    lines = run('slurm.sh', 'srun', tmp_path, '--stages=a b', SLURM_GPUS_ON_NODE='3', WORKDIR='/w')
    assert lines[-5:] == [
        *('experiments.launch', '--config=configs/quickstart.py', '--workdir=/w', '--stages=a b'),
        'devices 0,1,2',
    ]


def test_slurm_without_accelerators_names_none(tmp_path: pathlib.Path) -> None:
    assert run('slurm.sh', 'srun', tmp_path)[-1] == 'devices '


def test_tpu_pod_runs_one_launch_on_every_worker(tmp_path: pathlib.Path) -> None:
    variables = dict(TPU='slice', ZONE='zone', REPOSITORY='an address', WORKDIR='/runs/a b')
    lines = run('tpu_pod.sh', 'gcloud', tmp_path, '--config.data.source=*.txt', **variables)
    assert '--worker=all' in lines
    (command,) = [line for line in lines if line.startswith('exec ')]
    # What the shells there make of it.
    argv = subprocess.run(
        ['bash', '-c', f'printf "%s\\n" {command.removeprefix("exec ")}'],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert argv == [
        *('.venv/bin/python', '-m', 'experiments.launch', '--config=configs/quickstart.py'),
        *('--workdir=/runs/a b', '--config.data.source=*.txt'),
    ]


def test_tpu_pod_asks_for_what_is_missing(tmp_path: pathlib.Path) -> None:
    with pytest.raises(subprocess.CalledProcessError) as error:
        run('tpu_pod.sh', 'gcloud', tmp_path, TPU='slice', ZONE='zone', WORKDIR='/w')
    assert 'REPOSITORY: a git address' in error.value.stderr


def test_gke_runs_a_process_on_each_host_of_the_slice() -> None:
    yaml = pytest.importorskip('yaml')
    variables = dict(
        NAME='study',
        IMAGE='image:tag',
        CLAIM='runs',
        CONFIG='configs/quickstart.py',
        ACCELERATOR='tpu-v5p-slice',
        TOPOLOGY='2x2x4',
        HOSTS='4',
        CHIPS='4',
    )
    text = (CLUSTERS / 'gke.yaml').read_text()
    job_set = yaml.safe_load(string.Template(text).substitute(variables))
    (job,) = job_set['spec']['replicatedJobs']
    spec = job['template']['spec']
    assert (spec['parallelism'], spec['completions']) == (4, 4)
    pod = spec['template']['spec']
    assert pod['nodeSelector'] == {
        'cloud.google.com/gke-tpu-accelerator': 'tpu-v5p-slice',
        'cloud.google.com/gke-tpu-topology': '2x2x4',
    }
    (container,) = pod['containers']
    assert container['command'][:3] == ['python', '-m', 'experiments.launch']
    assert container['resources']['limits'] == {'google.com/tpu': '4'}
    mounts = {mount['name']: mount['mountPath'] for mount in container['volumeMounts']}
    assert '--workdir=/runs/study' in container['command']
    assert mounts == {volume['name']: '/runs' for volume in pod['volumes']}
