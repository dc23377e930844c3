"""What guessing ahead gains: the same questions answered with and without it, in pairs, by whole sessions.

No large Mistral with a small one of its vocabulary fits here. In their place the demo guesses for a model that says
what the demo says and takes far longer: its own weights padded by zeros, at Q8_0, where a processor computes a few
tokens at once in hardly more time than one, as GPUs do.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.checkpoints import DEMO, padded_demo
from benchmarks.results import FORMAT
from quant.convert import make_levels
from runtime.events import EngineSettings, Finished, Load, Piece
from runtime.library import find_model_file, shipped_catalogue
from runtime.messages import Message
from runtime.sampling import Sampling
from runtime.session import Session

_FILE = Path(__file__).parent.parent / "runtime" / "pace.py"
_PROSE = DEMO.parent / "eval" / "prose.txt"

_Asked = Sequence[tuple[str, str]]
"""Questions: what kind each is, and its text."""

_END = 2
"""The demo's `</s>`: forbidden, so that answers have the length that is measured."""


@dataclass(frozen=True, slots=True)
class Task:
    """What is measured at a scale."""

    n_ff: int
    n_layers: int
    """Of the padded demo."""
    n_answer: int
    rounds: int
    n_questions: int
    smollm2_rounds: int
    """0 leaves SmolLM2 out."""


TASKS = {
    "full": Task(16_384, 16, 256, 3, 3, 7),
    "small": Task(16_384, 16, 128, 1, 3, 2),
    "demo": Task(1280, 9, 8, 1, 1, 0),
}


@dataclass(frozen=True, slots=True)
class Pair:
    """One question, answered by both. Tokens a second from the first token on."""

    question: str
    """Of what kind it is."""
    plain: float
    guessing: float
    drafted: int
    accepted: int
    same_text: bool
    """Whether both said the same; above temperature 0 they are not meant to, and rounding can part them at 0."""

    @property
    def ratio(self) -> float:
        return self.guessing / self.plain


@dataclass(frozen=True, slots=True)
class Guessing:
    """One model with one way to guess, beside the same model without."""

    model: str
    file_bytes: int
    temperature: float
    way: str
    """ "lookup", or what guesses."""
    pairs: tuple[Pair, ...]

    @property
    def ratios(self) -> Mapping[str, tuple[float, float, float]]:
        """Kind of question → lowest, median and highest."""
        found: dict[str, list[float]] = {}
        for pair in self.pairs:
            found.setdefault(pair.question, []).append(pair.ratio)
        return {question: (min(ratios), median(ratios), max(ratios)) for question, ratios in found.items()}


@dataclass(frozen=True, slots=True)
class SpeculationResults:
    """What is measured of guessing, and where. Its file is speculation.json."""

    machine: Mapping[str, Any]
    load_after: tuple[float, ...]
    scale: str
    threads: int
    found: tuple[Guessing, ...]

    def to_json(self) -> str:
        content = {"format": FORMAT, **asdict(self)}
        for shown, found in zip(content["found"], self.found, strict=True):
            shown["ratios"] = found.ratios
        return json.dumps(content, indent=1) + "\n"


def speculation_speeds(folder: Path, scale: str, threads: int, say: Callable[[str], None]) -> tuple[Guessing, ...]:
    """Everything about guessing. Models are made below `folder`. Raises UserError."""
    task = TASKS[scale]
    settings = EngineSettings(n_ctx=2048, n_threads=threads)
    found = []
    if task.smollm2_rounds:
        file = find_model_file("smollm2", None, shipped_catalogue(), folder)
        code = _FILE.read_text(encoding="utf-8")[:2600]
        asked = [
            ("a file again", f"Repeat this file exactly as it is, but rename the class Pace to Speed:\n\n{code}"),
            ("prose", "Explain how a steam engine works, in detail."),
        ]
        sampling = Sampling(temperature=0.0, max_tokens=task.n_answer)
        found.append(_guessing(file.load(settings), file.path.stem, asked, sampling, task.smollm2_rounds, None))
        say("speculation: SmolLM2, lookup")
    checkpoint = padded_demo(folder / "weights-padded", task.n_ff, task.n_layers)
    (large,) = make_levels(
        checkpoint, "Padded", ["Q8_0"], folder / "speculation", threads=threads, overwrite=True
    ).values()
    small = make_levels(DEMO, "Demo", ["Q8_0", "Q2_K"], folder / "speculation", threads=threads, overwrite=True)
    text = _PROSE.read_text(encoding="utf-8")
    asked = [("prose", text[3000 * i :][:1200]) for i in range(task.n_questions)]
    sampling = Sampling(temperature=0.7, max_tokens=task.n_answer, logit_bias=((_END, float("-inf")),))
    load = Load(large, settings, "mistral-v3", DEMO / "tokenizer.model")
    model = f"the demo, padded to {task.n_layers} layers and an FFN of {task.n_ff:,}, Q8_0"
    for draft_model in (None, *small.values()):
        found.append(_guessing(load, model, asked, sampling, task.rounds, draft_model))
        say(f"speculation: {found[-1].way}")
    return tuple(found)


def _guessing(
    load: Load, model: str, asked: _Asked, sampling: Sampling, rounds: int, draft_model: Path | None
) -> Guessing:
    way = "lookup" if draft_model is None else draft_model.stem
    found = pairs(load, asked, sampling, rounds, draft_model)
    return Guessing(model, load.path.stat().st_size, sampling.temperature, way, found)


def pairs(
    load: Load, asked: _Asked, sampling: Sampling, rounds: int, draft_model: Path | None = None
) -> tuple[Pair, ...]:
    """Each question `rounds` times, the order alternating."""
    found = []
    with ExitStack() as stack:
        plain = _loaded(load, load.settings, stack)
        guessing = _loaded(load, replace(load.settings, drafts="always", draft_model=draft_model), stack)
        for i in range(rounds):
            for name, question in asked:
                both = [_answer(session, question, sampling) for session in (plain, guessing)[:: -1 if i % 2 else 1]]
                (slow, _, said), (fast, end, text) = both[:: -1 if i % 2 else 1]
                found.append(Pair(name, slow, fast, end.drafted_tokens, end.accepted_tokens, said == text))
    return tuple(found)


def _loaded(load: Load, settings: EngineSettings, stack: ExitStack) -> Session:
    session = Session(replace(load, settings=settings))
    stack.callback(session.close)
    for _ in session.load():
        pass
    return session


def _answer(session: Session, question: str, sampling: Sampling) -> tuple[float, Finished, str]:
    """Tokens a second, the end, the text."""
    at: list[tuple[float, int]] = []
    text = ""
    with closing(session.reply([Message("user", question)], sampling)) as events:  # type: ignore[type-var]
        for event in events:
            if isinstance(event, Piece):
                at.append((time.perf_counter(), event.n_tokens))
                text += event.text
            elif isinstance(event, Finished):
                end = event
    (first, n_first), (last, n_last) = at[0], at[-1]
    return (n_last - n_first) / (last - first), end, text


def share_right(found: Sequence[Pair]) -> float:
    """Of the guesses that were computed; 0 where none was."""
    return sum(pair.accepted for pair in found) / max(sum(pair.drafted for pair in found), 1)
