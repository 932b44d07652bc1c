"""What the student wrote: how long it is kept, who it is drawn for, and a run that was cut off."""

import dataclasses
import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from distill.checkpoint import CheckpointManager
from distill.config import BalanceConfig, RolloutConfig, TrainConfig
from distill.objective import Objective, Term
from distill.prompts import Sequences
from distill.recipe import Recipe, initial_state
from distill.replay import ReplayBuffer, empty_buffer, remembered, replayable, replayed
from distill.rollout import Rollout
from distill.step import make_train_step
from distill.teacher import OnlineTeacher
from distill.types import Batch
from moe.config import AttentionConfig, TransformerConfig
from moe.errors import InputError
from moe.sharding import MeshConfig, batch_sharding, make_mesh
from moe.transformer import Transformer

B, T, V = 4, 8, 12
DECAY = 0.75


def sequences(mark: int) -> Sequences:
    """Four rows that are known by their first tokens; the first row was not written."""
    tokens = jnp.full((B, T), mark).at[:, 1].set(jnp.arange(B))
    return Sequences(tokens, jnp.full(B, 3), jnp.array([0, 2, 2, 2]))


def test_a_sequence_is_kept_for_as_many_steps_as_stated():
    buffer = empty_buffer(2, B, T)
    rows = jnp.array([True, True, True, False])
    assert not replayable(buffer, jnp.int32(0)).any()
    buffer = remembered(buffer, jnp.int32(0), sequences(10), rows)
    buffer = remembered(buffer, jnp.int32(1), sequences(11), rows)
    # Both steps' rows 1 and 2: the first was not written, the last is not the student's.
    both = [[0, 1, 1, 0], [0, 1, 1, 0]]
    np.testing.assert_array_equal(replayable(buffer, jnp.int32(2)), both)
    # Nothing was written in step 2: at step 3, what is of step 0 is too old.
    np.testing.assert_array_equal(replayable(buffer, jnp.int32(3)), [[0] * 4, [0, 1, 1, 0]])
    assert not replayable(buffer, jnp.int32(4)).any()
    buffer = remembered(buffer, jnp.int32(2), sequences(12), rows)
    np.testing.assert_array_equal(buffer.steps, [2, 1])
    np.testing.assert_array_equal(replayable(buffer, jnp.int32(3)), both)

    draw = jax.jit(jax.vmap(lambda key: replayed(buffer, jnp.int32(3), key)))
    drawn = draw(jax.random.split(jax.random.key(0), 300))
    kinds, counts = np.unique(
        np.asarray(drawn.tokens[..., :2]).reshape(-1, 2), axis=0, return_counts=True
    )
    np.testing.assert_array_equal(kinds, [[11, 1], [11, 2], [12, 1], [12, 2]])
    # 1200 draws of four alike: 300 each, with a deviation of 15.
    assert np.abs(counts - 300).max() < 75
    assert (drawn.lengths == 2).all()


def test_rows_that_are_split_over_devices_are_drawn_alike():
    def drawn(place):
        buffer = place(empty_buffer(2, B, T))
        for step in range(2):
            rows = jnp.arange(B) != step
            buffer = jax.jit(remembered)(buffer, jnp.int32(step), sequences(10 + step), rows)
        return jax.device_get(jax.jit(replayed)(buffer, jnp.int32(2), jax.random.key(1)))

    mesh = make_mesh(MeshConfig(data=2, fsdp=2), jax.devices()[:4])
    by_row = NamedSharding(mesh, PartitionSpec(None, *batch_sharding(mesh).spec))
    replicated = NamedSharding(mesh, PartitionSpec())
    shardings = ReplayBuffer(Sequences(by_row, by_row, by_row), replicated)
    one = drawn(lambda buffer: buffer)
    jax.tree.map(
        np.testing.assert_array_equal, drawn(lambda buffer: jax.device_put(buffer, shardings)), one
    )
    assert (one.lengths > 0).all()


CONFIG = TransformerConfig(
    vocab_size=V,
    num_layers=1,
    embed_dim=8,
    mlp_dim=8,
    attention=AttentionConfig(num_heads=1, num_kv_heads=1, head_dim=8),
    scan_layers=False,
)


def make_recipe(**fields) -> Recipe:
    """A student that its own average teaches, and that learns from what it wrote before."""
    rollout = RolloutConfig(lmbda=0.5, max_new_tokens=3, replay_share=0.5, staleness=2)
    model = Transformer(CONFIG)
    defaults = dict(
        model=model,
        objective=Objective((Term('jsd'), Term('cross_entropy', on='text'))),
        optimizer=optax.adam(0.05),
        train=TrainConfig(steps=8),
        balance=BalanceConfig(),
        teacher=OnlineTeacher(model),
        rollout=Rollout(rollout, eos_id=V - 2, pad_id=V - 1),
        ema_decay=DECAY,
    )
    return Recipe(**(defaults | fields))


def batch(step: int) -> Batch:
    tokens = jnp.asarray(np.random.default_rng(step).integers(0, V - 2, (B, T + 1)), jnp.int32)
    ones = jnp.ones((B, T), jnp.int32)
    mask = (ones == 1).at[:, -1].set(False)
    return Batch(tokens[:, :-1], tokens[:, 1:], mask, ones, ones * jnp.arange(T))


@functools.cache
def stepper():
    return jax.jit(make_train_step(make_recipe()))


def start():
    variables = jax.jit(Transformer(CONFIG).init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    return jax.jit(lambda v: initial_state(make_recipe(), v, (B, T)))(nn.unbox(variables))


@functools.cache
def run():
    """Eight steps: the state after each, the first among them, and the metrics."""
    states, metrics = [jax.device_get(start())], []
    for step in range(8):
        state, measured = stepper()(states[-1], {}, batch(step))
        states.append(jax.device_get(state))
        metrics.append(jax.device_get(measured))
    return states, metrics


def test_some_steps_are_replayed_and_the_others_remembered():
    states, metrics = run()
    shares = [pairs['replayed'][0] / pairs['replayed'][1] for pairs in (m.pairs for m in metrics)]
    assert shares[0] == 0
    assert set(shares) == {0.0, 1.0}
    for step, share in enumerate(shares):
        slots = states[step + 1].replay.steps
        assert (step in slots) == (share == 0)
        before, after = states[step].replay, states[step + 1].replay
        if share:
            jax.tree.map(np.testing.assert_array_equal, before, after)


def test_the_average_follows_the_recursion():
    states, _ = run()
    for before, after in itertools.pairwise(states):
        wanted = jax.tree.map(
            lambda old, new: DECAY * np.float64(old) + (1 - DECAY) * np.float64(new),
            before.ema['params'],
            after.params,
        )
        close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
        jax.tree.map(close, after.ema['params'], wanted)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), states[8].params, states[0].params)
    assert min(jax.tree.leaves(moved)) > 1e-3
    # At first the teacher is the student, which then has nothing to learn from it.
    first, later = run()[1][0].pairs['jsd'], run()[1][7].pairs['jsd']
    assert first[0] / first[1] < 1e-6 < later[0] / later[1]


def test_a_run_that_was_cut_off_goes_on_bit_for_bit(tmp_path):
    states, _ = run()
    manager = CheckpointManager(tmp_path)
    manager.save(4, jax.device_put(states[4]), data_state={}, metadata={})
    manager.wait()
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), states[0]
    )
    # Off the device: the update of the others, not one that is compiled for where it was put.
    state = jax.device_get(CheckpointManager(tmp_path).restore(abstract)[0])
    manager.close()
    for step in range(4, 8):
        state, _ = stepper()(state, {}, batch(step))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), states[8])


def test_a_bad_update_leaves_the_average_and_keeps_what_was_written():
    broken = jax.tree.map(lambda leaf: leaf * np.nan, run()[0][4].ema['params'])
    before = dataclasses.replace(run()[0][4], ema={'params': broken, 'routing': {}})
    after, metrics = jax.device_get(stepper()(before, {}, batch(4)))
    assert metrics.skipped == 1
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)
    jax.tree.map(np.testing.assert_array_equal, after.ema, before.ema)
    jax.tree.map(np.testing.assert_array_equal, after.replay, run()[0][5].replay)


def test_an_average_is_of_the_student_itself():
    other = Transformer(dataclasses.replace(CONFIG, mlp_dim=16))
    with pytest.raises(InputError, match='needs a teacher of its own architecture'):
        make_recipe(teacher=OnlineTeacher(other))
    with pytest.raises(InputError, match=r'ema_decay must be in \[0, 1\), or None; received 1.0'):
        make_recipe(ema_decay=1.0)
