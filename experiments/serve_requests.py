"""Bodies of OpenAI completions and chat completions, read strictly, into requests."""

import dataclasses
import secrets
from collections.abc import Callable, Mapping
from typing import Any

from distill.formats import message_text
from distill.tokenizer import Tokenizer
from experiments.chat_prompts import ChatPrompts
from experiments.serve_errors import ApiError
from moe.errors import InputError
from moe.requests import MAX_SEED, EngineConfig, Request
from moe.sampling import Sampling

# What a conversation's next turn starts with: the model is not to write the user's.
NEXT_TURN = '\n\nuser:'
DEFAULT_TOKENS = 16  # of a completion, as OpenAI has it


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a body asks for.

    Attributes:
        chat: whether it is a conversation.
        requests: one for each choice.
        stops: strings that end a text.
        stream: whether to answer as it is written.
        usage: whether a stream ends with the counts of tokens.
        log_probs: whether to give log-probabilities.
        echo: whether a completion begins with its prompt.
        token_ids: whether tokens are named by their ids.
    """

    chat: bool
    requests: tuple[Request, ...]
    stops: tuple[str, ...]
    stream: bool
    usage: bool
    log_probs: bool
    echo: bool
    token_ids: bool


_Check = Callable[[Any], bool]


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_stop(value: Any) -> bool:
    texts = [value] if isinstance(value, str) else value
    return isinstance(texts, list) and len(texts) <= 4 and all(_is_text(text) for text in texts)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_zero(value: Any) -> bool:
    return _is_number(value) and value == 0


def _is_empty(value: Any) -> bool:
    return value in ('', [], {})


# Field -> whether a value will do, and what does; null is as good as leaving a field out.
_COMMON: dict[str, tuple[_Check, str]] = {
    'model': (lambda value: isinstance(value, str), 'the name of a model'),
    'max_tokens': (lambda value: _is_int(value) and value >= 0, 'a count of tokens'),
    'temperature': (lambda value: _is_number(value) and 0 <= value <= 2, 'from 0 to 2'),
    'top_p': (lambda value: _is_number(value) and 0 < value <= 1, 'in (0, 1]'),
    'top_k': (lambda value: _is_int(value) and value >= 0, 'a count of tokens, or 0 for all'),
    'min_p': (lambda value: _is_number(value) and 0 <= value <= 1, 'from 0 to 1'),
    'repetition_penalty': (lambda value: _is_number(value) and 0 < value <= 100, 'in (0, 100]'),
    'n': (lambda value: _is_int(value) and 1 <= value <= 128, 'from 1 to 128'),
    'seed': (_is_int, 'an integer'),
    'stop': (_is_stop, 'a text, or up to 4 of them'),
    'stream': (_is_bool, 'true or false'),
    'stream_options': (lambda value: isinstance(value, dict), 'an object'),
    'user': (lambda value: isinstance(value, str), 'a text'),
    'presence_penalty': (_is_zero, '0: it is not supported here'),
    'frequency_penalty': (_is_zero, '0: it is not supported here; see repetition_penalty'),
    'logit_bias': (_is_empty, 'empty: it is not supported here'),
    'return_tokens_as_token_ids': (_is_bool, 'true or false'),
}
_COMPLETION = _COMMON | {
    'prompt': (lambda value: isinstance(value, str | list), 'a text, ids, or a list of either'),
    'logprobs': (_is_int, 'a count of tokens'),
    'echo': (_is_bool, 'true or false'),
    'best_of': (lambda value: value == 1, '1: it is not supported here'),
    'suffix': (_is_empty, 'empty: it is not supported here'),
}
_CHAT = _COMMON | {
    'messages': (lambda value: isinstance(value, list) and bool(value), 'a list of messages'),
    'max_completion_tokens': (lambda value: _is_int(value) and value > 0, 'a count of tokens'),
    'logprobs': (_is_bool, 'true or false'),
    'top_logprobs': (_is_int, 'a count of tokens'),
    'response_format': (lambda value: value == {'type': 'text'}, '{"type": "text"}'),
    'tools': (_is_empty, 'empty: they are not supported here'),
    'metadata': (lambda value: isinstance(value, dict), 'an object'),
    'store': (lambda value: value is False, 'false: nothing is kept here'),
}


def read_completion(body: Any, tokenizer: Tokenizer, config: EngineConfig) -> Asked:
    """Reads the body of a completion.

    Raises:
        ApiError: naming the field that is unknown, missing or wrong.
    """
    fields = _fields(body, _COMPLETION, 'prompt')
    count = fields.get('logprobs')
    prompts = _prompts(fields['prompt'], tokenizer)
    echo = fields.get('echo', False)
    return Asked(
        chat=False,
        requests=_requests(
            fields,
            prompts,
            (tokenizer.eos_id,),
            config,
            default_tokens=DEFAULT_TOKENS,
            top_log_probs=count or 0,
            score_prompt=echo and count is not None,
        ),
        stops=_stops(fields),
        stream=fields.get('stream', False),
        usage=_usage(fields),
        log_probs=count is not None,
        echo=echo,
        token_ids=fields.get('return_tokens_as_token_ids', False),
    )


def read_chat(
    body: Any, tokenizer: Tokenizer, config: EngineConfig, chat: ChatPrompts | None = None
) -> Asked:
    """Reads the body of a chat completion.

    Args:
        body: as it was sent.
        tokenizer: of the model.
        config: of the engine.
        chat: that renders conversations; None for text as in training.

    Raises:
        ApiError: naming the field that is unknown, missing or wrong.
    """
    fields = _fields(body, _CHAT, 'messages')
    if 'max_completion_tokens' in fields:
        fields['max_tokens'] = fields['max_completion_tokens']
    try:
        if chat is None:
            text = message_text(fields['messages'], 'messages')
            prompt = _encoded(f'{text}assistant:', tokenizer)
        else:
            prompt = chat.encode(fields['messages'], 'messages')
    except (InputError, UnicodeEncodeError) as error:
        raise ApiError(str(error), param='messages') from error
    count, wanted = fields.get('top_logprobs', 0), fields.get('logprobs', False)
    if count and not wanted:
        raise ApiError('top_logprobs needs logprobs to be true.', param='top_logprobs')
    return Asked(
        chat=True,
        requests=_requests(
            fields,
            [prompt],
            (tokenizer.eos_id,) if chat is None else chat.stop_ids,
            config,
            default_tokens=max(1, config.max_length - len(prompt)),
            top_log_probs=count,
            score_prompt=False,
        ),
        stops=(*_stops(fields), NEXT_TURN) if chat is None else _stops(fields),
        stream=fields.get('stream', False),
        usage=_usage(fields),
        log_probs=wanted,
        echo=False,
        token_ids=fields.get('return_tokens_as_token_ids', False),
    )


def _fields(body: Any, known: Mapping[str, tuple[_Check, str]], needed: str) -> dict[str, Any]:
    if not isinstance(body, dict):
        raise ApiError(f'The body must be a JSON object; received {type(body).__name__}.')
    fields = {name: value for name, value in body.items() if value is not None}
    for name, value in fields.items():
        if name not in known:
            raise ApiError(
                f'{name!r} is not supported here. Leave it out; there are {", ".join(known)}.',
                param=name,
            )
        valid, required = known[name]
        if not valid(value):
            shown = repr(value)[:80]
            raise ApiError(f'{name} must be {required}; received {shown}.', param=name)
    for name in ('model', needed):
        if name not in fields:
            raise ApiError(f'{name} is required: {known[name][1]}.', param=name)
    return fields


def _encoded(text: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    text.encode()  # half of a surrogate pair is a UnicodeEncodeError
    return (tokenizer.bos_id, *tokenizer.encode(text).tolist())


def _prompts(prompt: Any, tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """A text, ids, or a list of either; ids are taken as they are, a text begins with bos."""
    prompts = [prompt] if isinstance(prompt, str) or all(map(_is_int, prompt)) else prompt
    rows = []
    for row in prompts:
        if isinstance(row, str):
            try:
                rows.append(_encoded(row, tokenizer))
            except UnicodeEncodeError as error:
                raise ApiError(f'prompt is no text: {error}.', param='prompt') from error
        elif isinstance(row, list) and row and all(map(_is_int, row)):
            rows.append(tuple(row))
        else:
            raise ApiError(
                'prompt must be a text, a list of one or more ids, or a list of either; received '
                f'{repr(row)[:80]}.',
                param='prompt',
            )
    return rows


def _requests(
    fields: dict[str, Any],
    prompts: list[tuple[int, ...]],
    stop_ids: tuple[int, ...],
    config: EngineConfig,
    *,
    default_tokens: int,
    top_log_probs: int,
    score_prompt: bool,
) -> tuple[Request, ...]:
    """One for each choice: each prompt `n` times, with seeds that follow each other."""
    tokens = fields.get('max_tokens', default_tokens)
    longest = max(map(len, prompts))
    if longest + tokens > config.max_length:
        raise ApiError(
            f'The prompt has {longest} tokens and {tokens} are to be written; together they may be '
            f'{config.max_length} at most. Shorten the prompt, or ask for fewer.',
            param='max_tokens' if 'max_tokens' in fields else None,
            code='context_length_exceeded',
        )
    if not tokens and not score_prompt:
        raise ApiError(
            'max_tokens must be at least 1, but where echo and logprobs score a prompt.',
            param='max_tokens',
        )
    if not 0 <= top_log_probs <= config.max_top:
        raise ApiError(
            f'At most {config.max_top} log-probabilities a token are given; received '
            f'{top_log_probs}.',
            param='logprobs',
        )
    names = ('temperature', 'top_k', 'top_p', 'min_p', 'repetition_penalty')
    sampling = Sampling(**{name: fields[name] for name in names if name in fields})
    seed = fields.get('seed', secrets.randbits(32))
    request = Request(
        prompt=(0,),
        max_new_tokens=tokens,
        sampling=sampling,
        stop_ids=stop_ids,
        top_log_probs=top_log_probs,
        score_prompt=score_prompt,
    )
    return tuple(
        dataclasses.replace(request, prompt=prompt, seed=(seed + number) % (MAX_SEED + 1))
        for number, prompt in enumerate(p for p in prompts for _ in range(fields.get('n', 1)))
    )


def _stops(fields: dict[str, Any]) -> tuple[str, ...]:
    stop = fields.get('stop', [])
    return (stop,) if isinstance(stop, str) else tuple(stop)


def _usage(fields: dict[str, Any]) -> bool:
    options = fields.get('stream_options', {})
    if set(options) - {'include_usage', 'include_obfuscation'}:
        raise ApiError(
            f'stream_options may hold include_usage alone; received {sorted(options)}.',
            param='stream_options',
        )
    if options and not fields.get('stream', False):
        raise ApiError('stream_options needs stream to be true.', param='stream_options')
    return options.get('include_usage') is True
