"""From tokens that arrive out of order to text that only grows: committed prefix, stop strings, split characters."""

from collections.abc import Sequence

from armd.request import Event, Written
from armd.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"


class TextBuilder:
    """The text of one choice. What `take` returned stands: never retracted, never with part of a stop string.

    Tokens are read one by one in text order, however many a step brings, so that the text and the place where it stops
    do not depend on how the steps were cut. The engine knows tokens only: who reads a text cancels its request where
    `finish_reason` says that a stop string ended it.

    Args:
        stop: strings that end the text, not empty; the text before the first of them stays.
        stop_ids: tokens that end the text, as its request has them.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], stop_ids: Sequence[int]) -> None:
        self._detokenizer = _Detokenizer(tokenizer)
        self._stop = tuple(stop)
        self._stop_ids = frozenset(stop_ids)
        self._hold = max((len(one) for one in stop), default=1) - 1
        self._pending: dict[int, tuple[Written, int]] = {}
        self._text = ""
        self._taken = 0
        self.tokens: list[int] = []
        """The committed prefix; with a stop string, up to the token that completed it."""
        self.logprobs: list[float] = []
        """Their log-probabilities, as `Written` has them."""
        self.step_of_token: list[int] = []
        """The step, counted from 1, at which each of them was written."""
        self.steps = 0
        """Forward passes so far."""
        self.accepted = 0
        """Tokens that these wrote as drafted."""
        self.rejected = 0
        """Tokens that they wrote in place of a draft."""
        self.finish_reason: str | None = None
        """`stop` or `length` once the text is complete."""
        self.stop_reason: str | None = None
        """The stop string that ended it."""

    def feed(self, event: Event) -> None:
        """Add what a step wrote."""
        self.steps += bool(event.written)  # a request for no token takes no step
        self.rejected += event.rejected
        self.accepted += len(event.written) - event.rejected
        for one in event.written:
            self._pending[one.index] = (one, self.steps)
        while self.finish_reason is None and len(self.tokens) in self._pending:
            one, step = self._pending.pop(len(self.tokens))
            if one.token in self._stop_ids:
                self._end("stop")
                return
            self.tokens.append(one.token)
            self.logprobs.append(one.logprob)
            self.step_of_token.append(step)
            self._add(self._detokenizer.push(one.token))
        if self.finish_reason is None and event.completion is not None:
            self._end(event.completion.finish_reason)

    def take(self) -> str:
        """The text that is certain by now and was not taken before."""
        certain = len(self._text) if self.finish_reason else max(self._taken, len(self._text) - self._hold)
        new = self._text[self._taken : certain]
        self._taken = certain
        return new

    def _end(self, reason: str) -> None:
        self._add(self._detokenizer.flush())
        if self.finish_reason is None:
            self.finish_reason = reason

    def _add(self, new: str) -> None:
        """Append `new`; where that completes a stop string, cut the text before it and finish."""
        start = max(0, len(self._text) - self._hold)
        self._text += new
        found = [(place, one) for one in self._stop if (place := self._text.find(one, start)) >= 0]
        if found:
            place, self.stop_reason = min(found)
            self._text = self._text[:place]
            self.finish_reason = "stop"


class _Detokenizer:
    """Decodes token by token; holds back the last character while it may be half of one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decode = tokenizer.decode
        self._window: list[int] = []  # decoded again with each token: as context, and for the character at its end
        self._given = 0  # characters of the window's text that were returned
        self._whole = True  # the window's text does not end within a character

    def push(self, token: int) -> str:
        """The text that `token` makes certain."""
        self._window.append(token)
        text = self._decode(self._window)
        whole = not text.endswith(_REPLACEMENT)
        certain = text if whole else text[:-1]
        new = certain[self._given :]
        self._given = max(self._given, len(certain))
        if whole and self._whole:  # the token begins and ends between characters: context enough for the next
            self._window = [token]
            self._given = len(self._decode(self._window))
        self._whole = whole
        return new

    def flush(self) -> str:
        """What was held back; half a character becomes U+FFFD."""
        return self._decode(self._window)[self._given :]
