import jax.numpy as jnp
import numpy as np
import pytest

from moe.errors import InputError
from moe.expert_weights import split_experts, stack_experts

E, D, F = 3, 4, 2


def stacked(biases: bool) -> dict[str, jnp.ndarray]:
    shapes = {'gate_up': (E, D, 2, F), 'down': (E, F, D)}
    if biases:
        shapes |= {'gate_up_bias': (E, 2, F), 'down_bias': (E, D)}
    rng = np.random.default_rng(0)
    return {name: jnp.array(rng.normal(size=shape)) for name, shape in shapes.items()}


@pytest.mark.parametrize('biases', [False, True])
def test_experts_come_apart_and_together(biases):
    params = stacked(biases)
    experts = split_experts(params | {'router': {'kernel': jnp.zeros((D, E))}})
    assert len(experts) == E
    np.testing.assert_array_equal(experts[1]['gate'], params['gate_up'][1, :, 0])
    np.testing.assert_array_equal(experts[2]['up'], params['gate_up'][2, :, 1])
    if biases:
        np.testing.assert_array_equal(experts[1]['gate_bias'], params['gate_up_bias'][1, 0])
        np.testing.assert_array_equal(experts[1]['up_bias'], params['gate_up_bias'][1, 1])
    again = stack_experts(experts)
    assert set(again) == set(params)
    for name, value in params.items():
        np.testing.assert_array_equal(again[name], value)


def test_experts_of_different_kinds_are_refused():
    with_bias, without = split_experts(stacked(True))[0], split_experts(stacked(False))[0]
    with pytest.raises(InputError, match='expert 1 has'):
        stack_experts([with_bias, without])
