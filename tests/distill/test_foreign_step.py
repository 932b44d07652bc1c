"""A student's update with a teacher of another tokenizer: its loss, and every split alike."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from routed_student import STUDENT as ROUTED
from routed_student import mesh_of, variables
from test_cross_tokenizer import SHARED, reference

from distill.across import CrossTokenizer
from distill.config import BalanceConfig, RolloutConfig, TrainConfig
from distill.features import Feature
from distill.foreign_teacher import ForeignTeacher
from distill.objective import Objective, Term
from distill.projectors import PROJECTORS, projector_axes, projector_shardings
from distill.recipe import Recipe, initial_state
from distill.rollout import Rollout
from distill.schedules import Schedule
from distill.step import make_train_step
from distill.teacher import OnlineTeacher
from distill.types import Batch, Counterpart, HiddenTargets
from moe.config import AttentionConfig, TransformerConfig
from moe.errors import InputError
from moe.sharding import batch_sharding, variable_shardings
from moe.transformer import Transformer, output_head

B, T, TT, V, VT = 8, 5, 4, 8, 10
STUDENT = dataclasses.replace(ROUTED, vocab_size=V, moe=None, num_layers=1)
TEACHER = TransformerConfig(VT, 1, 12, 8, AttentionConfig(2, 2, 8), scan_layers=False)
ACROSS = CrossTokenizer('gold', 2.0, 1.5, beta=0.3, matched_weight=0.8, unmatched_weight=0.4)
TERMS = (Term('cross_entropy', weight=0.5),)


def make_batch() -> Batch:
    """Rows of two documents; their spans are those of test_cross_tokenizer, in both orders."""
    rng = np.random.default_rng(3)

    def rows(length: int, vocab_size: int) -> list[np.ndarray]:
        tokens = rng.integers(0, vocab_size, (B, length + 1))
        index = np.tile(np.arange(length), (B, 1))
        segments = np.where(index < 2, 1, 2)
        return [tokens[:, :-1], tokens[:, 1:], segments, np.where(index < 2, index, index - 2)]

    tokens, labels, segment_ids, positions = rows(T, V)
    spans = [np.tile(side, (B // 2, 1)) for side in SPANS]
    its = Counterpart(*rows(TT, VT), *spans)
    mask = np.tile(np.arange(T) != 1, (B, 1))
    batch = Batch(tokens, labels, mask, segment_ids, positions, counterpart=its)
    return jax.tree.map(lambda a: jnp.asarray(a, bool if a.dtype == bool else jnp.int32), batch)


SPANS = (
    np.array([[0, 0, 1, 2, -1], [0, -1, 1, 1, -1]]),
    np.array([[0, 1, 1, 2], [0, 1, -1, -1]]),
)


def make_recipe(mesh=None, micro_batches: int = 1, **changes) -> Recipe:
    """Plain gradient descent at rate 1: the parameters move by exactly the gradient."""
    own = dict(
        model=Transformer(STUDENT, mesh),
        objective=Objective(TERMS, across=ACROSS),
        optimizer=optax.sgd(1.0),
        train=TrainConfig(steps=1, micro_batches=micro_batches, chunk_size=8),
        balance=BalanceConfig(),
        teacher=ForeignTeacher(Transformer(TEACHER, mesh), SHARED),
    )
    return Recipe(**(own | changes))


DUAL_SPACE = Objective(TERMS, across=CrossTokenizer('dskd', 2.0, 1.5))


@functools.cache
def run(micro_batches: int = 1, sizes: tuple[int, ...] = (1, 1, 1), **changes):
    """The state before and after one update, and what it measured."""
    mesh = mesh_of(sizes)
    recipe = make_recipe(mesh, micro_batches, **changes)
    state = initial_state(recipe, variables(STUDENT))
    teacher, batch = variables(TEACHER), make_batch()
    if mesh is not None:
        teacher = jax.device_put(teacher, variable_shardings(recipe.teacher.model, mesh))
        batch = jax.device_put(batch, batch_sharding(mesh))
        shardings = variable_shardings(recipe.model, mesh)['params']
        shardings |= projector_shardings(recipe.projectors, mesh)
        state = dataclasses.replace(state, params=jax.device_put(state.params, shardings))
    return jax.device_get((state, *jax.jit(make_train_step(recipe))(state, teacher, batch)))


def hidden_of(config: TransformerConfig, batch: Batch | Counterpart):
    output = Transformer(config).apply(
        variables(config),
        batch.tokens,
        positions=batch.positions,
        segment_ids=batch.segment_ids,
        logits=False,
    )
    return np.asarray(output.hidden), np.asarray(output_head(config, variables(config)['params']))


def test_the_loss_is_that_of_the_definition_and_of_the_text():
    _, _, metrics = run()
    batch = make_batch()
    hidden, head = hidden_of(STUDENT, batch)
    assert batch.counterpart is not None
    theirs, their_head = hidden_of(TEACHER, batch.counterpart)
    total, count = 0.0, 0
    for first in range(0, B, 2):
        rows = slice(first, first + 2)
        targets = HiddenTargets(theirs[rows], their_head)
        found, spans = reference(
            ACROSS.span_loss(SHARED, chunk_size=1),
            hidden[rows],
            head,
            np.asarray(batch.labels)[rows],
            targets,
            np.asarray(batch.counterpart.labels)[rows],
        )
        total, count = total + found, count + spans
    np.testing.assert_allclose(metrics.pairs['gold_loss'], (total, count), rtol=1e-4)
    assert count == 5 * B // 2
    mean = {name: a / b for name, (a, b) in metrics.pairs.items()}
    expected = 0.5 * mean['cross_entropy'] + 2.0 * total / count
    np.testing.assert_allclose(mean['loss'], expected, rtol=1e-4)
    np.testing.assert_allclose(mean['aligned'], 7 / 8)


def test_the_update_is_the_gradient():
    before, after, metrics = run()
    # Along the update the loss falls by its squared length, to first order.
    moved = jax.tree.map(jnp.subtract, before.params, after.params)
    assert min(np.abs(leaf).max() for leaf in jax.tree.leaves(moved)) > 1e-6
    length = sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(moved))
    np.testing.assert_allclose(metrics.pairs['gradient_norm'][0], length**0.5, rtol=1e-4)

    @jax.jit
    def loss(step):
        state = dataclasses.replace(
            before, params=jax.tree.map(lambda a, b: a + step * b, before.params, moved)
        )
        pairs = make_train_step(make_recipe())(state, variables(TEACHER), make_batch())[1].pairs
        return pairs['loss'][0]

    slope = (loss(1e-2) - loss(-1e-2)) / 2e-2
    np.testing.assert_allclose(slope, length, rtol=2e-2)


@pytest.mark.parametrize('objective', [Objective(TERMS, across=ACROSS), DUAL_SPACE])
def test_micro_batches_on_eight_devices_give_the_same_update(objective: Objective):
    (_, state, metrics), (_, wanted, expected) = (
        run(*split, objective=objective) for split in ((2, (2, 2, 1, 2)), ())
    )
    close = functools.partial(np.testing.assert_allclose, rtol=5e-4, atol=5e-6)
    jax.tree.map(close, state.params, wanted.params)
    jax.tree.map(close, metrics.pairs, expected.pairs)


def test_maps_between_the_spaces_are_trained_beside_the_student():
    before, after, metrics = run(objective=DUAL_SPACE)
    maps = jax.tree.map(jnp.subtract, after.params[PROJECTORS], before.params[PROJECTORS])
    assert {name: kernel.shape for name, kernel in maps.items()} == {
        'dual_query': (1, 16, 24),
        'dual_teacher': (1, 12, 8),
        'dual_student': (1, 8, 12),
    }
    assert min(np.abs(kernel).max() for kernel in maps.values()) > 1e-4
    assert set(projector_axes((), dual=True)[PROJECTORS]) == set(maps)
    sums = {name: float(total) for name, (total, _) in metrics.pairs.items()}
    spans = make_batch().counterpart
    assert spans is not None
    ours, theirs = ((side >= 0).sum() for side in (spans.student_spans, spans.teacher_spans))
    parts = sums['dskd_projection'] / ours + sums['dskd_student_space'] / ours
    parts += sums['dskd_teacher_space'] / theirs
    cross_entropy = sums['cross_entropy'] / metrics.pairs['cross_entropy'][1]
    np.testing.assert_allclose(sums['loss'], 0.5 * cross_entropy + 2.0 * parts, rtol=1e-4)
    assert metrics.pairs['dskd_teacher_space'][1] == theirs


ONLINE = OnlineTeacher(Transformer(dataclasses.replace(TEACHER, vocab_size=V)))


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(teacher=ONLINE), 'go together; received OnlineTeacher and across=CrossTok'),
        (dict(objective=Objective(TERMS)), 'received ForeignTeacher and across=None'),
        (
            dict(rollout=Rollout(RolloutConfig(0.5, max_new_tokens=2), eos_id=1, pad_id=0)),
            'Leave the rollout out',
        ),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict, message: str):
    with pytest.raises(InputError, match=message):
        make_recipe(**changes)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(terms=(*TERMS, Term('jsd'), Term('reverse_kl'))), 'jsd, reverse_kl: such terms'),
        (dict(features=(Feature('usage'),)), 'features: they are of the same tokens'),
        (dict(return_weight=0.5), 'return_weight=0.5'),
    ],
)
def test_what_compares_token_by_token_is_refused(changes: dict, message: str):
    with pytest.raises(InputError, match=message):
        Objective(**(dict(terms=TERMS, across=ACROSS) | changes))


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        (dict(method='dtw'), "method must be one of 'uld', 'gold', 'dskd'"),
        (dict(method='uld', beta=0.3), 'uld takes no beta; received 0.3'),
        (dict(method='gold', divergence='jeffreys'), "received 'jeffreys'"),
        (dict(method='gold', divergence='forward_kl', beta=0.1), 'forward_kl takes no beta'),
        (dict(method='gold', beta=1.5), 'beta of jsd must be'),
        (dict(method='gold', matched_weight=-1.0), 'matched_weight must be zero or more'),
        (dict(method='uld', weight=Schedule('linear', 1.0, -1.0, 5)), 'weight must be zero'),
        (dict(method='dskd', divergence='jsd'), "dskd takes no divergence; received 'jsd'"),
        (dict(method='uld', temperature=0.0), 'temperature must be positive'),
        (dict(method='uld', teacher_seq_len=1), 'teacher_seq_len must be at least 2'),
    ],
)
def test_options_that_mean_nothing_are_refused(fields: dict, message: str):
    with pytest.raises(InputError, match=message):
        CrossTokenizer(**fields)


def test_a_batch_without_counterpart_is_refused():
    bare = dataclasses.replace(make_batch(), counterpart=None)
    state = initial_state(make_recipe(), variables(STUDENT))
    with pytest.raises(InputError, match='batches with a counterpart'):
        jax.eval_shape(make_train_step(make_recipe()), state, variables(TEACHER), bare)
