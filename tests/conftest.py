"""Every test sees eight CPU devices."""

import os

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

jax.config.update('jax_num_cpu_devices', 8)


def pytest_sessionstart() -> None:
    """Fails the whole run, rather than skipping, where the eight devices are missing."""
    assert jax.device_count() == 8, f'tests need 8 CPU devices; found {jax.device_count()}'
