"""Many questions, one a line of a JSONL file, answered by several engines: `bise ask --each`.

Answers are added to a JSONL file as they come, whole lines at a time, so that a run that was ended by whatever goes on
where it stopped; when all are there, the file is put in the order of the questions. Each carries a digest of what was
asked and how, so that answers of other runs are not mixed.
"""

import argparse
import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from runtime.conversation import in_openai_form
from runtime.errors import EngineError, OutputError
from runtime.messages import Message, Tool
from runtime.openai_form import ConversationError, conversation

if TYPE_CHECKING:
    from runtime.events import Load
    from runtime.grammar import Grammar
    from runtime.pool import Answer
    from runtime.sampling import Sampling
    from tui.progress import ProgressLine


@dataclass(frozen=True, slots=True)
class Line:
    """A question of the file."""

    number: int
    """From 1; of the line, empty ones counted."""
    id: Any
    """What the user calls it; None where it has no name."""
    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("many questions")
    group.add_argument(
        "--each",
        type=Path,
        metavar="FILE.jsonl",
        help='each line a question: "…", {"question": "…"} or {"messages": […], "tools": […]}, with an id if you like',
    )
    group.add_argument("--out", type=Path, metavar="FILE.jsonl", help="their answers; the same command goes on with it")
    group.add_argument(
        "--workers",
        default="1",
        metavar="N",
        help="engines that answer side by side, each with the whole model; per-gpu for one on each GPU (default: 1)",
    )
    group.add_argument("--force", action="store_true", help="begin the answers anew")


def run(
    arguments: argparse.Namespace, load: "Load", sampling: "Sampling", grammar: "Grammar | None", line: "ProgressLine"
) -> int:
    """Answer them. Raises UserError; 1 where some have no answer."""
    from runtime.events import LoadProgress, Notice, Silent
    from runtime.pool import Answer, Pool, Question

    lines = _lines(arguments.each, arguments.system)
    if arguments.out.exists() and arguments.out.samefile(arguments.each):
        raise EngineError(f"{arguments.out} holds the questions; name another --out")
    settings = _workers(arguments.workers, load)
    digests = _digests(lines, load, sampling, grammar, line)
    with _Out(arguments.out, lines, digests, overwrite=arguments.force) as out:
        todo = [each for each in lines if each.number not in out.answered]
        if not todo:
            line.say(f"{out.path} has all {len(lines)} answers")
            return 0
        with closing(Pool([replace(load, settings=each) for each in settings])) as pool:
            for i, event in pool.load():
                if isinstance(event, LoadProgress):
                    line.show((i + event.fraction) / len(settings), "", event.seconds_left, f"engine {i + 1}")
                elif isinstance(event, Notice):
                    line.say(f"bise: {event.text}")
                elif isinstance(event, Silent):
                    line.say(f"bise: no sign of engine {i + 1} for {event.seconds:.0f} s; Ctrl-C ends it")
            questions = [Question(each.number, each.messages, each.tools) for each in todo]
            answers = pool.answers(
                questions, lambda session, q: session.reply(q.messages, sampling, grammar=grammar, tools=q.tools)
            )
            watch = _Watch(line, len(lines), len(lines) - len(todo))
            n_failed = 0
            with closing(answers):
                for told in answers:
                    if isinstance(told, Answer):
                        out.add(told)
                        watch.saw(told)
                        n_failed += told.error is not None
                    else:
                        line.say(f"bise: {told.text}")
        if n_failed:
            raise EngineError(
                f"{n_failed} of {len(lines)} have no answer; {out.path} says why, and this command asks again"
            )
        out.put_in_order()
    line.say(f"written: {out.path}, {len(lines)} answers")
    return 0


def check(arguments: argparse.Namespace) -> None:
    """Raises EngineError for options that do not go together."""
    if arguments.each is None:
        if arguments.out is not None or arguments.workers != "1" or arguments.force:
            raise EngineError("--out, --workers and --force go with --each FILE.jsonl")
        return
    for name in ("question", "json", "logprobs", "stats", "show_sampling", "tools", "tool"):
        if getattr(arguments, name):
            raise EngineError(
                f"--each answers the questions of its file and tells all as JSON; leave out {_name(name)}"
            )
    if arguments.out is None:
        raise EngineError("--each wants a file for the answers; name it with --out FILE.jsonl")


def _name(argument: str) -> str:
    return "the question" if argument == "question" else f"--{argument.replace('_', '-')}"


def _workers(wanted: str, load: "Load") -> "Sequence[Any]":
    from runtime.pool import one_per_gpu, side_by_side

    if wanted == "per-gpu":
        return one_per_gpu(load.settings)
    if not wanted.isdecimal() or not 0 < int(wanted) <= 64:
        raise EngineError(f"--workers {wanted} is neither per-gpu nor a number from 1 to 64")
    return side_by_side(load.settings, int(wanted))


def _lines(path: Path, system: str | None) -> list[Line]:
    """The questions. Raises EngineError with the line that is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise EngineError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise EngineError(f"{path}: not text in UTF-8") from None
    lines = []
    for number, said in enumerate(text.split("\n"), 1):
        if said.strip():
            try:
                id_, messages, tools = _question(json.loads(said))
            except (ValueError, RecursionError, ConversationError) as error:
                raise EngineError(f"{path}, line {number}: {error}") from None
            if system and messages[0].role != "system":
                messages = [Message("system", system), *messages]
            lines.append(Line(number, id_, tuple(messages), tuple(tools)))
    if not lines:
        raise EngineError(f"{path} holds no question; write one a line, in quotes, as JSON")
    return lines


def _question(value: Any) -> tuple[Any, list[Message], list[Tool]]:
    """Its id, and what it asks. Raises ConversationError."""
    id_ = value.get("id") if isinstance(value, dict) else None
    asked = value["question"] if isinstance(value, dict) and "question" in value else value
    if isinstance(asked, str):
        if not asked.strip():
            raise ConversationError("the question is empty")
        return id_, [Message("user", asked)], []
    if asked is not value:
        raise ConversationError("question: text is wanted")
    return id_, *conversation(value)


def _digests(
    lines: Sequence[Line], load: "Load", sampling: "Sampling", grammar: "Grammar | None", line: "ProgressLine"
) -> dict[int, str]:
    """Line → a digest of what is asked there, of which model, and how."""
    from quant.importance.identity import model_files

    files = model_files(load.path, lambda share: line.show(0, detail=f"reading the model for its SHA-256, {share:.0%}"))
    model = (files, load.prompt, load.settings.n_ctx, load.settings.kv_type)
    how = repr((model, sampling, grammar.text if grammar is not None else None))
    return {
        each.number: hashlib.sha256(f"{how}{each.messages!r}{each.tools!r}".encode()).hexdigest()[:16] for each in lines
    }


class _Out:
    """The file of answers, locked: two runs would lose each other's. A context manager, which unlocks it."""

    def __init__(self, path: Path, lines: Sequence[Line], digests: dict[int, str], *, overwrite: bool) -> None:
        """Read what is there. Raises OutputError where that is not of these questions and settings."""
        self.path = path
        self._ids, self._digests = {each.number: each.id for each in lines}, digests
        self.answered: dict[int, dict[str, Any]] = {}
        if path.exists() and not path.is_file():
            raise OutputError(f"{path} is not a file that can be replaced; name another --out")
        try:
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            self._fail(error)
        try:
            self._lock()
            if not overwrite:
                self._read()
            self._write_whole(self.answered.values())
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "_Out":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, answer: "Answer") -> None:
        """Write one line, whole, through to the disk."""
        record: dict[str, Any] = {"line": answer.number}
        if self._ids[answer.number] is not None:
            record["id"] = self._ids[answer.number]
        if answer.error is not None or answer.finished is None:
            record["error"] = answer.error
        else:
            end = answer.finished
            turn = in_openai_form([Message("assistant", answer.text, end.calls)])[0]
            record |= {
                "answer": answer.text,
                **({"tool_calls": turn["tool_calls"]} if end.calls else {}),
                "reason": end.reason,
                "prompt_tokens": end.prompt_tokens,
                "answer_tokens": end.answer_tokens,
                "seconds": round(end.prompt_seconds + end.answer_seconds, 3),
                "sampling": end.sampling,
            }
        record["asked"] = self._digests[answer.number]
        if "answer" in record:
            self.answered[answer.number] = record
        data = _line(record)
        try:
            while data:
                data = data[self._file.write(data) :]
            os.fdatasync(self._file.fileno())
        except OSError as error:
            self._fail(error)

    def put_in_order(self) -> None:
        self._write_whole(self.answered[number] for number in sorted(self.answered))

    def _lock(self) -> None:
        """The lock is the open file's: a file that takes its place is locked before it does."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_there = os.path.samestat(os.fstat(self._file.fileno()), self.path.stat())
        except OSError:
            is_there = False
        if not is_there:
            raise OutputError(f"{self.path} is being written by another `bise ask`; wait for it, or end it")

    def _read(self) -> None:
        try:
            *whole, _ = self.path.read_bytes().split(b"\n")  # what stands behind the last end of a line was cut off
        except OSError as error:
            self._fail(error)
        for i, line in enumerate(whole, 1):
            try:
                record = json.loads(line)
                number, asked, is_answer = int(record["line"]), record["asked"], "answer" in record
            except (ValueError, KeyError, TypeError, RecursionError):
                raise OutputError(
                    f"{self.path}, line {i}: not an answer of `bise ask --each`; name another --out"
                ) from None
            if self._digests.get(number) != asked:
                raise OutputError(
                    f"{self.path}, line {i}: the answer to another question, of another model or with other settings; "
                    "name another --out, or begin anew with --force"
                )
            if is_answer:
                self.answered[number] = record

    def _write_whole(self, records: Any) -> None:
        """Replace the file, or leave it as it was."""
        place = Path(os.path.realpath(self.path))
        new = place.with_name(f".{place.name}.new")
        try:
            new.unlink(missing_ok=True)
            file = new.open("ab", buffering=0)
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                data = b"".join(map(_line, records))
                while data:
                    data = data[file.write(data) :]
                os.fsync(file.fileno())
                os.replace(new, place)
            except BaseException:
                file.close()
                new.unlink(missing_ok=True)
                raise
        except OSError as error:
            self._fail(error)
        self._file.close()
        self._file = file

    def _fail(self, error: OSError) -> NoReturn:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "make room, and this command goes on where it stopped" if is_full else "name another --out"
        raise OutputError(f"{self.path}: cannot be written: {error.strerror}; {remedy}") from None


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


class _Watch:
    """How far it is, how fast, and how long it takes."""

    def __init__(self, line: "ProgressLine", total: int, done: int) -> None:
        from runtime.pace import Pace

        self._line, self._total, self._done, self._tokens = line, total, done, 0
        self._answers, self._speed = Pace(total, done), Pace(1)

    def saw(self, answer: "Answer") -> None:
        self._done += 1
        self._tokens += answer.finished.answer_tokens if answer.finished is not None else 0
        rate, _ = self._speed.at(self._tokens)
        _, left = self._answers.at(self._done)
        speed = f"{rate:,.1f} tokens/s" if rate is not None else ""
        self._line.show(self._done / self._total, speed, left, f"{self._done:,} of {self._total:,}")
