"""What guessing ahead gains: the same questions answered with and without it, in pairs, by whole sessions."""

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path

from runtime.events import EngineSettings, Finished, Load, Piece
from runtime.messages import Message
from runtime.sampling import Sampling
from runtime.session import Session

_FILE = Path(__file__).parent.parent / "runtime" / "pace.py"


def questions() -> Mapping[str, str]:
    """A text to give back with a change, and free prose."""
    return {
        "edit": "Repeat this file exactly as it is, but rename the class Pace to Speed:\n\n" + _FILE.read_text()[:2600],
        "prose": "Explain how a steam engine works, in detail.",
    }


@dataclass(frozen=True, slots=True)
class Pair:
    """One question, answered by both. Tokens a second from the first token on."""

    question: str
    plain: float
    guessing: float
    drafted: int
    accepted: int
    same_text: bool
    """Whether both said the same; rounding can part them."""

    @property
    def ratio(self) -> float:
        return self.guessing / self.plain


def pairs(load: Load, n_answer: int, rounds: int, draft_model: Path | None = None) -> tuple[Pair, ...]:
    """Answers of at most `n_answer` likeliest tokens, each question `rounds` times, the order alternating."""
    found = []
    with ExitStack() as stack:
        plain = _loaded(load, load.settings, stack)
        guessing = _loaded(load, replace(load.settings, drafts="always", draft_model=draft_model), stack)
        for i in range(rounds):
            for name, question in questions().items():
                both = [_answer(session, question, n_answer) for session in (plain, guessing)[:: -1 if i % 2 else 1]]
                (slow, _, said), (fast, end, text) = both[:: -1 if i % 2 else 1]
                found.append(Pair(name, slow, fast, end.drafted_tokens, end.accepted_tokens, said == text))
    return tuple(found)


def _loaded(load: Load, settings: EngineSettings, stack: ExitStack) -> Session:
    session = Session(replace(load, settings=settings))
    stack.callback(session.close)
    for _ in session.load():
        pass
    return session


def _answer(session: Session, question: str, n_answer: int) -> tuple[float, Finished, str]:
    """Tokens a second, the end, the text."""
    first: tuple[float, int] | None = None
    last, text = (0.0, 0), ""
    sampling = Sampling(temperature=0.0, max_tokens=n_answer)
    with closing(session.reply([Message("user", question)], sampling)) as events:  # type: ignore[type-var]
        for event in events:
            if isinstance(event, Piece):
                last, text = (time.perf_counter(), event.n_tokens), text + event.text
                first = first or last
            elif isinstance(event, Finished):
                end = event
    assert first is not None, question
    return (last[1] - first[1]) / (last[0] - first[0]), end, text


def medians(found: Sequence[Pair]) -> Mapping[str, tuple[float, float, float]]:
    """Question → lowest, median and highest ratio."""
    by_question = {name: sorted(pair.ratio for pair in found if pair.question == name) for name in questions()}
    return {name: (ratios[0], ratios[len(ratios) // 2], ratios[-1]) for name, ratios in by_question.items()}
