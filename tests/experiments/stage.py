"""A stage's folder as training leaves it, with a model that nobody trained."""

import pathlib
import types
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from distill.tokenizer import ByteTokenizer
from experiments.identity import model_identity
from experiments.training import save_model
from moe.config import AttentionConfig, MoEConfig, RouterConfig, TransformerConfig
from moe.transformer import Transformer

CONFIG = TransformerConfig(
    vocab_size=264,  # wider than the tokenizer's: the last five mean nothing
    num_layers=2,
    embed_dim=16,
    mlp_dim=12,
    attention=(AttentionConfig(2, 1, 8, window=6), AttentionConfig(2, 1, 8)),
    moe=MoEConfig(RouterConfig(4, 2, selection_bias=True), 6, layers=(1,)),
)
MODEL = Transformer(CONFIG)


def make_stage(
    workdir: pathlib.Path, change: Callable[[Any], Any] = lambda params: params
) -> pathlib.Path:
    """Saves the model, its parameters changed, and its tokenizer; returns the stage's folder."""
    init = jax.jit(lambda key: nn.unbox(MODEL.init(key, jnp.ones((1, 1), jnp.int32))))
    drawn = init(jax.random.key(0))
    params = change(jax.tree.map(lambda leaf: leaf * 2.0, drawn['params']))
    tokenizer = ByteTokenizer()
    tokenizer.save(workdir / 'tokenizer')
    identity = {'model': model_identity(CONFIG), 'tokenizer': tokenizer.fingerprint}
    state = types.SimpleNamespace(step=1, params=params, routing=drawn['routing'])
    save_model(workdir / 'student' / 'model', state, identity)
    return workdir / 'student'
