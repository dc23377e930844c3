"""Several engines side by side, and `bise ask --each`: every question answered once, whatever ends meanwhile."""

import fcntl
import json
import os
import re
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from runtime.conversation import in_openai_form
from runtime.errors import EngineError, OutputError
from runtime.events import EngineSettings, Finished, Load, LoadEvent, Notice, ReplyEvent, Sampling
from runtime.messages import Message, ToolCall
from runtime.pool import Answer, Pool, Question, one_per_gpu, side_by_side
from runtime.session import Session
from tests.checkpoints import DEMO
from tests.test_rpc import BISE, text_of, wait_until
from tui.cli import main
from tui.each import Line, _digests, _Out
from tui.progress import ProgressLine

GREEDY = Sampling(temperature=0.0, max_tokens=20)
WORDS = ("horse", "rain", "window", "music", "stone", "river", "bread", "winter")
QUESTIONS = [Question(i, (Message("user", f"Define {word}."),)) for i, word in enumerate(WORDS)]
SETTINGS = EngineSettings(n_ctx=256, n_threads=1)


def demo_load(path: Path, settings: EngineSettings = SETTINGS) -> Load:
    return Load(path, settings, "mistral-v3", DEMO / "tokenizer.model")


def ask(session: Session, question: Question) -> Iterator[ReplyEvent]:
    return session.reply(question.messages, GREEDY)


@pytest.fixture(scope="module")
def expected(demo: Path) -> list[str]:
    """What one engine answers, one question after the other."""
    session = Session(demo_load(demo))
    try:
        list(session.load())
        return [text_of(ask(session, question)) for question in QUESTIONS]
    finally:
        session.close()


def answered(
    pool: Pool, ask: Callable[[Session, Question], Iterator[ReplyEvent]] = ask, n: int = len(QUESTIONS)
) -> tuple[list[str], list[str]]:
    """The answers in the order of the questions, and what was told besides."""
    found: dict[int, str] = {}
    notices = []
    with closing(pool.answers(QUESTIONS[:n], ask)) as answers:
        for told in answers:
            if isinstance(told, Notice):
                notices.append(told.text)
            else:
                assert told.number not in found
                found[told.number] = told.text if told.error is None else f"error: {told.error}"
    return [found[question.number] for question in QUESTIONS[:n]], notices


def test_three_engines_answer_as_one_does(demo: Path, expected: list[str]) -> None:
    with closing(Pool([demo_load(demo)] * 3)) as pool:
        assert {i for i, _ in pool.load()} == {0, 1, 2}
        assert answered(pool) == (expected, [])


def test_one_engine_a_server(demo: Path, expected: list[str], servers: tuple[str, ...]) -> None:
    settings = one_per_gpu(replace(SETTINGS, rpc_servers=servers[:2]))
    assert [(each.rpc_servers, each.main_gpu) for each in settings] == [((server,), 0) for server in servers[:2]]
    with closing(Pool([demo_load(demo, each) for each in settings])) as pool:
        list(pool.load())
        assert answered(pool) == (expected, [])


def test_cores_are_shared_and_servers_are_not() -> None:
    cores = len(os.sched_getaffinity(0))
    assert [each.n_threads for each in side_by_side(EngineSettings(n_ctx=8), 2)] == [max(1, cores // 2)] * 2
    assert [each.n_threads for each in side_by_side(replace(SETTINGS, n_threads=5), 2)] == [5, 5]
    with pytest.raises(EngineError, match="an RPC server serves one engine at a time; take --workers per-gpu"):
        side_by_side(replace(SETTINGS, rpc_servers=("a:1",)), 2)
    with pytest.raises(EngineError, match=r"sees no GPU here, so --workers wants a number"):
        one_per_gpu(SETTINGS)


def killing(n_kills: int) -> Callable[[Session, Question], Iterator[ReplyEvent]]:
    """Asks an engine that was killed just before, so many times for each question."""
    kills: dict[int, int] = {}

    def ask_and_kill(session: Session, question: Question) -> Iterator[ReplyEvent]:
        if kills.get(question.number, 0) < n_kills:
            kills[question.number] = kills.get(question.number, 0) + 1
            worker = session._worker
            assert worker is not None
            os.kill(worker.pid, signal.SIGKILL)
            wait_until(lambda: not worker.is_alive())
        return ask(session, question)

    return ask_and_kill


def test_an_engine_that_dies_is_started_again_and_asked_once_more(demo: Path, expected: list[str]) -> None:
    with closing(Pool([demo_load(demo)] * 2)) as pool:
        list(pool.load())
        texts, notices = answered(pool, killing(1), 3)
    assert texts == expected[:3]
    assert len(notices) == 3
    assert all(re.match(r"the engine's process ended by SIGKILL .+; it is started again", text) for text in notices)


def test_engines_that_cannot_be_started_again_leave_their_questions_to_others(
    demo: Path, expected: list[str], tmp_path: Path
) -> None:
    copy = tmp_path / "demo.gguf"
    copy.write_bytes(demo.read_bytes())
    kill = killing(1)

    def ask_or_die(session: Session, question: Question) -> Iterator[ReplyEvent]:
        return kill(session, question) if session._load.path == copy else ask(session, question)

    with closing(Pool([demo_load(copy), demo_load(demo)], pause_seconds=0)) as pool:
        list(pool.load())
        copy.unlink()
        texts, notices = answered(pool, ask_or_die)
    assert texts == expected
    assert re.match(r"an engine takes no more questions: .+demo\.gguf", notices[-1])
    with closing(Pool([demo_load(demo)], pause_seconds=0)) as pool:
        list(pool.load())
        pool._sessions[0]._load = demo_load(copy)
        with pytest.raises(EngineError, match=r"no engine is left to answer: .+demo\.gguf"):
            answered(pool, killing(1))


def test_what_kills_twice_is_given_up_and_an_engine_that_dies_of_every_question(demo: Path) -> None:
    found: list[Answer | Notice] = []
    with closing(Pool([demo_load(demo)])) as pool, closing(pool.answers(QUESTIONS, killing(2))) as answers:
        list(pool.load())
        died = r"no engine is left to answer: it died of 2 questions in a row, twice of each: .+ SIGKILL"
        with pytest.raises(EngineError, match=died):
            found.extend(answers)
    given_up = [told for told in found if isinstance(told, Answer)]
    assert [told.number for told in given_up] == [0, 1]
    assert all((told.error or "").startswith("the engine's process ended by SIGKILL") for told in given_up)


class LateSession(Session):
    """Cannot be loaded again at once: its RPC server is being started again itself."""

    n_loads = 0

    def load(self) -> Iterator[LoadEvent]:
        self.n_loads += 1
        if self.n_loads == 2:
            raise EngineError("no llama.cpp RPC server answers")
        return super().load()


def test_an_engine_is_given_time_to_come_back(demo: Path, expected: list[str]) -> None:
    with closing(Pool([demo_load(demo)], LateSession, pause_seconds=0)) as pool:
        list(pool.load())
        assert answered(pool, killing(1), 1)[0] == expected[:1]


def test_leaving_early_ends_what_is_being_answered(demo: Path) -> None:
    endless = Sampling(temperature=0.0, max_tokens=10**6, logit_bias=((2, -float("inf")),))
    with closing(Pool([demo_load(demo, replace(SETTINGS, n_ctx=1 << 17))] * 2)) as pool:
        list(pool.load())
        answers = pool.answers(QUESTIONS, lambda session, q: session.reply(q.messages, GREEDY if q.number else endless))
        first = next(answers)
        assert isinstance(first, Answer)
        answers.close()


# The command


@pytest.fixture(scope="module", autouse=True)
def _levels(demo_levels: dict[str, Path]) -> None:
    """Where the command finds the demo in BF16."""
    FOLDER.append(demo_levels["BF16"].parent.parent)


FOLDER: list[Path] = []


def each(
    questions: Path, out: Path, *arguments: str, limit: Callable[[], None] | None = None
) -> "subprocess.Popen[str]":
    model = ["--model", "demo", "--level", "BF16", "--models", str(FOLDER[-1]), "--threads", "1"]
    command = [BISE, "ask", *model, "--each", str(questions), "--out", str(out)]
    return subprocess.Popen(
        [*command, "--temperature", "0", "--max-tokens", "20", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=limit,
    )


def ended(process: "subprocess.Popen[str]") -> tuple[int, str]:
    """Exit code and what was said on stderr; nothing is said on stdout."""
    with process:
        said, faults = process.communicate()
    assert said == ""
    return process.returncode, faults


def records(out: Path) -> list[Mapping[str, object]]:
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    lines = [f"Define {word}." for word in WORDS]
    forms: list[object] = [lines[0], {"question": lines[1], "id": "rain"}, {"id": 3, "messages": [
        {"role": "user", "content": [{"type": "text", "text": lines[2]}]}]}, *lines[3:]]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, forms[:4])) + "\n\n" + "\n".join(map(json.dumps, forms[4:])))
    return path


def test_every_line_is_answered_and_done_is_done(questions: Path, tmp_path: Path, expected: list[str]) -> None:
    out = tmp_path / "answers.jsonl"
    code, faults = ended(each(questions, out, "--workers", "2"))
    assert (code, faults.splitlines()[-1]) == (0, f"written: {out}, 8 answers")
    found = records(out)
    assert [record["answer"] for record in found] == expected
    assert [record["line"] for record in found] == [1, 2, 3, 4, 6, 7, 8, 9]
    assert [record.get("id") for record in found[:4]] == [None, "rain", 3, None]
    before = out.stat()
    code, faults = ended(each(questions, out))
    assert (code, faults.splitlines()[-1]) == (0, f"{out} has all 8 answers")
    assert out.read_text(encoding="utf-8").count("\n") == 8
    code, faults = ended(each(questions, out, "--top-k", "7"))
    assert code == 1
    assert faults.splitlines()[-1] == (
        f"bise: {out}, line 1: the answer to another question, of another model or with other settings; name another "
        "--out, or begin anew with --force"
    )
    assert out.stat().st_size == before.st_size
    assert ended(each(questions, out, "--top-k", "7", "--force"))[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "questions.jsonl"]


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGKILL]
)
def test_ended_by_whatever_it_goes_on_where_it_stopped(
    number: signal.Signals, questions: Path, tmp_path: Path, expected: list[str]
) -> None:
    text = questions.read_text(encoding="utf-8")
    questions.write_text(text + "".join(f"\n{json.dumps(f'Define {word}s.')}" for word in WORDS * 15), encoding="utf-8")
    out = tmp_path / "answers.jsonl"
    process = each(questions, out, "--workers", "2")
    wait_until(lambda: out.exists() and out.read_bytes().count(b"\n") > 10)
    process.send_signal(number)
    code, faults = ended(process)
    assert code == {signal.SIGINT: 130}.get(number, -number)
    assert "Traceback" not in faults
    with out.open("ab") as file:
        file.write(b'{"line": 3, "answ')  # as a full disk or a power cut leaves it
    done = [record["line"] for record in records_whole(out)]
    assert 10 < len(done) < 128
    code, faults = ended(each(questions, out, "--workers", "2"))
    assert (code, faults.splitlines()[-1]) == (0, f"written: {out}, 128 answers")
    assert [record["answer"] for record in records(out)[:8]] == expected
    assert len(set(done)) == len(done)


def records_whole(out: Path) -> list[Mapping[str, object]]:
    return [json.loads(line) for line in out.read_bytes().split(b"\n")[:-1]]


def test_what_cannot_be_answered_is_told_and_asked_again(tmp_path: Path) -> None:
    questions, out = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    out.symlink_to(tmp_path / "elsewhere.jsonl")
    long = "word " * 3000
    questions.write_text(f'"Define a horse."\n{json.dumps(long)}\n', encoding="utf-8")
    for _ in range(2):
        code, faults = ended(each(questions, out))
        assert code == 1
        assert faults.splitlines()[-1] == f"bise: 1 of 2 have no answer; {out} says why, and this command asks again"
        assert sorted(("answer" in record, "error" in record) for record in records(out)) == [
            (False, True),
            (True, False),
        ]
    code, _ = ended(each(questions, out, "--context", "4096", "--force"))
    assert code == 0
    assert out.is_symlink()


def test_a_full_disk_is_one_line_and_loses_no_answer(questions: Path, tmp_path: Path) -> None:
    text = questions.read_text(encoding="utf-8")
    questions.write_text(text + "".join(f"\n{json.dumps(f'Define {word}s.')}" for word in WORDS), encoding="utf-8")
    out = tmp_path / "answers.jsonl"

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, resource.RLIM_INFINITY))

    code, faults = ended(each(questions, out, limit=limit))
    assert code == 1
    assert faults.splitlines()[-1].startswith(f"bise: {out}: cannot be written: File too large; make room, and")
    n_kept = len(records_whole(out))
    assert 0 < n_kept < 16
    code, faults = ended(each(questions, out))
    assert (code, faults.splitlines()[-1]) == (0, f"written: {out}, 16 answers")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no question"),
        ("no JSON", "line 1: Expecting value"),
        ('"a"\n{"id": 1}', 'line 2: a list of messages is wanted, or an object with "messages" and "tools"'),
        ('" "', "line 1: the question is empty"),
        ('{"question": ["a"]}', "line 1: question: text is wanted"),
        ('[{"role": "king", "content": "a"}]', r"line 1: messages\[0\]\.role"),
        ("[" * 100_000, "line 1: "),
        ('{"messages": [{"role": "user", "content": "a"}], "tools": [7]}', r"line 1: tools\[0\]: a number"),
    ],
)
def test_questions_that_are_none_are_refused_with_their_line(text: str, words: str, tmp_path: Path) -> None:
    questions = tmp_path / "q.jsonl"
    questions.write_text(text, encoding="utf-8")
    code, faults = ended(each(questions, tmp_path / "a.jsonl"))
    assert code == 1
    assert re.match(rf"bise: {re.escape(str(questions))}.* ?{words}", faults.splitlines()[-1])
    assert not (tmp_path / "a.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--each", "q"], "--each wants a file for the answers; name it with --out FILE.jsonl"),
        (["--each", "q", "--out", "a", "hello"], "leave out the question"),
        (["--each", "q", "--out", "a", "--show-sampling"], "leave out --show-sampling"),
        (["--workers", "2", "hello"], "--out, --workers and --force go with --each FILE.jsonl"),
        (["--each", "q", "--out", "a"], "q: No such file or directory"),
    ],
)
def test_options_that_do_not_go_together(arguments: list[str], words: str, tmp_path: Path) -> None:
    run = subprocess.run(
        [BISE, "ask", "--model", "demo", *arguments], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert run.returncode == 1
    assert words in run.stderr.splitlines()[-1]


@pytest.mark.parametrize("workers", ["0", "65", "two", "-1"])
def test_a_number_of_workers_that_is_none(workers: str, questions: Path, tmp_path: Path) -> None:
    code, faults = ended(each(questions, tmp_path / "a.jsonl", f"--workers={workers}"))
    assert (code, faults.splitlines()[-1]) == (
        1,
        f"bise: --workers {workers} is neither per-gpu nor a number from 1 to 64",
    )


def test_questions_with_tools_are_told_of_them_and_calls_are_kept(tmp_path: Path) -> None:
    questions, out = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    messages = [{"role": "user", "content": "Define a horse."}]
    tools = [{"type": "function", "function": {"name": "define", "description": "A word", "parameters": {}}}]
    asked = [{"messages": messages}, {"messages": messages, "tools": tools}]
    questions.write_text("\n".join(map(json.dumps, asked)), encoding="utf-8")
    assert ended(each(questions, out))[0] == 0
    without, told = (record["prompt_tokens"] for record in records(out))
    assert isinstance(without, int)
    assert isinstance(told, int)
    assert told > without + 20
    call = ToolCall("abcdefgh1", "define", '{"word": "é"}')
    with _Out(out, [Line(1, None, ())], {1: "0"}, overwrite=True) as file:
        file.add(Answer(1, "", Finished("calls", 9, 0, 9, 0.1, 0.1, 18, 256, calls=(call,))))
    (turn,) = in_openai_form([Message("assistant", "", (call,))])
    assert records(out)[0]["tool_calls"] == turn["tool_calls"]


# The file of answers


def refused(capsys: pytest.CaptureFixture[str], model: Path, out: str, *arguments: str) -> str:
    """Why the question in q.jsonl is not answered."""
    Path("q.jsonl").write_text('"Define a horse."\n', encoding="utf-8")
    assert main(["ask", "--model", str(model), "--each", "q.jsonl", "--out", out, *arguments]) == 1
    assert Path("q.jsonl").read_text(encoding="utf-8") == '"Define a horse."\n'
    return capsys.readouterr().err.splitlines()[-1]


def test_no_file_is_replaced_that_must_not_be(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    Path("link.jsonl").symlink_to("q.jsonl")
    for out in ("q.jsonl", "./link.jsonl"):
        assert refused(capsys, demo, out, "--force").endswith("holds the questions; name another --out")
    for out in ("pipe", "."):
        assert "is not a file that can be replaced" in refused(capsys, demo, out, "--force")
    assert refused(capsys, demo, "none/a.jsonl").endswith("No such file or directory; name another --out")
    with Path("a.jsonl").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        other.write(b"kept")
        other.flush()
        for options in ([], ["--force"]):
            assert "a.jsonl is being written by another" in refused(capsys, demo, "a.jsonl", *options)
    assert Path("a.jsonl").read_bytes() == b"kept"


def test_two_runs_do_not_write_the_same_answers(tmp_path: Path) -> None:
    lines, digests = [Line(1, None, QUESTIONS[0].messages)], {1: "0"}
    for is_ordered in (False, True):
        with _Out(tmp_path / "a.jsonl", lines, digests, overwrite=True) as out:
            if is_ordered:
                out.put_in_order()
            with pytest.raises(OutputError, match="being written by another"):
                _Out(tmp_path / "a.jsonl", lines, digests, overwrite=True)


@pytest.mark.parametrize("line", ["ours?", "[]", "7", '{"line": 1}', '{"line": [], "asked": "x"}', "[" * 100_000])
def test_what_is_no_answer_is_kept(
    line: str, demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text(f"{line}\n", encoding="utf-8")
    assert "a.jsonl, line 1: not an answer of `bise ask --each`" in refused(capsys, demo, "a.jsonl")
    assert Path("a.jsonl").read_text(encoding="utf-8") == f"{line}\n"


def test_another_model_of_the_same_name_and_size_is_another(demo: Path, tmp_path: Path) -> None:
    questions = [Line(1, None, QUESTIONS[0].messages)]
    content = bytearray(demo.read_bytes())
    digests = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "demo.gguf").write_bytes(content)
        load = demo_load(tmp_path / folder / "demo.gguf")
        digests.append(_digests(questions, load, GREEDY, None, ProgressLine("", quiet=True)))
        content[-1] ^= 1
    assert digests[0] != digests[1]
