"""Matches what two models' passes over the same tokens hold, feature by feature."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from distill.feature_checks import layer_pairs, paired_attentions, require_comparable
from distill.feature_losses import (
    Pair,
    attention_match_loss,
    attention_scores,
    hidden_match_loss,
    relation_match_loss,
    usage_match_loss,
)
from distill.features import Feature, feature_names
from distill.projectors import project
from distill.router_match import router_match_loss
from distill.teacher import OnlineTeacher, Teacher
from moe.activations import ACTIVATIONS, noted_embedding, noted_layers
from moe.attention_context import attention_mask
from moe.config import TransformerConfig
from moe.errors import InputError
from moe.routing import ScoreFunction
from moe.types import RouterOutput


class Inside(NamedTuple):
    """What a pass over a model holds besides its output.

    Attributes:
        config: the model's.
        routers: `ModelOutput.router`.
        layers: of each activation that was noted what each layer has of it.
        embedding: of the tokens; None where the stream was not noted.
    """

    config: TransformerConfig
    routers: tuple[RouterOutput, ...]
    layers: dict[str, list[Any]]
    embedding: Array | None

    @classmethod
    def of(
        cls,
        config: TransformerConfig,
        routers: tuple[RouterOutput, ...],
        noted: Mapping[str, Any],
    ) -> 'Inside':
        """Takes apart the collections of `moe.activations` that a pass returned."""
        asked = {name: noted[name] for name in ACTIVATIONS if name in noted}
        layers = {name: noted_layers(config, own) for name, own in asked.items()}
        embedding = noted_embedding(asked['residual']) if 'residual' in asked else None
        return cls(config, routers, layers, embedding)

    def router(self, layer: int) -> RouterOutput:
        """Returns what the router of a layer decided."""
        return self.routers[sum(self.config.moe_layers[:layer])]

    @property
    def score(self) -> ScoreFunction:
        """The routers' score function."""
        assert self.config.moe is not None
        return self.config.moe.router.score


def require_features(
    features: Sequence[Feature], student: TransformerConfig, teacher: Teacher | None
) -> None:
    """Refuses features of a teacher that is not there to be looked into.

    Raises:
        InputError: where it does not run whole beside the student, or as `require_comparable`.
    """
    if not features:
        return
    if not isinstance(teacher, OnlineTeacher):
        raise InputError(
            f'features ({", ".join(feature_names(features))}) need a teacher that runs beside the '
            f'student, by itself; received {type(teacher).__name__}, of whom there is nothing but '
            'what it said. Leave them out, or give an OnlineTeacher.'
        )
    require_comparable(features, student, teacher.model.config)


def features_loss(
    features: Sequence[Feature],
    student: Inside,
    teacher: Inside,
    projectors: Mapping[str, Float[Array, 'pairs Ds Dt']],
    segment_ids: Int[Array, 'B T'],
    step: Int[Array, ''] | int,
) -> tuple[Float[Array, ''], dict[str, Pair]]:
    """Computes `sum over features of weight * (sum over tokens of its loss)`.

    A feature's loss is the mean over its pairs of layers. Tokens that are not padding count.

    Args:
        features: comparable.
        student: of a pass that gradients flow through.
        teacher: of the same tokens; none flow into it.
        projectors: kernels of those that are projected, by `feature_names`.
        segment_ids: documents within a row, 0 for padding.
        step: of the weights' schedules.

    Returns:
        The loss, and `(sum, weight)` of each feature as '..._match_loss'.
    """
    loss, pairs = jnp.zeros(()), {}
    for name, feature in zip(feature_names(features), features, strict=True):
        kernels = projectors.get(name)
        total, count = _match(feature, student, teacher, kernels, segment_ids)
        loss += feature.weight_at(step) * total
        pairs[f'{name}_match_loss'] = total, count
    return loss, pairs


def _match(
    feature: Feature, student: Inside, teacher: Inside, kernels: Any, segment_ids: Array
) -> Pair:
    """The loss of one feature, summed over tokens."""
    mask = segment_ids > 0

    def hidden(number: int, ours: Array, theirs: Array) -> Pair:
        assert feature.metric is not None
        states = ours if kernels is None else project(ours, kernels[number])
        return hidden_match_loss(states, theirs, mask, metric=feature.metric)

    if feature.kind == 'embedding':
        assert student.embedding is not None
        assert teacher.embedding is not None
        return hidden(0, student.embedding, teacher.embedding)
    losses = []
    for number, pair in enumerate(layer_pairs(feature, student.config, teacher.config)):
        if feature.kind == 'hidden':
            ours, theirs = _both(student, teacher, pair, 'residual')
            losses.append(hidden(number, ours, theirs))
        elif feature.kind == 'relation':
            assert feature.of is not None
            assert feature.heads is not None
            vectors = _both(student, teacher, pair, feature.of)
            losses.append(_relation(*vectors, segment_ids, feature.heads))
        elif feature.kind == 'attention':
            losses.append(_attention(student, teacher, pair, segment_ids))
        else:
            losses.append(_routed(feature, student, teacher, pair, segment_ids))
    return jnp.stack([total for total, _ in losses]).mean(), losses[0][1]


def _both(
    student: Inside, teacher: Inside, pair: tuple[int, int], activation: str
) -> tuple[Array, Array]:
    return student.layers[activation][pair[0]], teacher.layers[activation][pair[1]]


def _relation(ours: Array, theirs: Array, segment_ids: Array, heads: int) -> Pair:
    # Relations are [T, T] a head: made again in the backward pass rather than kept.
    @jax.checkpoint
    def loss(ours: Array, theirs: Array) -> Pair:
        return relation_match_loss(ours, theirs, segment_ids, heads=heads)

    return loss(ours, theirs)


def _attention(student: Inside, teacher: Inside, pair: tuple[int, int], segment_ids: Array) -> Pair:
    """Compares the maps of two layers, whose windows agree."""
    index = jnp.arange(segment_ids.shape[1])
    ours, theirs = paired_attentions(pair, student.config, teacher.config)
    allowed = attention_mask(index, index, segment_ids, segment_ids, ours.window)

    @jax.checkpoint
    def loss(queries: tuple[Array, Array], keys: tuple[Array, Array]) -> Pair:
        own = _scores(ours, queries[0], keys[0])
        wanted = _scores(theirs, queries[1], keys[1])
        return attention_match_loss(own, wanted, allowed, segment_ids > 0)

    return loss(*(_both(student, teacher, pair, name) for name in ('queries', 'keys')))


def _scores(attention: Any, queries: Array, keys: Array) -> Array:
    cap = getattr(attention, 'soft_cap', None)
    return attention_scores(queries, keys, scale=attention.score_scale, score_cap=cap)


def _routed(
    feature: Feature,
    student: Inside,
    teacher: Inside,
    pair: tuple[int, int],
    segment_ids: Array,
) -> Pair:
    ours, theirs = student.router(pair[0]), teacher.router(pair[1])
    scores: Any = {'student_score': student.score, 'teacher_score': teacher.score}
    if feature.kind == 'usage':
        return usage_match_loss(ours, theirs, segment_ids, **scores)
    return router_match_loss([ours], [theirs], segment_ids > 0, **scores)
