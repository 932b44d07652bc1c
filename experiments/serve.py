"""Serves a model over HTTP, as OpenAI's clients ask for it.

    python -m experiments.serve --checkpoint=runs/quickstart/student --port=8000

Routes: /v1/completions (with `echo` and `logprobs`, which score text that is given),
/v1/chat/completions, both streaming where asked; /v1/models, /health, /metrics. Requests are
written together, each as it would be alone. Conversations are rendered by the chat template of a
published model's folder that has one (the extra `chat`), otherwise as text, as in training.

Listens on this machine alone unless --host says otherwise. Where the environment has
FRACTIONAL_API_KEY, callers need it.
"""

import os
import sys

from absl import flags, logging

from experiments import cli
from experiments.chat_prompts import chat_prompts
from experiments.engine_flags import loaded_engine
from experiments.serve_app import App
from experiments.serve_worker import Worker
from moe.errors import InputError

HOST = flags.DEFINE_string('host', '127.0.0.1', 'Address to listen on.')
PORT = flags.DEFINE_integer('port', 8000, 'Port to listen on; 0 for any.', 0, 65535)
NAME = flags.DEFINE_string('name', None, "The model's name; by default study/stage.")
MAX_WAITING = flags.DEFINE_integer('max_waiting', 256, 'Texts that may wait for a row.', 0)

KEY = 'FRACTIONAL_API_KEY'


def main() -> None:
    """Loads the model and serves it until it is told to stop."""
    logging.set_verbosity(logging.WARNING)
    uvicorn = _uvicorn()
    key = os.environ.get(KEY) or None
    if key is None and HOST.value not in ('127.0.0.1', '::1', 'localhost'):
        print(f'Anyone who reaches {HOST.value} may use this server: set {KEY}.', file=sys.stderr)
    loaded, engine = loaded_engine(max_waiting=MAX_WAITING.value)
    chat = chat_prompts(loaded)
    worker = Worker(engine, loaded.tokenizer.vocab_size)
    app = App(worker, loaded.tokenizer, NAME.value or loaded.name, key, chat)
    try:
        uvicorn.run(app.application(), host=HOST.value, port=PORT.value, access_log=False)
    finally:
        worker.close()


def _uvicorn():
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise InputError(
            f'Serving needs {error.name}, which is not installed; it comes with the extra '
            "'serve': pip install 'fractional[serve]'."
        ) from error
    return uvicorn


if __name__ == '__main__':
    cli.run(main)
