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

# Tests compile much and compute little: half of the suite's time is LLVM polishing code that runs
# once. What XLA itself does to a program, which tests read from its HLO, stays as it is.
FLAGS = ['--xla_backend_optimization_level=0', '--xla_llvm_disable_expensive_passes=true']
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
    *('test_mtp', 'test_speculate', 'test_surgery_pruning', 'test_convert'),
    *('test_cache', 'test_estimators', 'test_fused', 'test_mtp_loss', 'test_step'),
    *('test_generate', 'test_growing_source', 'test_initial', 'test_notebook', 'test_processes'),
    *('test_published', 'test_resume', 'test_serve', 'test_sweep', 'test_targets_stage'),
}


def pytest_sessionstart() -> None:
    """Fails the whole run, rather than skipping, where the eight devices are missing."""
    assert jax.device_count() == 8, f'tests need 8 CPU devices; found {jax.device_count()}'


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of slow files, and keeps a file, or all that launches studies, together."""
    for item in items:
        if item.path.stem in SLOW_FILES:
            item.add_marker(pytest.mark.slow)
        launches = 'launcher' in getattr(item, 'fixturenames', ())
        item.add_marker(pytest.mark.xdist_group('launches' if launches else item.path.stem))


@pytest.fixture(scope='module', autouse=True)
def forget_programs() -> Iterator[None]:
    """Unloads compiled programs before Linux has mapped 65,530 regions, its most, for them."""
    yield
    maps = pathlib.Path('/proc/self/maps')
    if maps.exists() and maps.read_bytes().count(b'\n') > 20_000:
        jax.clear_caches()
