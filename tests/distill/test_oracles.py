"""Divergences beside those of TRL, where it is installed: `pip install -e '.[hf-test]'`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_divergences import logits_pair

import distill
from distill import DenseTargets, TopKTargets

torch = pytest.importorskip('torch')
pytest.importorskip('trl')
gkd = pytest.importorskip('trl.experimental.gkd', exc_type=ImportError)
iw_opd = pytest.importorskip('trl.experimental.iw_opd', exc_type=ImportError)

B, T, V = 2, 5, 40
BETAS = (0.0, 0.3, 0.5, 1.0)


def theirs(loss, student, teacher, mask, **options):
    """Value and gradient by TRL, its sum over words and tokens over the count of tokens."""
    tensor = torch.tensor(student, requires_grad=True)
    labels = torch.where(torch.tensor(mask), 0, -100)
    value = loss(tensor, torch.tensor(teacher), labels=labels, **options)
    value.backward()
    return value.item(), tensor.grad.numpy()


def ours(student, targets, **options):
    return jax.value_and_grad(lambda s: distill.jsd(s, targets, **options))(jnp.asarray(student))


def problem():
    student, teacher = logits_pair(0, (B, T, V))
    return student, teacher, np.random.default_rng(0).random((B, T)) < 0.7


@pytest.mark.parametrize('temperature', [0.9, 2.0])
@pytest.mark.parametrize('beta', BETAS)
def test_jsd_of_gkd(beta, temperature):
    student, teacher, mask = problem()
    options = {'beta': beta, 'temperature': temperature}
    loss = gkd.GKDTrainer.generalized_jsd_loss
    value, gradient = ours(student, DenseTargets(teacher), mask=mask, **options)
    expected, slope = theirs(loss, student, teacher, mask, **options)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, slope, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize('beta', BETAS)
def test_jsd_on_top_ids_with_their_tail(beta):
    """TRL takes the teacher's top ids for forward KL, the student's for reverse, else both's."""
    student, teacher, mask = problem()
    sides = {0.0: (teacher,), 1.0: (student,)}.get(beta, (teacher, student))
    log_q = np.float32(jax.nn.log_softmax(teacher))
    kept = np.zeros(teacher.shape, bool)
    for side in sides:
        np.put_along_axis(kept, np.argsort(-side, -1)[..., :4], True, -1)
    ids = np.argsort(~kept, -1, kind='stable')[..., :8]
    used = np.take_along_axis(kept, ids, -1)
    log_probs = np.where(used, np.take_along_axis(log_q, ids, -1), -np.inf)
    tail = np.log(np.where(kept, 0, np.exp(log_q)).sum(-1))
    value, gradient = ours(student, TopKTargets(ids, log_probs, tail), beta=beta, mask=mask)
    loss = iw_opd.IWOPDTrainer.generalized_jsd_loss
    expected, slope = theirs(loss, student, teacher, mask, beta=beta, top_k=4, add_tail=True)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, slope, rtol=1e-5, atol=1e-6)
