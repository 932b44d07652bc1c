"""The page, its pictures, and the numbers in both."""

import base64
import copy
import functools
import html.parser
import json
import re

import numpy as np
import pytest

from distill import exam_pictures, pictures
from distill.load_history import LoadHistory
from distill.report import write_report
from distill.report_page import render
from distill.routing_maps import RoutingMaps

VOID = {'meta', 'img', 'br', 'hr', 'link', 'input'}
HOSTILE = '<script>alert("&amp;")</script>'
PNG = b'\x89PNG\r\n\x1a\n'


def estimate(value: float, width: float = 0.02) -> dict[str, float]:
    return {'value': value, 'low': value - width, 'high': value + width}


SUMMARY = {
    'schema': 1,
    'command': f'study --name={HOSTILE}',
    'config': {'name': HOSTILE, 'rate': 0.25},
    'seed': 7,
    'versions': {'jax': '0.10.2'},
    'devices': {'kind': HOSTILE},
    'stages': {HOSTILE: {'seconds': 65.0}, 'student': {'seconds': 8, 'steps': 1200, 'tokens': 5e4}},
    'models': {
        'teacher': {'bits_per_byte': estimate(1.1), 'flops_per_token': 8e6},
        'student': {
            'bits_per_byte': estimate(1.25),
            'kl_from_teacher': estimate(0.321),
            'flops_per_token': 2e6,
            'usd_per_million_tokens': {
                'value': 0.5,
                'chip': HOSTILE,
                'price_source': {'url': HOSTILE},
                'basis': HOSTILE,
            },
        },
        'control': {'bits_per_byte': estimate(1.3), 'flops_per_token': 2e6},
    },
    'comparison': {
        'control_minus_student_bits_per_byte': estimate(0.05),
        'teacher_to_student_flops': 4.0,
        'retained_accuracy': estimate(0.875),
    },
    'experts': [
        {'layer': 1, 'max_violation': 0.5, 'entropy': 0.9, 'dead_experts': 0, 'drop_fraction': 0.1},
        {'layer': 3, 'max_violation': 2, 'entropy': 0.5, 'dead_experts': 1, 'drop_fraction': 0.0},
    ],
}
SUMMARY['stages']['student']['tokens'] = 50_000
SUMMARY['provenance'] = {
    'teacher': {'name': HOSTILE, 'version': 'v9', 'licence': 'MIT', 'permits_training': True}
}
MINIMAL = {
    'schema': 1,
    'command': 'study',
    'config': {},
    'seed': 0,
    'versions': {},
    'devices': {},
    'stages': {},
    'models': {'student': {'bits_per_byte': {'value': 1.25}}},
}
CURVES = {
    'teacher': [{'step': 0, 'cross_entropy': 3.0}, {'step': 10, 'cross_entropy': 2.0}],
    'student': [
        {'step': 0, 'cross_entropy': 3.5},
        {'step': 5, 'loss': 1.0},
        {'step': 10, 'cross_entropy': None},
        {'step': 20, 'cross_entropy': 2.25},
    ],
    'control': [{'step': 0, 'loss': 9.0}],
}
LOAD = np.array([[30.0, 10.0, 10.0, 10.0], [8.0, 24.0, 0.0, 0.0]])
SAMPLES = {
    'teacher': [{'prompt': 'Once ', 'text': 'upon a time'}],
    'student': [{'prompt': 'Once ', 'text': HOSTILE}, {'prompt': HOSTILE, 'text': 'end'}],
}


class Page(html.parser.HTMLParser):
    """Reads a page and insists that every element is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == 'tr':
            self.rows.append([])
        if tag in ('td', 'th'):
            self.rows[-1].append('')

    def handle_endtag(self, tag):
        assert self.open, f'</{tag}> closes nothing'
        assert self.open.pop() == tag

    def handle_data(self, data):
        if 'style' in self.open:
            return
        self.words.append(data)
        if {'td', 'th'} & set(self.open):
            self.rows[-1][-1] += f' {data}' if self.rows[-1][-1] else data

    @property
    def text(self) -> str:
        return ' '.join(self.words)

    def row(self, first: str) -> list[str]:
        """Returns the cells of the table row of that heading."""
        (found,) = [row for row in self.rows if row and row[0] == first]
        return found[1:]


@functools.cache
def page() -> Page:
    images = dict.fromkeys(('learning_curves', 'cost_quality', 'expert_load'), PNG)
    return Page(render(SUMMARY, SAMPLES, images))


def test_the_page_is_well_formed_and_has_every_section():
    headings = [
        'Teacher, student, control',
        'Learning',
        'What quality costs',
        'Experts',
        'In their own words',
        'The price, step by step',
        'How it was made',
    ]
    assert [word for word in page().words if word in headings] == headings
    assert len([tag for tag, _ in page().tags if tag == 'h1']) == 1
    assert len([tag for tag, _ in page().tags if tag == 'img']) == 3


def test_the_page_carries_the_numbers():
    assert page().row('Bits per byte lower is better') == [
        '1.100 1.080 to 1.120',
        '1.250 1.230 to 1.270',
        '1.300 1.280 to 1.320',
    ]
    assert page().row('FLOPs per token') == ['8.00M', '2.00M', '2.00M']
    assert page().row('1') == ['0.50', '0.900', '0', '10.0 %']
    assert page().row('3') == ['2.00', '0.500', '1', '0.0 %']
    assert page().row('student')[:3] == ['8s', '1,200', '50.0k']
    for number in ('+0.050', '4.0\u00d7', '87.5 %', '0.050 fewer than the same student'):
        assert number in page().text


def test_the_page_says_on_what_terms_the_teacher_taught():
    assert 'v9; licence: MIT; its terms permit training on its outputs' in page().text


def test_what_was_not_measured_is_a_dash_that_says_so_and_never_zero():
    assert page().row('KL from teacher nats/token') == ['\u2013', '0.321 0.301 to 0.341', '\u2013']
    assert page().row('Price million tokens') == ['\u2013', '$0.500', '\u2013']
    # A stage that counted neither updates nor tokens.
    assert page().row(HOSTILE) == ['1m 05s', '\u2013', '\u2013']
    dashes = [attrs for tag, attrs in page().tags if tag == 'abbr']
    assert dashes == [{'title': 'not measured'}] * 4
    # Nobody's accuracy was measured: it has no row at all.
    assert not [row for row in page().rows if row and row[0].startswith('Accuracy')]
    assert page().text.count('not measured') == 1, 'the git commit'


def test_the_smallest_summary_makes_a_page_without_empty_sections():
    bare = Page(render(MINIMAL, {}, {}))
    assert 'no control was measured' in bare.text
    for heading in ('Learning', 'Experts', 'What quality costs', 'The price', 'In their own words'):
        assert heading not in bare.text
    assert bare.rows[:2] == [['', 'student'], ['Bits per byte lower is better', '1.250']]
    assert not [tag for tag, _ in bare.tags if tag in ('img', 'li', 'figure')]


def test_what_a_model_or_a_user_wrote_is_text():
    """A script in samples, config, command, devices, stages or prices stays what it spells."""
    assert 'script' not in [tag for tag, _ in page().tags]
    text = page().text
    assert f'study --name={HOSTILE}' in text
    assert json.dumps(HOSTILE) in text, 'the config'
    # Command, device, stage, chip, basis, teacher, prompt, and the text of the student.
    assert text.count(HOSTILE) == 8
    assert '<script' not in render(SUMMARY, SAMPLES, {})
    labels = [attrs['aria-label'] for tag, attrs in page().tags if 'aria-label' in attrs]
    assert labels == ['Once ', HOSTILE]


def test_a_prompt_is_followed_by_what_each_model_made_of_it():
    words = page().words
    first = words.index('Once ')
    assert words[first : first + 2] == ['Once ', 'upon a time']
    second = words.index('Once ', first + 1)
    assert words[second + 1] == HOSTILE


def test_the_page_loads_nothing_from_elsewhere():
    for tag, attrs in page().tags:
        if tag == 'a':
            assert set(attrs) == {'href'}, 'a link loads nothing before it is followed'
            continue
        assert tag not in ('link', 'script', 'iframe', 'object', 'base')
        for name in ('src', 'href', 'srcset', 'data', 'action', 'poster'):
            assert (attrs.get(name) or 'data:').startswith('data:'), (tag, attrs)
    style = render(MINIMAL, {}, {})
    assert 'url(' not in style
    assert '@import' not in style


def test_pictures_are_embedded_byte_for_byte():
    images = {'expert_load': b'one', 'cost_quality': b'two'}
    tags = Page(render(SUMMARY, SAMPLES, images)).tags
    sources = [attrs['src'] for tag, attrs in tags if tag == 'img']
    prefix = 'data:image/png;base64,'
    assert all(source.startswith(prefix) for source in sources)
    assert [base64.b64decode(source.removeprefix(prefix)) for source in sources] == [b'two', b'one']


def test_a_report_is_a_summary_a_page_and_pictures(tmp_path):
    path = write_report(tmp_path / 'new', SUMMARY, CURVES, SAMPLES, expert_load=LOAD)
    assert path == tmp_path / 'new' / 'report.html'
    files = {str(p.relative_to(path.parent)) for p in path.parent.rglob('*') if p.is_file()}
    names = {'learning_curves', 'cost_quality', 'expert_load'}
    assert files == {'report.html', 'summary.json'} | {f'pictures/{name}.png' for name in names}
    assert json.loads((path.parent / 'summary.json').read_text()) == SUMMARY
    text = path.read_text(encoding='utf-8')
    for name in names:
        image = (path.parent / 'pictures' / f'{name}.png').read_bytes()
        assert image.startswith(PNG)
        assert base64.b64encode(image).decode() in text
    Page(text)


def test_routing_is_drawn_where_it_was_counted(tmp_path):
    balance = [{'step': s, 'moe_0/max_violation_global': 0.5} for s in (10, 20)]
    apart = np.eye(2)[None]
    maps = RoutingMaps((1,), apart, np.ones((1, 2, 2)), ('letters', 'digits'))
    together = RoutingMaps((1,), apart + 1, np.ones((1, 2, 2)), ('letters', 'digits'))
    drawn = []
    for name, routing in (('one', maps), ('two', together)):
        history = LoadHistory(np.array([10, 20]), np.ones((2, 1, 2), np.float32))
        page = write_report(
            tmp_path / name,
            MINIMAL,
            {'student': balance},
            {},
            routing=routing,
            load_history=history,
        )
        drawn.append({file.stem for file in (tmp_path / name / 'pictures').iterdir()})
        assert page.read_text().count('data:image/png') == len(drawn[-1])
    # With one expert a token there are no pairs to draw.
    assert drawn[0] == {'balance_over_steps', 'load_over_steps', 'experts_by_class'}
    assert drawn[1] - drawn[0] == {'experts_together'}


def test_exams_have_a_section_with_what_is_retained(tmp_path):
    summary = copy.deepcopy(MINIMAL)
    exam = {'value': 0.25, 'low': 0.2, 'high': 0.3, 'standard_error': 0.025, 'questions': 300}
    exam |= {'higher_is_better': True, 'retained': {'value': 0.5, 'standard_error': 0.1}}
    cells = [{'length': n, 'depth': 0.5, 'value': n / 512, 'questions': 8} for n in (256, 512)]
    summary['models']['student'] |= {'exams': {HOSTILE: exam}, 'needle': cells}
    path = write_report(tmp_path, summary, {}, {})
    read = Page(path.read_text())
    assert read.row(f'{HOSTILE} 300 questions') == ['25.0 % 20.0 to 30.0, \u00b12.5']
    assert read.row(f"{HOSTILE} of the teacher's") == ['50.0 % \u00b110.0']
    assert 'Examined' in read.words
    assert {file.stem for file in (tmp_path / 'pictures').iterdir()} == {'needle'}


def test_the_map_of_needles_has_a_cell_for_each_length_and_depth():
    cells = [
        {'length': 512, 'depth': 1.0, 'value': 0.25, 'questions': 8},
        {'length': 256, 'depth': 0.0, 'value': 1.0, 'questions': 8},
        {'length': 256, 'depth': 1.0, 'value': 0.5, 'questions': 8},
        {'length': 512, 'depth': 0.0, 'value': 0.75, 'questions': 8},
    ]
    (axes,) = exam_pictures.needle({'models': {'student': {'needle': cells}, 'control': {}}}).axes
    np.testing.assert_array_equal(axes.images[0].get_array(), [[1.0, 0.75], [0.5, 0.25]])
    assert [label.get_text() for label in axes.get_xticklabels()] == ['256', '512']
    assert [label.get_text() for label in axes.get_yticklabels()] == ['0 %', '100 %']
    assert [text.get_text() for text in axes.texts] == ['100', '75', '50', '25']


def test_completions_stand_side_by_side_on_a_page_of_their_own(tmp_path):
    rows = [{'prompt': f'p{n} ', 'text': f'student {n}'} for n in range(5)]
    rows[4] |= {'prompt': HOSTILE, 'source': f'{HOSTILE} went on'}
    teacher = [row | {'text': row['text'].replace('student', 'teacher')} for row in rows]
    samples = {'teacher': teacher, 'student': rows}
    report = Page(write_report(tmp_path, MINIMAL, {}, samples).read_text())
    assert '2 more beginnings, side by side' in report.text
    assert 'student 2' in report.text
    assert 'student 3' not in report.text
    links = [attrs['href'] for tag, attrs in report.tags if tag == 'a']
    assert links == ['completions.html']
    own = Page((tmp_path / links[0]).read_text())
    assert [attrs['aria-label'] for _, attrs in own.tags if 'aria-label' in attrs] == [
        *(f'p{n} ' for n in range(4)),
        HOSTILE,
    ]
    words = own.words[own.words.index('p0 ') :]
    assert [w for w in words if w.startswith(('teacher ', 'student '))][:4] == [
        'teacher 0',
        'student 0',
        'teacher 1',
        'student 1',
    ]
    assert f'{HOSTILE} went on' in own.words
    assert 'script' not in [tag for tag, _ in own.tags]
    assert [attrs['href'] for tag, attrs in own.tags if tag == 'a'] == ['report.html']


def test_few_prompts_need_no_page_of_their_own():
    assert 'completions.html' not in render(SUMMARY, SAMPLES, {})
    assert [tag for tag, _ in page().tags if tag == 'a'] == []


def test_pictures_without_numbers_are_not_drawn(tmp_path):
    path = write_report(tmp_path, MINIMAL, {'student': [{'step': 0}]}, {})
    assert list((tmp_path / 'pictures').iterdir()) == []
    assert 'data:image' not in path.read_text()


def test_a_summary_that_does_not_fit_leaves_no_report(tmp_path):
    summary = copy.deepcopy(MINIMAL)
    summary['models']['student']['accuracy'] = None
    with pytest.raises(ValueError, match=r'summary\.models\.student\.accuracy'):
        write_report(tmp_path, summary, {}, {})
    assert list(tmp_path.iterdir()) == []


def test_learning_curves_carry_the_numbers():
    """A row without the metric is passed over, and a model without any row is not named."""
    axes = pictures.learning_curves(CURVES).axes[0]
    lines = [line for line in axes.lines if len(line.get_xdata()) > 1]
    drawn = {line.get_color(): np.stack(line.get_data(), 1).tolist() for line in lines}
    assert drawn == {
        pictures.COLORS['teacher']: [[0, 3], [10, 2]],
        pictures.COLORS['student']: [[0, 3.5], [20, 2.25]],
    }
    assert {text.get_text() for text in axes.texts} == {'teacher', 'student'}
    axes = pictures.learning_curves(CURVES, y='loss').axes[0]
    assert [line.get_ydata()[-1] for line in axes.lines] == [1.0, 1.0, 9.0, 9.0]


def test_a_long_curve_is_drawn_raw_and_smooth():
    """Of 80 points each is averaged with up to two on either side, and the ends with none."""
    values = np.random.default_rng(0).normal(size=80)
    rows = [{'step': i, 'cross_entropy': value} for i, value in enumerate(values)]
    raw, smooth, end = pictures.learning_curves({'student': rows}).axes[0].lines
    np.testing.assert_array_equal(raw.get_ydata(), values)
    wanted = [
        values[max(0, i - r) : i + r + 1].mean() for i in range(80) for r in [min(2, i, 79 - i)]
    ]
    np.testing.assert_allclose(smooth.get_ydata(), wanted, atol=1e-12)
    assert end.get_ydata()[0] == pytest.approx(values[-1])


def test_the_heat_map_shows_load_over_the_mean():
    axes = pictures.expert_load(LOAD, [1, 3]).axes[0]
    wanted = [[2, 2 / 3, 2 / 3, 2 / 3], [1, 3, 0, 0]]
    np.testing.assert_allclose(axes.images[0].get_array(), wanted)
    assert [text.get_text() for text in axes.texts] == [f'{x:.2f}' for row in wanted for x in row]
    assert [label.get_text() for label in axes.get_yticklabels()] == ['1', '3']
    assert axes.images[0].get_clim() == (0, 3)


def test_cost_and_quality_stand_where_they_were_measured():
    """Three models by FLOPs, with their intervals; the one that has a price again by price."""
    flops, dollars = pictures.cost_quality(SUMMARY).axes
    points = {
        text.get_text(): tuple(map(float, text.xy)) for text in flops.texts if text.get_text()
    }
    assert points == {'teacher': (8e6, 1.1), 'student': (2e6, 1.25), 'control': (2e6, 1.3)}
    assert [(text.get_text(), text.xy) for text in dollars.texts] == [('student', (0.5, 1.25))]
    bars = [bar for container in flops.containers for bar in container.lines[2]]
    ends = sorted(tuple(bar.get_segments()[0][:, 1]) for bar in bars)
    np.testing.assert_allclose(ends, [(1.08, 1.12), (1.23, 1.27), (1.28, 1.32)])


def test_a_picture_of_the_same_numbers_has_the_same_bytes():
    first, second = (pictures.png(pictures.expert_load(LOAD)) for _ in range(2))
    assert first == second
    assert first.startswith(PNG)
    assert pictures.png(pictures.expert_load(LOAD[::-1])) != first
    assert not re.search(rb'Matplotlib|Software', first)
