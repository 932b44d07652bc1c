"""What requests may cost, in tokens and dollars: booked before they are sent, settled after."""

import dataclasses

from moe.errors import InputError
from moe.validation import require

_MILLION = 1_000_000


class BudgetError(InputError):
    """The next request could cost more than is left."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """Tokens and dollars.

    Attributes:
        tokens: of prompts and of what was written to them.
        dollars: that they cost; 0 where no price is known.
    """

    tokens: int = 0
    dollars: float = 0.0

    def __add__(self, other: 'Cost') -> 'Cost':
        return Cost(self.tokens + other.tokens, self.dollars + other.dollars)

    def __sub__(self, other: 'Cost') -> 'Cost':
        return Cost(self.tokens - other.tokens, self.dollars - other.dollars)


@dataclasses.dataclass(frozen=True)
class Limits:
    """The most that all requests together may cost, and the prices.

    Attributes:
        tokens: None for no limit.
        dollars: None for no limit; needs the prices.
        prompt_price: dollars for a million tokens of prompts; None where it is not known.
        written_price: dollars for a million tokens that are written.
    """

    tokens: int | None = None
    dollars: float | None = None
    prompt_price: float | None = None
    written_price: float | None = None

    def __post_init__(self) -> None:
        for name, key in (
            ('tokens', 'max_tokens'),
            ('dollars', 'max_dollars'),
            ('prompt_price', 'prompt_price'),
            ('written_price', 'written_price'),
        ):
            value = getattr(self, name)
            require(value is None or value >= 0, key, 'zero or more, or None', value)
        if (self.prompt_price is None) != (self.written_price is None):
            raise InputError(
                'Prices of prompts and of what is written come together; received '
                f'{self.prompt_price!r} and {self.written_price!r} dollars for a million tokens.'
            )
        if self.dollars is not None and not self.priced:
            raise InputError(
                f'A budget of {self.dollars} dollars needs the prices of a million tokens, of '
                'prompts and of what is written; they are None. Set both, or give the budget in '
                'tokens.'
            )

    @property
    def priced(self) -> bool:
        """Whether dollars are known."""
        return self.prompt_price is not None

    def cost(self, prompt: int, written: int) -> Cost:
        """Prices tokens of a prompt and of what was written to it."""
        prices = ((prompt, self.prompt_price), (written, self.written_price))
        return Cost(
            prompt + written, sum(count * (price or 0.0) / _MILLION for count, price in prices)
        )


class Budget:
    """What is spent, and what is booked for requests under way.

    Args:
        limits: that hold for both together.
        spent: before.
    """

    def __init__(self, limits: Limits, spent: Cost = Cost()) -> None:
        self.limits = limits
        self.spent = spent
        self.booked = Cost()

    def fits(self, most: Cost) -> bool:
        """Whether a request that costs so much at most can be afforded beside those under way."""
        total, limits = self.spent + self.booked + most, self.limits
        # What dollars sum to has rounding in its last digits.
        dollars = limits.dollars is None or total.dollars <= limits.dollars * (1 + 1e-12)
        return dollars and (limits.tokens is None or total.tokens <= limits.tokens)

    def book(self, most: Cost) -> None:
        """Books what a request costs at most.

        Raises:
            BudgetError: it could exceed a limit.
        """
        if not self.fits(most):
            raise BudgetError(
                f'The next request may cost {in_words(most, self.limits)}, and the budget is '
                f'{_budget_in_words(self.limits)}, of which {in_words(self.spent, self.limits)} '
                'are spent; it was not sent. Raise config.teacher.remote.max_tokens or '
                'max_dollars and run the same command again: what is answered is kept.'
            )
        self.booked += most

    def settle(self, most: Cost, cost: Cost) -> None:
        """Replaces what was booked by what it cost."""
        self.booked -= most
        self.spent += cost


def in_words(cost: Cost, limits: Limits) -> str:
    """Names tokens, and dollars where there are prices."""
    dollars = f' ({cost.dollars:.6g} dollars)' if limits.priced else ''
    return f'{cost.tokens} tokens{dollars}'


def _budget_in_words(limits: Limits) -> str:
    parts = [] if limits.tokens is None else [f'{limits.tokens} tokens']
    parts += [] if limits.dollars is None else [f'{limits.dollars:.6g} dollars']
    return ' and '.join(parts)
