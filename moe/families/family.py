"""What a family of published models is, as data: its tensors, and how its config reads."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from moe.config import AttentionConfig, TransformerConfig
from moe.families.fields import Fields


class Tensor(NamedTuple):
    """A row of a family's table: a tensor of the checkpoint and the parameter that it is a part of.

    Rows whose parameter a model lacks, or has with another number of axes, are not of that model:
    one table serves a family's models with and without biases, norms and experts.

    Attributes:
        ours: the parameter, from its layer on: 'attention/q'.
        theirs: the tensor, from its layer on; with '{e}', one for each expert.
        layout: how its axes become ours; see `moe.weights.layout.Layout`.
    """

    ours: str
    theirs: str
    layout: str


class Limit(NamedTuple):
    """What else a config must satisfy for the family's own code to accept it.

    Attributes:
        field: of our config that it is about.
        required: of it, in words.
        holds: says whether a config satisfies it.
    """

    field: str
    required: str
    holds: Callable[[TransformerConfig], bool]


TOP = (
    Tensor('embed/embedding', 'model.embed_tokens.weight', 'v d -> v d'),
    Tensor('final_norm/scale', 'model.norm.weight', 'd -> d'),
    Tensor('head/kernel', 'lm_head.weight', 'v d -> d v'),
)


@dataclasses.dataclass(frozen=True)
class Family:
    """A kind of published model.

    Attributes:
        model_type: in its config.json.
        architecture: the class that `transformers` loads it with.
        read: gives our config of a config.json.
        write: gives what config.json says of our config, in both spellings. It need not check that
            the family can express it: what does not survive `write` and `read` cannot be.
        layer: the tensors of a layer.
        attention: the kind that its layers have, all of them.
        experts: whether it has any; None where there are models of either kind.
        top: those of no layer.
        layer_prefix: of a layer's tensors; `{i}` is the layer.
        limits: that `read` does not imply.
        aliases: other model types that read alike.
        layers_behind: whether a folder may have layers behind the last, of multi-token prediction.
        left_out: patterns of tensors that a folder may have and our model has no place for.
    """

    model_type: str
    architecture: str
    read: Callable[[Fields], TransformerConfig]
    write: Callable[[TransformerConfig], dict[str, Any]]
    layer: tuple[Tensor, ...]
    attention: type = AttentionConfig
    experts: bool | None = False
    top: tuple[Tensor, ...] = TOP
    layer_prefix: str = 'model.layers.{i}.'
    limits: tuple[Limit, ...] = ()
    aliases: tuple[str, ...] = ()
    layers_behind: bool = False
    left_out: tuple[str, ...] = (r'.*rotary_emb\.inv_freq',)
