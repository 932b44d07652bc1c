"""Whatever a user can get wrong is one screen that names it and the remedy, without a traceback."""

import pathlib
import shutil
import subprocess

import pytest
from launching import LONGEST_LAUNCH, MESH, TINY, Finished, Launcher, metric_rows
from test_resume import flip_a_byte

from distill.checkpoint import complete_steps

SCREEN = 24


def assert_one_screen(finished: Finished, *parts: str, status: int = 2) -> None:
    """A message that a terminal holds, with these parts, and a status that is not zero."""
    assert finished.status == status, finished.output
    assert 'Traceback' not in finished.output
    assert 'Error' in finished.output
    assert len(finished.output.splitlines()) <= SCREEN, finished.output
    for part in parts:
        assert part in finished.output, finished.output


OVERRIDES = {
    'unknown key': (('--config.student.model.num_layer=3',), ("'num_layer'", 'num_layers')),
    'wrong type': (('--config.student.model.num_layers=three',), ('num_layers=three', 'int()')),
    'not a boolean': (('--config.student.model.scan_layers=maybe',), ('scan_layers=maybe',)),
    'impossible value': (('--config.student.model.num_layers=0',), ('config.student.model', '0')),
    'no such choice': (
        ('--config.student.model.activation=relu',),
        ("'silu', 'gelu'", "received 'relu'"),
    ),
    'unknown flag': (('--wrokdir=x',), ("'wrokdir'", 'workdir')),
    'stray word': (('--stages=teacher,', 'student'), ("'student' is no flag", 'no spaces')),
    'unknown stage': (
        ('--stages=teachr',),
        ('teachr', 'teacher,targets,student,quantise,control,evaluate,exams,report'),
    ),
    'no stage': (('--stages=',), ('--stages must name some of',)),
    'stage without its input': (('--stages=student',), ("'teacher'", '--stages=teacher,student')),
    'mesh': (('--config.mesh.data=3',), ('3', '8')),
    'batch': (('--config.data.batch_size=6',), ('config.data.batch_size', 'multiple of 8')),
    'micro batches': (
        ('--config.teacher.train.micro_batches=3',),
        ('teacher.train.micro_batches', 'batch_size=8'),
    ),
    'micro batches on the mesh': (
        ('--config.student.train.micro_batches=2',),
        ('student.train.micro_batches must be a multiple of 8', 'received 4'),
    ),
    'evaluation batch': (
        ('--config.evaluate.batch_size=12',),
        ('config.evaluate.batch_size', 'multiple of 8'),
    ),
    'heads': (
        ('--config.data.tokenizer=bpe', '--config.data.vocab_size=260', '--config.mesh.tensor=4'),
        ('config.teacher.model', 'attention/', "'kv_heads'", 'multiple of 4'),
    ),
    'experts': (
        ('--config.mesh.expert=8', '--config.student.model.moe.router.num_experts=6'),
        ('config.student.model', "'experts'", 'multiple of 8'),
    ),
    'vocabulary': (('--config.mesh.tensor=2',), ('embed', "'vocab'", 'size 259', 'multiple of 2')),
    'missing data': (('--config.data.source=/nowhere/*.txt',), ("'/nowhere/*.txt'", 'Check')),
    'teacher that is not there': (
        ('--config.teacher.source=checkpoint', '--config.teacher.checkpoint=/nowhere/teacher'),
        ('/nowhere',),
    ),
    'teacher without its source': (
        ('--config.teacher.checkpoint=/nowhere/teacher',),
        ("source='checkpoint'", "source='train'"),
    ),
    'conversation without a template': (
        ('--config.exams.chat=True',),
        ('exams.chat=True needs a tokenizer from a folder', 'exams.chat=False'),
    ),
    'exam that is not there': (
        ('--config.exams.gsm8k.test=/nowhere/test.jsonl', '--config.exams.gsm8k.shots=0'),
        ('/nowhere/test.jsonl must be a .jsonl file', 'no such file'),
    ),
    'price of no chip': (('--config.evaluate.chip=abacus',), ("'abacus'", 'choose from')),
    'seed': (('--config.seed=-1',), ('seed', '-1')),
}


@pytest.mark.parametrize('case', OVERRIDES)
def test_command_line(launcher: Launcher, tmp_path: pathlib.Path, case: str):
    flags, parts = OVERRIDES[case]
    workdir = tmp_path / 'study'
    assert_one_screen(launcher.run(*launcher.flags(workdir, *flags)), *parts)
    # Nothing that would stand in the way of the mended command.
    assert not (workdir / 'config.json').exists()


CONFIGS = {
    'unknown key': ('config.student.model.layres = 3', ('layres', 'config.student.model')),
    'unknown part': ('config.studnt.model.num_layers = 3', ('line 4', 'studnt', '"student"')),
    'wrong type': ('config.seed = "zero"', ('line 4', 'seed', "<class 'int'>")),
    'exception': ('config.seed = int("zero")', ('line 4', 'int("zero")', "'zero'")),
    'syntax': ('config.seed = (', ('line 4', "'(' was never closed")),
    'import': ('import nothing_of_that_name', ('line 4', 'nothing_of_that_name')),
}


@pytest.mark.parametrize('case', CONFIGS)
def test_config_file(launcher: Launcher, tmp_path: pathlib.Path, case: str):
    line, parts = CONFIGS[case]
    file = tmp_path / 'study.py'
    file.write_text(
        'from configs import base\ndef get_config():\n    config = base.get_config()\n'
        f'    {line}\n    return config\n'
    )
    finished = launcher.run(f'--config={file}', f'--workdir={tmp_path / "study"}')
    assert_one_screen(finished, *parts)


@pytest.mark.parametrize(
    ('argv', 'parts'),
    [
        ((), ('--config=PATH is required',)),
        ((f'--config={TINY}',), ('--workdir=PATH is required',)),
        ((f'--config={TINY}', '--workdir='), ('--workdir=PATH is required',)),
        (('--config=nowhere.py', '--workdir=x'), ('No such file', 'nowhere.py')),
        (('--config=nowhere.py', '--workdir=x', '--config.seed=1'), ('No such file',)),
        (('--config=pyproject.toml', '--workdir=x'), ('pyproject.toml, line ',)),
        (('--config.seed=1', f'--config={TINY}', '--workdir=x'), ('before', '--config')),
    ],
)
def test_what_must_be_given(launcher: Launcher, argv: tuple[str, ...], parts: tuple[str, ...]):
    assert_one_screen(launcher.run(*argv), *parts)


DATA = {
    'nothing in it': ('a.txt', b'', "a.txt' must hold text"),
    'too little': ('a.txt', b'one short text', 'at least 2'),
    'binary junk': ('a.txt', b'text\x00\xff\xfe more', 'a.txt: must be utf-8 text; byte 5'),
    'not utf-8': (
        'a.txt',
        'caf\u00e9 and so on'.encode('latin-1'),
        'a.txt: must be utf-8 text; byte 3 is 0xe9',
    ),
    'broken line': ('a.jsonl', b'{"text": "good"}\n{"text": "bad\n', 'a.jsonl, line 2'),
    'no such field': (
        'a.jsonl',
        b'{"text": "good"}\n{"body": "x"}\n',
        "a.jsonl, line 2: the field 'text'",
    ),
    'unknown kind': ('a.docx', b'text', "a.docx: cannot read files of kind '.docx'"),
}


@pytest.mark.parametrize('case', DATA)
def test_data(launcher: Launcher, tmp_path: pathlib.Path, case: str):
    name, content, part = DATA[case]
    (tmp_path / name).write_bytes(content)
    source = f'--config.data.source={tmp_path / name}'
    workdir = tmp_path / 'study'
    finished = launcher.run(*launcher.flags(workdir, source), devices=1)
    assert_one_screen(finished, part)
    assert not (workdir / 'config.json').exists()


@pytest.fixture
def trained(uninterrupted: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A study of one's own to spoil."""
    return shutil.copytree(uninterrupted, tmp_path / 'trained')


def test_workdir_of_another_config(launcher: Launcher, uninterrupted: pathlib.Path):
    finished = launcher.run(
        *launcher.flags(uninterrupted, '--config.student.model.num_layers=2', *MESH)
    )
    assert_one_screen(finished, 'student.model.num_layers: 1 there, 2 now', 'another --workdir')


def test_workdir_that_is_a_file(launcher: Launcher, tmp_path: pathlib.Path):
    (tmp_path / 'file').touch()
    assert_one_screen(launcher.run(*launcher.flags(tmp_path / 'file')), 'is a file')


def test_paths_that_cannot_be(launcher: Launcher, tmp_path: pathlib.Path):
    (tmp_path / 'file').touch()
    (tmp_path / 'loop').symlink_to(tmp_path / 'loop')
    (tmp_path / 'dangling').symlink_to(tmp_path / 'nowhere')
    for name, part in {
        'file/study': 'Not a directory',
        'x' * 300: 'File name too long',
        'loop/study': 'Too many levels of symbolic links',
        'dangling': 'File exists',
    }.items():
        workdir = tmp_path / name
        finished = launcher.run(*launcher.flags(workdir, '--stages=teacher'), devices=1)
        assert_one_screen(finished, str(workdir), part, '--workdir', status=1)


def test_tokenizer_of_another_checkpoint(
    launcher: Launcher, trained: pathlib.Path, tmp_path: pathlib.Path
):
    from distill.tokenizer import train_bpe

    # As many ids as there are bytes and marks: no shape tells the two apart.
    shutil.rmtree(trained / 'tokenizer')
    train_bpe(['the cat sat on a mat'], 259).save(trained / 'tokenizer')
    finished = launcher.run(
        *launcher.flags(
            tmp_path / 'study',
            '--config.teacher.source=checkpoint',
            f'--config.teacher.checkpoint={trained / "teacher"}',
        )
    )
    assert_one_screen(finished, 'was made with another', 'tokenizer:')


def test_teacher_of_another_shape(
    launcher: Launcher, uninterrupted: pathlib.Path, tmp_path: pathlib.Path
):
    finished = launcher.run(
        *launcher.flags(
            tmp_path / 'study',
            '--config.teacher.source=checkpoint',
            f'--config.teacher.checkpoint={uninterrupted / "teacher"}',
            '--config.teacher.model.mlp_dim=48',
        )
    )
    assert_one_screen(finished, 'was made with another', 'model.mlp_dim: 32 there, 48 here')


def test_every_checkpoint_corrupted(launcher: Launcher, trained: pathlib.Path):
    (trained / 'teacher' / 'result.json').unlink()
    checkpoints = trained / 'teacher' / 'checkpoints'
    for step in complete_steps(checkpoints):
        flip_a_byte(checkpoints / str(step))
    finished = launcher.run(*launcher.flags(trained, '--stages=teacher', *MESH))
    assert_one_screen(finished, 'checksum', str(checkpoints), 'delete the directory')


def test_model_of_the_teacher_corrupted(launcher: Launcher, trained: pathlib.Path):
    (trained / 'student' / 'result.json').unlink()
    flip_a_byte(trained / 'teacher' / 'model' / '12')
    finished = launcher.run(*launcher.flags(trained, '--stages=student', *MESH))
    assert_one_screen(finished, 'checksum', str(trained / 'teacher' / 'model'))


def test_result_cut_off(launcher: Launcher, trained: pathlib.Path):
    (trained / 'teacher' / 'result.json').write_text('{"steps"')
    finished = launcher.run(*launcher.flags(trained, *MESH))
    assert_one_screen(finished, 'teacher/result.json is not valid JSON', 'Delete it')


def test_no_space_on_the_disk(
    launcher: Launcher, uninterrupted: pathlib.Path, tmp_path: pathlib.Path
):
    """First the tokens do not fit, then the checkpoints."""
    disk = tmp_path / 'disk'
    disk.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=12k', 'tmpfs', str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip('mounting a small disk needs to be root; test_no_space_for_a_file does not')
    try:
        flags = launcher.flags(disk / 'study', '--stages=teacher', *MESH)
        for part, next_size in (('no space left to write', '200k'), ('room', '20m')):
            assert_one_screen(launcher.run(*flags), part, 'again', status=1)
            subprocess.run(['mount', '-o', f'remount,size={next_size}', str(disk)], check=True)
        finished = launcher.run(*flags)
        assert finished.status == 0, finished.output
        assert metric_rows(disk / 'study', 'teacher') == metric_rows(uninterrupted, 'teacher')
    finally:
        subprocess.run(['umount', str(disk)], check=True)


def test_no_space_for_a_file(
    launcher: Launcher, uninterrupted: pathlib.Path, tmp_path: pathlib.Path
):
    finished = launcher.run(
        *launcher.flags(tmp_path / 'study', '--stages=teacher', *MESH), limit=40_000
    )
    assert_one_screen(finished, 'checkpoint of step 3', 'room', 'start again', status=1)


def test_a_true_command_line(launcher: Launcher, tmp_path: pathlib.Path):
    """What the forks above show holds where Python starts anew."""
    argv = launcher.flags(tmp_path, '--config.student.model.num_layer=3')
    with launcher.command(*argv) as command:
        output, _ = command.communicate(timeout=LONGEST_LAUNCH)
    assert_one_screen(Finished(command.returncode, output), 'num_layers')
