"""The rate of a whole distillation step beside that of its own matrix products, bare."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from distill.config import BalanceConfig, TrainConfig
from distill.objective import Objective, Term
from distill.optimizer import OptimizerConfig, make_optimizer
from distill.recipe import Recipe, initial_state
from distill.step import make_train_step
from distill.teacher import OnlineTeacher
from distill.timing import interleaved_medians
from distill.types import Batch, TrainState
from experiments.benchmark_row import Row, ratio_row, this_machine
from moe.accounting import parameter_report
from moe.config import AttentionConfig, MoEConfig, RouterConfig, TransformerConfig
from moe.sharding import logical_axes
from moe.transformer import Transformer

TERMS = (Term('forward_kl', weight=0.9), Term('cross_entropy', weight=0.1))


def teacher_config(vocab_size: int = 32_000, *, scale: int = 1) -> TransformerConfig:
    """A dense teacher of 60 million parameters; `scale` divides its widths."""
    return TransformerConfig(
        vocab_size=vocab_size,
        num_layers=13,
        embed_dim=512 // scale,
        mlp_dim=1536 // scale,
        attention=AttentionConfig(num_heads=8, num_kv_heads=8, head_dim=64 // scale),
        tie_embeddings=True,
    )


def student_config(vocab_size: int = 32_000, *, scale: int = 1) -> TransformerConfig:
    """A student of 30 million parameters in 8 experts a layer, 2 of them for each token."""
    return TransformerConfig(
        vocab_size=vocab_size,
        num_layers=6,
        embed_dim=256 // scale,
        mlp_dim=256 // scale,
        attention=AttentionConfig(num_heads=4, num_kv_heads=4, head_dim=64 // scale),
        moe=MoEConfig(RouterConfig(num_experts=8, experts_per_token=2), expert_dim=544 // scale),
        tie_embeddings=True,
    )


def step_rows(
    teacher: TransformerConfig,
    student: TransformerConfig,
    *,
    rows: int = 8,
    length: int = 256,
    repeats: int = 7,
) -> list[Row]:
    """Measures a training step: teacher, student, fused KL and cross-entropy, backward, AdamW.

    The reference is one program of the step's matrix products and nothing else: each with its own
    shape, as often as the step needs it; an expert's with its share of the tokens, if all were
    equally loaded; scores of half the rows' length, as causal attention needs.

    Args:
        teacher: its architecture.
        student: its architecture, with experts in every layer or in none.
        rows: of a batch.
        length: tokens of a row.
        repeats: timed rounds; the median counts.

    Returns:
        A row of the rate in GFLOP/s of the products; one of the tokens per second, against those of
        the products alone; one of the peak temporary memory in GB, against the bytes of its state.
    """
    listed = step_products(teacher, student, rows, length)
    flops = sum(product.flops for product in listed)
    step, state, variables, batch = _step(teacher, student, rows, length)
    program = step.lower(state, variables, batch).compile()
    held = [state]

    def run() -> Any:
        held[0], metrics = program(held[0], variables, batch)
        return metrics

    functions: dict[str, Callable[[], object]] = {'step': run, 'products': bare(listed)}
    seconds = interleaved_medians(functions, repeats=repeats)
    tokens = rows * length
    conditions = (
        f'{tokens} tokens, V={student.vocab_size}, dense teacher '
        f'{parameter_report(teacher).total / 1e6:.1f}M, MoE student '
        f'{parameter_report(student).total / 1e6:.1f}M, AdamW, float32; '
        f'{this_machine()}; reference: '
    )
    rates = {name: flops / elapsed / 1e9 for name, elapsed in seconds.items()}
    speeds = {name: tokens / elapsed for name, elapsed in seconds.items()}
    memory: Any = program.memory_analysis()
    values = (
        ('step', 'GFLOP/s', rates['step'], rates['products'], 'its matrix products alone'),
        ('step/tokens', 'token/s', speeds['step'], speeds['products'], 'its products alone'),
        (
            'step/memory',
            'GB',
            memory.temp_size_in_bytes / 1e9,
            memory.argument_size_in_bytes / 1e9,
            'its state, teacher and batch',
        ),
    )
    return [
        ratio_row(name, unit, value, reference, conditions + against)
        for name, unit, value, reference, against in values
    ]


@dataclasses.dataclass(frozen=True)
class Product:
    """`[batch, m, k] @ [batch, k, n]`, done `times` with different factors.

    With `trained`, also the two products of its backward pass.
    """

    m: int
    k: int
    n: int
    times: int = 1
    batch: int = 1
    trained: bool = False

    @property
    def flops(self) -> int:
        """A multiply-add is two."""
        each = 2 * self.batch * self.m * self.k * self.n
        return each * self.times * (3 if self.trained else 1)


def step_products(
    teacher: TransformerConfig, student: TransformerConfig, rows: int, length: int
) -> list[Product]:
    """Lists the products of a step: the teacher's forward, the student's forward and backward."""
    listed = []
    for config, trained in ((teacher, False), (student, True)):
        tokens, D, attention = rows * length, config.embed_dim, config.attention_layers[0]
        assert isinstance(attention, AttentionConfig)
        heads, width = attention.num_heads, attention.head_dim
        add = functools.partial(Product, times=config.num_layers, trained=trained)
        listed += [
            add(tokens, D, heads * width),
            add(tokens, D, attention.num_kv_heads * width),
            add(tokens, D, attention.num_kv_heads * width),
            add(tokens, heads * width, D),
            add(length, width, length // 2, batch=rows * heads),
            add(length, length // 2, width, batch=rows * heads),
        ]
        if config.moe is None:
            listed += [add(tokens, D, 2 * config.mlp_dim), add(tokens, config.mlp_dim, D)]
        else:
            experts, F = config.moe.router.num_experts, config.moe.expert_dim
            share = tokens * config.moe.router.experts_per_token // experts
            listed += [
                add(tokens, D, experts),
                add(share, D, 2 * F, batch=experts),
                add(share, F, D, batch=experts),
            ]
        listed.append(Product(tokens, D, config.vocab_size, trained=trained))
    return listed


def bare(listed: list[Product]) -> Callable[[], Array]:
    """Returns one compiled program of the products alone, ready to run."""
    keys = jax.random.split(jax.random.key(0), len(listed))
    operands = [_operands(product, key) for product, key in zip(listed, keys, strict=True)]

    @jax.jit
    def program(operands: list[tuple[Array, ...]]) -> Array:
        return sum(
            (_run(p, *factors) for p, factors in zip(listed, operands, strict=True)), jnp.zeros(())
        )

    compiled = program.lower(operands).compile()
    return lambda: compiled(operands)


def _operands(product: Product, key: Array) -> tuple[Array, ...]:
    """Left, right (one for each time) and, in training, the result's gradient."""
    b, m, k, n = product.batch, product.m, product.k, product.n
    shapes = [(b, m, k), (product.times, b, k, n)] + [(b, m, n)] * product.trained
    return tuple(
        jax.random.normal(part, shape)
        for part, shape in zip(jax.random.split(key, len(shapes)), shapes, strict=True)
    )


def _run(product: Product, left: Array, rights: Array, *gradient: Array) -> Array:
    """Does the products one after another; of each result one number is kept."""

    def once(carry: Array, right: Array) -> tuple[Array, None]:
        results = [left @ right]
        if product.trained:
            results.append(gradient[0] @ right.mT)
            # Its left factor differs from time to time, or it would be done once.
            results.append((left + carry).mT @ gradient[0])
        # The barrier keeps the compiler from computing that one number alone.
        results = jax.lax.optimization_barrier(results)
        return carry + sum(result[0, 0, 0] for result in results), None

    return jax.lax.scan(once, jnp.zeros(()), rights)[0]


def _step(
    teacher: TransformerConfig, student: TransformerConfig, rows: int, length: int
) -> tuple[Any, TrainState, Any, Batch]:
    model, taught = Transformer(student), Transformer(teacher)
    optimizer = make_optimizer(OptimizerConfig(1e-3), 1000, logical_axes(model)['params'])
    recipe = Recipe(
        model,
        Objective(TERMS),
        optimizer,
        TrainConfig(steps=1000),
        BalanceConfig(load_balance_weight=0.01),
        OnlineTeacher(taught),
    )
    batch = _batch(rows, length, student.vocab_size)
    init = jax.jit(lambda model, key: nn.unbox(model.init(key, batch.tokens)), static_argnums=0)
    variables = init(taught, jax.random.key(1))
    state = jax.jit(functools.partial(initial_state, recipe))(init(model, jax.random.key(2)))
    return jax.jit(make_train_step(recipe), donate_argnums=0), state, variables, batch


def _batch(rows: int, length: int, vocab_size: int) -> Batch:
    """One document a row, of random tokens."""
    text = jax.random.randint(jax.random.key(3), (rows, length + 1), 0, vocab_size)
    return Batch(
        tokens=text[:, :-1],
        labels=text[:, 1:],
        mask=jnp.ones((rows, length), bool),
        segment_ids=jnp.ones((rows, length), jnp.int32),
        positions=jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (rows, length)),
    )
