from importlib import metadata

import pytest

from experiments import filters
from moe.errors import InputError


def without_names(text: str) -> str:
    return text.replace('Ada', '***')


def point(name: str, value: str) -> metadata.EntryPoint:
    return metadata.EntryPoint(name, value, filters.GROUP)


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What installed packages declare."""
    points = [
        point('no-names', f'{__name__}:without_names'),
        point('gone', f'{__name__}:no_such_function'),
        point('twice', 'os:system'),
        point('twice', 'os:system'),
    ]
    monkeypatch.setattr(metadata, 'entry_points', lambda group: points)


def test_an_installed_filter_is_loaded():
    keep, name = filters.load_filter('no-names')
    assert keep('Ada wrote') == '*** wrote'
    assert name == 'no-names'


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('os:system', "received 'os:system', which 0 declare. There are: gone, no-names, twice"),
        ('twice', 'which 2 declare'),
        ('gone', 'must be a function that can be imported'),
    ],
)
def test_nothing_else_is(name: str, message: str):
    with pytest.raises(InputError, match=message):
        filters.load_filter(name)
