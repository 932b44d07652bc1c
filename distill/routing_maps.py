"""Who is chosen with whom, and for what: counts of a model's routing over held-out text."""

import dataclasses
import functools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from distill.data import EvaluationSet
from distill.evaluate import placed
from distill.types import Batch
from moe.sharding import constrain
from moe.transformer import Transformer

TOKEN_CLASSES = (
    'whitespace',
    'letters',
    'keywords',
    'digits',
    'punctuation',
    'mixed',
    'special',
)


class Decoder(Protocol):
    """What classes of tokens are read from; see `distill.tokenizer.Tokenizer`."""

    @property
    def vocab_size(self) -> int: ...

    def decode(self, ids: Any) -> str: ...


@dataclasses.dataclass(frozen=True)
class RoutingMaps:
    """Counts over a text, for each MoE layer.

    Attributes:
        layers: their indices in the model, `L` of them.
        together: tokens that chose both of two experts, `[L, E, E]`; on the diagonal tokens that
            chose the one.
        by_class: assignments to each expert of tokens of each class, `[L, E, C]`.
        classes: names of the `C` classes.
    """

    layers: tuple[int, ...]
    together: np.ndarray
    by_class: np.ndarray
    classes: tuple[str, ...]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a NumPy archive, whole or not at all."""
        partial = Path(path).with_suffix('.partial.npz')
        fields: dict[str, Any] = {name: np.asarray(getattr(self, name)) for name in _FIELDS}
        np.savez_compressed(partial, **fields)
        os.replace(partial, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> 'RoutingMaps':
        """Reads what `save` wrote."""
        with np.load(path, allow_pickle=False) as archive:
            fields = {name: archive[name] for name in _FIELDS}
        layers, classes = fields.pop('layers').tolist(), fields.pop('classes').tolist()
        return cls(layers=tuple(layers), classes=tuple(classes), **fields)


_FIELDS = tuple(field.name for field in dataclasses.fields(RoutingMaps))


def chosen_together(
    expert_ids: Int[Array, 'B T K'], mask: Bool[Array, 'B T'], num_experts: int
) -> Float[Array, 'E E']:
    """Counts the tokens that chose both of two experts.

    Args:
        expert_ids: `RouterOutput.expert_ids`: of each token, all different.
        mask: True counts.
        num_experts: `E`.

    Returns:
        A symmetric matrix; on the diagonal how many tokens chose the one expert. Counts of batches
        add up.
    """
    chosen = _chosen(expert_ids, mask, num_experts)
    return jnp.einsum('bte,btf->ef', chosen, chosen, preferred_element_type=jnp.float32)


def load_by_class(
    expert_ids: Int[Array, 'B T K'],
    mask: Bool[Array, 'B T'],
    token_classes: Int[Array, 'B T'],
    num_experts: int,
    num_classes: int,
) -> Float[Array, 'E C']:
    """Counts each expert's assignments by the class of the token.

    Args:
        expert_ids: `RouterOutput.expert_ids`.
        mask: True counts.
        token_classes: in [0, C).
        num_experts: `E`.
        num_classes: `C`.

    Returns:
        Counts; those of batches add up, and over the classes to the load.
    """
    chosen = _chosen(expert_ids, mask, num_experts)
    classes = jax.nn.one_hot(token_classes, num_classes)
    return jnp.einsum('bte,btc->ec', chosen, classes, preferred_element_type=jnp.float32)


def _chosen(expert_ids: Array, mask: Array, num_experts: int) -> Float[Array, 'B T E']:
    chosen = (expert_ids[..., None] == jnp.arange(num_experts)).any(axis=2)
    return (chosen & mask[..., None]).astype(jnp.float32)


def co_activation(together: np.ndarray) -> np.ndarray:
    """Compares how often two experts are chosen together with what their loads alone would give.

    With `n_i` tokens on expert `i`, `c_ij` on both of `i` and `j`, and `C` the sum of `c` over all
    pairs of different experts,

        c_ij / (C n_i n_j / (sum over pairs k != l of n_k n_l)):

    1 for pairs as independent as loads allow, where each token chooses `K` different experts.

    Args:
        together: `[..., E, E]`, from `chosen_together`.

    Returns:
        The ratios `[..., E, E]`, float64; NaN on the diagonal, and where one of the two is never
        chosen.
    """
    together = np.asarray(together, np.float64)
    experts = together.shape[-1]
    different = ~np.eye(experts, dtype=bool)
    load = np.diagonal(together, axis1=-2, axis2=-1)
    product = load[..., :, None] * load[..., None, :] * different
    pairs = together * different
    with np.errstate(divide='ignore', invalid='ignore'):
        scale = pairs.sum((-2, -1)) / product.sum((-2, -1))
        return np.where(different, pairs / (scale[..., None, None] * product), np.nan)


def class_shares(by_class: np.ndarray) -> np.ndarray:
    """Divides each expert's load among the classes.

    Args:
        by_class: `[..., E, C]`, from `load_by_class`.

    Returns:
        Shares `[..., E, C]` that sum to 1 over the classes, float64; NaN for an expert that is
        never chosen.
    """
    by_class = np.asarray(by_class, np.float64)
    with np.errstate(invalid='ignore'):
        return by_class / by_class.sum(-1, keepdims=True)


def token_classes(
    tokenizer: Decoder, vocab_size: int, keywords: Iterable[str] = ()
) -> Int[np.ndarray, 'V']:
    """Sorts the vocabulary into `TOKEN_CLASSES`, by the text of each token.

    A token of letters is one of `keywords` without the spaces around it; 'letters' and 'digits' may
    begin with a space too. 'mixed' has characters of several kinds, or part of a character;
    'special' has no text.

    Args:
        tokenizer: whose tokens they are.
        vocab_size: the model's, at least the tokenizer's; what is beyond is 'special'.
        keywords: words with a class of their own, such as `keyword.kwlist` of Python.

    Returns:
        For each id the index of its class.
    """
    words = frozenset(keywords)
    names = [_class_of(tokenizer.decode([i]), words) for i in range(tokenizer.vocab_size)]
    names += ['special'] * (vocab_size - len(names))
    return np.array([TOKEN_CLASSES.index(name) for name in names], np.int32)


def _class_of(text: str, keywords: frozenset[str]) -> str:
    if not text:
        return 'special'
    bare = text.strip()
    if not bare:
        return 'whitespace'
    if '\ufffd' in bare:
        return 'mixed'
    if bare in keywords:
        return 'keywords'
    if bare.isalpha():
        return 'letters'
    if bare.isdigit():
        return 'digits'
    return 'mixed' if any(map(str.isalnum, bare)) else 'punctuation'


def routing_maps(
    model: Transformer,
    variables: Any,
    evaluation_set: EvaluationSet,
    classes: Int[np.ndarray, 'V'],
    *,
    batch_size: int,
) -> RoutingMaps | None:
    """Runs a model over held-out text and counts its routing.

    Args:
        model: with the mesh that its variables lie on.
        variables: unboxed.
        evaluation_set: what is read; padding counts nowhere.
        classes: from `token_classes`.
        batch_size: rows a step, over all devices; a multiple of the mesh's batch axes.

    Returns:
        The counts of all its tokens, alike on every process; None for a model without experts.
    """
    moe = model.config.moe
    if moe is None:
        return None
    table = jnp.asarray(classes)
    counts: list[list[Any]] = []
    for batch, _ in evaluation_set.batches(batch_size):
        step = _count(model, variables, placed(batch, model.mesh), table)
        counts.append([np.asarray(count, np.float64) for count in step])
    together, by_class = (np.sum(parts, 0) for parts in zip(*counts, strict=True))
    layers = tuple(np.flatnonzero(model.config.moe_layers).tolist())
    return RoutingMaps(layers, together, by_class, TOKEN_CLASSES)


@functools.partial(jax.jit, static_argnums=0)
def _count(
    model: Transformer, variables: Any, batch: Batch, table: Int[Array, 'V']
) -> tuple[Float[Array, 'L E E'], Float[Array, 'L E C']]:
    output: Any = model.apply(
        variables,
        batch.tokens,
        positions=batch.positions,
        segment_ids=batch.segment_ids,
        logits=False,
    )
    assert model.config.moe is not None
    experts, mask, classes = model.config.moe.router.num_experts, batch.segment_ids > 0, table
    ids = [router.expert_ids for router in output.router]
    of_tokens = jnp.take(classes, batch.tokens, axis=0)
    counts = (
        jnp.stack([chosen_together(x, mask, experts) for x in ids]),
        jnp.stack([load_by_class(x, mask, of_tokens, experts, len(TOKEN_CLASSES)) for x in ids]),
    )
    whole = [constrain(count, (None,) * count.ndim, model.mesh) for count in counts]
    return whole[0], whole[1]
