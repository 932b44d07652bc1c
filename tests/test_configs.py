"""Every config file is a study that can be built, and says what running it takes."""

import dataclasses
import importlib.util
import pathlib
import types

import jax
import jax.numpy as jnp
import ml_collections
import pytest

from experiments.study import build_study
from moe.accounting import flops_per_token, parameter_report
from moe.config import TransformerConfig
from moe.sharding import abstract_variables
from moe.transformer import Transformer

CONFIGS = pathlib.Path(__file__).parents[1] / 'configs'
FILES = sorted(path for path in CONFIGS.glob('*.py') if path.name != '__init__.py')
STUDIES = [path for path in FILES if path.name != 'base.py']


def load(path: pathlib.Path) -> types.ModuleType:
    """Imports a config file as the launcher does: by its path."""
    spec = importlib.util.spec_from_file_location(f'config_{path.stem}', path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_is_a_quickstart():
    assert 'quickstart.py' in [path.name for path in STUDIES]


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.stem)
def test_is_a_study_whose_models_can_be_made(path: pathlib.Path):
    study = build_study(load(path).get_config())
    for config in (study.teacher.model, study.student.model):
        variables = abstract_variables(Transformer(config))
        sizes = [leaf.size for leaf in jax.tree.leaves(variables['params'])]
        assert sum(sizes) == parameter_report(config).total


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.stem)
def test_lists_are_tuples(path: pathlib.Path):
    """A list could not be overridden as a whole from the command line."""

    def lists(values: ml_collections.ConfigDict, prefix: str) -> list[str]:
        found = []
        for key, value in values.items():
            if isinstance(value, ml_collections.ConfigDict):
                found += lists(value, f'{prefix}.{key}')
            elif isinstance(value, list):
                found.append(f'{prefix}.{key}')
        return found

    assert lists(load(path).get_config(), 'config') == []


@pytest.mark.parametrize('path', STUDIES, ids=lambda path: path.stem)
def test_says_how_to_run_it_and_what_that_takes(path: pathlib.Path):
    text = load(path).__doc__ or ''
    assert f'python -m experiments.launch --config=configs/{path.name}' in text
    for word in ('hardware', 'minutes'):
        assert word in text.lower()


def test_the_quickstart_student_costs_a_tenth_of_its_teacher():
    study = build_study(load(CONFIGS / 'quickstart.py').get_config())
    length = study.evaluate.context_length
    teacher, student = (
        flops_per_token(config, context_length=length).total
        for config in (study.teacher.model, study.student.model)
    )
    assert teacher >= 10 * student


def test_xla_agrees_that_the_student_costs_a_tenth():
    study = build_study(load(CONFIGS / 'quickstart.py').get_config())
    length = study.evaluate.context_length
    teacher, student = study.teacher.model, study.student.model
    # All experts on all tokens cost what the chosen ones do where there are no others.
    router = dataclasses.replace(
        student.moe.router, num_experts=student.moe.router.experts_per_token
    )
    moe = dataclasses.replace(student.moe, router=router, dispatch='dense')
    student = dataclasses.replace(student, moe=moe)
    assert xla_flops(teacher, length) >= 10 * xla_flops(student, length)


def xla_flops(config: TransformerConfig, length: int) -> float:
    """XLA's count of one forward pass; unrolled, since it counts the body of a loop once."""
    model = Transformer(dataclasses.replace(config, scan_layers=False))
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    compiled = jax.jit(model.apply).lower(abstract_variables(model), tokens).compile()
    return compiled.cost_analysis()['flops']
