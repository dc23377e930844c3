"""Which tokens to compute ahead of their being drawn: guesses by prompt lookup or a draft model, as far as they pay.

Told of every token that is drawn and of how long batches take, it learns how often guesses of either kind are right.
What a lookup would have guessed is scored without being computed, so that hopeless text costs nothing, and text that
repeats itself is still found. It changes no answer: a guess that was not drawn is dropped (engine.py).
"""

from collections.abc import Sequence

from runtime.draft_model import DraftModel
from runtime.drafting import MOST_DRAFTS, Choice, Costs, Guess, Lookup, Odds, Trust, best_size, by_probability

_FIRST_WAIT, _LAST_WAIT = 16, 256
"""Tokens until a draft model that did not pay is asked again; twice as many each time."""


class Speculation:
    """Guesses for one text at a time; what it has learnt outlives the text."""

    def __init__(self, n_ctx: int, model: DraftModel | None) -> None:
        self._lookup, self._model = Lookup(n_ctx), model
        self._odds, self._costs, self._trust = Odds(), Costs(), Trust()
        self._model_right = 0.7  # of the draft model's guesses, of late
        self._guess, self._at = Guess(), 0
        self._choice, self._n_right = Choice(), 0  # what of the guess is computed, and was drawn
        self._by_model = False
        self._wait = self._left = 0

    def start(self, ids: Sequence[int]) -> None:
        """A text begins with these ids. Raises AbortedError while the draft model reads them."""
        self._guess, self._choice = Guess(), Choice()
        self._lookup.start(ids)
        if self._model is not None:
            self._model.start(ids)

    def drawn(self, token: int) -> None:
        """The text goes on by this token."""
        if self._at < len(self._guess.tokens):
            right = self._guess.tokens[self._at] == token
            self._odds.saw(self._guess.confidences[self._at], right)
            if self._by_model:
                self._model_right += (right - self._model_right) / 32
            self._n_right += right and self._at < self._choice.n
            self._at += 1
            if not right:
                self._guess = Guess()
        self._lookup.push(token)
        if self._model is not None:
            self._model.push(token)

    def took(self, n: int, seconds: float) -> None:
        """The model computed a batch of `n` tokens in so long."""
        self._costs.took(n, seconds)

    def drafts(self, most: int) -> list[int]:
        """At most `most` tokens to compute behind the last one; none where that does not pay. Raises AbortedError."""
        if self._choice.n:
            self._trust.saw(self._choice.right, self._n_right)
        else:
            self._trust.rest()
        self._guess, self._at, self._n_right, self._by_model = self._lookup.guess(MOST_DRAFTS), 0, 0, False
        self._choice = self._best([self._odds.chance(confidence) for confidence in self._guess.confidences], most)
        if self._model is not None and most > 0 and self._costs.one > 0:
            self._ask(self._model, most)
        return list(self._guess.tokens[: self._choice.n])

    def _best(self, chances: Sequence[float], most: int, each: float = 0.0) -> Choice:
        return best_size(chances, self._costs, most=most, each=each, trust=self._trust.share)

    def _ask(self, model: DraftModel, most: int) -> None:
        """Take the draft model's guesses where they promise more than those that there are."""
        each = model.seconds / self._costs.one
        hoped = self._best([self._model_right] * most, most, each)
        n_asked = hoped.n
        if hoped.rate <= self._choice.rate:
            if self._choice.n or self._left > 0:
                self._left -= 1
                return
            self._wait = min(max(2 * self._wait, _FIRST_WAIT), _LAST_WAIT)
            self._left, n_asked = self._wait, 1
        else:
            self._wait = 0
        confidences: list[int] = []
        chances: list[float] = []
        together = 1.0

        def wanted(probability: float) -> bool:
            nonlocal together
            confidences.append(by_probability(probability))
            chances.append(self._odds.chance(confidences[-1]))
            together *= chances[-1]
            return together * self._model_right > each

        tokens = model.guess(n_asked, wanted)
        self._guess, self._by_model = Guess(tuple(tokens), tuple(confidences)), True
        self._choice = self._best(chances, most)
