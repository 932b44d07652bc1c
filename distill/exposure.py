"""How far a student strays from its teacher on text of its own, rather than on held-out text."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from distill.data import EvaluationSet
from distill.evaluate import evaluate, placed
from distill.prompts import as_rows, cut_prompts
from distill.rollout import Author, Rollout, complete
from distill.statistics import Estimate, ratio
from distill.types import Batch
from moe.errors import InputError
from moe.sharding import constrain
from moe.transformer import Transformer


def exposure(
    model: Transformer,
    variables: Any,
    evaluation_set: EvaluationSet,
    *,
    teacher: Transformer,
    teacher_variables: Any,
    rollout: Rollout,
    batch_size: int,
    seed: int = 0,
) -> Estimate:
    """Measures KL(teacher || model) where the model has to go on from what it wrote itself.

    Prompts are cut from the held-out rows, the model completes them, and the divergence is summed
    over the completions: beside the KL on held-out text, which is summed over what people wrote, it
    tells what the model's own mistakes lead to.

    Args:
        model: that writes and is judged.
        variables: unboxed.
        evaluation_set: the same for every model that is to be compared.
        teacher: on the same vocabulary.
        teacher_variables: unboxed.
        rollout: length and temperature of completions; its shares are not read.
        batch_size: rows a step, over all devices.
        seed: of what is drawn, and of the resampling.

    Returns:
        Nats per written token, with a 95 % bootstrap interval over documents.

    Raises:
        InputError: where no held-out row is long enough for a prompt and a token after it.
    """
    rows = own_text(
        model, variables, evaluation_set, rollout=rollout, batch_size=batch_size, seed=seed
    )
    measured = evaluate(
        model,
        variables,
        rows,
        teacher=teacher,
        teacher_variables=teacher_variables,
        batch_size=batch_size,
    )
    assert measured.kl is not None
    return ratio(measured.kl, measured.tokens, seed=seed)


def own_text(
    model: Transformer,
    variables: Any,
    evaluation_set: EvaluationSet,
    *,
    rollout: Rollout,
    batch_size: int,
    seed: int,
) -> EvaluationSet:
    """Lets a model complete a prompt of every held-out row, see `distill.prompts`.

    Returns:
        The set with rows of prompts and completions, of which the completions alone count; a row
        that has no prompt counts nothing. Bytes stay those of the documents.
    """
    key = jax.random.key(seed)
    written: list[Batch] = []
    for number, (batch, _) in enumerate(evaluation_set.batches(batch_size)):
        rows = _completed(
            model, rollout, variables, placed(batch, model.mesh), jax.random.fold_in(key, number)
        )
        written.append(jax.tree.map(np.asarray, rows))
    count = len(evaluation_set.document_index)
    rows = {
        name: np.concatenate([getattr(batch, name) for batch in written])[:count]
        for name in evaluation_set.rows
    }
    if not rows['mask'].any():
        raise InputError(
            'Own text needs a held-out row of two tokens or more, to cut a prompt from; received '
            f'{count} rows of at most one. Hold out longer documents.'
        )
    return dataclasses.replace(evaluation_set, rows=rows)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _completed(
    model: Transformer, rollout: Rollout, variables: Any, batch: Batch, key: Key[Array, '']
) -> Batch:
    prompts = cut_prompts(batch, rollout.config.max_new_tokens)
    author = Author(model, variables)
    chosen = prompts.lengths > 0
    rows = as_rows(complete(rollout, author, prompts, chosen, key), rollout.pad_id)
    rows = dataclasses.replace(rows, mask=rows.mask & chosen[:, None])
    # Every process has all rows.
    return jax.tree.map(lambda x: constrain(x, (None,) * jnp.ndim(x), model.mesh), rows)
