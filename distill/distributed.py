"""Several processes as one: joining them, one writer of files, batches fed by every host."""

from typing import Any

import jax
import numpy as np
from jax._src.clusters import ClusterEnv
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from moe.errors import InputError


def initialize(
    *,
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout_seconds: int = 300,
) -> None:
    """Joins this process to the others; does nothing where it is alone or has joined already.

    Without arguments the cluster (SLURM, Cloud TPU, GKE, Open MPI) is found from its environment by
    jax. Must come before jax is first used.

    Args:
        coordinator_address: 'host:port' of process 0, reachable from all; port free there.
        num_processes: in all, at least 1.
        process_id: of this one, in [0, num_processes).
        timeout_seconds: to wait for the others.

    Raises:
        InputError: where only some of the three are given, or one is out of range.
    """
    _check(coordinator_address, num_processes, process_id)
    if jax.distributed.is_initialized() or num_processes == 1:
        return
    if coordinator_address is None and not _in_cluster():
        return
    jax.distributed.initialize(
        coordinator_address,
        num_processes,
        process_id,
        cluster_detection_method=None if coordinator_address is None else 'deactivate',
        initialization_timeout=timeout_seconds,
    )


def _check(address: str | None, num_processes: int | None, process_id: int | None) -> None:
    settings = {
        'coordinator_address': address,
        'num_processes': num_processes,
        'process_id': process_id,
    }
    missing = [name for name, value in settings.items() if value is None]
    if len(missing) == len(settings):
        return
    if address is None or num_processes is None or process_id is None:
        raise InputError(
            f'Several processes need coordinator_address, num_processes and process_id together; '
            f'{", ".join(missing)} missing. Give all three, or none to find a cluster by itself.'
        )
    if num_processes < 1 or not 0 <= process_id < num_processes:
        raise InputError(
            f'process_id must be in [0, num_processes); received process_id={process_id}, '
            f'num_processes={num_processes}. Number the processes from 0.'
        )
    host, _, port = address.rpartition(':')
    if not host or not port.isdigit():
        raise InputError(
            f"coordinator_address must be 'host:port', reachable from every process; received "
            f'{address!r}.'
        )


def _in_cluster() -> bool:
    """Asks jax's own detectors; its public `initialize` can only detect and join at once."""
    return any(
        cluster.is_env_present()
        for cluster in ClusterEnv._cluster_types
        if not cluster.opt_in_only_method
    )


def is_writer() -> bool:
    """Returns whether this process writes files that all share (process 0)."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process has reached the barrier of this name; at once for one process."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def data_share(sharding: NamedSharding) -> tuple[int, int]:
    """Says which part of every global batch this process reads.

    Processes whose devices hold the same rows, because the mesh axes between them split something
    else than the batch, read the same part.

    Args:
        sharding: of the batch, as `moe.sharding.batch_sharding` makes it.

    Returns:
        `(index, count)`: the `index`-th of `count` equal parts, in the order of the rows.

    Raises:
        InputError: where the rows that this process holds are no such part.
    """
    rows = sharding.mesh.size
    indices = sharding.addressable_devices_indices_map((rows,)).values()
    held = sorted({row for index in indices if index for row in range(rows)[index[0]]})
    size = len(held)
    if rows % size or held[0] % size or held[-1] - held[0] != size - 1:
        raise InputError(
            f'The devices of one process must hold one of equal, contiguous parts of the batch; '
            f'those of process {jax.process_index()} hold {size} of {rows} rows, {held}. Choose '
            'mesh axes whose sizes divide, or are divided by, the devices of a process.'
        )
    return held[0] // size, rows // size


def global_batch(local_batch: Any, sharding: NamedSharding) -> Any:
    """Makes global arrays of the rows that each process holds.

    Args:
        local_batch: a pytree of NumPy arrays [rows, ...]: the part of the batch that `data_share`
            gives this process.
        sharding: of the global arrays, as `moe.sharding.batch_sharding` makes it.

    Returns:
        The same tree of `jax.Array`s; rows follow the order of the mesh's devices.

    Raises:
        InputError: where this process's devices cannot split its rows evenly.
    """
    _, count = data_share(sharding)

    def place(local: np.ndarray) -> jax.Array:
        shards = _local_shards(sharding, local.ndim)
        if local.shape[0] % shards:
            raise InputError(
                f'A process has {local.shape[0]} rows of the batch for {shards} shards of its own; '
                f'make the global batch a multiple of the mesh axes that split it.'
            )
        shape = (local.shape[0] * count, *local.shape[1:])
        return jax.make_array_from_process_local_data(sharding, local, shape)

    return jax.tree.map(place, local_batch)


def local_rows(arrays: Any) -> Any:
    """Undoes `global_batch`: the rows of global arrays that this process holds, on the host.

    Args:
        arrays: a pytree of `jax.Array`s whose first dimension alone is split, over rows.

    Returns:
        The same tree of NumPy arrays, each row once, in order.
    """

    def gather(array: jax.Array) -> np.ndarray:
        pieces = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
        return np.concatenate([np.asarray(pieces[start]) for start in sorted(pieces)])

    return jax.tree.map(gather, arrays)


def any_process(flag: bool) -> bool:
    """Whether the flag is set on any process: the same answer on each, which all must ask for."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def first_of_share(sharding: NamedSharding) -> bool:
    """Whether no process of a lower number reads the same part of every batch as this one."""
    if jax.process_count() == 1:
        return True
    index, _ = data_share(sharding)
    shares = multihost_utils.process_allgather(np.array(index))
    return int(np.flatnonzero(shares == index)[0]) == jax.process_index()


def _local_shards(sharding: NamedSharding, ndim: int) -> int:
    """Counts the different pieces of the rows that the devices of this process hold."""
    rows = sharding.mesh.size
    indices = sharding.addressable_devices_indices_map((rows,) + (1,) * (ndim - 1))
    return len({(index[0].start, index[0].stop) for index in indices.values() if index})
