"""Every config file is a study that can be built, and says what running it takes."""

import dataclasses
import importlib.util
import pathlib
import types

import jax
import jax.numpy as jnp
import ml_collections
import pytest
from absl import flags
from ml_collections import config_flags

from configs import base
from distill.config import BalanceConfig, RolloutConfig, TrainConfig
from distill.objective import Term
from distill.optimizer import OptimizerConfig
from distill.provenance import Provenance
from distill.schedules import Schedule
from experiments.exam_config import ExamConfig, GSM8KConfig, NeedleConfig
from experiments.init_config import InitConfig
from experiments.panel_config import FurtherTeacherConfig
from experiments.quantise_config import QuantiseConfig
from experiments.remote_config import RemoteConfig
from experiments.student_config import ControlConfig, StudentConfig
from experiments.study import EvaluateConfig, StudyConfig, build_study
from experiments.sweep_config import build_runs
from experiments.targets_config import TargetsConfig
from experiments.teacher_config import TeacherConfig
from experiments.text_config import TextConfig
from moe.accounting import flops_per_token, parameter_report
from moe.config import AttentionConfig, Llama3Scaling, MoEConfig, RouterConfig, TransformerConfig
from moe.sharding import MeshConfig, abstract_variables
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


def studies(path: pathlib.Path) -> list[ml_collections.ConfigDict]:
    """The studies that a config file describes: itself, or every run of a sweep."""
    config = load(path).get_config()
    return [run.config for run in build_runs(config)] if 'study' in config else [config]


def test_there_is_a_quickstart():
    assert 'quickstart.py' in [path.name for path in STUDIES]


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.stem)
def test_is_a_study_whose_models_can_be_made(path: pathlib.Path):
    built = [build_study(config) for config in studies(path)]
    models = {model for study in built for model in (study.teacher.model, study.student.model)}
    for config in models:
        variables = abstract_variables(Transformer(config))
        sizes = [leaf.size for leaf in jax.tree.leaves(variables['params'])]
        assert sum(sizes) == parameter_report(config).total


# Every mapping in configs/base.py whose keys are somebody's fields.
PARTS = {
    '': StudyConfig,
    'data': TextConfig,
    'mesh': MeshConfig,
    'teacher': TeacherConfig,
    'teacher.provenance': Provenance,
    'teacher.remote': RemoteConfig,
    'targets': TargetsConfig,
    'student': StudentConfig,
    'student.init': InitConfig,
    'student.init.provenance': Provenance,
    'student.balance': BalanceConfig,
    'student.terms.kl': Term,
    'student.terms.ce': Term,
    'student.model.moe': MoEConfig,
    'student.model.moe.router': RouterConfig,
    'control': ControlConfig,
    'control.terms.ce': Term,
    'evaluate': EvaluateConfig,
    'exams': ExamConfig,
    'exams.gsm8k': GSM8KConfig,
    'exams.needle': NeedleConfig,
} | {
    f'{who}.{part}': cls
    for who in ('teacher', 'student')
    for part, cls in {
        'model': TransformerConfig,
        'model.attention': AttentionConfig,
        'optimizer': OptimizerConfig,
        'train': TrainConfig,
    }.items()
}
# Mappings of names that a user chooses.
NAMED = {'student.terms', 'control.terms'}


def mappings(values: ml_collections.ConfigDict, path: str = '') -> dict[str, set[str]]:
    """The keys of every mapping in a config, by its dotted path."""
    found = {path: set(values.keys())}
    for key, value in values.items():
        if isinstance(value, ml_collections.ConfigDict):
            found |= mappings(value, f'{path}.{key}'.lstrip('.'))
    return found


def test_base_has_every_key():
    keys = mappings(base.get_config())
    assert keys.keys() == PARTS.keys() | NAMED
    for path, cls in PARTS.items():
        # The tokenizer knows how many ids a model needs.
        derived = {'vocab_size'} if cls is TransformerConfig else set()
        assert keys[path] == {field.name for field in dataclasses.fields(cls)} - derived, path
    # Of what is None there.
    assert set(base.quantise('int8')) == {
        field.name for field in dataclasses.fields(QuantiseConfig)
    }
    assert set(base.rollout()) == {field.name for field in dataclasses.fields(RolloutConfig)}
    further = {field.name for field in dataclasses.fields(FurtherTeacherConfig)}
    assert set(base.further_teacher('runs/x/teacher')) == further


def test_what_is_none_can_be_set_on_the_command_line():
    settings = {
        'teacher.model.logit_soft_cap': 30,
        'teacher.model.attention.soft_cap': 50.0,
        'teacher.model.attention.window': 128,
        'teacher.model.attention.clip_qkv': 8.0,
        'student.model.attention.scale': 0.125,
        'student.terms.kl.name': 'jsd',
        'student.terms.kl.beta': 0.25,
        'student.terms.ce.weight': 0,
        'student.model.moe.layers': '(1,3)',
    }
    argv = ['program', *(f'--config.{key}={value}' for key, value in settings.items())]
    values = flags.FlagValues()
    config = base.get_config()
    config_flags.DEFINE_config_dict('config', config, flag_values=values, sys_argv=argv)
    values(argv)
    study = build_study(values.config)
    assert study.teacher.model.logit_soft_cap == 30.0
    attention = study.teacher.model.attention
    assert (attention.soft_cap, attention.window, attention.clip_qkv) == (50.0, 128, 8.0)
    assert study.student.model.attention.scale == 0.125
    assert study.student.model.moe.layers == (1, 3)
    assert study.student.terms['kl'] == Term('jsd', weight=0.9, beta=0.25)


def test_a_config_file_can_set_a_mapping_that_is_none():
    config = base.get_config()
    config.teacher.model.moe = base.experts()
    config.teacher.model.moe.expert_dim = 48
    scaling = dict(factor=4.0, original_length=512, low_frequency_factor=2.0)
    config.teacher.model.attention.rope_scaling = ml_collections.ConfigDict(scaling)
    model = build_study(config).teacher.model
    assert model.moe.expert_dim == 48
    assert model.attention.rope_scaling == Llama3Scaling(4.0, 512, 2.0)


def test_a_config_file_can_set_schedules():
    config = base.get_config()
    config.student.terms.kl = base.term(
        'jsd',
        weight=2,
        beta=base.schedule('linear', 0.0, 0.5, 100),
        temperature=base.schedule('cosine', 2, 1, 50),
    )
    assert build_study(config).student.terms['kl'] == Term(
        'jsd',
        weight=2.0,
        beta=Schedule('linear', 0.0, 0.5, 100),
        temperature=Schedule('cosine', 2.0, 1.0, 50),
    )


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
    launcher = 'sweep' if 'study' in load(path).get_config() else 'launch'
    assert f'python -m experiments.{launcher} --config=configs/{path.name}' in text
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
