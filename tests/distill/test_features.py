"""Features are checked by themselves and against both models; what has no match is refused."""

import dataclasses

import pytest

from distill.feature_checks import layer_pairs, require_comparable
from distill.features import Feature, activations_of, feature_names
from moe.config import (
    AttentionConfig,
    LatentAttentionConfig,
    LinearAttentionConfig,
    MoEConfig,
    RouterConfig,
    TransformerConfig,
)
from moe.errors import InputError

ATTENTION = AttentionConfig(4, 2, 6)
TEACHER = TransformerConfig(
    vocab_size=8,
    num_layers=4,
    embed_dim=16,
    mlp_dim=8,
    attention=ATTENTION,
    moe=MoEConfig(RouterConfig(8, 2), 4, first_dense_layers=1),
)
STUDENT = dataclasses.replace(TEACHER, num_layers=2, embed_dim=8)
LATENT = LatentAttentionConfig(4, 6, 4, 2, 5)
LINEAR = LinearAttentionConfig(2, 2, 4, 4)
ONE = ((0, 1),)


def student(**changes) -> TransformerConfig:
    return dataclasses.replace(STUDENT, **changes)


def experts(**changes) -> TransformerConfig:
    return student(moe=dataclasses.replace(STUDENT.moe, **changes))


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(kind='hiden'), "'hiden'"),
        (dict(kind='hidden', of='keys'), "hidden takes no of; received 'keys'"),
        (dict(kind='router', metric='mse'), 'router takes no metric'),
        (dict(kind='usage', project=False), 'usage takes no project'),
        (dict(kind='attention', heads=2), 'attention takes no heads'),
        (dict(kind='embedding', layers=ONE), 'embedding takes no layers'),
        (dict(kind='relation'), 'relation needs heads, a positive integer; received None'),
        (dict(kind='relation', heads=0), 'received 0'),
        (dict(kind='relation', heads=2, of='logits'), "'logits'"),
        (dict(kind='hidden', metric='l1'), "'l1'"),
        (dict(kind='hidden', weight=-1.0), 'must be zero or more; received -1.0'),
        (dict(kind='hidden', layers=(0, 1)), r'distinct pairs \(student, teacher\)'),
        (dict(kind='hidden', layers=((0, 1, 2),)), 'distinct pairs'),
        (dict(kind='hidden', layers=(*ONE, *ONE)), 'distinct pairs'),
    ],
)
def test_refuses_what_a_kind_does_not_take(arguments, message):
    with pytest.raises(InputError, match=message):
        Feature(**arguments)


@pytest.mark.parametrize(
    ('feature', 'config', 'message'),
    [
        (Feature('hidden', layers=((2, 0),)), STUDENT, 'of the student .* 0, 1; received 2'),
        (Feature('hidden', layers=((0, -1),)), STUDENT, 'of the teacher .*The nearest is 0'),
        (Feature('hidden'), STUDENT, r'received 2 and 4. Give layers, such as \(\(0, 1\), \(1, 3'),
        (Feature('hidden', project=False, layers=ONE), STUDENT, 'as wide as .* 8 and 16. Set'),
        (Feature('embedding', project=False), STUDENT, 'Set project=True'),
        (Feature('router', layers=((0, 1),)), STUDENT, 'one of 1; received 0'),
        (Feature('router'), student(moe=None), "with routers .* received 'a dense model'"),
        (Feature('usage'), student(moe=None), "usage needs a student .* take 'hidden'"),
        (
            Feature('usage'),
            experts(router=RouterConfig(8, 2, choice='hash')),
            "received 'hash'",
        ),
        (
            Feature('router', layers=((1, 3),)),
            experts(router=RouterConfig(4, 2)),
            "as many experts .* received 4 and 8. .* take kind='usage'",
        ),
        (
            Feature('relation', heads=5, layers=ONE),
            STUDENT,
            'widths of the values in both models, 12 and 12; received 5. The nearest below is 4',
        ),
        (
            Feature('relation', of='queries', heads=8, layers=ONE),
            student(attention=AttentionConfig(2, 2, 6)),
            'the queries in both models, 12 and 24; received 8. The nearest below is 6',
        ),
        (
            Feature('relation', heads=2, layers=ONE),
            student(attention=(LINEAR, ATTENTION)),
            'relation needs layers of the student that have it, one of 1; received 0',
        ),
        (
            Feature('relation', heads=2),
            student(attention=LINEAR),
            'received linear attention alone',
        ),
        (
            Feature('attention', layers=ONE),
            student(attention=AttentionConfig(2, 2, 6)),
            "same number of heads .* received 2 and 4. .* kind='relation'",
        ),
        (
            Feature('attention', layers=ONE),
            student(attention=dataclasses.replace(ATTENTION, window=3)),
            'the same window .* received 3 and None',
        ),
        (
            Feature('attention', layers=ONE),
            student(attention=dataclasses.replace(ATTENTION, sinks=True)),
            "or sinks, alone. Take 'relation'",
        ),
    ],
)
def test_refuses_what_two_models_do_not_share(feature, config, message):
    with pytest.raises(InputError, match=message):
        require_comparable([feature], config, TEACHER)


def test_what_two_models_share_is_let_through():
    narrow = student(attention=LATENT, moe=dataclasses.replace(STUDENT.moe, first_dense_layers=0))
    features = (
        Feature('embedding'),
        Feature('hidden', layers=((1, 3), (0, 0))),
        Feature('relation', of='queries', heads=12, layers=ONE),
        Feature('relation', of='values', heads=4, layers=ONE),
        Feature('attention', layers=ONE),
        Feature('router', layers=((0, 3),)),
    )
    require_comparable(features, narrow, TEACHER)
    require_comparable(
        (Feature('usage', layers=((1, 1),)),), experts(router=RouterConfig(4, 2)), TEACHER
    )
    assert activations_of(features) == ('residual', 'queries', 'values', 'keys')
    names = ('embedding', 'hidden', 'relation', 'relation_2', 'attention', 'router')
    assert feature_names(features) == names


def test_layers_that_have_it_are_paired_in_order():
    """A student without the teacher's dense layer has as many routers, one layer higher."""
    flat = dataclasses.replace(experts(first_dense_layers=0), num_layers=3)
    assert layer_pairs(Feature('router'), flat, TEACHER) == ((0, 1), (1, 2), (2, 3))
    mixed = dataclasses.replace(TEACHER, attention=(LINEAR, ATTENTION))
    pairs = layer_pairs(Feature('relation', heads=2), student(attention=ATTENTION), mixed)
    assert pairs == ((0, 1), (1, 3))
    assert layer_pairs(Feature('embedding'), STUDENT, TEACHER) == ()
