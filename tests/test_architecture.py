"""The floors: who may import whom, what a bare import loads, and what no file uses."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ('moe', 'distill', 'configs', 'experiments')
MAY_IMPORT = {
    'moe': {'moe'},
    'distill': {'distill', 'moe'},
    'configs': {'configs'},
    'experiments': {'experiments', 'configs', 'distill', 'moe'},
}
LAUNCHER_ONLY = {
    'absl.app',
    'absl.flags',
    'jax.config',
    'ml_collections',
    'os.environ',
    'os.getenv',
}
HEAVY = {
    'array_record',
    'grain',
    'matplotlib',
    'openai',
    'orbax',
    'pyarrow',
    'safetensors',
    'starlette',
    'tensorflow',
    'tensorstore',
    'tokenizers',
    'torch',
    'transformers',
    'uvicorn',
}


def imported(tree: ast.AST) -> Iterator[str]:
    """Yields the full name of every module, and of every name taken from one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = '.' * node.level + (node.module or '')
            yield from (f'{module}.{alias.name}' for alias in node.names)


def within(name: str, modules: set[str]) -> bool:
    return any(name == module or name.startswith(module + '.') for module in modules)


def violations(package: str, source: str) -> list[str]:
    """Lists what a file of this package may not do, in words."""
    tree = ast.parse(source)
    names = sorted(set(imported(tree)))
    broken = [f'relative import {name}' for name in names if name.startswith('.')]
    above = set(PACKAGES) - MAY_IMPORT[package]
    broken += [f'{package} imports {name}' for name in names if within(name, above)]
    if package in ('moe', 'distill'):
        broken += [f'library imports {name}' for name in names if within(name, LAUNCHER_ONLY)]
        broken += [f'library uses {use}' for use in uses(tree)]
    if package == 'configs':
        allowed = {'configs', 'ml_collections'}
        broken += [f'config imports {name}' for name in names if not within(name, allowed)]
    forbidden = {'pickle', 'cloudpickle', 'dill', 'joblib'}
    return broken + [f'unsafe import {name}' for name in names if within(name, forbidden)]


def uses(tree: ast.AST) -> list[str]:
    """Finds changes of jax's configuration and reads of the environment."""
    found = []
    for node in ast.walk(tree):
        text = ast.unparse(node) if isinstance(node, ast.Attribute | ast.Call) else ''
        if text.startswith('jax.config.') and isinstance(node, ast.Attribute):
            found.append(text)
        if text in ('os.environ', 'os.getenv') or 'allow_pickle=True' in text:
            found.append(text)
    return sorted(set(found))


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob('*.py'))


@pytest.mark.parametrize('package', PACKAGES)
def test_floors_hold(package: str) -> None:
    assert files(package), f'no file of {package} found under {ROOT}'
    broken = [
        f'{path.relative_to(ROOT)}: {violation}'
        for path in files(package)
        for violation in violations(package, path.read_text())
    ]
    assert not broken, '\n'.join(broken)


@pytest.mark.parametrize(
    ('package', 'source', 'violation'),
    [
        ('moe', 'import distill.step', 'moe imports distill.step'),
        ('moe', 'from distill import types', 'moe imports distill.types'),
        ('moe', 'def f():\n    from experiments import launch', 'moe imports experiments.launch'),
        ('distill', 'import configs', 'distill imports configs'),
        ('distill', 'from experiments.build import student', 'distill imports experiments.build.s'),
        ('distill', 'from absl import flags', 'library imports absl.flags'),
        ('moe', 'from ml_collections import ConfigDict', 'library imports ml_collections.Config'),
        ('moe', 'import jax\njax.config.update("x", 1)', 'library uses jax.config.update'),
        ('distill', 'import os\nx = os.environ["HOME"]', 'library uses os.environ'),
        ('distill', 'import numpy as np\nnp.load(p, allow_pickle=True)', 'allow_pickle=True'),
        ('moe', 'from os import environ', 'library imports os.environ'),
        ('distill', 'from jax import config', 'library imports jax.config'),
        ('configs', 'import jax', 'config imports jax'),
        ('configs', 'from moe import config', 'configs imports moe.config'),
        ('experiments', 'import pickle', 'unsafe import pickle'),
        ('moe', 'from . import layers', 'relative import'),
    ],
)
def test_planted_violations_are_found(
    tmp_path: Path, package: str, source: str, violation: str
) -> None:
    planted = tmp_path / 'planted.py'
    planted.write_text(source)
    assert any(violation in found for found in violations(package, planted.read_text()))


def test_allowed_imports_pass() -> None:
    assert not violations('moe', 'import jax\nfrom moe.config import MoEConfig\nimport moement')
    assert not violations('distill', 'from moe import Transformer\nfrom absl import logging')
    assert not violations('configs', 'import ml_collections\nfrom configs import base')
    assert not violations(
        'experiments', 'from absl import app, flags\nimport distill, moe, configs'
    )


@pytest.mark.parametrize('package', ['moe', 'distill'])
def test_import_loads_nothing_heavy(package: str) -> None:
    program = f'import sys, json, {package}; print(json.dumps(sorted(sys.modules)))'
    run = subprocess.run(
        [sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    loaded = set(json.loads(run.stdout))
    assert package in loaded
    assert not {name for name in loaded if within(name, HEAVY | {'ml_collections'})}
