"""Figures of loading a published model: what the host's memory holds besides the parameters."""

import json
import math
import pathlib
import platform
import subprocess
import sys
import tempfile
import threading
import time

import jax
import jax.numpy as jnp

from experiments.benchmark_row import Row, ratio_row
from moe.config import AttentionConfig, MoEConfig, RouterConfig, TransformerConfig
from moe.convert import load_pretrained, save_pretrained
from moe.sharding import abstract_variables
from moe.transformer import Transformer
from moe.weights.folder import open_folder

_SAMPLE_SECONDS = 0.002


def load_rows(*, width: int = 512, layers: int = 8) -> list[Row]:
    """Measures the loading of a mixture-of-experts model, in a process of its own.

    On a CPU the parameters lie in the memory that is measured; they are taken off.

    Args:
        width: `D`.
        layers: `L`.

    Returns:
        A row of the most bytes that the process held besides program and parameters, against those
        of the largest tensor; and a row of the rate, against that of reading the same files.
    """
    config = TransformerConfig(
        vocab_size=64 * width,
        num_layers=layers,
        embed_dim=width,
        mlp_dim=width,
        attention=AttentionConfig(8, 4, width // 8, 'head'),
        moe=MoEConfig(RouterConfig(16, 2), expert_dim=width),
    )
    zeros = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract_variables(Transformer(config))
    )
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(folder, config, zeros)
        del zeros
        command = [sys.executable, '-m', 'experiments.benchmark_load', folder]
        run = subprocess.run(command, check=True, capture_output=True, text=True)
        sources = open_folder(pathlib.Path(folder)).values()
        largest = max(4 * math.prod(source.shape) for source in sources)
    held = json.loads(run.stdout)
    conditions = (
        f'float32, D={width}, L={layers}, E=16, {held["parameters"] / 1e9:.2f} GB in '
        f'{len(sources)} tensors; {platform.processor() or platform.machine()}, '
        f'jax {jax.__version__}'
    )
    rows = (
        ('load/host_memory', 'GB', held['extra'] / 1e9, largest / 1e9),
        ('load/rate', 'GB/s', held['rate'], held['read_rate']),
    )
    return [ratio_row(*figure, conditions) for figure in rows]


def _measure(folder: str) -> dict[str, float]:
    """Loads twice, the first time to compile, and watches the second."""
    load_pretrained(folder, dtype='float32')
    files = sorted(pathlib.Path(folder).glob('*.safetensors'))
    start = time.perf_counter()
    size = sum(len(file.read_bytes()) for file in files)
    read_seconds = time.perf_counter() - start
    before, peak = _anonymous_bytes(), 0
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(_SAMPLE_SECONDS):
            peak = max(peak, _anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    _, variables = load_pretrained(folder, dtype='float32')
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
    return {
        'extra': max(peak, _anonymous_bytes()) - before - parameters,
        'parameters': parameters,
        'rate': size / seconds / 1e9,
        'read_rate': size / read_seconds / 1e9,
    }


def _anonymous_bytes() -> int:
    """What the process holds that is not the pages of a file."""
    for line in pathlib.Path('/proc/self/status').read_text().splitlines():
        if line.startswith('RssAnon:'):
            return int(line.split()[1]) * 1024
    raise OSError('/proc/self/status has no RssAnon: this is measured on Linux alone.')


if __name__ == '__main__':
    print(json.dumps(_measure(sys.argv[1])))
