"""--help tells of every flag that a command has, and of no other's."""

import pathlib
import re
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ('command', 'own', 'shared', 'absent'),
    [
        ('serve', {'port'}, {'checkpoint', 'tensor', 'rows', 'max_pages'}, {'tasks', 'out'}),
        ('examine', {'tasks'}, {'checkpoint', 'weights', 'max_length'}, {'max_pages', 'port'}),
        ('quantise', {'out'}, {'checkpoint', 'weights', 'fsdp'}, {'rows', 'max_length'}),
    ],
)
def test_help_lists_shared_flags(command, own, shared, absent):
    done = subprocess.run(
        [sys.executable, '-m', f'experiments.{command}', '--help'],
        cwd=pathlib.Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    listed = set(re.findall(r'^ +--(?:\[no\])?(\w+): ', done.stdout, re.MULTILINE))
    assert own | shared <= listed
    assert not absent & listed
