"""A study is built from its config, and what cannot go together is refused by name."""

import dataclasses

import jax
import pytest
from tiny import get_config

from configs import base
from experiments.build import build
from experiments.fit import batch_shards, require_fit
from experiments.init_config import InitConfig
from experiments.study import StudyConfig, build_study
from moe.errors import InputError
from moe.sharding import MeshConfig, make_mesh
from moe.surgery import METHODS, method_options


def built(**overrides: object) -> StudyConfig:
    """The tiny study with values under dotted keys changed."""
    config = get_config()
    for key, value in overrides.items():
        *path, name = key.split('__')
        part = config
        for step in path:
            part = part[step]
        with part.unlocked(), part.ignore_type():
            part[name] = value
    return build_study(config)


def test_builds_every_part():
    study = built()
    assert study.teacher.model.moe is None
    assert study.student.model.moe.router.num_experts == 4
    terms = {name: (term.name, term.weight) for name, term in study.student.terms.items()}
    assert terms == {'kl': ('forward_kl', 0.9), 'ce': ('cross_entropy', 0.1)}
    assert study.student.objective().needs_teacher
    assert not study.control.objective().needs_teacher
    assert study.evaluate.prompts == ('ab', 'the')


@pytest.mark.parametrize(('tokenizer', 'vocab_size'), [('byte', 259), ('bpe', 300)])
def test_models_have_the_vocabulary_of_the_tokenizer(tokenizer: str, vocab_size: int):
    study = built(data__tokenizer=tokenizer, data__vocab_size=300)
    assert study.teacher.model.vocab_size == study.student.model.vocab_size == vocab_size


def moe(**router: object) -> dict[str, object]:
    """Experts with these fields of their router."""
    return dict(router=dict(num_experts=4, experts_per_token=2) | router, expert_dim=8)


WITHOUT_BIAS = {
    'student__model__moe__router__selection_bias': False,
    'student__balance__selection_bias_rate': 0.0,
}
UPCYCLED = {'student__init__method': 'upcycle'}
PUBLISHED = {
    'student__init__method': 'upcycle',
    'student__init__source': 'hf',
    'student__init__checkpoint': 'models/dense',
    'student__init__provenance__licence': 'MIT',
    'student__init__provenance__permits_training': True,
}
CACHED = {'targets__kind': 'top_k', 'targets__cached': True}
EMA = {'teacher__source': 'ema'}
MORE = {'more_teachers': base.further_teachers(maths='runs/maths/teacher')}
ROUTERS = {'student__features': base.features(routers=base.feature('router'))}
ROLLOUT = {'student__rollout': dict(lmbda=0.5, max_new_tokens=8)}
DENSE = {'student__model__moe': None, 'student__balance__selection_bias_rate': 0.0}


@pytest.mark.parametrize(
    ('overrides', 'message'),
    [
        (
            {'student__terms__kl__name': 'hinge', 'student__terms__kl__k': 260},
            'k=260 ids, and hidden targets must have at least as many; received 259',
        ),
        ({'targets__kind': 'hidden', 'targets__cached': True}, "must be 'top_k' or 'sampled'"),
        ({'targets__kind': 'truncated', 'targets__cached': True}, "'top_k' keeps what it leaves"),
        (
            {
                'targets__kind': 'truncated',
                'targets__k': 8,
                'student__terms__kl__name': 'hinge',
                'student__terms__kl__k': 9,
            },
            'k=9 ids',
        ),
        ({'student__rollout': dict(lmbda=1.5)}, 'In config.student.rollout: rollout.lmbda must be'),
        ({'student__rollout': dict(lambda_=0.5)}, "config.student.rollout has no key 'lambda_'"),
        ({'student__rollout': dict(max_new_tokens=16)}, 'must be below data.seq_len=16'),
        (ROLLOUT | CACHED, 'student.rollout needs a teacher that runs beside the student'),
        (
            {'student__terms__kl__on': 'student'},
            "In config.student: forward_kl on='student' needs a rollout",
        ),
        (
            ROLLOUT | {'student__return_weight': 1.0, 'targets__kind': 'top_k'},
            "targets.kind='hidden'; received 'top_k'",
        ),
        ({'control__terms__ce__on': 'student'}, "cross_entropy on='student' needs a rollout"),
        (EMA | {'teacher__checkpoint': 'x'}, "source='ema' and checkpoint='x'"),
        (EMA | {'targets__kind': 'top_k'}, "teacher.source='ema' changes with every update"),
        (EMA | UPCYCLED, 'needs a teacher that is there before the student'),
        ({'teacher__ema_decay': 1.0}, r'teacher.ema_decay must be in [0, 1); received 1.0'),
        (MORE | EMA, "more_teachers (maths) cannot go with teacher.source='ema'"),
        (MORE | ROLLOUT, 'more_teachers (maths) cannot go with student.rollout'),
        (MORE | {'targets__kind': 'top_k'}, "cannot go with targets.kind='top_k'"),
        ({'data__route_field': 'subject'}, "data.route_field='subject' chooses among several"),
        ({'teacher__weight': 0.0}, 'teacher.weight must be positive'),
        (
            {'more_teachers': dict(maths=dict(source='train'))},
            "config.more_teachers.maths.source must be one of 'checkpoint', 'hf'",
        ),
        ({'targets__path': 'x'}, 'targets.path and targets.steps need targets.cached=True'),
        ({'targets__kind': 'top_k', 'targets__k': 0}, 'targets.k must be at least 1'),
        ({'targets__temperature': 2.0}, "targets.temperature must be 1 for kind='hidden'"),
        ({'targets__distinct': 0.5}, 'targets.distinct must be at least 1'),
        (CACHED | {'targets__steps': 3}, 'targets.steps must be at least student.train.steps=12'),
        (CACHED | {'targets__rows_per_shard': 0}, 'targets.rows_per_shard must be positive'),
        (
            {'teacher__provenance__permits_training': False},
            'its terms forbid training on its outputs',
        ),
        ({'teacher__provenance__licence': ' '}, 'provenance.licence must be a text'),
        ({'studnt': 1}, "config has no key 'studnt'. Did you mean 'student'"),
        ({'data__sequence': 1}, "config.data has no key 'sequence'"),
        ({'student__model__mtp_depth': 1}, 'In config.student: A model with mtp_depth=1 needs an'),
        ({'teacher__mtp_weight': 0.3}, 'In config.teacher: A model with mtp_depth=0 needs an'),
        ({'student__model__layers': 1}, "config.student.model has no key 'layers'"),
        ({'data': 3}, 'config.data must be of type mapping'),
        ({'teacher__model': None}, 'config.teacher.model must be of type mapping'),
        ({'student__model__vocab_size': 9}, "is the tokenizer's; set config.data.vocab_size"),
        ({'data__held_out_fraction': 1.0}, 'held_out_fraction must be between 0 and 1'),
        ({'data__held_out_field': 'text'}, 'data.held_out_field is of the rows of'),
        (
            {'teacher__weights': 'int8', 'teacher__source': 'ema'},
            'config.teacher.weights quantises a frozen model',
        ),
        ({'teacher__weights': 'int3'}, 'teacher.weights'),
        ({'teacher__micro_batches': 3}, 'must divide data.batch_size=8; received 3'),
        (MORE | {'teacher__micro_batches': 2}, 'micro_batches cannot go with more_teachers'),
        ({'data__seq_len': 0}, 'data.seq_len must be positive'),
        ({'teacher__source': 'checkpoint'}, "source='checkpoint'"),
        ({'teacher__train__micro_batches': 3}, 'a divisor of data.batch_size=8; received 3'),
        ({'control__terms__ce__name': 'forward_kl'}, 'must need no teacher'),
        ({'student__terms__ce__name': 'backward_kl'}, "'backward_kl'"),
        ({'student__model__moe__router__selection_bias': False}, 'selection_bias=True'),
        ({'evaluate__prompts': ()}, 'at least one text'),
        ({'evaluate__chip': 'abacus'}, "No price is known for chip 'abacus'"),
        ({'evaluate__temperature': -1.0}, 'zero or more'),
        (
            {'teacher__optimizer__warmup_steps': 12},
            'In config.teacher: optimizer.warmup_steps must',
        ),
        (
            {'student__optimizer__warmup_steps': 12},
            'In config.student: optimizer.warmup_steps must',
        ),
        ({'student__optimizer__schedule': 'wsd', 'student__train__steps': 2}, 'total_steps=2'),
        ({'student__terms__kl__weight': 0.0}, 'terms must hold a divergence from the teacher'),
        (
            {'student__terms__kl__weight': dict(kind='constant', start=0.0)},
            'terms must hold a divergence from the teacher',
        ),
        ({'student__terms': dict(ce=dict(name='cross_entropy'))}, 'cross_entropy (weight 1.0)'),
        (WITHOUT_BIAS | {'student__model__moe__router__choice': 'expert'}, "choice='expert'"),
        (
            WITHOUT_BIAS
            | {
                'student__model__moe__router__experts_per_token': 4,
                'student__model__moe__router__choice': 'soft',
            },
            'A study, which compares models that read left to right, needs',
        ),
        ({'teacher__model__moe': moe(choice='expert')}, 'In config.teacher: A study'),
        (
            {'teacher__model__moe': moe(selection_bias=True)},
            'In config.teacher: model.moe.router.selection_bias must be False',
        ),
        ({'student__init__method': 'melt'}, 'init.method must be one of random, copy, upcycle'),
        ({'student__init__noise': 0.1}, "init.noise is nothing that method='random' reads"),
        (UPCYCLED | {'student__init__by': 'weight'}, 'it takes noise, router, router_std'),
        (UPCYCLED | {'student__init__router': 'zeros'}, "init.router must be one of 'drawn'"),
        (UPCYCLED | {'student__init__noise': -1.0}, 'noise and router_std must be zero or more'),
        ({'student__init__source': 'checkpoint'}, "goes with source='checkpoint'"),
        (
            {'student__init__source': 'checkpoint', 'student__init__checkpoint': 'runs/a/teacher'},
            "init.checkpoint is nothing that method='random' reads",
        ),
        (
            PUBLISHED | {'student__init__provenance__licence': None},
            'licence missing. Read its terms',
        ),
        (
            PUBLISHED | {'student__init__provenance__permits_training': False},
            "The student's start (a published model its weights, MIT) is declared with "
            'permits_training=False: its terms forbid training from its weights',
        ),
        (
            PUBLISHED | {'student__init__source': 'checkpoint'},
            "init.provenance declares a published model and goes with source='hf'",
        ),
        ({'student__init__calibration_rows': 0}, 'init.calibration_rows must be positive'),
        (
            UPCYCLED | {'student__model__embed_dim': 32},
            "'upcycle' keeps embed_dim: the source has 16, the target 32",
        ),
        (
            UPCYCLED | {'student__model__moe__router__experts_per_token': 1},
            'The nearest that can: moe.router.experts_per_token=2.',
        ),
        (UPCYCLED | {'student__model__moe__expert_dim': 12}, 'received 12. Choose an expert_dim'),
        (ROUTERS, "router needs a teacher with routers of choice 'token' or 'expert'"),
        (
            CACHED | ROUTERS | {'targets__cached': False},
            "targets.kind must be 'hidden' with student.features (router)",
        ),
        (MORE | ROUTERS, 'student.features (router) are matched to one teacher'),
        (
            {'student__features': dict(h=dict(kind='hidden', of='keys'))},
            'In config.student.features.h: hidden takes no of',
        ),
        (
            {'student__features': base.features(h=base.feature('hidden', layers=((0, 3),)))},
            'needs layers of the teacher that have it, one of 0; received 3',
        ),
        (DENSE | {'student__balance__load_balance_weight': 0.1}, 'load_balance_weight=0.1 needs'),
        (DENSE | {'student__balance__router_z_weight': 0.1}, 'router_z_weight=0.1 needs routers'),
    ],
)
def test_refuses(overrides: dict[str, object], message: str):
    with pytest.raises(InputError) as caught:
        built(**overrides)
    assert message in str(caught.value)


def test_tokens_further_ahead_are_weighed_for_teacher_and_student():
    weights = {'teacher__mtp_weight': 0.3, 'student__mtp_weight': 0.1}
    study = built(teacher__model__mtp_depth=1, student__model__mtp_depth=2, **weights)
    assert study.teacher.objective().mtp_weight == 0.3
    assert study.student.objective().mtp_weight == 0.1


def test_features_are_part_of_the_objective():
    own = base.feature('hidden', weight=0.5, layers=((0, 0),), metric='cosine')
    (feature,) = built(student__features=base.features(h=own)).student.objective().features
    assert (feature.kind, feature.weight, feature.layers) == ('hidden', 0.5, ((0, 0),))
    assert (feature.metric, feature.project) == ('cosine', True)
    assert built().student.objective().features == ()


def test_further_teachers_have_the_vocabulary_of_the_study():
    study = built(**MORE, data__route_field='subject')
    assert study.more_teachers['maths'].model.vocab_size == study.teacher.model.vocab_size == 259


def test_the_students_average_has_its_architecture():
    study = built(**EMA, **ROLLOUT)
    assert study.teacher.model == study.student.model
    assert study.teacher.own_decay == 0.999
    assert built().teacher.own_decay is None


def test_lets_a_term_begin_or_end_at_zero():
    for start, end in ((0.0, 1.0), (1.0, 0.0)):
        weight = dict(kind='linear', start=start, end=end, steps=5)
        assert built(student__terms__kl__weight=weight).student.objective().needs_teacher


def test_a_teacher_from_a_checkpoint_is_not_trained(monkeypatch: pytest.MonkeyPatch):
    """Nothing is asked of its schedule, its biases were moved where it was trained."""
    monkeypatch.setenv('HOME', '/home/someone')
    study = built(
        teacher__source='checkpoint',
        teacher__checkpoint='~/runs/one/student',
        teacher__model__moe=moe(selection_bias=True),
        teacher__optimizer__warmup_steps=99,
    )
    assert study.teacher.checkpoint == '/home/someone/runs/one/student'


@pytest.mark.parametrize(
    ('mesh', 'shards'),
    [(MeshConfig(data=8), 8), (MeshConfig(2, 2, 2), 8), (MeshConfig(data=2, tensor=4), 2)],
)
def test_rows_are_split_over_the_batch_axes(mesh: MeshConfig, shards: int):
    assert batch_shards(make_mesh(mesh)) == shards


def test_what_fits_is_let_through():
    require_fit(built(), make_mesh(MeshConfig(data=2, fsdp=2, expert=2)))


@pytest.mark.parametrize(
    ('overrides', 'mesh', 'message'),
    [
        ({'data__batch_size': 12}, MeshConfig(data=8), 'config.data.batch_size / teacher'),
        ({'student__train__micro_batches': 2}, MeshConfig(data=8), 'student.train.micro_batches'),
        ({'teacher__micro_batches': 2}, MeshConfig(data=8), '/ config.teacher.micro_batches must'),
        ({'evaluate__prefill_batch': 4}, MeshConfig(data=8), 'config.evaluate.prefill_batch'),
        ({}, MeshConfig(data=4, tensor=2), 'config.teacher.model does not fit'),
        ({'student__model__moe__router__num_experts': 6}, MeshConfig(2, 1, 4), "('experts', size"),
        ({'student__model__embed_dim': 20}, MeshConfig(fsdp=8), "('embed', size 20)"),
    ],
)
def test_what_does_not_fit_is_named(overrides: dict[str, object], mesh: MeshConfig, message: str):
    study = dataclasses.replace(built(**overrides), mesh=mesh)
    with pytest.raises(InputError) as caught:
        require_fit(study, make_mesh(mesh))
    assert message in str(caught.value)


def test_parts_that_the_teachers_own_mesh_does_not_split_are_named():
    both = [make_mesh(MeshConfig(data=4), jax.devices()[at : at + 4]) for at in (0, 4)]
    require_fit(built(teacher__micro_batches=2), *both)
    with pytest.raises(InputError, match=r'config\.teacher\.micro_batches must be a mult'):
        require_fit(built(teacher__micro_batches=4), *both)


def test_groups_of_numbers_that_the_teachers_mesh_would_split_are_named():
    """Of 128 inputs 64 share a scale: two groups, which four devices cannot have whole."""
    moe = get_config().student.model.moe
    moe.router.selection_bias = False
    study = built(teacher__model__moe=moe, teacher__model__embed_dim=128)
    study = dataclasses.replace(study, mesh=MeshConfig(data=2, fsdp=4))
    mesh, two = make_mesh(study.mesh), make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])
    in_groups = dataclasses.replace(study.teacher, weights='int4_experts')
    study = dataclasses.replace(study, teacher=dataclasses.replace(in_groups, weights='int8'))
    require_fit(study, mesh)
    study = dataclasses.replace(study, teacher=in_groups)
    require_fit(study, mesh, two)
    with pytest.raises(InputError, match=r'config\.teacher\.weights do not fit .* group of inputs'):
        require_fit(study, mesh)


def test_every_option_of_every_method_is_a_key_of_init():
    fields = {field.name for field in dataclasses.fields(InitConfig)}
    options = {name for method in METHODS for name in method_options(method)}
    assert fields - {'method', 'source', 'checkpoint', 'provenance', 'calibration_rows'} == options
    values = get_config().student.init.to_dict() | dict(method='upcycle', noise=1)
    assert build(InitConfig, values, 'init').options == {'noise': 1.0}
