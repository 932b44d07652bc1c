"""Samples of text: what a model makes of the prompts, and of the beginnings of held-out text."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from distill.data import EvaluationSet
from distill.tokenizer import Tokenizer
from experiments.context import Context
from experiments.fit import batch_shards
from moe.decode import generate
from moe.transformer import Transformer
from moe.writing_inputs import pad_prompts

# Tokens of held-out text that a model is given, where a row has twice as many.
_BEGINNING = 32


@dataclasses.dataclass(frozen=True)
class Beginning:
    """A prompt.

    Attributes:
        ids: of it, the first one `bos`.
        text: of those.
        source: how the text goes on where the prompt was taken from; None where it was made up.
    """

    ids: np.ndarray
    text: str
    source: str | None = None


def write_samples(
    context: Context, name: str, model: Transformer, variables: Any
) -> list[dict[str, str]]:
    """Lets a model continue each prompt, and the beginnings of some held-out documents.

    Args:
        context: of the study.
        name: of the model: 'teacher', 'student' or 'control'.
        model: that writes.
        variables: its own.

    Returns:
        For each its `prompt` and the `text` that was written; of held-out text also the `source`,
        as many tokens of its own continuation.
    """
    config, (tokenizer, held_out) = context.study.evaluate, context.read_by(name)
    beginnings = [
        Beginning(np.array([tokenizer.bos_id, *tokenizer.encode(text)]), text)
        for text in config.prompts
    ]
    beginnings += held_out_beginnings(
        held_out, tokenizer, config.sample_documents, config.sample_tokens
    )
    ids = [beginning.ids for beginning in beginnings]
    # Every device writes a row: where the mesh has more parts than there are prompts, they repeat.
    ids += ids[:1] * (-len(ids) % batch_shards(context.mesh))
    tokens, mask = pad_prompts(ids)
    written, _ = generate(
        model,
        variables,
        tokens,
        prompt_mask=mask,
        max_new_tokens=config.sample_tokens,
        temperature=config.temperature,
        key=jax.random.key(context.study.seed),
        eos_id=tokenizer.eos_id,
    )
    rows = multihost_utils.process_allgather(written, tiled=True)
    return [
        {'prompt': beginning.text, 'text': tokenizer.decode(_until(row, tokenizer.eos_id))}
        | ({} if beginning.source is None else {'source': beginning.source})
        for beginning, row in zip(beginnings, rows, strict=False)
    ]


def held_out_beginnings(
    held_out: EvaluationSet, tokenizer: Tokenizer, count: int, length: int
) -> list[Beginning]:
    """Takes the beginnings of the first documents that are long enough to go on.

    Args:
        held_out: the documents' rows.
        tokenizer: that encoded them.
        count: documents at most.
        length: tokens of the source's own continuation, as far as the first row has them.
    """
    rows, found = held_out.rows['tokens'], []
    given = 1 + min(_BEGINNING, rows.shape[1] // 2)
    _, firsts = np.unique(held_out.document_index, return_index=True)
    for row in firsts:
        ids = rows[row][held_out.rows['segment_ids'][row] > 0]
        if len(found) < count and len(ids) > given:
            source = _until(ids[given : given + length], tokenizer.eos_id)
            text = tokenizer.decode(ids[1:given])
            found.append(Beginning(ids[:given], text, tokenizer.decode(source)))
    return found


def _until(ids: np.ndarray, eos_id: int) -> np.ndarray:
    ends = np.flatnonzero(ids == eos_id)
    return ids[: ends[0]] if ends.size else ids
