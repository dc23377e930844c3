"""How fast a model runs through Bise, from a question to the last word, beside bare loops over llama_decode.

Ours is a `Session`: its own process, Mistral's prompt format, sampling, text, events. Its seconds are those of whoever
asks, from the call to the event. Both sides have the same wheel, threads, batches and context, and take turns; each
round begins with the other one and reads another text. Everything lies in the page cache before.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from sentencepiece import SentencePieceProcessor

from benchmarks.accounting import ROOT, status_bytes
from benchmarks.checkpoints import DEMO, random_checkpoint
from benchmarks.experiments import model_of
from benchmarks.results import FORMAT, Model
from quant.convert import make_levels
from runtime.errors import UserError
from runtime.events import EngineSettings, Finished, Load, Loaded, Piece
from runtime.levels import Shape
from runtime.messages import Message
from runtime.sampling import Sampling
from runtime.session import Session

LEVEL = "Q4_K_M"

_TEXT = DEMO.parent / "eval" / "prose.txt"
_END = 2
"""`</s>` of both vocabularies: forbidden, so that answers have the length that is measured."""

_AROUND, _SHARED = 3, 2
"""Tokens that a question has around its text, `<s>[INST]` and `[/INST]`; those that every question begins with."""

_BRANCHES = 4
"""The chat's."""

_SITTINGS = 3
"""The processes of both sides are started so often: where their memory happens to lie can make 10 % of a difference."""

_MID = Shape(n_layers=8, n_embd=2048, n_ff=5632, n_heads=32, n_heads_kv=8, head_dim=64, n_vocab=32_768)


@dataclass(frozen=True, slots=True)
class Task:
    """What is measured of a model."""

    shape: Shape | None
    """Of random weights with Mistral Large 2's vocabulary; None is the demo model."""
    n_ctx: int
    characters: int
    """Of a prompt."""
    n_answer: int
    """Tokens of an answer."""
    turns: int
    """Of the conversation whose next turn is measured, each of `characters` and an answer."""
    rounds: int


TASKS = {
    "full": (Task(None, 2048, 2000, 256, 2, 9), Task(_MID, 8192, 2000, 48, 8, 9)),
    "small": (Task(None, 2048, 2000, 256, 2, 5),),
    "demo": (Task(None, 2048, 400, 16, 2, 1),),
}


@dataclass(frozen=True, slots=True)
class Round:
    """Tokens a second of both sides, one behind the other."""

    n_prompt: int
    raw_prompt: float
    our_prompt: float
    """Until the first token is there: prompt format, tokens, events and the first draw are in it."""
    raw_answer: float
    our_answer: float
    """Of the likeliest tokens."""
    our_drawn_answer: float
    """Drawn by default settings. Random weights make it the worst case: top-p sorts most of the vocabulary."""


@dataclass(frozen=True, slots=True)
class Turn:
    """Seconds to the first word of the next turn of a long conversation, its earlier turns read already, and unread."""

    n_prompt: int
    n_reused: int
    warm_seconds: float
    cold_seconds: float
    n_back_reused: int
    back_seconds: float
    """The same question once more, after one of another conversation."""


@dataclass(frozen=True, slots=True)
class RuntimeSpeed:
    """One model, by both sides. Bytes and seconds."""

    model: Model
    file_bytes: int
    threads: int
    n_ctx: int
    n_answer: int
    rounds: tuple[Round, ...]
    turns: tuple[Turn, ...]
    raw_load_seconds: tuple[float, ...]
    our_load_seconds: tuple[float, ...]
    """Of opening the file until it can answer, in a process that runs; with the prompt format and its vocabulary."""
    our_start_seconds: tuple[float, ...]
    """Of all, from nothing: Python, imports, process, load."""
    raw_resident_bytes: int
    our_resident_bytes: int
    raw_anonymous_bytes: int
    our_anonymous_bytes: int

    @property
    def ratios(self) -> Mapping[str, tuple[float, float, float]]:
        """Our speed over the raw loop's, by round: lowest, median, highest. `next_turn`: the cold seconds per warm."""
        return {
            "prompt": _spread([each.our_prompt / each.raw_prompt for each in self.rounds]),
            "answer": _spread([each.our_answer / each.raw_answer for each in self.rounds]),
            "drawn_answer": _spread([each.our_drawn_answer / each.raw_answer for each in self.rounds]),
            "load": _spread(
                [raw / ours for raw, ours in zip(self.raw_load_seconds, self.our_load_seconds, strict=True)]
            ),
            "next_turn": _spread([each.cold_seconds / each.warm_seconds for each in self.turns]),
        }


@dataclass(frozen=True, slots=True)
class RuntimeResults:
    """What is measured of the runtime, and where. Its file is runtime.json."""

    machine: Mapping[str, Any]
    load_after: tuple[float, ...]
    scale: str
    speeds: tuple[RuntimeSpeed, ...]

    def to_json(self) -> str:
        content = {"format": FORMAT, **asdict(self)}
        for shown, found in zip(content["speeds"], self.speeds, strict=True):
            shown["ratios"] = found.ratios
        return json.dumps(content, indent=1) + "\n"


def runtime_speeds(folder: Path, scale: str, threads: int, say: Callable[[str], None]) -> tuple[RuntimeSpeed, ...]:
    """Everything about the runtime. Models are made below `folder` once, and stay. Raises UserError."""
    found = []
    for task in TASKS[scale]:
        checkpoint = _checkpoint(folder, task, threads)
        path = make_levels(
            checkpoint, "Benchmark", [LEVEL], checkpoint_folder(folder, task), threads=threads, overwrite=True
        )[LEVEL]
        say(f"runtime: {path.stat().st_size / 1e6:,.0f} MB")
        tokenizer = DEMO / "tokenizer.model" if task.shape is None else None
        found.append(_measure(task, checkpoint, path, tokenizer, threads, say))
    return tuple(found)


def checkpoint_folder(folder: Path, task: Task) -> Path:
    """Where a task's level lies."""
    return folder / ("runtime-demo" if task.shape is None else "runtime-random")


def _checkpoint(folder: Path, task: Task, threads: int) -> Path:
    if task.shape is None:
        return DEMO
    return random_checkpoint(folder / "weights-runtime", task.shape, threads, tokenizer=_large_tokenizer())


def _large_tokenizer() -> Path:
    """Mistral-Large-Instruct-2407's tokenizer, which mistral-common brings along."""
    import mistral_common

    return Path(mistral_common.__file__).parent / "data" / "mistral_instruct_tokenizer_240323.model.v3"


class _Raw(AbstractContextManager["_Raw"]):
    """raw_runtime.py in its process."""

    def __init__(self, path: Path, n_ctx: int, threads: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.raw_runtime", str(path), str(n_ctx), str(threads)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid
        self.load_seconds = self._answer()["load_seconds"]

    def run(self, n_prompt: int, n_answer: int) -> tuple[float, float]:
        """Seconds of both."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"n_prompt": n_prompt, "n_answer": n_answer}) + "\n")
        self._process.stdin.flush()
        found = self._answer()
        return found["prompt_seconds"], found["answer_seconds"]

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise UserError("the bare loop over llama_decode failed; its error is above")
        found: dict[str, float] = json.loads(line)
        return found

    def __exit__(self, *_: object) -> None:
        self._process.communicate()


class _Ours(AbstractContextManager["_Ours"]):
    """A session, and how long it took to begin."""

    def __init__(self, path: Path, n_ctx: int, threads: int, tokenizer: Path | None) -> None:
        settings = EngineSettings(n_ctx=n_ctx, n_threads=threads, n_branches=_BRANCHES)
        self._session = Session(Load(path, settings, "mistral-v3", tokenizer))
        began = time.perf_counter()
        loaded = [event for event in self._session.load() if isinstance(event, Loaded)]
        self.start_seconds, self.load_seconds = time.perf_counter() - began, loaded[0].seconds

    def ask(
        self, messages: Sequence[Message], n_answer: int, temperature: float = 0.0
    ) -> tuple[Finished, float, float, str]:
        """Its end, seconds to the first token, seconds for each one after it, and the text."""
        bias = ((_END, float("-inf")),)
        sampling = Sampling(temperature=temperature, seed=1, max_tokens=n_answer, logit_bias=bias)
        began = time.perf_counter()
        at: list[tuple[float, int]] = []
        text = ""
        with closing(self._session.reply(messages, sampling)) as events:  # type: ignore[type-var]
            for event in events:
                if isinstance(event, Piece):
                    at.append((time.perf_counter(), event.n_tokens))
                    text += event.text
                elif isinstance(event, Finished):
                    end = event
        (first, n_first), (last, n_last) = at[0], at[-1]
        return end, first - began, (last - first) / max(n_last - n_first, 1), text

    @property
    def pid(self) -> int:
        worker = self._session._worker
        assert worker is not None
        return worker.pid

    def __exit__(self, *_: object) -> None:
        self._session.close()


def _measure(
    task: Task, checkpoint: Path, path: Path, tokenizer: Path | None, threads: int, say: Callable[[str], None]
) -> RuntimeSpeed:
    text = _TEXT.read_text(encoding="utf-8")
    pieces = SentencePieceProcessor(model_file=str(tokenizer or _large_tokenizer()))
    path.read_bytes()  # into the page cache
    loads: list[tuple[float, float, float]] = []
    rounds: list[Round] = []
    n_sittings = min(task.rounds, _SITTINGS)
    for sitting in range(n_sittings):
        with ExitStack() as stack:
            raw = stack.enter_context(_Raw(path, task.n_ctx, threads))
            ours = stack.enter_context(_Ours(path, task.n_ctx, threads, tokenizer))
            loads.append((raw.load_seconds, ours.load_seconds, ours.start_seconds))
            ours.ask([Message("user", text[:100])], 8)  # what is imported and allocated at first
            raw.run(64, 8)
            for i in range(sitting, task.rounds, n_sittings):
                piece = text[(i + 1) * task.characters :][: task.characters]
                rounds.append(
                    _round(task, raw, ours, piece, len(pieces.encode(piece)), ours_first=len(rounds) % 2 == 1)
                )
                say(f"runtime: round {len(rounds)} of {task.rounds}")
            memory = [status_bytes(str(side.pid), key) for side in (raw, ours) for key in ("VmHWM", "RssAnon")]
    turns = [_turn(task, path, tokenizer, threads, text[i * 1000 :]) for i in range(min(task.rounds, 3))]
    say("runtime: turns")
    return RuntimeSpeed(
        model=model_of(checkpoint),
        file_bytes=path.stat().st_size,
        threads=threads,
        n_ctx=task.n_ctx,
        n_answer=task.n_answer,
        rounds=tuple(rounds),
        turns=tuple(turns),
        raw_load_seconds=tuple(each[0] for each in loads),
        our_load_seconds=tuple(each[1] for each in loads),
        our_start_seconds=tuple(each[2] for each in loads),
        raw_resident_bytes=memory[0],
        raw_anonymous_bytes=memory[1],
        our_resident_bytes=memory[2],
        our_anonymous_bytes=memory[3],
    )


def _round(task: Task, raw: _Raw, ours: _Ours, text: str, n_tokens: int, *, ours_first: bool) -> Round:
    """Both sides once. The bare loop reads as many tokens, of any kind."""
    question = [Message("user", text)]
    n_read = n_tokens + _AROUND - _SHARED

    def ours_once() -> tuple[float, float, float]:
        end, first, each, _ = ours.ask(question, task.n_answer)
        assert end.prompt_tokens - end.reused_tokens == n_read, (end, n_read)
        _, _, each_drawn, _ = ours.ask(question, task.n_answer, Sampling().temperature)
        return first, each, each_drawn

    if ours_first:
        first, each, each_drawn = ours_once()
    read, answered = raw.run(n_read, task.n_answer)
    if not ours_first:
        first, each, each_drawn = ours_once()
    return Round(n_read, n_read / read, n_read / first, task.n_answer / answered, 1 / each, 1 / each_drawn)


def _turn(task: Task, path: Path, tokenizer: Path | None, threads: int, text: str) -> Turn:
    """The same question at the same place of the same conversation, in the engine that led it and in a fresh one."""
    messages: list[Message] = []
    with _Ours(path, task.n_ctx, threads, tokenizer) as ours:
        for i in range(task.turns):
            messages.append(Message("user", text[i * task.characters :][: task.characters]))
            _, _, _, answer = ours.ask(messages, task.n_answer)
            messages.append(Message("assistant", answer))
        messages.append(Message("user", text[task.turns * task.characters :][:200]))
        end, warm, _, _ = ours.ask(messages, 2)
        ours.ask([Message("user", text[300:800])], 2)
        back_end, back, _, _ = ours.ask(messages, 2)
    with _Ours(path, task.n_ctx, threads, tokenizer) as fresh:
        fresh.ask([Message("user", "Hello")], 2)
        _, cold, _, _ = fresh.ask(messages, 2)
    return Turn(end.prompt_tokens, end.reused_tokens, warm, cold, back_end.reused_tokens, back)


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    return min(values), median(values), max(values)
