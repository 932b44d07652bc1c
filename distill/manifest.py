"""A manifest of checksums beside files: what is there is whole, or it is noticed."""

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from distill.files import file_sha256

MANIFEST = 'manifest.json'


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that the file is whole or absent, also after a kill or a power cut.

    Args:
        path: of the file; its directory exists.
        value: what JSON holds as it is: no tuple, no NaN, no key that is not a string.

    Raises:
        TypeError: where reading the file would not give `value` back.
        OSError: where it cannot be written.
    """
    text = json.dumps(value, allow_nan=False)
    if json.loads(text) != value:
        raise TypeError(
            f'{path.name} must hold what JSON gives back unchanged; received {value!r}.'
        )
    partial = path.with_name(path.name + '.partial')
    with partial.open('w', encoding='utf-8') as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_manifest(directory: Path) -> None:
    """Writes size and SHA-256 of every file under a directory: from then on it is complete."""
    paths = sorted(path for path in directory.rglob('*') if path.is_file())
    names = [path.relative_to(directory).as_posix() for path in paths]
    with ThreadPoolExecutor() as pool:
        files = dict(zip(names, pool.map(_fingerprint, paths), strict=True))
    write_json(directory / MANIFEST, {'files': files, 'sha256': _digest(files)})


def damaged_files(directory: Path, names: Sequence[str] | None = None) -> list[str]:
    """Compares files with the manifest.

    Args:
        directory: that holds the manifest.
        names: the files to compare, relative to the directory; None for all that are listed.

    Returns:
        A phrase for each file that is not as it was written ('state/d/0f3a: missing'); empty where
        all are.
    """
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding='utf-8'))
        files = manifest['files']
        if manifest['sha256'] != _digest(files):
            return [f'{MANIFEST}: checksum differs']
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f'{MANIFEST}: unreadable ({error})']
    names = list(files) if names is None else names
    with ThreadPoolExecutor() as pool:
        damage = pool.map(lambda name: _damage(directory / name, files.get(name)), names)
        return [f'{name}: {what}' for name, what in zip(names, damage, strict=True) if what]


def _damage(path: Path, expected: dict[str, Any] | None) -> str | None:
    if expected is None:
        return 'not in the manifest'
    try:
        size = path.stat().st_size
        if size != expected['bytes']:
            return f'{size} bytes instead of {expected["bytes"]}'
        return None if _fingerprint(path) == expected else 'checksum differs'
    except FileNotFoundError:
        return 'missing'
    except OSError as error:
        return f'unreadable ({error.strerror})'


def _fingerprint(path: Path) -> dict[str, Any]:
    return {'bytes': path.stat().st_size, 'sha256': file_sha256(path)}


def _digest(files: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def manifest_sha256(directory: Path) -> str:
    """Reads the one checksum that stands for every file under a complete directory."""
    return json.loads((directory / MANIFEST).read_text(encoding='utf-8'))['sha256']
