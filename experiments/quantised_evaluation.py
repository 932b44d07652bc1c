"""What a student loses and saves where its matrices are quantised, measured here."""

import functools
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill.evaluate import evaluate, summarize
from distill.timing import interleaved_medians
from experiments.context import Context
from experiments.loading import unstacked
from moe.decode import write
from moe.quantised import Weights
from moe.quantising import quantise
from moe.sampling import Sampling
from moe.transformer import Transformer
from moe.weights.tree_file import save_tree

# Tokens of a prompt, of the shorter text and of the longer: what lies between is decoding alone.
_PROMPT, _SHORT, _LONG = 16, 8, 72
_REPEATS = 3


def measure_quantised(
    context: Context,
    kinds: tuple[Weights, ...],
    student: tuple[Transformer, Any],
    trained: tuple[Weights, Any] | None,
) -> list[dict[str, Any]]:
    """Measures the student in floats, in each kind of weights, and trained on for one of them.

    Args:
        context: of the study, on one device.
        kinds: keys of `moe.quantised.FORMATS`.
        student: the model and its variables, which are given up.
        trained: what the stage 'quantise' trained it for, and its variables, which are given up.

    Returns:
        Rows as `summary['quantised']` has them: bytes on disk and in memory of all arrays, tokens a
        second of greedy decoding at batch 1, bits per byte and KL from the student in floats.
    """
    config = student[0].config
    model, floats = unstacked(*student, context.mesh)
    forms: dict[tuple[str, bool], Any] = {(config.param_dtype, False): floats}
    forms |= {(kind, False): quantise(model, floats, kind) for kind in kinds}
    if trained is not None:
        kind, variables = trained
        own = unstacked(student[0], variables, context.mesh)[1]
        forms[kind, True] = quantise(model, own, kind)
    speeds = _decoding(model, forms)
    return [
        {
            'weights': weights,
            'trained': is_trained,
            'bytes_on_disk': _on_disk(variables),
            'bytes_in_memory': sum(map(_bytes, jax.tree.leaves(variables))),
            'tokens_per_second': speeds[weights, is_trained],
            **_quality(context, model, variables, floats),
        }
        for (weights, is_trained), variables in forms.items()
    ]


def _on_disk(variables: Any) -> int:
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder, 'model.safetensors')
        save_tree(file, variables)
        return file.stat().st_size


def _bytes(leaf: jax.Array) -> int:
    """Of an array, whose integers of 4 bits XLA keeps two to a byte."""
    bits = 4 if leaf.dtype == jnp.int4 else 8 * leaf.dtype.itemsize
    return -(-leaf.size * bits // 8)


def _quality(context: Context, model: Transformer, variables: Any, floats: Any) -> dict[str, Any]:
    evaluation = evaluate(
        model,
        variables,
        context.held_out,
        teacher=model,
        teacher_variables=floats,
        batch_size=context.study.evaluate.batch_size,
    )
    found = summarize(evaluation, seed=context.study.seed)
    figures = {'bits_per_byte': found['bits_per_byte']}
    # From itself the student in floats has nothing to be measured.
    return (
        figures if variables is floats else figures | {'kl_from_student': found['kl_from_teacher']}
    )


def _decoding(model: Transformer, forms: dict[Any, Any]) -> dict[Any, float]:
    """Times all in turn, so that what else the machine does falls on each of them."""
    prompt = np.arange(_PROMPT)[None] % model.config.vocab_size
    settings: Any = {'sampling': Sampling(0.0), 'key': jax.random.key(0)}

    def text(variables: Any, length: int) -> Any:
        return write(model, variables, prompt, max_new_tokens=length, **settings).tokens

    functions: dict[str, Callable[[], Any]] = {
        f'{form}/{length}': functools.partial(text, variables, length)
        for form, variables in forms.items()
        for length in (_SHORT, _LONG)
    }
    seconds = interleaved_medians(functions, repeats=_REPEATS)
    return {
        form: (_LONG - _SHORT) / (seconds[f'{form}/{_LONG}'] - seconds[f'{form}/{_SHORT}'])
        for form in forms
    }
