"""What targets of real text are made of: the text in tokens, a teacher that knows some of it."""

import dataclasses
import functools
import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from distill.cache import CachedTargets
from distill.config import BalanceConfig, TrainConfig
from distill.corpus import tokenize
from distill.data import DataConfig, TrainPipeline
from distill.objective import Objective, Term
from distill.optimizer import OptimizerConfig, make_optimizer
from distill.recipe import Recipe, initial_state
from distill.sources import Document, read_documents
from distill.step import make_train_step
from distill.teacher import CachedTeacher
from distill.tokenizer import train_bpe
from distill.types import Batch
from experiments.benchmark_step import student_config
from moe.config import AttentionConfig, TransformerConfig
from moe.sharding import logical_axes
from moe.transformer import Transformer

# Tokens whose logits exist at one time.
CHUNK = 512


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        vocab_size: `V` of the tokenizer, trained on the text.
        max_bytes: of the text, whole documents in their order.
        width: `D` of the teacher, of 2 layers.
        steps: updates of its training.
        rows: of a batch.
        length: tokens of a row.
        batches: whose targets are written and read.
        scale: divides the student's widths, see `benchmark_step.student_config`.
    """

    vocab_size: int = 32_768
    max_bytes: int = 8_000_000
    width: int = 128
    steps: int = 40
    rows: int = 8
    length: int = 256
    batches: int = 8
    scale: int = 1


def text_batches(source: str, sizes: Sizes) -> tuple[TrainPipeline, str]:
    """Batches of the text, in a tokenizer of its own."""
    documents: list[Document] = []
    used = 0
    for document in read_documents(source):
        used += len(document.text.encode())
        if documents and used > sizes.max_bytes:
            break
        documents.append(document)
    tokenizer = train_bpe([document.text for document in documents], sizes.vocab_size)
    corpus = tokenize(documents, tokenizer)
    config = DataConfig(sizes.length, sizes.rows, seed=0)
    return TrainPipeline(corpus, config), tokenizer.fingerprint


def trained_teacher(pipeline: TrainPipeline, sizes: Sizes) -> tuple[Transformer, Any, float]:
    """A teacher, its variables, and the cross-entropy of its last update."""
    heads = max(1, sizes.width // 64)
    attention = AttentionConfig(heads, heads, sizes.width // heads)
    model = Transformer(
        TransformerConfig(sizes.vocab_size, 2, sizes.width, 3 * sizes.width, attention)
    )
    optimizer = OptimizerConfig(1e-2, name='muon', warmup_steps=min(10, sizes.steps - 1))
    step, state = _update(model, Objective((Term('cross_entropy'),)), None, optimizer, sizes)
    loss = jnp.nan
    for batch in itertools.islice(pipeline, sizes.steps):
        state, metrics = step(state, {}, batch)
        loss = metrics.pairs['loss'][0]
    return model, {'params': state.params, 'routing': state.routing}, float(loss)


def training(reader: CachedTargets, batch: Batch, sizes: Sizes) -> Any:
    """One update of a student after the other, on one batch with its targets."""
    model = Transformer(student_config(sizes.vocab_size, scale=sizes.scale))
    objective = Objective((Term('forward_kl'),))
    step, state = _update(model, objective, CachedTeacher(), OptimizerConfig(1e-3), sizes)
    given = dataclasses.replace(batch, targets=reader.read(batch))
    placed = jax.tree.map(jnp.asarray, given)
    held = [state]

    def run() -> Any:
        held[0], metrics = step(held[0], {}, placed)
        return metrics

    return run


def _update(
    model: Transformer,
    objective: Objective,
    teacher: CachedTeacher | None,
    optimizer: OptimizerConfig,
    sizes: Sizes,
) -> tuple[Any, Any]:
    chain = make_optimizer(optimizer, sizes.steps, logical_axes(model)['params'])
    train = TrainConfig(steps=sizes.steps, chunk_size=CHUNK)
    recipe = Recipe(model, objective, chain, train, BalanceConfig(), teacher)
    tokens = jnp.zeros((1, 2), jnp.int32)
    variables = jax.jit(lambda key: nn.unbox(model.init(key, tokens)))(jax.random.key(0))
    state = jax.jit(functools.partial(initial_state, recipe))(variables)
    return jax.jit(make_train_step(recipe), donate_argnums=0), state
