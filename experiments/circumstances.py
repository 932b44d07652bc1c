"""On what a study was measured: devices, versions of libraries, commit of the checkout."""

import pathlib
import platform
import subprocess
from importlib import metadata
from typing import Any

import jax

_LIBRARIES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy', 'tokenizers')


def circumstances() -> dict[str, Any]:
    """Returns `devices` and `versions` of this process's run, and `git_commit` in a checkout."""
    commit = _git_commit()
    return {
        'versions': {'python': platform.python_version()}
        | {name: metadata.version(name) for name in _LIBRARIES},
        'devices': {
            'kind': jax.devices()[0].device_kind,
            'count': jax.device_count(),
            'processes': jax.process_count(),
            'machine': platform.machine(),
        },
    } | ({} if commit is None else {'git_commit': commit})


def _git_commit() -> str | None:
    """The commit of the checkout that runs, marked where it has changes; None outside of one."""
    try:
        described = subprocess.run(
            ['git', 'describe', '--always', '--dirty', '--abbrev=40', '--exclude=*'],
            cwd=pathlib.Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()
