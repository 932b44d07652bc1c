"""How a remote teacher is reached, asked and paid, as a config describes it."""

import dataclasses
import os
import re
from typing import Literal

from distill.asking import Manner
from distill.backoff import Backoff
from distill.budget import Limits
from distill.remote import RemoteServer, require_plain_url
from moe.errors import InputError
from moe.validation import require

_VARIABLE = re.compile(r'[A-Za-z_][A-Za-z0-9_]*')
# Longer names are keys that were put where their variable's name belongs.
_LONGEST_NAME = 64


@dataclasses.dataclass(frozen=True)
class RemoteConfig:
    """A server that speaks OpenAI's protocol; read where config.teacher.source='remote'.

    Attributes:
        base_url: such as 'https://host/v1'.
        model: as the server calls it.
        tokenizer: the folder of the teacher's tokenizer, of a published model or of a study of
            ours, which its log-probabilities are read with; None for that of config.data.
        api_key_variable: the environment variable that holds the key; None where none is needed.
        concurrency: requests at one time.
        timeout: seconds of one request.
        attempts: of one request, the first included.
        first_wait: seconds that the first wait is below; the next ones are twice as long.
        longest_wait: seconds that a wait is below, but one that the server asks for.
        max_tokens: that all prompts and answers of a ledger may have; None for no limit.
        max_dollars: that they may cost; None for no limit.
        prompt_price: dollars for a million tokens of prompts; None where it is not known.
        written_price: dollars for a million tokens that are written.
        scoring: how log-probabilities are asked for by the stage `targets`: 'echo' and
            'prompt_logprobs' score the study's text, as servers offer; 'written' takes those that
            came with the texts that `experiments.remote` had written.
        tokens_as_ids: whether tokens are asked for by their ids, as vLLM and `experiments.serve`
            know it; else they are told by their text.
        temperature: of the texts.
        top_p: of the texts.
        max_new_tokens: of each text.
        prompt: of a row of the file of prompts: a text in which each `{name}` stands for that of a
            field; None for rows with `prompt` or `messages`.
        top_log_probs: ids listed beside each token of a text; 0 for none.
        keep_cut: whether texts that were cut off at `max_new_tokens` are data too; an end is put
            behind them like behind any other.
    """

    base_url: str | None
    model: str | None
    tokenizer: str | None
    api_key_variable: str | None
    concurrency: int
    timeout: float
    attempts: int
    first_wait: float
    longest_wait: float
    max_tokens: int | None
    max_dollars: float | None
    prompt_price: float | None
    written_price: float | None
    scoring: Literal['echo', 'prompt_logprobs', 'written']
    tokens_as_ids: bool
    temperature: float
    top_p: float
    max_new_tokens: int
    prompt: str | None
    top_log_probs: int
    keep_cut: bool

    def __post_init__(self) -> None:
        self.manner()
        require(self.timeout > 0, 'timeout', 'positive seconds', self.timeout)
        if self.base_url is not None:
            require_plain_url(self.base_url)
        name = self.api_key_variable
        if name is not None and (len(name) > _LONGEST_NAME or not _VARIABLE.fullmatch(name)):
            raise InputError(
                'api_key_variable must be the name of an environment variable that holds the key, '
                'not the key itself, which no config may hold; what was received is no name.'
            )
        require(0 <= self.temperature <= 2, 'temperature', 'from 0 to 2', self.temperature)
        require(0 < self.top_p <= 1, 'top_p', 'above 0, up to 1', self.top_p)
        require(self.max_new_tokens >= 1, 'max_new_tokens', 'at least 1', self.max_new_tokens)
        require(self.top_log_probs >= 0, 'top_log_probs', 'zero or more', self.top_log_probs)
        if self.tokenizer is not None:
            object.__setattr__(self, 'tokenizer', os.path.expanduser(self.tokenizer))

    def manner(self) -> Manner:
        """How the server is asked."""
        return Manner(
            concurrency=self.concurrency,
            backoff=Backoff(self.attempts, self.first_wait, self.longest_wait),
            limits=Limits(self.max_tokens, self.max_dollars, self.prompt_price, self.written_price),
        )

    def server(self) -> RemoteServer:
        """Where it is; the key comes from the environment, and goes nowhere else.

        Raises:
            InputError: where the variable is not set.
        """
        assert self.base_url is not None
        assert self.model is not None
        key = None
        if self.api_key_variable is not None:
            key = os.environ.get(self.api_key_variable)
            if not key:
                raise InputError(
                    f'The environment variable {self.api_key_variable} must hold the key of the '
                    'remote teacher (config.teacher.remote.api_key_variable); it is not set. '
                    'Export it, or name another.'
                )
            if not (key.isascii() and key.isprintable()) or ' ' in key:
                raise InputError(
                    f'The environment variable {self.api_key_variable} must hold a key of '
                    'printable characters without spaces or ends of lines, as a header takes it; '
                    'it holds others. Export the key alone.'
                )
        return RemoteServer(self.base_url, self.model, key, self.timeout)
