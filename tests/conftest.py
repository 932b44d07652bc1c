"""Every test sees eight CPU devices."""

import os
from collections.abc import Iterator

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
# Tests compile much and compute little: a third of the suite's time is LLVM polishing code that
# runs once. What XLA itself does to a program, which tests read from its HLO, stays as it is.
os.environ['XLA_FLAGS'] = ' '.join(
    [
        os.environ.get('XLA_FLAGS', ''),
        '--xla_backend_optimization_level=0',
        '--xla_llvm_disable_expensive_passes=true',
    ]
)

import jax
import pytest

# What takes a minute or more on two cores. `-m 'not slow'` leaves it out.
SLOW_FILES = {
    *('test_attention_kinds', 'test_engine', 'test_exchange', 'test_expert_parallel'),
    *('test_mtp', 'test_speculate', 'test_surgery_pruning', 'test_convert'),
    *('test_cache', 'test_estimators', 'test_fused', 'test_mtp_loss', 'test_step'),
    *('test_generate', 'test_growing_source', 'test_initial', 'test_notebook', 'test_processes'),
    *('test_published', 'test_resume', 'test_serve', 'test_sweep', 'test_targets_stage'),
}

jax.config.update('jax_num_cpu_devices', 8)


def pytest_sessionstart() -> None:
    """Fails the whole run, rather than skipping, where the eight devices are missing."""
    assert jax.device_count() == 8, f'tests need 8 CPU devices; found {jax.device_count()}'


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of slow files."""
    for item in items:
        if item.path.stem in SLOW_FILES:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope='module', autouse=True)
def forget_programs() -> Iterator[None]:
    """Unloads what a file compiled: Linux maps at most 65,530 regions into a process."""
    yield
    jax.clear_caches()
