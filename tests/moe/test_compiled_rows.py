"""The compiled loop: every row by its own expert, in float64; where it is taken, and where not."""

import concurrent.futures
import functools
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import compiled_rows
from moe.config import AttentionConfig, MoEConfig, RouterConfig, TransformerConfig
from moe.decode import write
from moe.few_rows import tile_size
from moe.grouped_mlp import grouped_mlp
from moe.quantised import rounded
from moe.sampling import Sampling
from moe.sharding import MeshConfig, make_mesh, variable_shardings
from moe.transformer import Transformer

CALL = 'xla_buffer_python_cpu_callback'
E, D, F, M = 5, 19, 6, 11
RNG = np.random.default_rng(0)
ROWS, WEIGHTS = RNG.normal(size=(M, D)), RNG.random((M, 1))
GATE_UP, DOWN = RNG.normal(size=(E, D, 2, F)), RNG.normal(size=(E, F, D))
ARRAYS = tuple(jnp.asarray(each, jnp.float32) for each in (ROWS, WEIGHTS, GATE_UP, DOWN))
SIZES = [2, 0, 5, 1, 2]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch):
    """Has the loop take matrices that the caches would hold."""
    jax.clear_caches()
    monkeypatch.setattr(compiled_rows, 'LEAST_BYTES', 0)
    monkeypatch.setattr(compiled_rows, 'LEAD', 0)
    yield
    jax.clear_caches()


@pytest.fixture
def without_numba(monkeypatch: pytest.MonkeyPatch, small: None):
    monkeypatch.setitem(sys.modules, 'numba', None)
    compiled_rows._has_numba.cache_clear()
    yield
    compiled_rows._has_numba.cache_clear()


def product(rows, matrices, sizes):
    out = np.zeros((len(rows), matrices.shape[2]))
    for row, e in enumerate(np.repeat(np.arange(len(sizes)), sizes)):
        out[row] = np.asarray(rows[row], np.float64) @ np.asarray(matrices[e], np.float64)
    return out


def by_row(sizes):
    gate, up = np.split(product(ROWS, GATE_UP.reshape(E, D, 2 * F), sizes), 2, axis=1)
    return product(WEIGHTS * gate / (1 + np.exp(-gate)) * up, DOWN, sizes)


def run(sizes, rows=ARRAYS[0]):
    return grouped_mlp(rows, *ARRAYS[1:], jnp.asarray(sizes), 'silu')


def program_of(function, *operands):
    return jax.jit(lambda *operands: function(*operands)).lower(*operands).as_text()


@pytest.mark.parametrize(
    ('processors', 'lead'), [(1, 0), (2, 0), (3, 0), (16, 0), (2, 2000), (3, 1 << 21)]
)
@pytest.mark.parametrize(
    'sizes', [[2, 0, 5, 1, 3], [0, 0, 11, 0, 0], [1, 2, 0, 0, 4], [0] * 5, [0, 0, 0, 0, 11]]
)
@pytest.mark.parametrize(('depth', 'width'), [(19, 37), (8, 512), (3, 520), (24, 1), (150, 9)])
def test_every_row_meets_its_own_matrix(depth, width, sizes, processors, lead, monkeypatch):
    monkeypatch.setattr(compiled_rows, 'LEAD', lead)
    monkeypatch.setattr(compiled_rows, 'processors', lambda: processors)
    rows = RNG.normal(size=(M, depth)).astype(np.float32)
    matrices = RNG.normal(size=(E, depth, width)).astype(np.float32)
    out = np.full((M, width), np.nan, np.float32)
    compiled_rows.multiply(rows, matrices, np.array(sizes, np.int32), out)
    np.testing.assert_allclose(out, product(rows, matrices, sizes), atol=2e-5)


def test_what_is_not_finite_stays_in_its_row_and_stays_what_it_is():
    rows, matrices = np.ones((4, 9), np.float32), np.ones((2, 9, 20), np.float32)
    rows[0, 8], rows[1, 2], rows[2, :2] = np.nan, np.inf, (np.inf, -np.inf)
    matrices[1, 3, 5] = np.inf
    rows[3, 3] = 0
    out = np.zeros((4, 20), np.float32)
    compiled_rows.multiply(rows, matrices, np.array([3, 1], np.int32), out)
    expected = np.full((4, 20), np.nan)
    expected[1], expected[3] = np.inf, 8
    expected[3, 5] = np.nan  # zero times infinity
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize('sizes', [[2, 0, 5, 1, 3], [1, 2, 0, 0, 4], [0, 0, 0, 0, 11]])
def test_an_mlp_of_few_rows_takes_the_loop(sizes, small):
    assert program_of(run, jnp.asarray(sizes)).count(CALL) == 2
    np.testing.assert_allclose(jax.jit(run)(jnp.asarray(sizes)), by_row(sizes), atol=3e-5)


def grouped_silu(*operands):
    return grouped_mlp(*operands, 'silu')


def test_others_do_not(small, monkeypatch):
    sizes = jnp.asarray(SIZES)
    rows, weights, gate_up, down = ARRAYS
    half = [each.astype(jnp.bfloat16) for each in ARRAYS]
    integers = rounded(gate_up, 2, batch_axes=1), rounded(down, 1, batch_axes=1)
    many = [jnp.tile(each, (8, 1)) for each in (rows, weights)]
    assert tile_size(8 * M, E) is None
    for operands in (half, (rows, weights, *integers), (*many, gate_up, down)):
        assert CALL not in program_of(grouped_silu, *operands, sizes)
    assert CALL not in program_of(jax.grad(lambda rows: run(SIZES, rows).sum()), rows)
    assert CALL in program_of(grouped_silu, *ARRAYS, sizes)
    monkeypatch.setattr(compiled_rows, 'LEAST_BYTES', gate_up.nbytes + down.nbytes + 1)
    jax.clear_caches()
    assert CALL not in program_of(grouped_silu, *ARRAYS, sizes)


def test_without_numba_there_is_no_such_loop(without_numba):
    sizes = jnp.asarray(SIZES)
    assert CALL not in program_of(run, sizes)
    np.testing.assert_allclose(jax.jit(run)(sizes), by_row(SIZES), atol=3e-5)


def test_gradients_are_those_of_the_other_loop(small):
    """Also where the pass is computed anew, which holds the compiled loop without a gradient."""

    def loss(rows):
        return (run(SIZES, rows) ** 2).sum()

    assert CALL in program_of(jax.checkpoint(loss), ARRAYS[0])
    found = jax.jit(jax.grad(jax.checkpoint(loss)))(ARRAYS[0])
    step, along = 1e-4, RNG.normal(size=ROWS.shape)
    ends = []
    for sign in (1, -1):
        gate, up = np.split(
            product(ROWS + sign * step * along, GATE_UP.reshape(E, D, 2 * F), SIZES), 2, axis=1
        )
        hidden = WEIGHTS * gate / (1 + np.exp(-gate)) * up
        ends.append((product(hidden, DOWN, SIZES) ** 2).sum())
    expected = (ends[0] - ends[1]) / (2 * step)
    np.testing.assert_allclose((np.asarray(found) * along).sum(), expected, rtol=1e-4)


def test_inside_of_loops_and_branches(small):
    sizes, others = jnp.asarray(SIZES), jnp.asarray([0, 3, 3, 3, 1])

    def repeated(sizes):
        def body(state):
            return state[0] + 1, run(sizes)

        return jax.lax.while_loop(lambda state: state[0] < 2, body, (0, ARRAYS[0]))[1]

    def branch(sizes):
        return jax.lax.cond(sizes[0] > 0, run, lambda sizes: ARRAYS[0], sizes)

    for function in (repeated, branch):
        assert CALL in program_of(function, sizes)
        np.testing.assert_allclose(jax.jit(function)(sizes), by_row(SIZES), atol=3e-5)
    both = jnp.stack([sizes, others])
    expected = np.stack([by_row(each) for each in both])
    scanned = jax.jit(lambda both: jax.lax.scan(lambda _, each: (0, run(each)), 0, both)[1])
    np.testing.assert_allclose(scanned(both), expected, atol=3e-5)
    assert jax.eval_shape(run, sizes).shape == (M, D)


def test_two_programs_at_once(small):
    program = jax.jit(run)
    all_sizes = [jnp.asarray(each) for each in (SIZES, [0, 3, 3, 3, 1])] * 20
    with concurrent.futures.ThreadPoolExecutor(2) as callers:
        found = list(callers.map(program, all_sizes))
    for sizes, out in zip(all_sizes, found, strict=True):
        np.testing.assert_allclose(out, by_row(sizes), atol=3e-5)


FORKED = """
import os, signal, sys
import numpy as np
from moe import compiled_rows
assert 'numba' not in sys.modules
compiled_rows.processors, compiled_rows.LEAD = lambda: 2, 0
rows, matrices = np.ones((4, 8), np.float32), np.ones((2, 8, 8), np.float32)

def multiply():
    out = np.zeros((4, 8), np.float32)
    compiled_rows.multiply(rows, matrices, np.array([2, 2], np.int32), out)
    assert (out == 8).all()

multiply()
child = os.fork()
if child == 0:
    signal.alarm(20)
    multiply()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""


def test_a_forked_process_has_threads_of_its_own():
    subprocess.run([sys.executable, '-W', 'ignore', '-c', FORKED], check=True, timeout=120)


CONFIG = TransformerConfig(
    32,
    2,
    16,
    16,
    AttentionConfig(2, 2, 8),
    moe=MoEConfig(RouterConfig(8, 2), 12, dispatch='grouped'),
)
PROMPTS = jax.random.randint(jax.random.key(1), (8, 3), 0, 32)


@functools.cache
def drawn():
    init = jax.jit(lambda key: nn.unbox(Transformer(CONFIG).init(key, PROMPTS)))
    variables = init(jax.random.key(0))
    # Larger weights, so that no argmax hangs on rounding.
    return {**variables, 'params': jax.tree.map(lambda leaf: leaf * 2.0, variables['params'])}


def written(model, variables):
    """Returns tokens and their log-probabilities, and the logits of the prompts."""
    step = jax.jit(lambda variables, tokens: model.apply(variables, tokens).logits)
    text = write(
        model, variables, PROMPTS, max_new_tokens=4, sampling=Sampling(0.0), key=jax.random.key(2)
    )
    calls = step.lower(variables, PROMPTS[:, :1]).as_text().count(CALL)
    return text.tokens, text.log_probs, step(variables, PROMPTS[:, :1]), calls


@functools.cache
def expected():
    """As the loop that XLA compiles writes: the matrices are too small for the other."""
    jax.clear_caches()
    *found, calls = written(Transformer(CONFIG), drawn())
    assert calls == 0
    return found


@pytest.mark.parametrize('mesh', [None, MeshConfig(data=8), MeshConfig(2, 1, 2, 2)])
def test_a_model_writes_as_with_the_other_loop(mesh, monkeypatch):
    tokens, log_probs, logits = expected()
    jax.clear_caches()
    monkeypatch.setattr(compiled_rows, 'LEAST_BYTES', 0)
    monkeypatch.setattr(compiled_rows, 'LEAD', 0)
    model, variables = Transformer(CONFIG), drawn()
    if mesh is not None:
        model = model.clone(mesh=make_mesh(mesh))
        assert model.mesh.size == 8
        variables = jax.device_put(variables, variable_shardings(model, model.mesh))
    found = written(model, variables)
    jax.clear_caches()
    assert found[3] > 0
    np.testing.assert_array_equal(found[0], tokens)
    np.testing.assert_allclose(found[1], log_probs, atol=1e-4)
    np.testing.assert_allclose(found[2], logits, atol=1e-4)
