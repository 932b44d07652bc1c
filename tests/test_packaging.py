"""The wheel: it holds the two libraries only, and works where it is installed alone."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

PROGRAM = """
import moe, distill
import jax
from moe.config import AttentionConfig, MoEConfig, RouterConfig, TransformerConfig
from moe.transformer import Transformer

experts = MoEConfig(RouterConfig(num_experts=2, experts_per_token=1), expert_dim=4)
config = TransformerConfig(
    vocab_size=8,
    num_layers=1,
    embed_dim=4,
    mlp_dim=4,
    attention=AttentionConfig(1, 1, 4),
    moe=experts,
    scan_layers=False,
)
tokens = jax.numpy.zeros((1, 3), int)
model = Transformer(config)
forward = jax.jit(lambda key: model.apply(model.init(key, tokens), tokens).logits)
assert forward(jax.random.key(0)).shape == (1, 3, 8)
print(moe.__file__, distill.__file__)
"""


@pytest.fixture(scope='module')
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Builds the wheel from a copy, so that the checkout gets no build folders."""
    copy, built = tmp_path_factory.mktemp('copy'), tmp_path_factory.mktemp('wheel')
    for name in ('moe', 'distill', 'configs', 'experiments', 'tests'):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns('__pycache__'))
    for name in ('pyproject.toml', 'LICENSE', 'README.md'):
        shutil.copy(ROOT / name, copy / name)
    command = [sys.executable, '-m', 'build', '--wheel', '--no-isolation', '--outdir', str(built)]
    run = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    (path,) = built.glob('*.whl')
    return path


def test_wheel_holds_the_two_libraries_only(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.split('/')[0] for name in names}
    (info,) = tops - {'moe', 'distill'}
    assert info.startswith('fractional-')
    assert info.endswith('.dist-info')
    assert f'{info}/licenses/LICENSE' in names
    for package in ('moe', 'distill'):
        sources = {str(path.relative_to(ROOT)) for path in (ROOT / package).rglob('*.py')}
        assert {name for name in names if name.startswith(f'{package}/')} == sources


def test_wheel_works_alone(wheel: Path, tmp_path: Path) -> None:
    site, elsewhere = tmp_path / 'site', tmp_path / 'elsewhere'
    elsewhere.mkdir()
    zipfile.ZipFile(wheel).extractall(site)
    environment = {**os.environ, 'PYTHONPATH': str(site), 'PYTHONSAFEPATH': '1'}
    run = subprocess.run(
        [sys.executable, '-c', PROGRAM],
        cwd=elsewhere,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.split() == [str(site / name / '__init__.py') for name in ('moe', 'distill')]
