"""Waits and budgets, by hand."""

import random
from datetime import UTC, datetime

import pytest

from distill.backoff import Backoff, retry_after
from distill.budget import Budget, BudgetError, Cost, Limits
from moe.errors import InputError


def test_waits_double_up_to_the_longest_and_are_drawn_over_all_of_it():
    backoff = Backoff(attempts=9, first=2.0, longest=9.0)
    for failures, reach in ((1, 2.0), (2, 4.0), (3, 8.0), (4, 9.0), (500, 9.0)):
        draw = random.Random(failures)
        waits = [backoff.seconds(failures, None, draw) for _ in range(400)]
        assert 0 <= min(waits) < 0.05 * reach
        assert 0.95 * reach < max(waits) <= reach


def test_a_wait_that_the_server_names_is_never_cut_short():
    backoff = Backoff(first=1.0, longest=4.0)
    draw = random.Random(0)
    waits = [backoff.seconds(1, 30.0, draw) for _ in range(100)]
    assert min(waits) >= 30
    assert max(waits) <= 31
    assert len(set(waits)) == 100


@pytest.mark.parametrize(
    ('headers', 'seconds'),
    [
        ({'retry-after': '7'}, 7.0),
        ({'retry-after': '0.25'}, 0.25),
        ({'retry-after': '-3'}, 0.0),
        ({'retry-after': 'Wed, 21 Oct 2026 07:28:30 GMT'}, 30.0),
        ({'retry-after': 'Wed, 21 Oct 2026 07:00:00 GMT'}, 0.0),
        ({'retry-after-ms': '1500', 'retry-after': '9'}, 1.5),
        ({'retry-after': 'soon'}, None),
        ({'retry-after': 'nan'}, None),
        ({}, None),
    ],
)
def test_what_a_server_asks_for(headers, seconds):
    assert retry_after(headers, datetime(2026, 10, 21, 7, 28, 0, tzinfo=UTC)) == seconds


def test_dollars_are_of_a_million_tokens():
    limits = Limits(prompt_price=2.0, written_price=8.0)
    # 250,000 * 2 / 1e6 + 125,000 * 8 / 1e6
    assert limits.cost(250_000, 125_000) == Cost(375_000, 1.5)


def test_what_is_booked_counts_until_it_is_settled():
    budget = Budget(Limits(tokens=100), spent=Cost(30))
    budget.book(Cost(40))
    assert budget.fits(Cost(30))
    assert not budget.fits(Cost(31))
    with pytest.raises(BudgetError, match=r'may cost 31 tokens.* 100 tokens, of which 30 tokens'):
        budget.book(Cost(31))
    budget.settle(Cost(40), Cost(5))
    assert budget.spent == Cost(35)
    budget.book(Cost(65))


def test_dollars_stop_as_tokens_do():
    limits = Limits(dollars=0.01, prompt_price=1.0, written_price=10.0)
    budget = Budget(limits)
    for _ in range(10):
        budget.book(limits.cost(0, 100))  # 0.001 dollars each
    with pytest.raises(BudgetError, match=r'the budget is 0\.01 dollars'):
        budget.book(limits.cost(1, 0))


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda: Limits(dollars=1.0), 'needs the prices'),
        (lambda: Limits(prompt_price=1.0), 'come together'),
        (lambda: Limits(tokens=-1), 'zero or more'),
        (lambda: Backoff(attempts=0), 'attempts must be at least 1'),
        (lambda: Backoff(first=5.0, longest=4.0), 'at least first_wait=5.0'),
    ],
)
def test_what_cannot_be_meant_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()
