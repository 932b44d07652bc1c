"""A tiny student and teacher that write, and rows that they wrote."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from distill.config import BalanceConfig, RolloutConfig, TrainConfig
from distill.objective import Objective, Term
from distill.recipe import Recipe
from distill.rollout import Author, Rollout, roll_out, rollout_key
from distill.teacher import OnlineTeacher
from distill.types import Batch
from distill.writers import STUDENT, TEACHER
from moe.config import AttentionConfig, MoEConfig, RouterConfig, TransformerConfig
from moe.transformer import Transformer

JSD = Term('jsd', beta=0.3)
B, T, V, N = 8, 12, 18, 5
EOS, PAD = 16, 17

STUDENT_CONFIG = TransformerConfig(
    vocab_size=V,
    num_layers=1,
    embed_dim=16,
    mlp_dim=16,
    attention=AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=8),
    moe=MoEConfig(RouterConfig(4, 2, selection_bias=True), expert_dim=8, dispatch='dense'),
    scan_layers=False,
)
TEACHER_CONFIG = TransformerConfig(
    vocab_size=V,
    num_layers=1,
    embed_dim=24,
    mlp_dim=16,
    attention=AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=8),
    scan_layers=False,
)


def make_batch() -> Batch:
    """Rows of two documents and some padding, of different lengths."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, EOS, (B, T + 1))
    first, total = rng.integers(2, 6, (B, 1)), rng.integers(8, T + 1, (B, 1))
    index = np.arange(T)
    segment_ids = np.where(index < first, 1, 2) * (index < total)
    positions = np.where(index < first, index, index - first)
    mask = (segment_ids > 0) & (index != first - 1) & (index != total - 1)
    arrays = tokens[:, :T], tokens[:, 1:], mask, segment_ids, positions
    return Batch(*(jnp.asarray(a, bool if a.dtype == bool else jnp.int32) for a in arrays))


def make_recipe(mesh=None, *, terms=(JSD,), **fields) -> Recipe:
    """Plain gradient descent at rate 1: the parameters move by exactly the gradient."""
    config = dict(lmbda=0.5, teacher_share=0.25, max_new_tokens=N) | fields.pop('config', {})
    defaults = dict(
        model=Transformer(STUDENT_CONFIG, mesh),
        objective=Objective(terms),
        optimizer=optax.sgd(1.0),
        train=TrainConfig(steps=1, chunk_size=16),
        balance=BalanceConfig(selection_bias_rate=0.01),
        teacher=OnlineTeacher(Transformer(TEACHER_CONFIG, mesh)),
        rollout=Rollout(RolloutConfig(**config), EOS, PAD),
    )
    return Recipe(**(defaults | fields))


@functools.cache
def variables():
    """Variables of student and teacher, with logits far from uniform."""
    init = jax.jit(
        lambda model, key: nn.unbox(model.init(key, jnp.zeros((1, 2), jnp.int32))), static_argnums=0
    )
    student = init(Transformer(STUDENT_CONFIG), jax.random.key(1))
    teacher = init(Transformer(TEACHER_CONFIG), jax.random.key(2))
    double = functools.partial(jax.tree.map, lambda leaf: leaf * 2)
    return student | {'params': double(student['params'])}, double(teacher)


@functools.cache
def written(step: int, seed: int = 0):
    """The rows of a step, written on one device, and what was measured of them."""
    student, teacher = variables()
    return jax.device_get(_written(student, teacher, rollout_key(seed, step)))


@jax.jit
def _written(student, teacher, key):
    recipe = make_recipe()
    authors = {
        STUDENT: Author(recipe.model, student),
        TEACHER: Author(recipe.teacher.model, teacher),
    }
    return roll_out(recipe.rollout, authors, make_batch(), key)
