"""Tasks of lm-eval, of each kind, from local files: what our model scores, against a plain forward.

lm-eval needs no torch; it stands here because its dependencies are many.
"""

import json
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip('lm_eval', reason='tasks of lm-eval need the extra eval')
datasets = pytest.importorskip('datasets', reason='tasks of lm-eval need the extra eval')

from distill.pretrained_tokenizer import PretrainedTokenizer, write_pretrained  # noqa: E402
from distill.tokenizer import ByteTokenizer  # noqa: E402
from experiments.exam_config import ExamConfig  # noqa: E402
from experiments.examinee import Examinee  # noqa: E402
from experiments.exams import make_examinee  # noqa: E402
from experiments.harness import harness_model, run_tasks  # noqa: E402
from experiments.tasks.python_endings import questions  # noqa: E402
from moe.config import AttentionConfig, MoEConfig, RouterConfig, TransformerConfig  # noqa: E402
from moe.engine import Engine  # noqa: E402
from moe.errors import InputError  # noqa: E402
from moe.transformer import Transformer  # noqa: E402

BYTES = ByteTokenizer()
TASKS = pathlib.Path(__file__).parents[2] / 'experiments' / 'tasks'
CONFIG = TransformerConfig(
    vocab_size=BYTES.vocab_size,
    num_layers=2,
    embed_dim=16,
    mlp_dim=12,
    attention=AttentionConfig(2, 1, 8),
    moe=MoEConfig(RouterConfig(4, 2), 6, layers=(1,)),
)
WIDTH = 64  # bytes of the longest text of the reference
QUESTIONS = [
    {'question': 'The cat', 'choices': ['sat', 'was on the mat'], 'gold': 0},
    {'question': 'A dog', 'choices': ['ran', 'is', 'no'], 'gold': 1},
    {'question': 'Up', 'choices': ['and away', 'x'], 'gold': 1},
    {'question': 'Why', 'choices': ['so', 'not this', 'me'], 'gold': 2},
    {'question': 'It is', 'choices': ['a', 'the longest of them', 'b'], 'gold': 0},
]
TEXTS = [{'text': 'the cat sat on the mat'}, {'text': 'a dog'}, {'text': 'up and away it went'}]
COMMON = 'dataset_path: json\ntest_split: test\n'
CHOICE = """
task: local_choice
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
ROLLING = """
task: local_rolling
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
"""
WRITING = """
task: local_writing
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: [%s], max_gen_toks: 8, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""

TEMPLATE = """{{ bos_token }}{% for message in messages %}
[{{ message.role }}]{{ message.content }}{{ eos_token }}
{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"""


@pytest.fixture(scope='module')
def model():
    """The model, and its log-probabilities of each position of a text in float64."""
    module = Transformer(CONFIG)
    init = jax.jit(lambda key: nn.unbox(module.init(key, jnp.ones((1, 1), jnp.int32))))
    variables = jax.tree.map(lambda leaf: leaf * 2.5, init(jax.random.key(0)))
    apply = jax.jit(module.apply)

    def log_probs(ids: list[int]) -> np.ndarray:
        row = np.zeros((1, WIDTH), np.int32)
        row[0, : len(ids)] = ids
        logits = np.asarray(apply(variables, row).logits[0], np.float64)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    return module, variables, log_probs


@pytest.fixture
def examinee(model):
    return Examinee(model[0], model[1], BYTES, rows=4, max_length=WIDTH)


@pytest.fixture
def sit(examinee, tmp_path, monkeypatch):
    """Writes a task and its data as files, and sits it."""
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'cache')
    for setting in ('HF_DATASETS_OFFLINE', 'HF_HUB_OFFLINE'):
        monkeypatch.setattr(datasets.config, setting, True)

    def sit(task: str, rows: list[dict] | None, by: Examinee = examinee, **settings):
        name = task.split()[1]
        data = tmp_path / f'{name}.jsonl'
        if rows is not None:
            data.write_text('\n'.join(map(json.dumps, rows)) + '\n')
        files = f'dataset_kwargs: {{data_files: {{test: {data}}}}}\n'
        (tmp_path / 'tasks').mkdir(exist_ok=True)
        (tmp_path / 'tasks' / f'{name}.yaml').write_text(task.strip() + '\n' + COMMON + files)
        config = ExamConfig(tasks=(name,), tasks_path=str(tmp_path / 'tasks'), **settings)
        return {exam.name: exam for exam in run_tasks(by, config, seed=0)}

    return sit


def likelihood(model, context: str, continuation: str) -> tuple[float, bool]:
    """Of a continuation, byte by byte, and whether each byte is the likeliest."""
    before = [BYTES.bos_id, *context.encode()]
    log_probs, total, greedy = model[2]([*before, *continuation.encode()]), 0.0, True
    for at, byte in enumerate(continuation.encode(), start=len(before) - 1):
        total += log_probs[at, byte]
        greedy &= byte == log_probs[at].argmax()
    return total, bool(greedy)


def written(model, prompt: str, count: int) -> bytes:
    """What the likeliest byte at each step writes."""
    ids = [BYTES.bos_id, *prompt.encode()]
    for _ in range(count):
        ids.append(int(model[2](ids)[len(ids) - 1].argmax()))
    return bytes(ids[1 + len(prompt.encode()) :])


class Request:
    def __init__(self, *args):
        self.args = args


def test_the_three_questions_of_lm_eval(model, examinee):
    asked = harness_model(examinee)
    # Spaces at the end of a context are lm-eval's to move, and belong to what follows.
    moved = {('The cat', ' sat'): None, ('', 'x'): None, ('a ', 'b'): ('a', ' b')}
    found = asked.loglikelihood([Request(*pair) for pair in moved])
    for (total, greedy), (pair, other) in zip(found, moved.items(), strict=True):
        wanted = likelihood(model, *(other or pair))
        assert total == pytest.approx(wanted[0], abs=1e-3)
        assert greedy == wanted[1]
    (text,) = asked.generate_until([Request('The', {'max_gen_toks': 5, 'until': []})])
    assert text == written(model, 'The', 5).decode(errors='replace')
    with pytest.raises(InputError, match='received num_beams'):
        asked.generate_until([Request('x', {'num_beams': 4})])


def test_a_long_text_is_cut_into_windows_that_predict_each_token_once(model):
    text = 'the cat sat on the mat, and the dog ran up the hill and away'
    short = Examinee(model[0], model[1], BYTES, rows=4, max_length=17)
    (total,) = harness_model(short).loglikelihood_rolling([Request(text)])
    # 16 inputs at a time; the last window has as much of them as context as there is room for.
    ids, predicted, wanted = [BYTES.bos_id, *text.encode()], 0, 0.0
    while predicted < len(text):
        count = min(16, len(text) - predicted)
        start = max(0, predicted + count - 16)
        log_probs = model[2](ids[start : predicted + count])
        for at in range(predicted, predicted + count):
            wanted += log_probs[at - start, ids[at + 1]]
        predicted += count
    assert total == pytest.approx(wanted, abs=2e-3)
    (whole,) = harness_model(
        Examinee(model[0], model[1], BYTES, rows=4, max_length=64)
    ).loglikelihood_rolling([Request(text)])
    assert whole == pytest.approx(likelihood(model, '', text)[0], abs=2e-3)
    assert abs(whole - total) > 0.1


def test_multiple_choice(model, sit):
    exams = sit(CHOICE, QUESTIONS)
    right, right_by_length = [], []
    for asked in QUESTIONS:
        scores = [likelihood(model, asked['question'], f' {c}')[0] for c in asked['choices']]
        lengths = [len(choice) for choice in asked['choices']]
        right.append(np.argmax(scores) == asked['gold'])
        right_by_length.append(np.argmax(np.divide(scores, lengths)) == asked['gold'])
    assert 0 < sum(right) < len(right), 'the reference must tell right from wrong'
    acc, norm = exams['local_choice acc'], exams['local_choice acc_norm']
    assert acc.grades.tolist() == right
    assert norm.grades.tolist() == right_by_length
    assert (acc.questions, acc.higher_is_better) == (5, True)
    assert acc.standard_error == pytest.approx(np.std(right, ddof=1) / np.sqrt(5))
    limited = sit(CHOICE, QUESTIONS, limit=2)
    assert limited['local_choice acc'].grades.tolist() == right[:2]


def test_rolling_likelihood(model, sit):
    exams = sit(ROLLING, TEXTS)
    nats = -sum(likelihood(model, '', row['text'])[0] for row in TEXTS)
    words = sum(len(row['text'].split()) for row in TEXTS)
    size = sum(len(row['text'].encode()) for row in TEXTS)
    perplexity = exams['local_rolling word_perplexity']
    assert perplexity.value == pytest.approx(np.exp(nats / words), rel=1e-3)
    assert exams['local_rolling bits_per_byte'].value == pytest.approx(
        nats / size / np.log(2), rel=1e-4
    )
    assert (perplexity.grades, perplexity.higher_is_better) == (None, False)


def test_generation(model, sit):
    """The model's own text, up to a string of it, is right; anything else is wrong."""
    prompts = ('The', 'A dog', 'Up')
    own = {prompt: written(model, prompt, 8).decode(errors='replace') for prompt in prompts}
    stop = next(c for c in own['The'][2:] if c.isascii() and c.isprintable())
    rows = [{'prompt': prompt, 'answer': text.split(stop)[0]} for prompt, text in own.items()]
    rows[1]['answer'] += ' and more'
    exams = sit(WRITING % json.dumps(stop), rows)
    assert exams['local_writing exact_match'].grades.tolist() == [1, 0, 1]


@pytest.fixture
def conversing(model, sit, tmp_path, monkeypatch):
    """Sits a task in conversations; returns the ids that the model was given, each time."""
    pytest.importorskip('jinja2', reason='chat templates need the extra chat')
    write_pretrained(BYTES, tmp_path / 'published')
    (tmp_path / 'published' / 'chat_template.jinja').write_text(TEMPLATE)
    ends = {'eos_token_id': [BYTES.eos_id, ord('!')]}
    (tmp_path / 'published' / 'generation_config.json').write_text(json.dumps(ends))
    tokenizer = PretrainedTokenizer(tmp_path / 'published')
    requests, submit = [], Engine.submit
    pairs, score = [], Examinee.score
    monkeypatch.setattr(Engine, 'submit', lambda *args: requests.append(args[1]) or submit(*args))
    monkeypatch.setattr(Examinee, 'score', lambda *args: pairs.extend(args[1]) or score(*args))
    model = (model[0], model[1], tokenizer)

    def conversing(task: str, rows: list[dict], **settings):
        config = ExamConfig(chat=True, max_length=256, **settings)
        sit(task, rows, by=make_examinee(*model, config), chat=True, **settings)
        return pairs, requests

    return conversing


BOS, EOS = [BYTES.bos_id], [BYTES.eos_id]


@pytest.mark.parametrize('multiturn', [True, False])
def test_likelihoods_in_a_conversation(conversing, multiturn):
    """One example, a description and a system turn; what spells a special token is one."""
    shown = 'fewshot_config: {sampler: first_n}\nfewshot_split: test\ndescription: Choose.\n'
    rows = [{'question': 'Up', 'choices': ['so', 'no'], 'gold': 1}, *QUESTIONS[:1]]
    pairs, _ = conversing(CHOICE + shown, rows, shots=1, system='Be brief.', multiturn=multiturn)
    begin = [*BOS, *b'[system]Be brief.\n\nChoose.', *EOS, *b'\n']
    turns = [*b'[user]Up', *EOS, *b'\n[assistant]no', *EOS, *b'\n[user]The cat']
    asked = turns if multiturn else [*b'[user]Up no\n\nThe cat']
    context = [*begin, *asked, *EOS, *b'\n[assistant]']
    assert (context, [*b'sat']) in pairs
    assert (context, [*b'was on the mat']) in pairs


def test_answers_in_a_conversation(conversing):
    rows = [{'prompt': 'The cat', 'answer': 'x'}]
    _, requests = conversing(WRITING % '', rows)
    asked = [*BOS, *b'[user]The cat', *EOS, *b'\n[assistant]']
    assert list(requests[-1].prompt) == asked
    assert requests[-1].stop_ids == (BYTES.eos_id, ord('!'))
    conversing(WRITING % '' + 'gen_prefix: "So: "\n', rows)
    assert list(requests[-1].prompt) == [*asked, *b'So: ']


def test_what_is_scored_whole_is_no_conversation(conversing):
    pairs, _ = conversing(ROLLING, TEXTS[1:2])
    assert pairs == [(BOS, [*b'a dog'])]


def test_the_task_that_needs_no_data(model, examinee):
    """Its questions differ, and have one right ending each, which a forward pass judges alike."""
    asked = questions(count=400, seed=0)['test'].to_list()
    assert asked == questions(count=400, seed=0)['test'].to_list()
    assert len({one['text'] for one in asked}) == 400
    assert {one['choices'][one['gold']] for one in asked} >= {':\n', ']\n', ')\n', ' as'}
    assert len({one['gold'] for one in asked}) == 4
    config = ExamConfig(('python_endings',), str(TASKS), limit=4)
    (exam,) = run_tasks(examinee, config, seed=0)
    asked = asked[:4]
    scores = [[likelihood(model, one['text'], c)[0] for c in one['choices']] for one in asked]
    wanted = [np.argmax(row) == one['gold'] for row, one in zip(scores, asked, strict=True)]
    assert (exam.name, exam.grades.tolist()) == ('python_endings acc', wanted)


def test_what_is_not_there_is_named(sit, examinee, tmp_path):
    config = ExamConfig(tasks=('local_choise',), tasks_path=str(tmp_path))
    with pytest.raises(InputError, match="no task 'local_choise'"):
        run_tasks(examinee, config, seed=0)
    with pytest.raises(InputError, match='data of local_rolling must be on this machine'):
        sit(ROLLING, None)
    with pytest.raises(InputError, match='max_length=64 tokens'):
        sit(CHOICE, [{'question': 'x' * 70, 'choices': ['a', 'b'], 'gold': 0}])
