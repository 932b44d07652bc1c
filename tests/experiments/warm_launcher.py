"""One warmed-up interpreter that forks a launch for each request: a process without its start.

Reads a JSON object a line. {"command": NAME, "argv": [...], "output": PATH, "devices": N, "event":
E, "limit": B} forks `python -m experiments.NAME ARGV`, with all it prints in PATH and no file
longer than B bytes, and answers with its pid; {"wait": PID} answers with its exit status, negative
for a signal.

An event [WHERE, STAGE, STEP, SIGNAL] sends a signal to the launch from within, at a moment that a
signal from outside could hit by luck alone: 'step' after a step was observed, 'saving' while
orbax writes the arrays in the background, 'unsealed' when they are written and the manifest is not,
'shard' when the shard of targets numbered STEP is written and the journal does not list it.
"""

import gc
import importlib
import json
import os
import resource
import sys
from typing import Any

import jax

from distill import checkpoint, target_store
from experiments import cli, stages  # noqa: F401 - what takes long to import
from experiments.watch import Watch


def plan(where: str, stage: str, step: int, signal: int) -> None:
    """Has this process send itself the signal."""

    def strike() -> None:
        os.kill(os.getpid(), signal)

    if where == 'step':
        observe = Watch.observe

        def observe_and_strike(self: Watch, number: int, metrics: Any) -> None:
            observe(self, number, metrics)
            if (self._line._stage, number) == (stage, step):
                strike()

        Watch.observe = observe_and_strike
    elif where == 'saving':
        save_async = checkpoint.ocp.save_async

        def save_and_strike(path: str, arrays: Any) -> Any:
            response = save_async(path, arrays)
            if f'/{stage}/checkpoints/{step}/' in path:
                strike()
            return response

        checkpoint.ocp.save_async = save_and_strike
    elif where == 'shard':
        write = target_store.write_json

        def strike_or_list(path: Any, value: Any) -> None:
            if path.name == f'{step}.json':
                strike()
            write(path, value)

        target_store.write_json = strike_or_list
    else:
        seal = checkpoint.write_manifest

        def strike_or_seal(directory: Any) -> None:
            if str(directory).endswith(f'/{stage}/checkpoints/{step}'):
                strike()
            seal(directory)

        checkpoint.write_manifest = strike_or_seal


def run(request: dict[str, Any]) -> None:
    """Becomes the launch that was asked for; leaves by `SystemExit`."""
    output = os.open(request['output'], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream, descriptor in ((os.open(os.devnull, os.O_RDONLY), 0), (output, 1), (output, 2)):
        os.dup2(stream, descriptor)
    sys.stdout.reconfigure(line_buffering=True)
    jax.config.update('jax_num_cpu_devices', request['devices'])
    if request['event'] is not None:
        plan(*request['event'])
    if request['limit'] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request['limit'], request['limit']))
    # Each command has flags of its own, and some of one name.
    command = request['command']
    sys.argv = [f'{command}.py', *request['argv']]
    cli.run(importlib.import_module(f'experiments.{command}').main)


def serve() -> None:
    """Answers requests until there are no more."""
    # A fork neither copies nor looks through what was there before it.
    gc.collect()
    gc.freeze()
    gc.set_threshold(200_000, 20, 100)
    answers = os.fdopen(os.dup(1), 'w')
    for line in sys.stdin:
        request = json.loads(line)
        if 'wait' in request:
            _, status = os.waitpid(request['wait'], 0)
            answer = {'status': os.waitstatus_to_exitcode(status)}
        else:
            pid = os.fork()
            if pid == 0:
                run(request)
            answer = {'pid': pid}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == '__main__':
    serve()
