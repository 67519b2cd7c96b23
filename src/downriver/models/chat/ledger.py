"""What a language model has cost so far, and the limit that no request may cross.

A request that could cross the limit is refused before it is sent: its largest possible cost is set aside while it is
under way and replaced by the true cost when the answer is there.
"""

from dataclasses import dataclass

from downriver.core.errors import DownriverError, InputError


class SpendingLimit(DownriverError):
    """The next request could cost more than what is left of the spending limit; it was not sent."""


@dataclass
class Ledger:
    """Requests, tokens, seconds and money of one chat model.

    ``price`` is what a million prompt tokens and a million completion tokens cost, in any currency;
    ``spending_limit`` is in the same one. ``requests`` counts answers that the model gave, ``cached`` those that
    came from disk and cost nothing, ``retries`` the repeated attempts. ``seconds`` adds up the time of each
    answered request, so it exceeds wall time where requests ran side by side. ``unconfirmed`` is the largest
    possible cost of requests whose answer got lost on the way (time-outs, cut connections) and which the provider
    may have billed: the limit counts them, ``cost`` does not.

    >>> ledger = Ledger(price=(1.0, 4.0), spending_limit=0.01)
    >>> ledger.reserve(0.004)
    >>> ledger.settle(0.004, prompt=1000, completion=500, seconds=0.8)
    >>> ledger.cost, ledger.fits(0.008)
    (0.003, False)
    >>> print(ledger)
    1 request (0 retries, 0 answers from the cache), 1,000 prompt and 500 completion tokens, 0.8 s, cost 0.0030
    """

    price: tuple[float, float] | None = None
    spending_limit: float | None = None
    requests: int = 0
    cached: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    unconfirmed: float = 0.0
    in_flight: int = 0
    reserved: float = 0.0

    def __post_init__(self) -> None:
        if self.price is not None and (len(self.price) != 2 or min(self.price) < 0):
            raise InputError(
                f"price {self.price!r}: two numbers are expected, for a million prompt and completion tokens"
            )
        if self.spending_limit is not None and self.price is None:
            raise InputError("spending_limit needs price=(per million prompt tokens, per million completion tokens)")
        if self.spending_limit is not None and self.spending_limit < 0:
            raise InputError(f"spending_limit {self.spending_limit}: an amount of at least 0 is expected")

    def price_of(self, prompt: int, completion: int) -> float:
        """What this many prompt and completion tokens cost; 0 without a price."""
        before, after = self.price or (0.0, 0.0)
        return (prompt * before + completion * after) / 1e6

    @property
    def cost(self) -> float:
        """What the answered requests cost."""
        return self.price_of(self.prompt_tokens, self.completion_tokens)

    def fits(self, amount: float) -> bool:
        """Whether a request of at most this cost stays within the limit, all that is under way counted in full."""
        if self.spending_limit is None:
            return True
        return self.cost + self.unconfirmed + self.reserved + amount <= self.spending_limit * (1 + 1e-12)

    def reserve(self, amount: float) -> None:
        """Set aside the largest possible cost of a request; ``SpendingLimit`` where it does not fit."""
        if not self.fits(amount):
            raise SpendingLimit(
                f"spending limit {self.spending_limit:g}: {self.cost + self.unconfirmed:g} is spent and the next "
                f"request could cost {amount:g}; answers so far are in the cache where there is one"
            )
        self.in_flight += 1
        self.reserved += amount

    def settle(self, amount: float, *, prompt: int, completion: int, seconds: float) -> None:
        """Replace a reservation by what the answered request used."""
        self._release(amount)
        self.count(prompt=prompt, completion=completion, seconds=seconds)

    def count(self, *, prompt: int, completion: int, seconds: float) -> None:
        """Add an answer that needed no reservation."""
        self.requests += 1
        self.prompt_tokens += prompt
        self.completion_tokens += completion
        self.seconds += seconds

    def abandon(self, amount: float, *, billed: bool) -> None:
        """Give up the reservation of a failed request; ``billed``: the provider may have charged it all the same."""
        self._release(amount)
        if billed:
            self.unconfirmed += amount

    def _release(self, amount: float) -> None:
        self.in_flight -= 1
        self.reserved = self.reserved - amount if self.in_flight else 0.0

    def __str__(self) -> str:
        cost = f", cost {self.cost:.4f}" if self.price else ""
        cost += f" and up to {self.unconfirmed:.4f} for lost answers" if self.unconfirmed else ""
        return (
            f"{self.requests:,} request{'s' * (self.requests != 1)} ({self.retries:,} retries, {self.cached:,} answers "
            f"from the cache), {self.prompt_tokens:,} prompt and {self.completion_tokens:,} completion tokens, "
            f"{self.seconds:.1f} s{cost}"
        )
