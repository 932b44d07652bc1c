"""Multi-token prediction: modules that look further ahead than the next token.

Module `d` of `mtp_depth` reads, at position `t`, what module `d - 1` made of it (module 0 is the
model itself) and the token `d` ahead, and predicts the one after that:

    h_d[t] = norm(block_d(M_d [norm(h_{d-1}[t]); norm(embedding(tokens[t + d]))]))
    logits_d[t] = h_d[t] @ head      of tokens[t + d + 1]

Embedding and head are the model's own.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe.attention_context import AttentionContext
from moe.attention_kinds import LayerCache
from moe.block import remat_block
from moe.config import TransformerConfig
from moe.layers import kernel_init, linear, norm_of, partitioned
from moe.quantised import stored_kernel
from moe.sharding import constrain
from moe.stacking import LayerKind
from moe.types import RouterOutput


def ahead(x: Array, distance: int) -> Array:
    """Moves `x[:, t + distance]` to `t`; zeros, or False, where that lies past the end.

    Args:
        x: [B, T, ...].
        distance: zero or more.
    """
    padding = [(0, 0)] * x.ndim
    padding[1] = (0, distance)
    return jnp.pad(x, padding)[:, distance:]


def same_segment_ahead(segment_ids: Int[Array, 'B T'], distance: int) -> Bool[Array, 'B T']:
    """Marks the positions whose token `distance` ahead is of the same document; never padding."""
    return (segment_ids > 0) & (segment_ids == ahead(segment_ids, distance))


class PredictionModule(nn.Module):
    """Joins hidden states with later tokens, and runs a layer on them.

    Parameters: `projection` [2D, D], whose first `D` rows multiply the hidden states; the norms
    `hidden_norm`, `embedding_norm` and `final_norm`; those of a layer under `block`.

    Attributes:
        config: the model's.
        kind: of the layer.
        mesh: constrains activations where given.

    Source: DeepSeek-V3, arXiv 2412.19437, section 2.2, equations 21 to 23. The paper leaves open on
        which side of the final norm hidden states pass from one depth to the next; here it is
        behind it: what a module reads and returns is what the head multiplies.
    """

    config: TransformerConfig
    kind: LayerKind
    mesh: jax.sharding.Mesh | None = None

    @nn.compact
    def __call__(
        self,
        hidden: Float[Array, 'B T D'],
        embedded: Float[Array, 'B T D'],
        cache: LayerCache | None,
        context: AttentionContext,
        mask: Bool[Array, 'B T'],
        tokens: Int[Array, 'B T'],
        replayed: Int[Array, 'B T K'] | None = None,
    ) -> tuple[Float[Array, 'B T D'], RouterOutput | None, LayerCache | None]:
        """Runs the module.

        Args:
            hidden: of the depth before, after its final norm.
            embedded: the later tokens, embedded.
            cache: of the module's layer, or None.
            context: of its kind of attention.
            mask: False is not routed.
            tokens: the later tokens, for routers that choose by hash.
            replayed: the experts of each token, from a record; None lets the router choose.

        Returns:
            The hidden states that the head multiplies, the router's output where there are experts,
            and the extended cache.
        """
        config, width = self.config, hidden.shape[-1]
        normed = [
            norm_of(config, 'hidden_norm')(hidden),
            norm_of(config, 'embedding_norm')(embedded),
        ]
        # The joined channels are split over devices as a hidden width is.
        joined = constrain(jnp.concatenate(normed, -1), ('batch', 'length', 'mlp'), self.mesh)
        init = partitioned(kernel_init(0, 1), ('mlp', 'embed'))
        shape = (2 * width, width)
        read = functools.partial(self.param, 'projection', init, shape, config.param_dtype)
        projection = stored_kernel(self, 'projection', read, 1)
        x = constrain(linear(joined, projection), ('batch', 'length', None), self.mesh)
        block = remat_block(config.remat, scanned=False)(config, self.kind, self.mesh, name='block')
        x, router, cache = block(x, cache, context, mask, tokens, replayed)
        return norm_of(config, 'final_norm')(x), router, cache
