"""The exams that a model sits: tasks of lm-eval, school problems, facts in long texts."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from distill import gsm8k
from distill.exams import Exam, exam_summary, graded
from distill.gsm8k import Problem, read_problems
from distill.needle import needle
from distill.tokenizer import Tokenizer
from experiments.chat_prompts import required_chat
from experiments.exam_config import ExamConfig, NeedleConfig
from experiments.examinee import Examinee, Question
from experiments.harness import require_tasks, run_tasks
from moe.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class Sat:
    """What one model did in its exams.

    Attributes:
        exams: its scores.
        needle: its share of right choices for each length and depth, where that was asked.
    """

    exams: list[Exam]
    needle: list[dict[str, Any]]


def sit(examinee: Examinee, config: ExamConfig, *, seed: int) -> Sat:
    """Has a model sit every exam that is asked for.

    Args:
        examinee: that sits them.
        config: which.
        seed: of the examples and of the texts with needles; alike for models to be compared.

    Raises:
        InputError: for a task or a file that is not there, or questions that are too long.
    """
    exams, cells = [], []
    if config.tasks:
        exams += run_tasks(examinee, config, seed=seed)
    if config.gsm8k.test is not None:
        exams.append(_sit_gsm8k(examinee, config, seed))
    if config.needle.lengths:
        found, cells = _sit_needle(examinee, config.needle, seed)
        exams += found
    return Sat(exams, cells)


def results(sat: dict[str, Sat], *, seed: int) -> dict[str, Any]:
    """Lays out what several models did, for the summary: `exams` and, where asked, `needle`.

    Args:
        sat: by model, in the order of the report; the teacher is who the others are compared with.
        seed: of the intervals.
    """
    rows: dict[str, Any] = {
        'exams': exam_summary({name: one.exams for name, one in sat.items()}, seed=seed)
    }
    if any(one.needle for one in sat.values()):
        rows['needle'] = {name: one.needle for name, one in sat.items()}
    return rows


def require_sittable(config: ExamConfig, tokenizers: Sequence[Tokenizer]) -> None:
    """Checks what can be checked before there are models: they may take long to train.

    Args:
        config: which exams.
        tokenizers: of the models to be.

    Raises:
        InputError: for a library, a task, a file or a chat template that is not there.
    """
    if config.tasks:
        require_tasks(config)
    if config.gsm8k.test is not None:
        _problems(config, seed=0)
    if config.chat:
        for tokenizer in tokenizers:
            required_chat(tokenizer)


def make_examinee(
    model: Transformer, variables: Any, tokenizer: Tokenizer, config: ExamConfig
) -> Examinee:
    """Makes a model sit as the config says.

    Raises:
        InputError: where conversations are asked and the tokenizer has no chat template, or the
            extra `chat` is not installed.
    """
    chat = required_chat(tokenizer) if config.chat else None
    rows, max_length = config.rows, config.max_length
    return Examinee(model, variables, tokenizer, rows=rows, max_length=max_length, chat=chat)


def _sit_gsm8k(examinee: Examinee, config: ExamConfig, seed: int) -> Exam:
    """Has a model write its answers, each with its likeliest tokens."""
    exam, chat = config.gsm8k, examinee.chat
    problems, examples = _problems(config, seed)

    def ask(question: str) -> str:
        if chat is None:
            return gsm8k.prompt(examples, question)
        turns = gsm8k.conversation(
            examples, question, system=config.system, multiturn=config.multiturn
        )
        return chat.template.render(turns, add_generation_prompt=True)

    rendered = chat is not None
    questions = [
        Question(ask(p.question), exam.max_new_tokens, (gsm8k.STOP,), rendered=rendered)
        for p in problems
    ]
    answers = examinee.write(questions)
    grades = [gsm8k.is_correct(*pair) for pair in zip(answers, problems, strict=True)]
    return graded('gsm8k exact match', grades)


def _problems(config: ExamConfig, seed: int) -> tuple[list[Problem], list[Problem]]:
    """Reads the problems that are asked, and the solved examples."""
    exam = config.gsm8k
    assert exam.test is not None
    problems = read_problems(exam.test)[: config.limit]
    if not exam.shots:
        return problems, []
    assert exam.train is not None
    return problems, gsm8k.draw_examples(read_problems(exam.train), exam.shots, seed)


def _sit_needle(
    examinee: Examinee, config: NeedleConfig, seed: int
) -> tuple[list[Exam], list[dict[str, Any]]]:
    """Has a model choose between the numbers in a text, by how likely it holds each.

    A choice is right where the right number is strictly likelier than every other; it is also
    recited where the likeliest token at each step writes it.
    """
    grid = list(itertools.product(config.lengths, config.depths))
    right, recited = np.zeros((2, len(grid), config.trials))
    for cell, (length, depth) in enumerate(grid):
        asked = [
            needle(
                lambda text: len(examinee.encode(text)),
                length=length,
                depth=depth,
                seed=(seed, length, round(depth * 1_000_000), trial),
                keys=config.keys,
            )
            for trial in range(config.trials)
        ]
        pairs = [examinee.split(one.text, choice) for one in asked for choice in one.choices]
        scored = np.array(examinee.score(pairs), object).reshape(config.trials, config.keys)
        for trial, (answer, *others) in enumerate(scored):
            right[cell, trial] = answer.log_prob > max(other.log_prob for other in others)
            recited[cell, trial] = answer.is_greedy
    cells = [
        {'length': length, 'depth': depth, 'value': float(hits.mean()), 'questions': config.trials}
        for (length, depth), hits in zip(grid, right, strict=True)
    ]
    chosen = graded(f'needle chosen of {config.keys}', right.ravel())
    return [chosen, graded('needle recited', recited.ravel())], cells
