"""The parameters that student and control start from: drawn, or made of a trained model's."""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from distill.checkpoint import read_metadata
from distill.pretrained_tokenizer import PretrainedTokenizer
from distill.provenance import Provenance
from experiments.build import build
from experiments.context import Context
from experiments.init_config import InitConfig
from experiments.seen import refuse_seen
from experiments.training import load_model, model_sha256
from moe.config import TransformerConfig
from moe.convert import folder_sha256, load_pretrained, pretrained_config
from moe.errors import InputError
from moe.sharding import init_sharded, variable_shardings
from moe.surgery import Calibration, initialise


@dataclasses.dataclass(frozen=True)
class Source:
    """A trained model: its config, the folder that it is in, and whether others published it."""

    config: TransformerConfig
    folder: pathlib.Path
    published: bool = False

    @property
    def sha256(self) -> str:
        """Of its weights."""
        return folder_sha256(self.folder) if self.published else model_sha256(self.folder / 'model')

    def tokenizer(self) -> str:
        """The fingerprint of the tokenizer that it was trained with."""
        if self.published:
            return PretrainedTokenizer(self.folder).fingerprint
        return read_metadata(self.folder / 'model').metadata['identity']['tokenizer']

    def load(self, context: Context) -> Any:
        """Its variables, each on the devices of the study that hold it."""
        if self.published:
            dtype = self.config.param_dtype
            return load_pretrained(self.folder, mesh=context.mesh, dtype=dtype)[1]
        model, identity = context.model(self.config), context.identity(self.config)
        return load_model(self.folder / 'model', model, context.mesh, identity)


def require_source(context: Context) -> None:
    """Refuses a source that the student cannot start from, before anything trains.

    Raises:
        InputError: where there is no such checkpoint, it has another tokenizer, has seen what is
            held out, does not fit the mesh, or is no model that the method can make a student of.
    """
    init = context.study.student.init
    if init.checkpoint is None:
        return
    if init.source == 'checkpoint':
        folder = pathlib.Path(init.checkpoint)
        refuse_seen(folder, context.documents.split[1], key='config.student.init.checkpoint')
    source = _source(context)
    saved = source.tokenizer()
    if saved != context.tokenizer.fingerprint:
        raise InputError(
            f'config.student.init.checkpoint={source.folder} must have the tokenizer of the study, '
            f'{context.tokenizer.fingerprint}; it has {saved}. Start from a model of the same '
            'tokenizer, such as the teacher.'
        )
    variable_shardings(context.model(source.config), context.mesh)
    init.require_reachable(source.config, context.study.student.model)


def initial_variables(context: Context, key: jax.Array) -> Any:
    """Returns the student's variables before its first update, each on the devices that hold it.

    Surgery chooses what to keep by comparing measured numbers, and must choose alike on every mesh.
    So each process makes the whole of it by itself, in host memory, of the same arrays: the same
    bits on any mesh. The source need fit no device, but source and student the host.

    Args:
        context: of the study.
        key: of what is drawn.
    """
    init, model = context.study.student.init, context.model(context.study.student.model)
    if init.is_random:
        return init_sharded(model, key, context.mesh)
    source = _source(context)
    variables = jax.tree.map(_on_host, source.load(context))
    batch = context.training_rows(init.calibration_rows) if init.calibrates else None
    host = _host()
    with jax.default_device(host):
        made = initialise(
            init.method,
            source.config,
            {name: collection for name, collection in variables.items() if collection},
            model.config,
            key=jax.device_put(key, host),
            calibration=None if batch is None else Calibration(batch.tokens, batch.segment_ids),
            options=init.options,
        )
    return jax.tree.map(_placed, made, variable_shardings(model, context.mesh))


def started_from(context: Context) -> dict[str, Any]:
    """Describes the start, as checkpoints and the summary have it: of the same, the same bits."""
    init = context.study.student.init
    if init.is_random:
        return {'method': 'random'}
    size = init.calibration_rows * context.study.data.seq_len
    source = _source(context)
    return {
        'method': init.method,
        'source': init.source_in_words,
        'source_sha256': source.sha256,
        **({'provenance': _declared(init, source)} if init.source == 'hf' else {}),
        **({'options': init.options} if init.options else {}),
        **({'calibration_tokens': size} if init.calibrates else {}),
    }


def _declared(init: InitConfig, source: Source) -> dict[str, Any]:
    """What is declared of a published model, and known."""
    known = Provenance(name=source.folder.name, version=source.sha256[:16])
    return dataclasses.asdict(init.provenance.filled(known))


def _source(context: Context) -> Source:
    """Finds the model to start from: a new kind of source is a branch here."""
    student, teacher = context.study.student, context.study.teacher
    init = student.init
    if init.checkpoint is None:
        return Source(teacher.model, context.teacher_folder, published=teacher.source == 'hf')
    folder = pathlib.Path(init.checkpoint)
    if init.source == 'hf':
        return Source(pretrained_config(folder, student.model.param_dtype), folder, published=True)
    return Source(_saved_config(folder / 'model'), folder)


def _saved_config(folder: pathlib.Path) -> TransformerConfig:
    """Reads which architecture a checkpoint is of, and the dtype that it is stored in."""
    record = read_metadata(folder)
    values = record.metadata['identity']['model']
    dtypes = {dtype for name, (dtype, _) in record.arrays.items() if name.startswith('params/')}
    stored = {'param_dtype': dtypes.pop()} if len(dtypes) == 1 else {}
    return build(TransformerConfig, values | stored, f'the model of {folder}')


def _host() -> jax.Device:
    try:
        return jax.local_devices(backend='cpu')[0]
    except RuntimeError as error:
        raise InputError(
            'config.student.init needs the host as a device of jax; JAX_PLATFORMS leaves it out. '
            "Add it, as in JAX_PLATFORMS='tpu,cpu', or leave JAX_PLATFORMS unset."
        ) from error


def _on_host(leaf: jax.Array) -> np.ndarray:
    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))


def _placed(leaf: jax.Array, sharding: jax.sharding.NamedSharding) -> jax.Array:
    whole = np.asarray(leaf)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])
