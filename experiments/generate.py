"""Continues every prompt of a file.

    python -m experiments.generate --checkpoint=runs/quickstart/student --prompts=in.jsonl \\
        --out=out.jsonl

A line of the prompts is a JSON object with `prompt`, a string, or `messages`, a list of objects
with `role` and `content`, rendered by the chat template of a published model's folder that has one
(the extra `chat`); and an `id`, if it is to be found again by one. A line of the output has the
number of its prompt's line, the `id`, the `text`, its `tokens` with their `log_probs`, and what
ended it: `stop` or `length`.

Lines are written as they are done. The same command goes on after a kill: no prompt is left out, or
done twice, and each gets the text that it would have got at once.
"""

import pathlib
import sys
import time

from absl import flags, logging

from experiments import cli
from experiments.bulk import Job, Prompt, Results, read_prompts
from experiments.chat_prompts import ChatPrompts, chat_prompts
from experiments.engine_flags import loaded_engine
from experiments.loaded import Loaded
from experiments.signals import StopSignal
from experiments.text_stream import TextStream
from experiments.writing_flags import ROWS
from moe.engine import Engine
from moe.errors import InputError
from moe.requests import MAX_SEED, Request
from moe.sampling import Sampling

PROMPTS = flags.DEFINE_string('prompts', None, 'The file of prompts, .jsonl.')
OUT = flags.DEFINE_string('out', None, 'The file to write, .jsonl.')
MAX_NEW_TOKENS = flags.DEFINE_integer('max_new_tokens', 256, 'Of each text.', lower_bound=1)
TEMPERATURE = flags.DEFINE_float('temperature', 1.0, '0 takes the likeliest token.')
TOP_K = flags.DEFINE_integer('top_k', 0, 'Draws from that many likeliest tokens; 0 from all.')
TOP_P = flags.DEFINE_float('top_p', 1.0, 'Draws from the likeliest tokens of this probability.')
MIN_P = flags.DEFINE_float('min_p', 0.0, 'Draws from tokens this likely beside the likeliest.')
PENALTY = flags.DEFINE_float('repetition_penalty', 1.0, 'Of tokens that are there already.')
STOP = flags.DEFINE_multi_string('stop', [], 'A string that ends a text; may be repeated.')
SEED = flags.DEFINE_integer('seed', 0, 'Equal seeds write equal texts.', lower_bound=0)


def main() -> None:
    """Writes what is not written yet."""
    logging.set_verbosity(logging.WARNING)
    source, out = cli.required(PROMPTS), cli.required(OUT)
    stop = StopSignal()
    prompts = read_prompts(pathlib.Path(source))
    loaded, engine = loaded_engine(max_waiting=2 * ROWS.value)
    conversations = any(prompt.messages is not None for prompt in prompts)
    chat = chat_prompts(loaded) if conversations else None
    work = _work(loaded, chat, prompts)
    settings = {
        'model': loaded.sha256,
        'chat_template': chat and chat.template.fingerprint,
        'max_new_tokens': MAX_NEW_TOKENS.value,
        'stop': STOP.value,
        'seed': SEED.value,
        'temperature': TEMPERATURE.value,
        'top_k': TOP_K.value,
        'top_p': TOP_P.value,
        'min_p': MIN_P.value,
        'repetition_penalty': PENALTY.value,
    }
    with Results(pathlib.Path(out), prompts, settings) as results:
        left = [pair for pair in work if pair[0].line not in results.done]
        print(f'{len(prompts)} prompts, {len(left)} to be written', file=sys.stderr)
        write_all(loaded, engine, left, results, stop)


def write_all(
    loaded: Loaded,
    engine: Engine,
    work: list[tuple[Prompt, Request]],
    results: Results,
    stop: StopSignal,
) -> None:
    """Keeps an engine's rows full until every prompt is done, or it is asked to stop."""
    config = engine.config
    too_long = [p.line for p, r in work if len(r.prompt) + r.max_new_tokens > config.max_length]
    if too_long:
        raise InputError(
            f'{PROMPTS.value}: prompt and --max_new_tokens together must be at most --max_length='
            f'{config.max_length} tokens; lines {_listed(too_long)} are longer. Raise it, or '
            'shorten them.'
        )
    waiting, jobs, start, tokens = list(reversed(work)), {}, time.perf_counter(), 0
    while (waiting or jobs) and not stop.agreed(0):
        while waiting and engine.waiting + engine.running < 2 * config.max_rows:
            prompt, request = waiting.pop()
            stream = TextStream(loaded.tokenizer, STOP.value)
            jobs[engine.submit(request)] = Job(prompt, stream)
        for event in engine.step():
            assert event.token is not None
            tokens += 1
            if jobs[event.request].add(event.token, event.finish):
                engine.cancel(event.request)
                results.add(jobs.pop(event.request))
    seconds = time.perf_counter() - start
    print(f'{tokens} tokens in {seconds:.1f} s, {tokens / seconds:.1f} a second', file=sys.stderr)


def _work(
    loaded: Loaded, chat: ChatPrompts | None, prompts: list[Prompt]
) -> list[tuple[Prompt, Request]]:
    """Returns the request of each prompt; every conversation that is refused is named."""
    work, refused = [], []
    for prompt in prompts:
        try:
            work.append((prompt, _request(loaded, chat, prompt)))
        except InputError as error:
            refused.append((prompt.line, error))
    if refused:
        lines = [line for line, _ in refused]
        raise InputError(
            f'{PROMPTS.value}: lines {_listed(lines)} cannot be rendered. Line {lines[0]}: '
            f'{refused[0][1]}'
        )
    return work


def _request(loaded: Loaded, chat: ChatPrompts | None, prompt: Prompt) -> Request:
    """The prompt's own seed: its text does not depend on what was done before a kill."""
    tokenizer = loaded.tokenizer
    ids = (tokenizer.bos_id, *tokenizer.encode(prompt.text).tolist())
    stop_ids = (tokenizer.eos_id,)
    if chat is not None and prompt.messages is not None:
        ids, stop_ids = chat.encode(prompt.messages, 'its messages'), chat.stop_ids
    return Request(
        prompt=ids,
        max_new_tokens=MAX_NEW_TOKENS.value,
        sampling=_sampling(),
        stop_ids=stop_ids,
        seed=(SEED.value * 1_000_003 + prompt.line) % (MAX_SEED + 1),
    )


def _sampling() -> Sampling:
    return Sampling(TEMPERATURE.value, TOP_K.value, TOP_P.value, MIN_P.value, PENALTY.value)


def _listed(lines: list[int]) -> str:
    more = f' and {len(lines) - 8} more' if len(lines) > 8 else ''
    return ', '.join(map(str, lines[:8])) + more


if __name__ == '__main__':
    cli.run(main)
