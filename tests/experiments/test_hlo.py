import jax
import jax.numpy as jnp
import pytest

from experiments.hlo import Exchange, array_sizes, check_not_expanded, exchanges

TEXT = """
ENTRY %main (x: f32[4,6]) -> bf16[2,3] {
  %x = f32[4,6]{1,0} parameter(0)
  %m = pred[7]{0} constant({...})
  ROOT %y = bf16[2,3]{1,0:T(8,128)(2,1)} custom-call(%x)
}
"""


def test_reads_shapes_of_every_type() -> None:
    assert array_sizes(TEXT) == {(4, 6): 24, (7,): 7, (2, 3): 6}


def test_a_text_without_arrays_is_refused() -> None:
    with pytest.raises(ValueError, match='must hold arrays'):
        array_sizes('no program')


def test_an_array_larger_than_the_rest_is_named() -> None:
    check_not_expanded(TEXT, most=24, what='It')
    with pytest.raises(RuntimeError, match=r'It was compiled to dense.*23 elements.*\(4, 6\): 24'):
        check_not_expanded(TEXT, most=23, what='It')


def test_finds_what_ragged_dot_becomes_on_this_cpu() -> None:
    # On CPU it multiplies every row by every group's matrix: [groups, rows, width] is there.
    rows, matrices, sizes = jnp.ones((32, 8)), jnp.ones((4, 8, 8)), jnp.full(4, 8)
    text = jax.jit(jax.lax.ragged_dot).lower(rows, matrices, sizes).compile().as_text()
    with pytest.raises(RuntimeError, match='dense products'):
        check_not_expanded(text, most=max(rows.size, matrices.size), what='ragged_dot')


SCHEDULE = """
%branch (p: f32[9]) -> f32[9] {
  %hidden = f32[9]{0} ragged-all-to-all(%p, %p)
}

ENTRY %main.1 (x: bf16[4,2]) -> bf16[4,2] {
  %start.1 = ((bf16[4,2]{1,0}, bf16[5,2]{1,0}), bf16[5,2]{1,0}) ragged-all-to-all-start(%x, %e, %s)
  %start = ((bf16[4,3]{1,0}, bf16[5,3]{1,0}), bf16[5,3]{1,0}) ragged-all-to-all-start(%w, %e, %s)
  %done = bf16[5,3]{1,0:T(8,128)(2,1)} ragged-all-to-all-done(%start), metadata={}
  %y = bf16[5,2]{1,0} custom-call(%z, %v), custom_call_target="tpu_custom_call", backend_config={}
  %c = s32[5]{0} custom-call(%z), custom_call_target="AllocateBuffer"
  %v = bf16[5,2]{1,0} fusion(%y, %v), kind=kOutput, calls=%f
  %w = bf16[5,2]{1,0} fusion(%y, %v), kind=kLoop, calls=%f
  %done.1 = bf16[5,2]{1,0:T(8,128)(2,1)} ragged-all-to-all-done(%start.1), metadata={}
  ROOT %out = bf16[4,7]{1,0} all-to-all(%v), dimensions={0}
}
"""


def test_products_are_counted_between_an_exchange_s_start_and_its_end() -> None:
    assert exchanges(SCHEDULE) == [Exchange(15, 0), Exchange(10, 2), Exchange(28, 0)]
    with pytest.raises(ValueError, match='must have an ENTRY'):
        exchanges('no program')
