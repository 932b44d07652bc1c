"""A model to write with, and all that it is used with."""

import dataclasses
import pathlib
from typing import Any

from distill.tokenizer import Tokenizer
from moe.quantised import Weights
from moe.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model with all that it is used with.

    Attributes:
        name: of the model: its study and its stage.
        model: the architecture, with a subtree for each layer.
        variables: its weights, placed.
        tokenizer: that it was trained with.
        sha256: of the weights' files.
        published: the folder of a published model; None of a stage.
        weights: what the matrices are quantised to; None for floats.
    """

    name: str
    model: Transformer
    variables: Any
    tokenizer: Tokenizer
    sha256: str
    published: pathlib.Path | None = None
    weights: Weights | None = None
