"""Figures of the fused head and divergence beside its bare matrix products and the plain loss."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from distill.divergences import forward_kl
from distill.fused import DEFAULT_CHUNK_SIZE, fused_distillation_loss
from distill.objective import Term
from distill.timing import interleaved_medians
from distill.types import HiddenTargets
from experiments.benchmark_row import Row, ratio_row, this_machine

ROWS = 8


def loss_rows(
    *,
    tokens: int = 4096,
    vocab_size: int = 32_000,
    student_dim: int = 256,
    teacher_dim: int = 512,
    repeats: int = 7,
) -> list[Row]:
    """Measures head + forward KL, forward and backward, with the teacher's logits made on the way.

    The reference of both rates is the matrix products that any form needs, alone: the logits of
    both, and the gradients in the student's hidden states and head. With a teacher twice as wide as
    the student they count for five products of the student's width.

    Args:
        tokens: a multiple of 8, in rows of tokens / 8.
        vocab_size: `V`.
        student_dim: width of the student.
        teacher_dim: width of the teacher.
        repeats: timed rounds; the median counts.

    Returns:
        For 'fused', 'fused_kl_ce' (cross-entropy in the same pass) and 'plain', a row of the rate
        in GFLOP/s against that of the bare products, and a row of the peak temporary memory in GB
        (of the compiled program) against the plain form's; and the milliseconds of 'fused' against
        the plain form's.
    """
    arguments = _arguments(tokens, vocab_size, student_dim, teacher_dim)
    forms = {'products': _products} | {
        name: jax.value_and_grad(form, argnums=(0, 1))
        for name, form in (('fused', _fused), ('fused_kl_ce', _fused_kl_ce), ('plain', _plain))
    }
    compiled = {name: jax.jit(f).lower(*arguments).compile() for name, f in forms.items()}
    functions: dict[str, Callable[[], Any]] = {
        name: (lambda program=program: program(*arguments)) for name, program in compiled.items()
    }
    seconds = interleaved_medians(functions, repeats=repeats)
    memory = {name: _temporary_bytes(program) / 1e9 for name, program in compiled.items()}
    flops = 2 * tokens * vocab_size * (3 * student_dim + teacher_dim)
    rates = {name: flops / elapsed / 1e9 for name, elapsed in seconds.items()}
    conditions = (
        f'forward+backward, {tokens} tokens, V={vocab_size}, student D={student_dim}, teacher '
        f'D={teacher_dim}, float32; {this_machine()}; reference: '
    )
    rows = []
    for form in ('fused', 'fused_kl_ce', 'plain'):
        rows += [
            ratio_row(
                f'loss/{form}', 'GFLOP/s', rates[form], rates['products'], conditions + 'products'
            ),
            ratio_row(
                f'loss/{form}/memory', 'GB', memory[form], memory['plain'], conditions + 'plain'
            ),
        ]
    milliseconds = {name: elapsed * 1e3 for name, elapsed in seconds.items()}
    row = ratio_row(
        'loss/fused/time', 'ms', milliseconds['fused'], milliseconds['plain'], conditions + 'plain'
    )
    return [*rows, row]


def memory_rows(
    *, tokens: int = 4096, vocab_size: int = 128_256, dim: int = 2048, chunk_size: int = 64
) -> list[Row]:
    """Compiles, and does not run, head + forward KL at a size that few machines could run plainly.

    Args:
        tokens: a multiple of 8, in rows of tokens / 8.
        vocab_size: `V`.
        dim: width of both student and teacher.
        chunk_size: tokens whose logits exist at one time in the fused form.

    Returns:
        A row of the fused form's peak temporary memory in GB against the plain form's.
    """
    shapes = [(ROWS, tokens // ROWS, dim), (dim, vocab_size)] * 2
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    fused, plain = (
        _temporary_bytes(jax.jit(gradient).lower(*arguments).compile()) / 1e9
        for gradient in (
            jax.value_and_grad(form, argnums=(0, 1))
            for form in (functools.partial(_fused, chunk_size=chunk_size), _plain)
        )
    )
    conditions = (
        f'compiled alone, forward+backward, {tokens} tokens, V={vocab_size}, D={dim} of both, '
        f'chunks of {chunk_size}, float32; {this_machine()}; reference: plain'
    )
    return [ratio_row(f'loss/fused/memory/V{vocab_size}', 'GB', fused, plain, conditions)]


def _temporary_bytes(program: Any) -> int:
    return program.memory_analysis().temp_size_in_bytes


def _arguments(tokens: int, vocab_size: int, *dims: int) -> list[jax.Array]:
    """Hidden states and heads of unit variance in the logits: the student's, then the teacher's."""
    arrays = []
    for key, dim in zip(jax.random.split(jax.random.key(0), len(dims)), dims, strict=True):
        states, weights = jax.random.split(key)
        arrays.append(jax.random.normal(states, (ROWS, tokens // ROWS, dim)))
        arrays.append(jax.random.normal(weights, (dim, vocab_size)) / dim**0.5)
    return arrays


def _fused(
    hidden: jax.Array, head: jax.Array, *teacher: jax.Array, chunk_size: int = DEFAULT_CHUNK_SIZE
) -> jax.Array:
    return fused_distillation_loss(
        hidden, head, HiddenTargets(*teacher), (Term('forward_kl'),), chunk_size=chunk_size
    )[0]


def _fused_kl_ce(hidden: jax.Array, head: jax.Array, *teacher: jax.Array) -> jax.Array:
    terms = (Term('forward_kl', weight=0.9), Term('cross_entropy', weight=0.1))
    labels = jnp.zeros(hidden.shape[:2], int)
    return fused_distillation_loss(hidden, head, HiddenTargets(*teacher), terms, labels=labels)[0]


def _plain(hidden: jax.Array, head: jax.Array, *teacher: jax.Array) -> jax.Array:
    return forward_kl(hidden @ head, HiddenTargets(*teacher))


def _products(
    hidden: jax.Array, head: jax.Array, teacher_hidden: jax.Array, teacher_head: jax.Array
) -> tuple[jax.Array, ...]:
    """The products alone; the logits stand in for their gradient, which costs the same."""
    logits = hidden @ head
    d_hidden = jnp.einsum('btv,dv->btd', logits, head)
    d_head = jnp.einsum('btd,btv->dv', hidden, logits)
    return teacher_hidden @ teacher_head, d_hidden, d_head
