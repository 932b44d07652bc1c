"""Killed at any moment and started again, a run ends as the uninterrupted one, bit for bit."""

import os
import pathlib
import random
import shutil
import signal
import time

from launching import (
    KILL,
    LONGEST_LAUNCH,
    MESH,
    TERMINATE,
    Launcher,
    assert_bitwise_equal,
    checkpoint_arrays,
    metric_rows,
)

from distill.checkpoint import complete_steps

STAGES = '--stages=teacher,student'
# Where each session of the run is killed, and the newest step that must be saved by then: a save
# ends before the next one begins, and checkpoints are of steps 3, 6, 9 and 12.
KILLS = (
    ('saving', 'teacher', 3, None),
    ('unsealed', 'teacher', 9, 6),
    ('step', 'student', 8, 3),
    ('saving', 'student', 12, 9),
)


def assert_same_training(left: pathlib.Path, right: pathlib.Path, *stages: str) -> None:
    """Compares parameters, optimizer states, and the metrics of every step."""
    for stage in stages:
        assert_bitwise_equal(checkpoint_arrays(left, stage), checkpoint_arrays(right, stage))
        assert metric_rows(left, stage) == metric_rows(right, stage)


def test_killed_again_and_again(
    launcher: Launcher, uninterrupted: pathlib.Path, tmp_path: pathlib.Path
):
    flags = launcher.flags(tmp_path, STAGES, *MESH)
    for where, stage, step, saved in KILLS:
        finished = launcher.run(*flags, event=(where, stage, step, KILL))
        assert finished.status == -KILL, finished.output
        checkpoints = tmp_path / stage / 'checkpoints'
        assert saved is None or saved in complete_steps(checkpoints), (where, stage, step)
        if where != 'step':
            assert (checkpoints / str(step)).exists()
            assert step not in complete_steps(checkpoints)
    finished = launcher.run(*flags)
    assert finished.status == 0, finished.output
    assert_same_training(tmp_path, uninterrupted, 'teacher', 'student')


def test_killed_at_moments_of_chance(
    launcher: Launcher, uninterrupted: pathlib.Path, tmp_path: pathlib.Path
):
    flags = launcher.flags(tmp_path, '--stages=teacher', *MESH)
    metrics = tmp_path / 'teacher' / 'metrics.jsonl'
    chance = random.SystemRandom()
    for _ in range(2):
        started = launcher.start(*flags)
        seen = metrics.read_text() if metrics.exists() else ''
        deadline = time.monotonic() + LONGEST_LAUNCH
        while time.monotonic() < deadline:
            if metrics.exists() and metrics.read_text() not in ('', seen):
                break
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.3))
        os.kill(started[0], signal.SIGKILL)
        assert launcher.wait(started).status in (-KILL, 0)
    finished = launcher.run(*flags)
    assert finished.status == 0, finished.output
    assert_same_training(tmp_path, uninterrupted, 'teacher')


def test_sigterm_saves_and_the_same_command_goes_on(
    launcher: Launcher, uninterrupted: pathlib.Path, tmp_path: pathlib.Path
):
    flags = launcher.flags(tmp_path, '--stages=teacher', *MESH)
    finished = launcher.run(*flags, event=('step', 'teacher', 4, TERMINATE))
    assert finished.status == 0, finished.output
    # Step 4 is looked at while step 5 runs.
    assert 'Stopped as asked, saved at step 5.' in finished.output
    assert complete_steps(tmp_path / 'teacher' / 'checkpoints') == (3, 5)
    assert launcher.run(*flags).status == 0
    assert_same_training(tmp_path, uninterrupted, 'teacher')


def test_sigterm_to_a_command(launcher: Launcher, tmp_path: pathlib.Path):
    flags = launcher.flags(tmp_path, '--stages=teacher', '--config.teacher.train.steps=1000000')
    metrics = tmp_path / 'teacher' / 'metrics.jsonl'
    with launcher.command(*flags, devices=1) as command:
        deadline = time.monotonic() + LONGEST_LAUNCH
        while time.monotonic() < deadline and command.poll() is None:
            if metrics.exists() and metrics.read_text():
                break
            time.sleep(0.05)
        command.terminate()
        output, _ = command.communicate(timeout=LONGEST_LAUNCH)
    assert command.returncode == 0, output
    assert 'Stopped as asked, saved at step' in output
    assert 'Traceback' not in output
    assert complete_steps(tmp_path / 'teacher' / 'checkpoints')


def test_goes_on_from_the_newest_good_checkpoint(
    launcher: Launcher, uninterrupted: pathlib.Path, tmp_path: pathlib.Path
):
    workdir = shutil.copytree(uninterrupted, tmp_path / 'study')
    (workdir / 'teacher' / 'result.json').unlink()
    shutil.rmtree(workdir / 'teacher' / 'model')
    flip_a_byte(workdir / 'teacher' / 'checkpoints' / '12')
    finished = launcher.run(*launcher.flags(workdir, '--stages=teacher', *MESH))
    assert finished.status == 0, finished.output
    assert 'checkpoints/12 is damaged' in finished.output
    assert_same_training(workdir, uninterrupted, 'teacher')


def flip_a_byte(checkpoint: pathlib.Path) -> None:
    """Damages the largest file of a checkpoint."""
    files = (path for path in (checkpoint / 'state').rglob('*') if path.is_file())
    file = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
