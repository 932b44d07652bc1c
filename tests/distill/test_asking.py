"""Asking a server that fails in every way, over real connections on loopback."""

import collections
import json
import threading
import time

import pytest
from faulty_proxy import FaultyProxy

import distill.remote
from distill.answer_ledger import AnswerLedger
from distill.asking import MalformedError, Manner, RemoteError, ask_all
from distill.backoff import Backoff
from distill.budget import BudgetError, Limits
from distill.remote import RemoteServer, Request
from moe.errors import InputError

KEY = 'sk-a-key-that-nobody-may-see'
NO_LIMITS = Limits()
QUICK = Backoff(attempts=4, first=0.01, longest=0.02)


def answer(body):
    """Eight tokens of prompt, two of answer."""
    text = body['prompt'].upper() if 'prompt' in body else 'chat'
    usage = {'prompt_tokens': 8, 'completion_tokens': 2}
    return {'choices': [{'text': text}], 'usage': usage}


def request(prompt, occurrence=0):
    return Request('completions', {'prompt': prompt, 'max_tokens': 4}, 10, 4, occurrence)


def read(request, answer):
    text = answer['choices'][0]['text']
    if text != request.body['prompt'].upper():
        raise MalformedError(f'misaligned: {text!r}')
    return text


@pytest.fixture
def proxy():
    proxy = FaultyProxy(answer=answer)
    yield proxy
    proxy.close()


@pytest.fixture
def ask(proxy, tmp_path):
    """Asks prompts of the proxy, and returns the tally and the ledger."""

    def ask(prompts, *, limits=NO_LIMITS, concurrency=4, timeout=60.0, backoff=QUICK, **how):
        server = RemoteServer(proxy.url, 'tiny', KEY, timeout)
        manner = Manner(concurrency, backoff, limits)
        with AnswerLedger(tmp_path / 'ledger.jsonl', {}) as ledger:
            requests = [p if isinstance(p, Request) else request(p) for p in prompts]
            tally = ask_all(server, requests, ledger, read, manner, **how)
            for one in requests:
                assert ledger.outcome(one.key)
        return tally

    return ask


def lines(tmp_path):
    return [json.loads(line) for line in (tmp_path / 'ledger.jsonl').read_text().splitlines()]


def outcomes(tmp_path, prompt):
    key = request(prompt).key
    return [line['as'] for line in lines(tmp_path) if line.get('ended') == key]


def test_every_failure_ends_in_one_answer(proxy, ask, tmp_path):
    for fault in ('429', '500', '503', 'reset', 'lost'):
        proxy.faults[json.dumps(fault)] = [fault]
    tally = ask(['429', '500', '503', 'reset', 'lost', 'fine'])
    assert (tally.answered, tally.quarantined, tally.given_up) == (6, 0, 0)
    for fault in ('429', '500', '503'):
        assert outcomes(tmp_path, fault) == ['refused', 'answered']
    # The connection broke after the request was sent: it may have been done.
    for fault in ('reset', 'lost'):
        assert outcomes(tmp_path, fault) == ['lost', 'answered']
    assert outcomes(tmp_path, 'fine') == ['answered']
    assert set(proxy.answered.values()) == {1}
    # One key for all attempts of a request, by which the server can tell.
    assert len(proxy.asked) == 6
    assert sorted(map(len, proxy.asked.values())) == [1, 2, 2, 2, 2, 2]
    with AnswerLedger(tmp_path / 'ledger.jsonl', {}) as ledger:
        # Six answers of 10 tokens; two attempts that may have cost all of their 14.
        assert ledger.spent.tokens == 6 * 10 + 2 * 14


def test_retry_after_is_waited_for_by_all(proxy, ask):
    proxy.retry_after = '0.6'
    for name in 'ab':
        proxy.faults[json.dumps(name)] = ['429']
    ask(['a', 'b', 'c', 'd'], concurrency=2)
    first = min(proxy.times[request(name).key][0] for name in 'ab')
    others = [proxy.times[request(name).key][-1] for name in 'abcd']
    assert min(others) - first >= 0.6


def test_a_server_that_hangs_is_left_after_the_timeout(proxy, ask, tmp_path):
    proxy.faults[json.dumps('a')] = ['hang']
    ask(['a'], timeout=2.0)
    # A machine that rests may be late more than once.
    *lost, last = outcomes(tmp_path, 'a')
    assert last == 'answered'
    assert set(lost) == {'lost'}
    reasons = {line['reason'] for line in lines(tmp_path) if line.get('as') == 'lost'}
    assert reasons == {'no answer within 2.0 seconds'}


def test_what_is_no_answer_is_quarantined_with_the_reason_and_never_paid_for_again(
    proxy, ask, tmp_path
):
    proxy.faults[json.dumps('cut')] = ['truncated']
    proxy.faults[json.dumps('bad')] = ['400']
    proxy.faults[json.dumps('odd')] = [lambda whole: whole | {'choices': [{'text': 'other'}]}]
    proxy.faults[json.dumps('own')] = [lambda whole: whole | {'choices': KEY}]
    for _ in range(2):
        ask(['cut', 'bad', 'odd', 'own', 'fine'])
    kept = {line['ended']: line for line in lines(tmp_path) if line.get('as') == 'quarantined'}
    cut, bad, odd, own = (kept[request(name).key] for name in ('cut', 'bad', 'odd', 'own'))
    assert 'no JSON' in cut['reason']
    assert cut['answer'].startswith('{"choices"')
    assert cut['cost'][0] == 14  # what it cost is not known: the most
    assert bad['reason'].startswith('400')
    assert bad['cost'][0] == 0
    assert odd['reason'] == "misaligned: 'other'"
    assert odd['cost'][0] == 10
    assert own['reason'].startswith('the answer has another form: TypeError')
    assert own['answer'].startswith('{"choices": "***"')
    assert all(len(asked) == 1 for asked in proxy.asked.values())


def test_no_more_at_one_time_than_is_allowed(proxy, ask):
    proxy.delay = 0.03
    # None is answered before there are three.
    three = threading.Barrier(3, timeout=60)
    proxy.before_answer = lambda key: three.wait()
    ask([f'{n}' for n in range(12)], concurrency=3)
    assert proxy.most_at_once == 3


def test_the_budget_stops_before_the_request_that_could_exceed_it(proxy, ask, tmp_path):
    # Each may cost 14 and costs 10: the sixth may come to 64, the seventh to 74.
    prompts = [f'{n}' for n in range(20)]
    proxy.delay = 0.02
    with pytest.raises(BudgetError, match=r'14 tokens.*70 tokens, of which 60 tokens'):
        ask(prompts, limits=Limits(tokens=70), concurrency=5)
    assert len(proxy.asked) == 6
    # The budget is the ledger's, not the session's; a higher one goes on.
    with pytest.raises(BudgetError):
        ask(prompts, limits=Limits(tokens=70))
    assert len(proxy.asked) == 6
    ask(prompts, limits=Limits(tokens=250))
    assert set(proxy.answered.values()) == {1}
    assert len(proxy.answered) == 20


def test_dollars_stop_too(proxy, ask, tmp_path):
    limits = Limits(dollars=1e-4, prompt_price=1.0, written_price=10.0)
    # 8 + 2 * 10 millionths of a dollar each, 10 + 4 * 10 at most: 100 is reached by the third.
    with pytest.raises(BudgetError, match=r'of which 20 tokens \(5.6e-05 dollars\) are'):
        ask(['a', 'b', 'c', 'd'], limits=limits, concurrency=2)


def test_a_server_that_says_nothing_of_its_price_is_booked_at_the_most(proxy, ask, tmp_path):
    for name in 'ab':
        proxy.faults[json.dumps(name)] = [lambda whole: {'choices': whole['choices']}]
    ask(['a', 'b'])
    with AnswerLedger(tmp_path / 'ledger.jsonl', {}) as ledger:
        assert ledger.spent.tokens == 28


def test_what_holds_for_every_request_stops_at_once(proxy, ask, tmp_path):
    proxy.faults[json.dumps('0')] = ['401']
    # Others are answered when the refusal is long there.
    proxy.before_answer = lambda key: proxy.refused.wait(60) and time.sleep(0.3)
    with pytest.raises(RemoteError, match='denies every request') as error:
        ask([f'{n}' for n in range(50)], concurrency=2)
    assert len(proxy.asked) <= 3
    assert KEY not in str(error.value)
    # The server repeated the key in its message.
    assert '***' in str(error.value)
    assert KEY not in (tmp_path / 'ledger.jsonl').read_text()
    assert proxy.keys == {f'Bearer {KEY}'}


def test_nothing_but_failures_stops(proxy, ask):
    prompts = [f'{n}' for n in range(60)]
    for prompt in prompts:
        proxy.faults[json.dumps(prompt)] = [lambda whole: whole | {'choices': [{'text': '?'}]}]
    with pytest.raises(RemoteError, match=r"16 requests in a row .* the last: misaligned: '\?'"):
        ask(prompts)
    assert len(proxy.asked) < 24


def test_given_up_is_sent_again_by_the_next_call(proxy, tmp_path):
    proxy.faults[json.dumps('a')] = ['500'] * 4
    server = RemoteServer(proxy.url, 'tiny', KEY, 60.0)
    manner = Manner(2, QUICK)
    with AnswerLedger(tmp_path / 'ledger.jsonl', {}) as ledger:
        tally = ask_all(server, [request('a'), request('b')], ledger, read, manner)
        assert (tally.answered, tally.given_up) == (1, 1)
        tally = ask_all(server, [request('a'), request('b')], ledger, read, manner)
        assert (tally.answered, tally.given_up) == (1, 0)
    assert outcomes(tmp_path, 'a') == ['refused'] * 4 + ['answered']


def test_a_server_that_is_not_there_costs_nothing(tmp_path):
    proxy = FaultyProxy(answer=answer)
    proxy.close()
    server = RemoteServer(proxy.url, 'tiny', KEY, 60.0)
    with AnswerLedger(tmp_path / 'ledger.jsonl', {}) as ledger:
        manner = Manner(2, Backoff(2, 0.01, 0.01))
        tally = ask_all(server, [request('a')], ledger, read, manner)
        assert tally.given_up == 1
        assert ledger.spent.tokens == 0
    assert outcomes(tmp_path, 'a') == ['refused', 'refused']


def test_being_asked_to_stop_waits_for_what_is_under_way(proxy, tmp_path):
    proxy.delay = 0.05
    server = RemoteServer(proxy.url, 'tiny', KEY, 60.0)
    with AnswerLedger(tmp_path / 'ledger.jsonl', {}) as ledger:
        requests = [request(f'{n}') for n in range(50)]
        stop = lambda: len(proxy.asked) >= 2  # noqa: E731
        ask_all(server, requests, ledger, read, Manner(3, QUICK), should_stop=stop)
    written = collections.Counter(next(iter(line)) for line in lines(tmp_path))
    assert written['asked'] == written['ended'] == sum(proxy.answered.values())
    assert 2 <= written['asked'] < 10


def test_the_same_prompt_twice_is_asked_twice_where_it_is_meant_so(proxy, ask):
    ask([request('a'), request('a'), request('a', 1)], concurrency=1)
    assert sum(proxy.answered.values()) == 2


def test_chat_goes_its_own_way(proxy, tmp_path):
    chat = Request('chat/completions', {'messages': [{'role': 'user', 'content': 'x'}]}, 9, 1)
    server = RemoteServer(proxy.url, 'tiny', None, 60.0)
    with AnswerLedger(tmp_path / 'ledger.jsonl', {}) as ledger:
        ask_all(server, [chat], ledger, lambda _, a: a['choices'][0]['text'], Manner())
        assert ledger.entry(chat.key)['record'] == 'chat'
    (body,) = proxy.asked[chat.key]
    assert body == {'messages': [{'role': 'user', 'content': 'x'}], 'model': 'tiny'}


def test_a_missing_library_is_named_with_its_extra(monkeypatch, ask):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(distill.remote.importlib, 'import_module', missing)
    with pytest.raises(InputError, match=r"extra 'api': pip install 'fractional\[api\]'"):
        ask(['a'])


@pytest.mark.parametrize(
    ('url', 'message'),
    [
        ('https://user:secret@host/v1', 'without a user, a password or a query'),
        ('https://host/v1?key=secret', 'without a user, a password or a query'),
        ('host/v1', "such as 'https://host/v1'"),
    ],
)
def test_an_address_holds_no_secret(url, message):
    with pytest.raises(InputError, match=message) as error:
        RemoteServer(url, 'tiny')
    assert 'secret' not in str(error.value)


def test_a_server_does_not_show_its_key():
    assert KEY not in repr(RemoteServer('https://host/v1', 'tiny', KEY))
