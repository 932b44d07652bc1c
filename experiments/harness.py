"""Tasks of lm-eval, sat by one of our models; the library is the extra `eval`."""

import dataclasses
import difflib
import importlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from distill.exams import Exam
from experiments.exam_config import ExamConfig
from experiments.examinee import Examinee, Question
from moe.errors import InputError
from moe.sampling import Sampling

_MAX_NEW_TOKENS = 256
# For the standard errors of metrics that are no means.
_RESAMPLES = 2000
_SAMPLING = ('temperature', 'top_k', 'top_p', 'min_p', 'repetition_penalty')


def require_tasks(config: ExamConfig) -> None:
    """Checks that tasks could be sat, but for their data.

    Raises:
        InputError: where lm-eval is not installed, or a task is unknown.
    """
    _library()
    _manager(config)


def run_tasks(examinee: Examinee, config: ExamConfig, *, seed: int) -> list[Exam]:
    """Has a model sit tasks of lm-eval.

    Args:
        examinee: that sits them.
        config: which tasks, and how many questions of each.
        seed: of the few-shot examples.

    Returns:
        An exam for each metric of each task and group, in the order of their names.

    Raises:
        InputError: where lm-eval is not installed, a task is unknown, or its data are not here.
    """
    library = _library()
    # Its bootstrap forks, which a process that runs JAX must not.
    os.environ.setdefault('DISABLE_MULTIPROC', '1')
    manager = _manager(config)
    try:
        results = library.simple_evaluate(
            model=harness_model(examinee, seed=seed),
            tasks=list(config.tasks),
            task_manager=manager,
            num_fewshot=config.shots,
            apply_chat_template=config.chat,
            fewshot_as_multiturn=config.multiturn,
            system_instruction=config.system,
            limit=config.limit,
            bootstrap_iters=_RESAMPLES,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    except OSError as error:
        raise InputError(
            f'The data of {", ".join(config.tasks)} must be on this machine; they cannot be read: '
            f'{error}. Fetch them where there is a network, or name a folder of tasks of your own '
            'with tasks_path.'
        ) from error
    return list(_exams(results))


def _library() -> Any:
    try:
        return importlib.import_module('lm_eval')
    except ImportError as error:
        raise InputError(
            "Tasks of lm-eval need the extra 'eval': pip install 'fractional[eval]'."
        ) from error


def _manager(config: ExamConfig) -> Any:
    """Finds the tasks: in the user's folder alone where all are there, as the others take long."""
    manager = importlib.import_module('lm_eval.tasks').TaskManager
    found = None
    if config.tasks_path is not None:
        found = manager(include_path=config.tasks_path, include_defaults=False)
    if found is None or set(config.tasks) - set(found.all_tasks):
        found = manager(include_path=config.tasks_path)
    unknown = sorted(set(config.tasks) - set(found.all_tasks))
    if unknown:
        near = difflib.get_close_matches(unknown[0], found.all_tasks, n=3)
        hint = f' Near to {unknown[0]!r}: {", ".join(near)}.' if near else ''
        raise InputError(f'lm-eval has no task {", ".join(map(repr, unknown))}.{hint}')
    return found


def harness_model(examinee: Examinee, *, seed: int = 0) -> Any:
    """Returns an `lm_eval.api.model.LM` that answers with a model of ours.

    With a chat template, lm-eval has every context of a continuation or an answer rendered by it;
    texts that are scored whole, and contexts that are empty, stay as they are.

    Args:
        examinee: the model.
        seed: of texts that are drawn rather than taken as likeliest.
    """
    base: Any = importlib.import_module('lm_eval.api.model').LM
    chat = examinee.chat

    class HarnessModel(base):
        """The three questions that lm-eval has, each a list of requests with `args`."""

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            pairs = [
                examinee.split(context, rest, rendered=chat is not None and context != '')
                for context, rest in (request.args for request in requests)
            ]
            return [(scored.log_prob, scored.is_greedy) for scored in examinee.score(pairs)]

        def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
            return _rolling(examinee, [request.args[0] for request in requests])

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            drawn = enumerate(request.args for request in requests)
            questions = [
                _question(text, wanted, (seed + at) % 2**32) for at, (text, wanted) in drawn
            ]
            if chat is not None:
                questions = [dataclasses.replace(one, rendered=True) for one in questions]
            return examinee.write(questions)

        def apply_chat_template(
            self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
        ) -> str:
            """Renders a conversation; without a prompt to answer, its last turn stays open."""
            assert chat is not None
            if add_generation_prompt:
                return chat.template.render(chat_history, add_generation_prompt=True)
            return chat.template.render_begun(chat_history)

        @property
        def tokenizer_name(self) -> str:
            return examinee.tokenizer.fingerprint

        def chat_template(self, chat_template: bool | str = False) -> str:
            return chat.template.source if chat_template and chat is not None else ''

    return HarnessModel()


def _rolling(examinee: Examinee, texts: Sequence[str]) -> list[float]:
    """Adds up the log-probabilities of every token of each text.

    What is longer than `max_length` is cut into windows as lm-eval cuts it: each token is predicted
    once, and the last window has as much context as there is room for.
    """
    utils = importlib.import_module('lm_eval.utils')
    pairs, owners = [], []
    for owner, text in enumerate(texts):
        bos, *ids = examinee.encode(text)
        windows = utils.get_rolling_token_windows(ids, bos, examinee.max_length - 1, 1)
        pairs += [utils.make_disjoint_window(window) for window in windows]
        owners += [owner] * (len(pairs) - len(owners))
    totals = [0.0] * len(texts)
    for owner, scored in zip(owners, examinee.score(pairs), strict=True):
        totals[owner] += scored.log_prob
    return totals


def _question(text: str, wanted: dict[str, Any], seed: int) -> Question:
    """Reads a task's `generation_kwargs` as lm-eval's own models do: greedy unless told to draw."""
    utils = importlib.import_module('lm_eval.models.utils')
    settings = dict(utils.normalize_gen_kwargs(wanted, _MAX_NEW_TOKENS))
    stops, tokens = settings.pop('until'), settings.pop('max_gen_toks')
    if not settings.pop('do_sample'):
        settings['temperature'] = 0.0
    unknown = sorted(set(settings) - set(_SAMPLING))
    if unknown:
        raise InputError(
            f'generation_kwargs of a task may be until, max_gen_toks, do_sample, '
            f'{", ".join(_SAMPLING)}; received {", ".join(unknown)}.'
        )
    sampling = Sampling(**settings)
    return Question(text, tokens, tuple(stop for stop in stops if stop), sampling, seed)


def _exams(results: dict[str, Any]) -> Iterator[Exam]:
    """Yields each metric of the results, with the grades of its questions where it is their mean.

    lm-eval spells a metric as 'acc,none': its name, and the filter that the answers went through.
    """
    for task, row in results['results'].items():
        better = results.get('higher_is_better', {}).get(task, {})
        for key, value in row.items():
            metric, _, chosen = key.partition(',')
            if not chosen or metric.endswith('_stderr') or not isinstance(value, int | float):
                continue
            name = f'{task} {metric}' + ('' if chosen == 'none' else f' ({chosen})')
            error = row.get(f'{metric}_stderr,{chosen}')
            samples = [s for s in results['samples'].get(task, ()) if s['filter'] == chosen]
            grades = _grades(samples, metric, value)
            questions = len(samples) or int(row.get('sample_len', 0))
            yield Exam(
                name,
                float(value),
                float(error) if isinstance(error, int | float) else None,
                questions,
                grades,
                better.get(metric),
            )


def _grades(samples: list[Any], metric: str, value: float) -> np.ndarray | None:
    """Returns the numbers of the questions, where their mean is the metric."""
    numbers = [sample.get(metric) for sample in samples]
    if not numbers or not all(isinstance(n, int | float) for n in numbers):
        return None
    grades = np.array(numbers, np.float64)
    return grades if np.isclose(grades.mean(), value) else None
