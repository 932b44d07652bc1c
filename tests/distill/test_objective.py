"""Terms and objectives: what is refused, and what a step makes of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill import Objective, Schedule, Term
from moe.errors import InputError


@pytest.mark.parametrize(
    ('build', 'message'),
    [
        (lambda: Term('kl'), 'one of cross_entropy, forward_kl, reverse_kl, jsd'),
        (lambda: Term('forward_kl', beta=0.5), 'forward_kl takes no beta'),
        (lambda: Term('jsd', lam=0.5), 'jsd takes no lam'),
        (lambda: Term('jsd', beta=1.5), r'beta of jsd must be in \[0, 1\]; received 1.5'),
        (lambda: Term('skew_reverse_kl', lam=1.0), r'lam of skew_reverse_kl must be in \[0, 1\)'),
        (lambda: Term('jsd', beta=Schedule('linear', 0.0, 2.0, 9)), r'beta of jsd must be in'),
        (lambda: Term('skew_forward_kl', lam=Schedule('linear', 0.0, 1.0, 9)), 'lam of skew'),
        (lambda: Term('adaptive_kl', mu=0.0), r'mu of adaptive_kl must be in \(0, 1\)'),
        (lambda: Term('alpha_divergence', alpha=-0.1), 'alpha of alpha_divergence'),
        (lambda: Term('hinge', k=2.5), 'k of hinge must be a whole number'),
        (lambda: Term('forward_kl', k=4), 'forward_kl takes no k'),
        (lambda: Term('cross_entropy', standardize=True), 'takes no standardize'),
        (lambda: Term('jsd', weight=-1.0), 'weight of jsd must be zero or more; received -1.0'),
        (lambda: Term('jsd', weight=float('nan')), 'weight of jsd'),
        (lambda: Term('jsd', weight='1'), 'must be a number or a Schedule'),
        (lambda: Term('jsd', temperature=0.0), 'temperature of jsd must be positive'),
        (lambda: Term('jsd', weight=Schedule('linear', 1.0, -1.0, 9)), 'weight of jsd'),
        (lambda: Term('jsd', temperature=Schedule('cosine', 0.0, 1.0, 9)), 'temperature of jsd'),
        (lambda: Objective(()), 'one or more Term'),
        (lambda: Objective(('forward_kl',)), 'one or more Term'),
    ],
)
def test_bad_terms_are_refused_when_built(build, message):
    with pytest.raises(InputError, match=message):
        build()


def test_defaults_and_immutability():
    assert Term('jsd').parameter == 0.5
    assert Term('skew_forward_kl').parameter == 0.1
    assert Term('jsd', beta=0.0).parameter == 0.0
    assert Term('hinge').parameter == 16
    assert Term('forward_kl').parameter is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        Term('jsd').weight = 2.0


def test_what_an_objective_needs():
    control = Objective((Term('cross_entropy'),))
    distilled = Objective((Term('forward_kl'),))
    both = Objective((Term('cross_entropy'), Term('jsd')))
    assert [o.needs_teacher for o in (control, distilled, both)] == [False, True, True]


def test_schedules_are_resolved_at_a_traced_step():
    objective = Objective(
        (
            Term('forward_kl', weight=Schedule('linear', 0.0, 2.0, 10), temperature=3.0),
            Term('jsd', beta=0.1, temperature=Schedule('cosine', 4.0, 2.0, 10)),
            Term('jsd', beta=Schedule('linear', 0.0, 1.0, 10)),
            Term('skew_forward_kl', lam=Schedule('cosine', 0.2, 0.0, 10)),
        )
    )

    @jax.jit
    def numbers(step):
        first, second, third, fourth = objective.at(step)
        assert (first.temperature, second.weight, second.beta) == (3.0, 1.0, 0.1)
        return first.weight, second.temperature, third.beta, fourth.parameter

    for step, expected in (
        (0, (0.0, 4.0, 0.0, 0.2)),
        (5, (1.0, 3.0, 0.5, 0.1)),
        (10, (2.0, 2.0, 1.0, 0.0)),
        (99, (2.0, 2.0, 1.0, 0.0)),
    ):
        np.testing.assert_allclose(numbers(jnp.int32(step)), expected, atol=1e-6)
