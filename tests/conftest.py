"""Every test sees eight CPU devices."""

import gc
import os
import pathlib
from collections.abc import Iterator

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

import jax
import jaxlib
import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

# Tests compile much and compute little: half of the suite's time is LLVM polishing code that runs
# once. What XLA itself does to a program, which tests read from its HLO, stays as it is.
FLAGS = [
    *('--xla_backend_optimization_level=0', '--xla_llvm_disable_expensive_passes=true'),
    '--xla_cpu_parallel_codegen_split_count=1',
]
if jaxlib.__version__.startswith('0.10.'):
    # The older of the two emitters takes half as long; later releases have one alone.
    FLAGS.append('--xla_cpu_use_fusion_emitters=false')
os.environ['XLA_FLAGS'] = ' '.join([os.environ.get('XLA_FLAGS', ''), *FLAGS])
jax.config.update('jax_num_cpu_devices', 8)
# Traced programs are many live objects, and the default looks through them again and again.
gc.set_threshold(200_000, 20, 100)

# What takes a minute or more on two cores. `-m 'not slow'` leaves it out.
SLOW_FILES = {
    *('test_attention_kinds', 'test_engine', 'test_exchange', 'test_expert_parallel'),
    *('test_mtp', 'test_speculate', 'test_surgery_pruning', 'test_convert', 'test_transformer'),
    *('test_balance_statistics', 'test_benchmark', 'test_cache', 'test_estimators', 'test_fused'),
    *('test_exams', 'test_initial', 'test_more_teachers', 'test_mtp_loss', 'test_on_policy_study'),
    *('test_generate', 'test_growing_source', 'test_notebook', 'test_processes', 'test_remote'),
    *('test_published', 'test_resume', 'test_serve', 'test_step', 'test_sweep'),
    *('test_targets_stage', 'test_bad_input'),
}

# What looks at the one study that a fixture runs from start to end.
LAUNCHING_FILES = {
    *('test_bad_input', 'test_initial', 'test_launch', 'test_on_policy_study'),
    *('test_processes', 'test_resume', 'test_targets_stage'),
}


def pytest_sessionstart() -> None:
    """Fails the whole run, rather than skipping, where the eight devices are missing."""
    assert jax.device_count() == 8, f'tests need 8 CPU devices; found {jax.device_count()}'


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of slow files, and has the longest pieces of work begin first."""
    for item in items:
        if item.path.stem in SLOW_FILES:
            item.add_marker(pytest.mark.slow)
    items.sort(
        key=lambda item: (item.path.stem not in LAUNCHING_FILES, item.path.stem not in SLOW_FILES)
    )


class ByFile(LoadScopeScheduling):
    """Gives a process whole files, and one all the files that look at the same study."""

    def _split_scope(self, nodeid: str) -> str:
        file = pathlib.Path(nodeid.split('::')[0])
        return 'study' if file.stem in LAUNCHING_FILES else str(file)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByFile:
    """Tells pytest-xdist how to share out the tests."""
    return ByFile(config, log)


@pytest.fixture(scope='module', autouse=True)
def forget_programs() -> Iterator[None]:
    """Unloads compiled programs before Linux has mapped 65,530 regions, its most, for them."""
    yield
    maps = pathlib.Path('/proc/self/maps')
    if maps.exists() and maps.read_bytes().count(b'\n') > 20_000:
        jax.clear_caches()
