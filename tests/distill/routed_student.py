"""A student with routers whose update is looked at, and parameters of chance for any model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from moe.config import AttentionConfig, MoEConfig, RouterConfig, TransformerConfig
from moe.sharding import MeshConfig, abstract_variables, make_mesh
from moe.transformer import Transformer

V = 16
STUDENT = TransformerConfig(
    vocab_size=V,
    num_layers=2,
    embed_dim=8,
    mlp_dim=8,
    attention=AttentionConfig(2, 2, 4),
    moe=MoEConfig(RouterConfig(4, 1), 4, dispatch='dense'),
)


@functools.cache
def variables(config: TransformerConfig):
    rng = np.random.default_rng(config.embed_dim)
    return jax.tree.map(
        lambda x: jnp.asarray(0.6 * rng.normal(size=x.shape), x.dtype),
        abstract_variables(Transformer(config)),
    )


def mesh_of(sizes: tuple[int, ...]) -> jax.sharding.Mesh | None:
    """A mesh of the first devices; None for one of them."""
    count = int(np.prod(sizes))
    return None if count == 1 else make_mesh(MeshConfig(*sizes), jax.devices()[:count])
