"""Directories that appear whole or not at all."""

import contextlib
import hashlib
import os
import pathlib
import shutil
import uuid
from collections.abc import Iterator


@contextlib.contextmanager
def whole_directory(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Gives a temporary directory that is renamed to `path` when the block ends well.

    A process that is killed inside the block leaves nothing at `path`. Where another process put a
    directory at `path` first, that one stays and this one is dropped: use it for content that is
    the same whoever writes it.

    Args:
        path: of the directory to make; its parents are made too. It may exist if it is empty.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f'.{path.name}.{uuid.uuid4().hex}'
    temporary.mkdir()
    try:
        yield temporary
        try:
            temporary.rename(path)
        except OSError:
            if not (path.is_dir() and any(path.iterdir())):
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def file_sha256(path: str | os.PathLike) -> str:
    """Hashes a file's bytes: hexadecimal sha256."""
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()
