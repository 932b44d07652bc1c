import pytest

from distill.provenance import FROM_WEIGHTS, Provenance, in_words, require_permission
from moe.errors import InputError

WHOLE = Provenance('a model', 'v1', 'Apache-2.0', True)


def test_what_is_declared_stands_before_what_is_known():
    filled = Provenance(licence='MIT', permits_training=False).filled(WHOLE)
    assert filled == Provenance('a model', 'v1', 'MIT', False)


def test_a_whole_declaration_that_permits_is_let_through():
    require_permission(WHOLE, 'The teacher')
    require_permission(vars(WHOLE), 'The teacher')


@pytest.mark.parametrize(
    ('provenance', 'message'),
    [
        (Provenance(), 'name, version, licence, permits_training missing'),
        (Provenance('a', 'b', 'c'), 'The server must be declared.*; permits_training missing'),
        ({'name': 'a', 'licence': 'c', 'permits_training': True}, '; version missing'),
        (Provenance('a', 'b', 'c', False), r'\(a b, c\) is declared with permits_training=False'),
    ],
)
def test_what_is_not_declared_or_not_permitted_is_refused(provenance, message: str):
    with pytest.raises(InputError, match=message):
        require_permission(provenance, 'The server')


@pytest.mark.parametrize('field', ['name', 'version', 'licence'])
def test_blanks_declare_nothing(field: str):
    with pytest.raises(InputError, match=f'provenance.{field} must be a text that is not blank'):
        Provenance(**{field: '  '})


def test_in_words():
    forbids = vars(Provenance('a model', 'v1', 'own terms', False))
    assert in_words(forbids).endswith(
        'licence: own terms; its terms forbid training on its outputs'
    )
    assert 'its terms permit' in in_words(vars(WHOLE))


def test_weights_that_a_model_is_made_of_are_declared_too():
    forbids = Provenance('a model', 'v1', 'own terms', False)
    with pytest.raises(InputError, match='its terms forbid training from its weights'):
        require_permission(forbids, 'The start', key='config.start', use=FROM_WEIGHTS)
    with pytest.raises(InputError, match=r'licence, permits_training missing.* set config\.start'):
        require_permission(Provenance('a', 'b'), 'The start', key='config.start', use=FROM_WEIGHTS)
    assert in_words(vars(forbids), FROM_WEIGHTS).endswith('forbid training from its weights')
