"""Prompts as requests to a remote teacher, and its texts as data that a study reads."""

import collections
import dataclasses
import json
import os
import pathlib
from typing import Any

from distill.answer_ledger import AnswerLedger
from distill.asking import MalformedError
from distill.remote import Request
from distill.token_names import TokenNames
from distill.token_scores import top_rows, written
from distill.written_targets import bytes_before
from experiments.bulk import Prompt
from experiments.study import StudyConfig
from experiments.tokenizers import remote_tokenizer
from moe.errors import InputError

LEDGER, TEXTS = 'ledger.jsonl', 'texts.jsonl'
# A chat template puts text of its own around messages, sometimes a system prompt of a page.
_TEMPLATE_TOKENS, _MESSAGE_TOKENS, _PROMPT_TOKENS = 512, 16, 8


class Texts:
    """What prompts ask, and what becomes of the answers.

    Args:
        study: with a remote teacher.
        prompts: of one kind, conversations or texts.

    Attributes:
        requests: one for each prompt, in their order.

    Raises:
        InputError: where there are prompts of both kinds.
    """

    def __init__(self, study: StudyConfig, prompts: list[Prompt]) -> None:
        kinds = {prompt.messages is None for prompt in prompts}
        if len(kinds) > 1:
            raise InputError(
                "A file of prompts must have either 'messages' or 'prompt' in every line, which "
                'become data of another field each; received both. Split it, and give each a '
                'workdir.'
            )
        self._config = study.teacher.remote
        self._provenance = dataclasses.asdict(study.teacher.provenance)
        self._seed = study.seed
        self._prompts = prompts
        self._names: TokenNames | None = None
        self._tokenizer: str | None = None
        if self._config.top_log_probs:
            tokenizer = remote_tokenizer(self._config.tokenizer, study.data.tokenizer)
            self._names, self._tokenizer = TokenNames(tokenizer), tokenizer.fingerprint
        seen: collections.Counter[str] = collections.Counter()
        self.requests: list[Request] = []
        for prompt in prompts:
            request = self._request(prompt)
            # The same prompt twice is two texts; where it stands in the file is no matter.
            number = seen[request.key]
            seen[request.key] += 1
            self.requests.append(self._request(prompt, number))

    def terms(self) -> dict[str, Any]:
        """What every text depends on besides its prompt; the server may be moved."""
        config = self._config
        return {
            'kind': 'texts',
            'model': config.model,
            'provenance': self._provenance,
            'seed': self._seed,
            'temperature': config.temperature,
            'top_p': config.top_p,
            'max_new_tokens': config.max_new_tokens,
            'top_log_probs': config.top_log_probs,
            'tokenizer': self._tokenizer,
        }

    def read(self, request: Request, answer: dict[str, Any]) -> dict[str, Any]:
        """Reads an answer into what is kept of it; see `distill.asking.ask_all`."""
        choices = answer.get('choices')
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise MalformedError('the answer does not hold one choice')
        choice, chat = choices[0], request.path != 'completions'
        message = choice.get('message') if chat else choice
        text = message.get('content' if chat else 'text') if isinstance(message, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise MalformedError('the answer holds no text')
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise MalformedError('the text holds half of a surrogate pair') from error
        finish = choice.get('finish_reason')
        if finish not in ('stop', 'length'):
            raise MalformedError(f'the text ended by {finish!r}, neither a stop nor its length')
        record = {'text': text, 'finish': finish, 'model': answer.get('model')}
        if self._names is None:
            return record
        tokens, entries = written(choice, self._names)
        top = top_rows(entries, self._config.top_log_probs, len(self._names.table))
        return record | {
            'before': bytes_before(tokens, text),
            'lengths': [len(token) for token in tokens],
            'top': top.packed(),
        }

    def write(self, ledger: AnswerLedger, file: pathlib.Path) -> collections.Counter[str]:
        """Writes a line for each text that there is; the file is whole at any time.

        Returns:
            How many `texts` there are, how many were `cut` off and left out, and `quarantined`.
        """
        counts: collections.Counter[str] = collections.Counter()
        partial = file.with_name(f'.{file.name}.partial')
        with partial.open('w', encoding='utf-8') as lines:
            for prompt, request in zip(self._prompts, self.requests, strict=True):
                outcome = ledger.outcome(request.key)
                if outcome == 'answered':
                    record = ledger.entry(request.key)['record']
                    cut = record['finish'] == 'length' and not self._config.keep_cut
                    counts['cut' if cut else 'texts'] += 1
                    if not cut:
                        row = self._row(prompt, request, record)
                        lines.write(json.dumps(row, ensure_ascii=False) + '\n')
                elif outcome == 'quarantined':
                    counts['quarantined'] += 1
            lines.flush()
            os.fsync(lines.fileno())
        partial.replace(file)
        return counts

    def _request(self, prompt: Prompt, occurrence: int = 0) -> Request:
        config = self._config
        body: dict[str, Any] = {
            'temperature': config.temperature,
            'top_p': config.top_p,
            'max_tokens': config.max_new_tokens,
        }
        size = len(prompt.text.encode())
        if prompt.messages is None:
            body |= {'prompt': prompt.text}
            body |= {'logprobs': config.top_log_probs} if config.top_log_probs else {}
            if config.top_log_probs and config.tokens_as_ids:
                body['return_tokens_as_token_ids'] = True
            most, path = size + _PROMPT_TOKENS, 'completions'
        else:
            body |= {'messages': prompt.messages}
            if config.top_log_probs:
                body |= {'logprobs': True, 'top_logprobs': config.top_log_probs}
            most = size + _TEMPLATE_TOKENS + _MESSAGE_TOKENS * len(prompt.messages)
            path = 'chat/completions'
        request = Request(path, body, most, config.max_new_tokens, occurrence)
        # A seed of the prompt's own, which depends on no other prompt.
        seed = (self._seed * 1_000_003 + int(request.key[:8], 16)) % 2**31
        return dataclasses.replace(request, body=body | {'seed': seed})

    def _row(self, prompt: Prompt, request: Request, record: dict[str, Any]) -> dict[str, Any]:
        if prompt.messages is None:
            said: dict[str, Any] = {'text': prompt.text + record['text']}
        else:
            answer = {'role': 'assistant', 'content': record['text']}
            said = {'messages': [*prompt.messages, answer]}
        return {
            **({} if prompt.id is None else {'id': prompt.id}),
            **said,
            'licence': self._provenance['licence'],
            'teacher': self._provenance,
            'model': record['model'],
            'finish': record['finish'],
            'key': request.key,
        }
