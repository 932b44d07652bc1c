"""Exams: what is asked, how it is judged, and what comes of it in the report."""

import json
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from launching import ROOT
from stage import make_stage

from distill.gsm8k import prompt
from distill.pretrained_tokenizer import PretrainedTokenizer, write_pretrained
from distill.tokenizer import ByteTokenizer
from experiments.chat_prompts import required_chat
from experiments.exam_config import ExamConfig, GSM8KConfig, NeedleConfig
from experiments.examinee import Examinee, Question
from experiments.exams import make_examinee, require_sittable, results, sit
from experiments.harness import run_tasks
from experiments.loading import load_stage
from moe.decode import write
from moe.errors import InputError
from moe.sampling import Sampling

BYTES = ByteTokenizer()
PROBLEMS = [
    {'question': f'{n} and {n}?', 'answer': f'{n}+{n}={2 * n}\n#### {2 * n}'} for n in range(6)
]


class Scripted(Examinee):
    """Sits exams by a script: right in some, wrong in others; remembers what it was asked."""

    def __init__(self, **script):
        self.tokenizer, self.chat, self.script, self.asked = BYTES, None, script, []

    def write(self, questions):
        self.asked += questions
        return [self.script['answers'](number) for number, _ in enumerate(questions)]

    def score(self, pairs):
        return [self.script['scored'](number, *pair) for number, pair in enumerate(pairs)]


@pytest.fixture(scope='module')
def stage(tmp_path_factory):
    return make_stage(tmp_path_factory.mktemp('study'))


@pytest.fixture(scope='module')
def examinee(stage):
    loaded = load_stage(stage)
    return Examinee(loaded.model, loaded.variables, loaded.tokenizer, rows=2, max_length=64)


@pytest.fixture
def files(tmp_path):
    for name, problems in (('test', PROBLEMS[:4]), ('train', PROBLEMS[4:])):
        (tmp_path / f'{name}.jsonl').write_text('\n'.join(map(json.dumps, problems)))
    return str(tmp_path / 'test.jsonl'), str(tmp_path / 'train.jsonl')


def test_answers_are_what_the_model_alone_would_write(examinee, stage):
    """More questions than rows; one ends at a string of its own text."""
    loaded = load_stage(stage)
    texts = ['the cat', '', 'sat on a mat']
    ids = [[BYTES.bos_id, *BYTES.encode(text)] for text in texts]
    greedy, key = Sampling(0.0), jax.random.key(0)
    alone = write(
        loaded.model, loaded.variables, ids, max_new_tokens=8, sampling=greedy, key=key
    ).tokens
    wanted = []
    for row in np.asarray(alone).tolist():
        row = row[: row.index(BYTES.eos_id)] if BYTES.eos_id in row else row
        assert max(row) < BYTES.vocab_size, 'the reference knows no narrower vocabulary'
        wanted.append(BYTES.decode(row))
    assert examinee.write([Question(text, 8) for text in texts]) == wanted
    stop = wanted[0][3:5]
    cut = examinee.write([Question(texts[0], 8, ('no such string', stop))])
    assert cut == [wanted[0][: wanted[0].index(stop)]]


def test_spaces_belong_to_what_follows(examinee):
    context, rest = examinee.split('a b  ', 'cd')
    assert (context, rest) == ([BYTES.bos_id, *b'a b'], [*b'  cd'])
    assert examinee.split('', 'x') == ([BYTES.bos_id], [*b'x'])


def test_what_has_no_room_is_refused(examinee):
    with pytest.raises(InputError, match=r'max_length=64 tokens; 1 of 2 take more, up to 81'):
        examinee.write([Question('x', 9), Question('x' * 50, 30)])
    with pytest.raises(InputError, match='1 of 1 take more, up to 65'):
        examinee.score([([1] * 40, [2] * 25)])


def test_gsm8k_is_graded_by_the_number(files):
    test, train = files
    answers = [' 0+0\n#### 0', ' #### 5', ' 2+2=4', ' so it is #### 6.00']
    model = Scripted(answers=answers.__getitem__)
    config = ExamConfig(gsm8k=GSM8KConfig(test, train, shots=2, max_new_tokens=32))
    (exam,) = sit(model, config, seed=1).exams
    assert exam.grades.tolist() == [1, 0, 0, 1]
    assert (exam.value, exam.questions) == (0.5, 4)
    asked = model.asked[3]
    assert (asked.max_new_tokens, asked.stops) == (32, ('Question:',))
    assert asked.sampling == Sampling(0.0)
    solved = asked.text.split('Question: ')[1:-1]
    assert sorted(text.splitlines()[0] for text in solved) == ['4 and 4?', '5 and 5?']
    assert asked.text.endswith(prompt([], '3 and 3?'))
    assert len(sit(model, ExamConfig(limit=3, gsm8k=config.gsm8k), seed=1).exams[0].grades) == 3


def test_gsm8k_is_asked_as_a_conversation(files, tmp_path):
    pytest.importorskip('jinja2', reason='chat templates need the extra chat')
    write_pretrained(BYTES, tmp_path / 'published')
    (tmp_path / 'published' / 'chat_template.jinja').write_text(
        '{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}'
        '{% if add_generation_prompt %}<assistant>{% endif %}'
    )
    model = Scripted(answers=lambda _: '')
    model.chat = required_chat(PretrainedTokenizer(tmp_path / 'published'))
    exam = GSM8KConfig(*files, shots=2)
    for multiturn in (True, False):
        config = ExamConfig(gsm8k=exam, limit=1, chat=True, system='Be brief.', multiturn=multiturn)
        sit(model, config, seed=1)
    first, second = [p['question'] for p in PROBLEMS[4:]]
    turns, one = (asked.text for asked in model.asked)
    if turns.index(first) > turns.index(second):
        first, second = second, first
    answers = {p['question']: p['answer'] for p in PROBLEMS}
    begin, mark, end = '<system>Be brief.<|eos|>', '<user>Question: ', 'Question: 0 and 0?\nAnswer:'
    assert (
        turns
        == begin
        + ''.join(
            f'{mark}{q}\nAnswer:<|eos|><assistant>{answers[q]}<|eos|>' for q in (first, second)
        )
        + f'<user>{end}<|eos|><assistant>'
    )
    solved = '\n\nQuestion: '.join(f'{q}\nAnswer: {answers[q]}' for q in (first, second))
    assert one == f'{begin}{mark}{solved}\n\n{end}<|eos|><assistant>'
    assert all(asked.rendered for asked in model.asked)


def test_a_conversation_needs_a_template(examinee, tmp_path, monkeypatch):
    parts = (examinee._model, examinee._variables)
    config = ExamConfig(chat=True)
    with pytest.raises(InputError, match=r"received one of kind 'byte'\. Ask in plain text"):
        make_examinee(*parts, BYTES, config)
    write_pretrained(BYTES, tmp_path / 'published')
    with pytest.raises(InputError, match='must have a chat template'):
        make_examinee(*parts, PretrainedTokenizer(tmp_path / 'published'), config)
    (tmp_path / 'published' / 'chat_template.jinja').write_text('x')
    monkeypatch.setitem(sys.modules, 'jinja2', None)
    with pytest.raises(InputError, match="need the extra 'chat'"):
        make_examinee(*parts, PretrainedTokenizer(tmp_path / 'published'), config)
    assert make_examinee(*parts, BYTES, ExamConfig()).chat is None


def scored_as(log_prob, greedy):
    return types.SimpleNamespace(log_prob=log_prob, is_greedy=greedy)


def test_a_needle_is_found_where_the_right_number_is_likeliest():
    """A model that reads the first half of a text alone, and one that holds all alike."""

    def half_blind(number, context, rest):
        text, value = bytes(context[1:]).decode(), bytes(rest).decode().strip()
        town = text.rsplit('of ', 1)[1].removesuffix(' is')
        seen = f'{town} is {value}.' in text[: len(text) // 2]
        return scored_as(-1.0 if seen else -2.0, seen and number % 8 == 0)

    config = ExamConfig(needle=NeedleConfig((600, 900), (0.0, 1.0), trials=2), max_length=900)
    sat = sit(Scripted(scored=half_blind), config, seed=0)
    chosen, recited = sat.exams
    assert {(c['length'], c['depth']): c['value'] for c in sat.needle} == {
        (600, 0.0): 1.0,
        (600, 1.0): 0.0,
        (900, 0.0): 1.0,
        (900, 1.0): 0.0,
    }
    assert (chosen.name, chosen.value, chosen.questions) == ('needle chosen of 4', 0.5, 8)
    assert recited.value == 0.25
    alike = sit(Scripted(scored=lambda *_: scored_as(-1.0, False)), config, seed=0)
    assert alike.exams[0].value == 0


def command(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, '-m', 'experiments.examine', *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_command_compares_with_a_teacher(stage, tmp_path):
    """A model with itself."""
    file = tmp_path / 'out' / 'scores.json'
    sizes = ('--needle_lengths=250', '--needle_trials=2', '--max_length=256')
    run = command(f'--checkpoint={stage}', f'--teacher={stage}', *sizes, f'--json={file}')
    assert run.returncode == 0, run.stderr
    assert 'needle chosen of 4, 10 questions' in run.stdout
    rows = json.loads(file.read_text())
    names = ['needle chosen of 4', 'needle recited']
    wanted = [f'{model}/{name}' for model in ('teacher', 'model') for name in names]
    assert [row['name'] for row in rows] == wanted
    assert rows[0]['value'] == rows[2]['value'] == rows[2].get('reference', 0.0)
    assert f'--checkpoint={stage}' in rows[2]['conditions']


def test_the_command_asks_for_an_exam(stage):
    run = command(f'--checkpoint={stage}')
    assert run.returncode == 2
    assert 'Name an exam' in run.stderr


def test_lm_eval_is_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, 'lm_eval', None)
    with pytest.raises(InputError, match=r"the extra 'eval': pip install 'fractional\[eval\]'"):
        run_tasks(Scripted(), ExamConfig(tasks=('arc_easy',)), seed=0)
    with pytest.raises(InputError, match="the extra 'eval'"):
        require_sittable(ExamConfig(tasks=('arc_easy',)), ())


def test_what_is_not_there_is_found_out_before_training(files, tmp_path):
    test, train = files
    require_sittable(ExamConfig(gsm8k=GSM8KConfig(test, train, shots=2)), ())
    with pytest.raises(InputError, match='3 solved examples are asked for'):
        require_sittable(ExamConfig(gsm8k=GSM8KConfig(test, train, shots=3)), ())
    with pytest.raises(InputError, match='there is no such file'):
        require_sittable(ExamConfig(gsm8k=GSM8KConfig(str(tmp_path / 'nowhere'), shots=0)), ())
    with pytest.raises(InputError, match='A conversation needs the tokenizer'):
        require_sittable(ExamConfig(chat=True), (BYTES,))


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda: GSM8KConfig('test.jsonl'), 'gsm8k.train must be the file that 5'),
        (lambda: GSM8KConfig(shots=-1), 'gsm8k.shots must be zero or more'),
        (lambda: NeedleConfig((0,)), 'needle.lengths must be positive'),
        (lambda: NeedleConfig((9,), (1.5,)), 'needle.depths must be one or more, from 0 to 1'),
        (lambda: NeedleConfig((9,), keys=1), 'needle.keys must be 2 to 8'),
        (lambda: ExamConfig(system='Be brief.'), 'exams.system needs exams.chat=True'),
        (lambda: ExamConfig(multiturn=False), 'exams.multiturn=False is of conversations'),
        (lambda: ExamConfig(limit=0), 'exams.limit must be positive'),
        (lambda: ExamConfig(needle=NeedleConfig((4096,))), 'at least the longest of needle'),
    ],
)
def test_an_exam_that_cannot_be_is_refused(make, message):
    with pytest.raises(InputError) as caught:
        make()
    assert message in str(caught.value)


def test_no_exam_is_sat_unless_asked_for():
    assert not ExamConfig().any
    asked = ExamConfig(('x',), gsm8k=GSM8KConfig('y', shots=0), needle=NeedleConfig((9,)))
    assert asked.any
    assert asked.names == ('x', 'gsm8k', 'needle')
    assert results({}, seed=0) == {'exams': {}}
