"""Mappings become dataclasses, and every mistake is named."""

import dataclasses
from typing import Literal

import pytest

from experiments.build import build
from moe.config import require
from moe.errors import InputError


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float
    kind: Literal['a', 'b'] = 'a'


@dataclasses.dataclass(frozen=True)
class Outer:
    size: int
    inner: Inner
    names: tuple[str, ...] = ()
    other: Inner | None = None
    named: dict[str, Inner] = dataclasses.field(default_factory=dict)
    level: float | Inner = 0.5
    flag: bool = False

    def __post_init__(self) -> None:
        require(self.size > 0, 'size', 'positive', self.size)


def test_builds_nested_fields_with_their_types():
    values = dict(
        size=3,
        inner=dict(rate=1),
        names=('x', 'y'),
        named=dict(first=dict(rate=0.5, kind='b')),
        level=dict(rate=2.0),
    )
    built = build(Outer, values, 'config')
    assert built == Outer(
        size=3,
        inner=Inner(1.0),
        names=('x', 'y'),
        named={'first': Inner(0.5, 'b')},
        level=Inner(2.0),
    )
    assert isinstance(built.inner.rate, float)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(sise=3), r"config has no key 'sise'. Did you mean 'size'"),
        (dict(inner=dict(rates=1.0)), r"config.inner has no key 'rates'. Did you mean 'rate'"),
        (dict(inner={}), r'config.inner needs rate'),
        (dict(inner=3), r'config.inner must be of type mapping, of the fields of Inner'),
        (dict(size='3'), r"config.size must be of type int; received '3' \(str\)"),
        (dict(size=2.0), r'config.size must be of type int; received 2.0'),
        (dict(size=True), r'config.size must be of type int; received True'),
        (dict(flag=1), r'config.flag must be of type bool; received 1'),
        (dict(size=0), r'In config: size must be positive; received 0'),
        (dict(names='xy'), r"config.names must be of type tuple; received 'xy'"),
        (dict(names=(1,)), r'config.names\[0\] must be of type str'),
        (dict(inner=dict(rate=1.0, kind='c')), r"config.inner.kind must be one of 'a', 'b'"),
        (dict(named=dict(first=dict(rte=1.0))), r"config.named.first has no key 'rte'"),
        (dict(level='high'), r"config.level must be of type float; received 'high'"),
        (dict(level=dict(rats=1.0)), r"config.level has no key 'rats'"),
    ],
)
def test_names_the_mistake(change, message):
    values = dict(size=3, inner=dict(rate=1.0)) | change
    with pytest.raises(InputError, match=message):
        build(Outer, values, 'config')
