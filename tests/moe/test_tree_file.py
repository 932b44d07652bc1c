"""A tree of arrays in one file: the same bits back, half a byte each where they have four."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from moe.errors import InputError
from moe.weights.files import read_header
from moe.weights.tree_file import load_tree, save_tree

FOUR = np.array([[-8, 7, -1], [0, 3, -5], [1, 2, -7]], ml_dtypes.int4)  # an odd number of them
TREE = {
    'params': {'norm': {'scale': jnp.asarray([0.1, 0.2], jnp.bfloat16)}},
    'quantised': {
        'gate_up': {'values': jnp.asarray(FOUR), 'scales': jnp.asarray([[1.5], [2.5], [0.5]])},
        'down': {'values': jnp.asarray([[-128, 127]], jnp.int8)},
        'head': {'values': jnp.asarray([[1.25, -448.0]], jnp.float8_e4m3fn)},
    },
    'routing': {},
}
SHAPES = jax.eval_shape(lambda: TREE)


def test_what_is_saved_is_loaded_to_the_bit(tmp_path):
    file = tmp_path / 'model.safetensors'
    save_tree(file, TREE)
    loaded = load_tree(file, SHAPES)
    assert jax.tree.structure(loaded) == jax.tree.structure(TREE)
    for found, expected in zip(jax.tree.leaves(loaded), jax.tree.leaves(TREE), strict=True):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found.astype(np.float32), expected.astype(np.float32))
    half = TREE | {'quantised': {'gate_up': TREE['quantised']['gate_up']}}
    save_tree(file, half)
    stored = read_header(file)['quantised/gate_up/values'].view()
    # -8 is 1000, 7 is 0111: the first of two has the lower bits.
    np.testing.assert_array_equal(stored, [0x78, 0x0F, 0xB3, 0x21, 0x09])


def test_all_that_is_not_as_it_must_be_is_named(tmp_path):
    file = tmp_path / 'model.safetensors'
    save_tree(file, TREE)
    wanted = jax.tree.map(lambda leaf: leaf, SHAPES)
    wanted['quantised']['down'] = {'values': jax.ShapeDtypeStruct((2, 2), jnp.int8)}
    wanted['quantised']['head'] = {'values': jax.ShapeDtypeStruct((1, 2), jnp.int8)}
    del wanted['params']
    wanted['more'] = jax.ShapeDtypeStruct((1,), jnp.float32)
    with pytest.raises(InputError, match='4 arrays are not as they must be') as caught:
        load_tree(file, wanted)
    for line in (
        'more: is missing',
        'params/norm/scale: is not of this model',
        r'quantised/down/values: must be int8[2, 2]; is int8[1, 2]',
        'quantised/head/values: must be int8[1, 2]; is float8_e4m3fn[1, 2]',
    ):
        assert line in str(caught.value)
