"""The notebook runs from top to bottom, tiny, in a kernel of this interpreter; it is kept clean."""

import json
import os
import pathlib
import sys

import nbclient
import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager

ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOK = ROOT / 'experiments' / 'notebooks' / 'quickstart.ipynb'
PNG = 'image/png'

TINY = """
SEED = 0
TEXT = {text!r}
HELD_OUT, HELD_OUT_DOCUMENTS = 0.3, 4
VOCAB_SIZE, SEQ_LEN, BATCH_SIZE, STEPS = 300, 32, 4, 6
OPTIMIZER, LEARNING_RATE = 'adamw', 5e-3
TEACHER = {{'num_layers': 1, 'embed_dim': 32, 'mlp_dim': 32, 'scan_layers': False}}
STUDENT = {{'num_layers': 1, 'embed_dim': 16, 'mlp_dim': 16, 'scan_layers': False}}
TEACHER_HEADS = STUDENT_HEADS = {{'num_heads': 2, 'num_kv_heads': 1, 'head_dim': 8}}
EXPERTS, EXPERTS_PER_TOKEN, EXPERT_DIM = 4, 2, 8
SAMPLE_TOKENS = 4
"""


@pytest.fixture(scope='module')
def committed() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=nbformat.NO_CONVERT)


@pytest.fixture(scope='module')
def executed(tmp_path_factory: pytest.TempPathFactory) -> nbformat.NotebookNode:
    """The notebook after a run at tiny sizes, on two fake devices: their mesh is a TPU's."""
    folder = tmp_path_factory.mktemp('notebook')
    for number in range(8):
        lines = [f'def f{number}_{line}(x):\n    return x + {line}\n\n' for line in range(20)]
        (folder / f'{number}.txt').write_text(''.join(lines))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (sizes,) = (cell for cell in notebook.cells if 'sizes' in cell.metadata.get('tags', []))
    names = assigned(sizes.source)
    sizes.source = TINY.format(text=str(folder / '*.txt'))
    assert assigned(sizes.source) == names
    environment = os.environ | {
        'JAX_PLATFORMS': 'cpu',
        'JAX_NUM_CPU_DEVICES': '2',
        # The control is trained by the program of the student.
        'JAX_COMPILATION_CACHE_DIR': str(folder / 'compiled'),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
        'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
    }
    client = nbclient.NotebookClient(
        notebook,
        timeout=240,
        km=kernel_manager(folder),
        resources={'metadata': {'path': str(ROOT)}},
    )
    client.execute(env=environment)
    return notebook


def kernel_manager(folder: pathlib.Path) -> AsyncKernelManager:
    """A manager that knows one kernel, of the interpreter that runs the tests."""
    spec = folder / 'kernels' / 'this'
    spec.mkdir(parents=True)
    argv = [sys.executable, '-m', 'ipykernel_launcher', '-f', '{connection_file}']
    text = json.dumps({'argv': argv, 'display_name': 'this', 'language': 'python'})
    (spec / 'kernel.json').write_text(text)
    specs = KernelSpecManager(kernel_dirs=[str(folder / 'kernels')], ensure_native_kernel=False)
    return AsyncKernelManager(kernel_name='this', kernel_spec_manager=specs)


def assigned(source: str) -> set[str]:
    """The names that a cell of constants gives values to."""
    values: dict[str, object] = {}
    exec(source, {}, values)
    return set(values)


def printed(notebook: nbformat.NotebookNode) -> str:
    outputs = [output for cell in notebook.cells for output in cell.get('outputs', [])]
    return ''.join(output.text for output in outputs if output.output_type == 'stream')


def test_runs_on_the_mesh_of_all_devices(executed: nbformat.NotebookNode) -> None:
    assert '2 x cpu' in printed(executed)


def test_shows_its_pictures_inline(executed: nbformat.NotebookNode) -> None:
    shown = [
        cell.source.rpartition('pictures.')[2].split('(')[0]
        for cell in executed.cells
        for output in cell.get('outputs', [])
        if PNG in output.get('data', {})
    ]
    assert shown == ['learning_curves', 'cost_quality', 'expert_load']


def test_prints_table_and_samples(executed: nbformat.NotebookNode) -> None:
    text = printed(executed)
    for wanted in ('Bits per byte', 'KL from teacher', 'FLOPs', '--- student\ndef read(self, '):
        assert wanted in text
    assert "of its teacher's FLOPs per token" in text


def test_prints_no_warning(executed: nbformat.NotebookNode) -> None:
    outputs = [output for cell in executed.cells for output in cell.get('outputs', [])]
    assert [output.text for output in outputs if output.get('name') == 'stderr'] == []


def test_is_kept_without_outputs(committed: nbformat.NotebookNode) -> None:
    nbformat.validate(committed)
    code = [cell for cell in committed.cells if cell.cell_type == 'code']
    assert [cell.outputs for cell in code] == [[]] * len(code)
    assert {cell.execution_count for cell in code} == {None}
    assert 'colab' in committed.metadata


def test_every_code_cell_follows_its_explanation(committed: nbformat.NotebookNode) -> None:
    kinds = [cell.cell_type for cell in committed.cells]
    unexplained = [
        cell.source
        for before, cell in zip(kinds, committed.cells[1:], strict=False)
        if before == cell.cell_type == 'code'
    ]
    assert unexplained == []


def test_imports_the_libraries_alone(committed: nbformat.NotebookNode) -> None:
    lines = '\n'.join(cell.source for cell in committed.cells if cell.cell_type == 'code')
    imports = [line for line in lines.splitlines() if line.startswith(('import ', 'from '))]
    rooms = {line.split()[1].split('.')[0] for line in imports}
    assert rooms == {'distill', 'functools', 'importlib', 'jax', 'moe'}
