"""Which exams the models of a study sit; none, unless they are asked for."""

import dataclasses
import os

from distill.needle import TOWNS
from moe.config import require
from moe.errors import InputError


@dataclasses.dataclass(frozen=True)
class GSM8KConfig:
    """School problems in words.

    Attributes:
        test: the file of problems, `.jsonl` of `question` and `answer`; None for no such exam.
        train: that solved examples are drawn from.
        shots: examples before each question.
        max_new_tokens: of an answer.
    """

    test: str | None = None
    train: str | None = None
    shots: int = 5
    max_new_tokens: int = 256

    def __post_init__(self) -> None:
        require(self.shots >= 0, 'gsm8k.shots', 'zero or more', self.shots)
        require(self.max_new_tokens > 0, 'gsm8k.max_new_tokens', 'positive', self.max_new_tokens)
        if self.test is not None and self.shots and self.train is None:
            raise InputError(
                f'gsm8k.train must be the file that {self.shots} solved examples are drawn from; '
                'received None. Give it, or set gsm8k.shots to 0.'
            )
        for name in ('test', 'train'):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, os.path.expanduser(value))


@dataclasses.dataclass(frozen=True)
class NeedleConfig:
    """Facts in long texts.

    Attributes:
        lengths: of the texts, tokens; none for no such exam.
        depths: where the fact stands, from 0 to 1.
        trials: questions of each length and depth.
        keys: facts in a text, that the model chooses between.
    """

    lengths: tuple[int, ...] = ()
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    trials: int = 8
    keys: int = 4

    def __post_init__(self) -> None:
        require(all(n > 0 for n in self.lengths), 'needle.lengths', 'positive', self.lengths)
        inside = self.depths and all(0 <= depth <= 1 for depth in self.depths)
        require(bool(inside), 'needle.depths', 'one or more, from 0 to 1', self.depths)
        require(self.trials > 0, 'needle.trials', 'positive', self.trials)
        require(2 <= self.keys <= len(TOWNS), 'needle.keys', f'2 to {len(TOWNS)}', self.keys)


@dataclasses.dataclass(frozen=True)
class ExamConfig:
    """Exams of every model.

    Attributes:
        tasks: of lm-eval, by name; they need the extra `eval`, and their data on this machine.
        tasks_path: a folder of more tasks' YAML files.
        shots: examples before each question of those; None for what each task says.
        limit: questions of a task, and of GSM8K, at most; None for all.
        chat: whether tasks and GSM8K are asked as conversations, by the chat template of the
            model's tokenizer.
        system: what such a conversation begins with; None for what the task says, if anything.
        multiturn: whether examples are turns of their own, rather than a part of the question's.
        gsm8k: school problems, by our own sampler.
        needle: facts in long texts.
        rows: texts that are run at once.
        max_length: tokens of a question and its answer.
    """

    tasks: tuple[str, ...] = ()
    tasks_path: str | None = None
    shots: int | None = None
    limit: int | None = None
    chat: bool = False
    system: str | None = None
    multiturn: bool = True
    gsm8k: GSM8KConfig = dataclasses.field(default_factory=GSM8KConfig)
    needle: NeedleConfig = dataclasses.field(default_factory=NeedleConfig)
    rows: int = 8
    max_length: int = 2048

    def __post_init__(self) -> None:
        for name in ('limit', 'rows', 'max_length'):
            value = getattr(self, name)
            require(value is None or value > 0, f'exams.{name}', 'positive', value)
        require(self.shots is None or self.shots >= 0, 'exams.shots', 'zero or more', self.shots)
        if self.system is not None and not self.chat:
            raise InputError(
                f'exams.system needs exams.chat=True; received {self.system!r} and False. Set it, '
                'or leave the system turn out.'
            )
        if not (self.multiturn or self.chat):
            raise InputError(
                'exams.multiturn=False is of conversations, with exams.chat=True; received False. '
                'Set it, or leave multiturn at True.'
            )
        longest = max(self.needle.lengths, default=0)
        require(
            longest <= self.max_length,
            'exams.max_length',
            f'at least the longest of needle.lengths, {longest}',
            self.max_length,
        )
        if self.tasks_path is not None:
            object.__setattr__(self, 'tasks_path', os.path.expanduser(self.tasks_path))

    def require_asked_of(self, folder: str | None) -> None:
        """Refuses conversations where no folder with a chat template can come with the models.

        Args:
            folder: that a study's tokenizer is from; None where it is made from text.
        """
        if self.chat and folder is None:
            raise InputError(
                'exams.chat=True needs a tokenizer from a folder with a chat template, such as '
                'that of config.teacher.checkpoint; received config.data.tokenizer alone, which '
                'has none. Ask in plain text: exams.chat=False.'
            )

    @property
    def any(self) -> bool:
        """Whether there is an exam to sit."""
        return bool(self.names)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the exams to sit."""
        gsm8k = ('gsm8k',) if self.gsm8k.test else ()
        return (*self.tasks, *gsm8k, *(('needle',) if self.needle.lengths else ()))
