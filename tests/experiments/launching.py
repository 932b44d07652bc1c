"""Launches of a tiny study in processes of their own, and what their checkpoints hold."""

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from distill.checkpoint import CheckpointManager, read_metadata

ROOT = pathlib.Path(__file__).parents[2]
TINY = 'tests/experiments/tiny.py'
STEPS = 12
LONGEST_LAUNCH = 400  # seconds, on a machine that has much else to do
MESH = ('--config.mesh.data=2', '--config.mesh.fsdp=2', '--config.mesh.expert=2')
KILL, TERMINATE = int(signal.SIGKILL), int(signal.SIGTERM)

Arrays = dict[str, np.ndarray]
Started = tuple[int, pathlib.Path]


@dataclasses.dataclass(frozen=True)
class Finished:
    """How a launch ended: its exit status (negative for a signal) and all that it printed."""

    status: int
    output: str


@dataclasses.dataclass(frozen=True)
class Launcher:
    """Runs `python -m experiments.launch`, or its sibling, on a machine of fake devices.

    Attributes:
        process: a warmed-up interpreter that forks the launches.
        environment: of a launch from a true command line.
        source: a glob of small text files.
        scratch: for what launches print.
    """

    process: subprocess.Popen[str]
    environment: dict[str, str]
    source: str
    scratch: pathlib.Path

    def flags(self, workdir: pathlib.Path, *flags: str) -> list[str]:
        """The command line of the tiny study."""
        source = f'--config.data.source={self.source}'
        return [f'--config={TINY}', f'--workdir={workdir}', source, *flags]

    def start(
        self,
        *argv: str,
        command: str = 'launch',
        devices: int = 8,
        event: tuple[str, str, int, int] | None = None,
        limit: int | None = None,
    ) -> Started:
        """Starts a launch, or another command; `event` and `limit` are as in warm_launcher.py."""
        output = self.scratch / f'{len(list(self.scratch.iterdir()))}.txt'
        output.touch()
        how = {'command': command, 'devices': devices, 'event': event, 'limit': limit}
        answer = self._ask(argv=argv, output=str(output), **how)
        return answer['pid'], output

    def wait(self, started: Started) -> Finished:
        """Waits until a launch has ended; kills it where it does not."""
        pid, output = started
        watchdog = threading.Timer(LONGEST_LAUNCH, os.kill, (pid, KILL))
        watchdog.start()
        try:
            return Finished(self._ask(wait=pid)['status'], output.read_text())
        finally:
            watchdog.cancel()

    def run(self, *argv: str, **how: Any) -> Finished:
        """Launches and waits."""
        return self.wait(self.start(*argv, **how))

    @contextlib.contextmanager
    def command(self, *argv: str, devices: int = 8) -> Iterator[subprocess.Popen[str]]:
        """Starts a launch from a true command line, and sees to it that it ends."""
        command = subprocess.Popen(
            [sys.executable, '-m', 'experiments.launch', *argv],
            cwd=ROOT,
            env=self.environment | {'JAX_NUM_CPU_DEVICES': str(devices)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            yield command
        finally:
            command.kill()
            command.communicate()

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())


def checkpoint_arrays(workdir: pathlib.Path, stage: str, step: int = STEPS) -> Arrays:
    """Every array of a stage's checkpoint: parameters, optimizer state, biases, counters."""
    folder = workdir / stage / 'checkpoints'
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=device)
        for name, (dtype, shape) in read_metadata(folder, step=step).arrays.items()
    }
    manager = CheckpointManager(folder)
    try:
        loaded, _, _, _ = manager.restore(abstract, step=step)
    finally:
        manager.close()
    return {name: np.asarray(array) for name, array in loaded.items()}


def assert_bitwise_equal(left: Arrays, right: Arrays) -> None:
    """Compares arrays by their bytes, and names those that differ."""
    assert left.keys() == right.keys()
    differing = [
        name
        for name in left
        if (left[name].dtype, left[name].shape, left[name].tobytes())
        != (right[name].dtype, right[name].shape, right[name].tobytes())
    ]
    assert not differing


def metric_rows(workdir: pathlib.Path, stage: str) -> list[dict[str, float]]:
    """What a stage wrote of each step."""
    lines = (workdir / stage / 'metrics.jsonl').read_text().splitlines()
    return [json.loads(line) for line in lines]
