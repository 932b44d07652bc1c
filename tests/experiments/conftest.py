"""Launches of a tiny study, in processes of their own that share one start and one compilation."""

import os
import pathlib
import random
import subprocess
import sys
from collections.abc import Iterator

import pytest
from launching import MESH, ROOT, Launcher

WORDS = ('the', 'cat', 'sat', 'on', 'a', 'mat', 'def', 'return', 'import', 'while')


@pytest.fixture(scope='session')
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    """A launcher of the tiny study, with text to read."""
    folder = tmp_path_factory.mktemp('launcher')
    (folder / 'text').mkdir()
    (folder / 'output').mkdir()
    generator = random.Random(0)
    for number in range(10):
        text = ' '.join(generator.choices(WORDS, k=80))
        (folder / 'text' / f'{number}.txt').write_text(text)
    # A program that was compiled by one launch is read from disk by the others: the same machine
    # code, so a resumed run that differed from the uninterrupted one would do so all the same.
    environment = os.environ | {
        'JAX_PLATFORMS': 'cpu',
        'JAX_COMPILATION_CACHE_DIR': str(folder / 'compiled'),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
        'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
        # A fork copies one thread alone.
        'OPENBLAS_NUM_THREADS': '1',
        'PYTHONPATH': str(ROOT),
    }
    process = subprocess.Popen(
        [sys.executable, str(ROOT / 'tests/experiments/warm_launcher.py')],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    yield Launcher(process, environment, str(folder / 'text' / '*.txt'), folder / 'output')
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(timeout=60) == 0


@pytest.fixture(scope='session')
def uninterrupted(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The workdir of the tiny study, run by one process on eight devices from start to end."""
    workdir = tmp_path_factory.mktemp('uninterrupted') / 'study'
    finished = launcher.run(*launcher.flags(workdir, *MESH))
    assert finished.status == 0, finished.output
    return workdir
