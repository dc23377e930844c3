"""Conversations with real models: what is told in which order, how answers end, and how a session survives."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import cast

import gguf
import llama_cpp
import pytest

from runtime import answering
from runtime.answering import Answerer
from runtime.engine import Engine
from runtime.errors import EngineError, WorkerDiedError
from runtime.events import (
    EngineSettings,
    Event,
    Finished,
    Load,
    Loaded,
    LoadProgress,
    Piece,
    PromptProgress,
    Reply,
    ReplyEvent,
    Sampling,
)
from runtime.grammar import Grammar
from runtime.memory_watch import resident_bytes
from runtime.messages import Message, Tool
from runtime.prompts import Prompter
from runtime.session import Session
from tests.checkpoints import DEMO

GREEDY = Sampling(temperature=0.0)

EOS = 2
"""The demo's token that ends an answer."""
PROSE = (DEMO.parent / "eval" / "prose.txt").read_text(encoding="utf-8")
HORSE = Message("user", "Define a horse.")
QUESTION = Message("user", "Name three colours of the rainbow.")

RAMBLE = ([HORSE, Message("assistant", PROSE[:100])], Sampling(temperature=2.0, seed=3))
"""What the demo answers with hundreds of words of nonsense."""


def demo_load(path: Path, n_ctx: int = 2048) -> Load:
    settings = EngineSettings(n_ctx=n_ctx, n_batch=256, n_threads=1)
    return Load(path, settings, "mistral-v3", DEMO / "tokenizer.model")


@pytest.fixture(scope="module")
def session(demo: Path) -> Iterator[Session]:
    """The demo, loaded once for the tests that leave it in good health."""
    session = Session(demo_load(demo))
    list(session.load())
    yield session
    session.close()


@pytest.fixture
def opened(demo: Path) -> Iterator[Callable[..., Session]]:
    """Makes sessions of a test's own, and closes them."""
    sessions: list[Session] = []

    def open_session(load: Load | None = None) -> Session:
        sessions.append(Session(load or demo_load(demo)))
        return sessions[-1]

    yield open_session
    for each in sessions:
        each.close()


def text_of(events: Sequence[ReplyEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, Piece))


def finished(events: Sequence[ReplyEvent]) -> Finished:
    last = events[-1]
    assert isinstance(last, Finished)
    return last


def ask(session: Session, *messages: Message, sampling: Sampling = GREEDY) -> list[ReplyEvent]:
    return list(session.reply(messages, sampling))


# Events


def test_a_load_tells_its_progress_and_what_was_loaded(opened: Callable[..., Session], demo: Path) -> None:
    *progress, last = opened().load()
    assert all((event.bytes_per_second or 1) > 0 for event in progress if isinstance(event, LoadProgress))
    shares = [event.fraction for event in progress if isinstance(event, LoadProgress)]
    assert len(shares) == len(progress)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    tensors = gguf.GGUFReader(demo).tensors
    assert isinstance(last, Loaded)
    assert last.tensor_bytes == sum(tensor.n_bytes for tensor in tensors)
    assert last.n_params == sum(tensor.n_elements for tensor in tensors)
    assert (last.n_ctx, last.n_ctx_train, last.n_vocab) == (2048, 2048, 4096)
    assert last.seconds > 0
    assert last.has_calls
    assert "BF16" in last.description


def test_a_reply_tells_the_prompt_then_the_pieces_then_the_end(session: Session) -> None:
    events = ask(session, Message("user", PROSE[:3000]), sampling=Sampling(temperature=0.0, max_tokens=12))
    n_prompt = next(i for i, event in enumerate(events) if not isinstance(event, PromptProgress))
    prompt, pieces = events[:n_prompt], events[n_prompt:-1]
    end = finished(events)
    steps = [(event.done, event.total, event.reused) for event in prompt if isinstance(event, PromptProgress)]
    assert [done for done, _, _ in steps] == sorted({done for done, _, _ in steps})
    assert steps[0] == (end.reused_tokens, end.prompt_tokens, end.reused_tokens)
    assert steps[-1] == (end.prompt_tokens, end.prompt_tokens, end.reused_tokens)
    assert len(steps) == 1 + -(-(end.prompt_tokens - end.reused_tokens) // 256)
    counts = [event.n_tokens for event in pieces if isinstance(event, Piece)]
    assert len(counts) == len(pieces)
    assert counts == sorted(set(counts))
    assert (end.reason, end.answer_tokens, end.n_ctx) == ("length", 12, 2048)
    assert end.context_used == end.prompt_tokens + 11  # the last token drawn is never decoded
    assert end.tokens_per_second > 0
    assert all(event.text for event in pieces if isinstance(event, Piece))
    assert end.first_token_seconds is not None
    assert end.prompt_seconds <= end.first_token_seconds <= end.prompt_seconds + end.answer_seconds
    assert end.prompt_tokens_per_second == (end.prompt_tokens - end.reused_tokens) / end.prompt_seconds
    memory = resident_bytes(pid_of(session))
    assert end.memory_bytes is not None
    assert memory is not None
    assert abs(end.memory_bytes - memory) < 8 << 20
    assert end.gpu_bytes is None


def test_the_model_ends_an_answer_by_itself(session: Session) -> None:
    end = finished(ask(session, HORSE))
    assert end.reason == "end"
    assert end.context_used == end.prompt_tokens + end.answer_tokens


def test_an_answer_ends_where_the_context_is_full(opened: Callable[..., Session], demo: Path) -> None:
    session = opened(demo_load(demo, n_ctx=128))
    list(session.load())
    endless = Sampling(temperature=2.0, seed=3, logit_bias=((EOS, float("-inf")),))
    end = finished(ask(session, HORSE, Message("assistant", PROSE[:200]), sampling=endless))
    assert (end.reason, end.context_used) == ("context", 128)
    assert end.prompt_tokens + end.answer_tokens == 129
    with pytest.raises(EngineError, match=r"the conversation has \d+ tokens and the context holds 128"):
        ask(session, Message("user", PROSE[:2000]))
    assert finished(ask(session, HORSE)).answer_tokens > 0


def test_the_next_turn_reuses_what_was_read_and_said(session: Session) -> None:
    first = ask(session, HORSE)
    again = finished(ask(session, HORSE))
    assert again.reused_tokens == again.prompt_tokens - 1
    turn = finished(ask(session, HORSE, Message("assistant", text_of(first)), Message("user", "Define a cow.")))
    assert turn.reused_tokens >= finished(first).prompt_tokens + finished(first).answer_tokens - 1


def test_a_seed_repeats_an_answer(session: Session) -> None:
    texts = [text_of(ask(session, HORSE, sampling=Sampling(temperature=1.2, seed=seed))) for seed in (5, 5, 6)]
    assert texts[0] == texts[1] != texts[2]


def test_nothing_to_answer_is_an_ordinary_error(session: Session) -> None:
    with pytest.raises(EngineError, match="the conversation has no user message"):
        ask(session)
    assert finished(ask(session, HORSE)).reason == "end"


# Text


def test_an_answer_does_not_begin_with_a_space_but_a_continuation_may(session: Session) -> None:
    text = text_of(ask(session, HORSE))
    assert text[0].isalpha()
    word, _, rest = text.partition(" ")
    goes_on = text_of(ask(session, HORSE, Message("assistant", word)))
    assert goes_on.startswith(" ")
    assert f" {rest}" == goes_on
    assert text_of(ask(session, HORSE, Message("assistant", " "))) == text


def test_smollm2_says_what_llama_cpps_own_chat_says(opened: Callable[..., Session], smollm2: Path) -> None:
    session = opened(Load(smollm2, EngineSettings(n_ctx=512, n_threads=1), "template"))
    list(session.load())
    ours = text_of(ask(session, QUESTION, sampling=Sampling(0.0, max_tokens=20)))
    llama = llama_cpp.Llama(str(smollm2), n_ctx=512, n_threads=1, n_threads_batch=1, flash_attn=True, verbose=False)
    theirs = llama.create_chat_completion(
        [{"role": "user", "content": QUESTION.content}], temperature=0.0, max_tokens=20
    )
    llama.close()
    assert ours == theirs["choices"][0]["message"]["content"]  # type: ignore[index]


class SpeltModel:
    """An engine that draws given byte strings, one a token, and then ends."""

    is_spm = False
    n_ctx = context_used = 100
    n_drafted = n_accepted = 0

    def __init__(self, tokens: Sequence[bytes]) -> None:
        self.vocabulary = self
        self._tokens = tokens
        self._next = 0

    def read(self, ids: Sequence[int], on_progress: Callable[[int, int, int], None]) -> int:
        on_progress(len(ids), len(ids), 0)
        return 0

    def start_sampling(
        self, sampling: Sampling, grammar: Grammar | None, *, drafting: bool, forbidden: Sequence[int]
    ) -> str:
        self._next = 0
        return "one after the other"

    def next(self) -> int:
        return self._next

    def ends_answer(self, token: int) -> bool:
        return token == len(self._tokens)

    def piece(self, token: int, *, strip_space: bool) -> bytes:
        return self._tokens[token]

    def has_room(self) -> bool:
        return True

    def extend(self, token: int) -> None:
        self._next = token + 1

    def gpu_bytes(self) -> None:
        """There is no GPU."""

    def keep(self) -> None:
        """There is no KV cache."""

    def encode(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[int]:
        return [1]


@pytest.mark.parametrize(
    ("tokens", "pieces"),
    [
        ([b"a", b"b"], [("a", 1), ("b", 2)]),
        ([*(bytes([byte]) for byte in "né🙂".encode()), b"!"], [("n", 1), ("é", 3), ("🙂", 7), ("!", 8)]),
        ([b"x\xf0\x9f", b"\x99\x82y"], [("x", 1), ("🙂y", 2)]),
        ([b"\xf0\x9f"], [("\ufffd", 1)]),
        ([b"\xff", b"a"], [("\ufffd", 1), ("a", 2)]),
        ([b"", b"a"], [("a", 2)]),
        ([], []),
    ],
)
def test_pieces_are_whole_characters(
    tokens: list[bytes], pieces: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answering, "_TELL_SECONDS", 0.0)
    assert pieces_of(tokens) == pieces


def pieces_of(tokens: list[bytes]) -> list[tuple[str, int]]:
    model = SpeltModel(tokens)
    events: list[Event] = []
    Answerer(cast(Engine, model), cast(Prompter, model)).reply(Reply((HORSE,)), events.append)
    end = events[-1]
    assert isinstance(end, Finished)
    assert end.answer_tokens == len(tokens)
    return [(event.text, event.n_tokens) for event in events if isinstance(event, Piece)]


def test_what_comes_faster_than_it_can_be_seen_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering, "_TELL_SECONDS", 1000.0)
    monkeypatch.setattr(time, "monotonic", lambda: 1.0)  # a machine that has just started
    assert pieces_of([b"a", b"b", b"", b"c\xf0", b"d"]) == [("a", 1), ("bc\ufffdd", 5)]


# Stops


def test_a_stop_keeps_the_partial_answer_and_the_next_reply_works(session: Session) -> None:
    events: list[ReplyEvent] = []
    for event in session.reply(*RAMBLE):
        events.append(event)
        if isinstance(event, Piece) and event.n_tokens >= 5:
            session.stop()
    end = finished(events)
    assert end.reason == "stopped"
    assert end.answer_tokens >= 5
    assert text_of(events)
    assert finished(ask(session, HORSE)).reason == "end"


def test_a_stop_while_the_prompt_is_read_keeps_what_was_read(session: Session) -> None:
    message = Message("user", "New. " + PROSE[1000:6000])
    events: list[ReplyEvent] = []
    for event in session.reply([message], GREEDY):
        events.append(event)
        if isinstance(event, PromptProgress) and event.done >= 256:
            session.stop()
    end = finished(events)
    assert (end.reason, end.answer_tokens) == ("stopped", 0)
    assert 256 <= end.context_used < end.prompt_tokens
    assert finished(ask(session, message, sampling=Sampling(0.0, max_tokens=1))).reused_tokens == end.context_used


def test_leaving_early_stops_the_answer_and_the_next_starts_clean(session: Session) -> None:
    expected = text_of(ask(session, HORSE))
    answer = session.reply(*RAMBLE)
    for event in answer:
        if isinstance(event, Piece):
            break
    answer.close()  # type: ignore[attr-defined]
    assert text_of(ask(session, HORSE)) == expected


def test_leaving_while_the_prompt_is_read_stops_the_reading(session: Session) -> None:
    message = Message("user", "Anew. " + PROSE[2000:7000])
    answer = session.reply([message], GREEDY)
    next(iter(answer))
    answer.close()  # type: ignore[attr-defined]
    again = finished(ask(session, message, sampling=Sampling(0.0, max_tokens=1)))
    assert again.reused_tokens < again.prompt_tokens - 1


def test_leaving_a_load_early_cancels_it_and_the_next_loads(opened: Callable[..., Session], smollm2: Path) -> None:
    session = opened(Load(smollm2, EngineSettings(n_ctx=256, n_threads=1), "template"))
    for _ in range(2):
        loading = session.load()
        assert isinstance(next(iter(loading)), LoadProgress)
        loading.close()  # type: ignore[attr-defined]
    events = list(session.load())
    assert [isinstance(event, Loaded) for event in events] == [*([False] * (len(events) - 1)), True]
    assert isinstance(events[-1], Loaded)
    assert not events[-1].has_calls, "its template has no tools"


def test_a_load_can_be_stopped(opened: Callable[..., Session]) -> None:
    session = opened()
    loading = session.load()
    next(iter(loading))
    session.stop()
    with contextlib.suppress(EngineError):  # cancelled, or loaded before the stop arrived
        list(loading)
    list(session.load())
    assert finished(ask(session, HORSE)).reason == "end"


# Deaths and ends


def pid_of(session: Session) -> int:
    worker = session._worker
    assert worker is not None
    return worker.pid


def test_an_engine_killed_in_mid_answer_can_be_loaded_again(opened: Callable[..., Session]) -> None:
    session = opened()
    list(session.load())
    answer = session.reply(*RAMBLE)
    while not isinstance(next(answer), Piece):
        pass
    os.kill(pid_of(session), signal.SIGKILL)
    with pytest.raises(WorkerDiedError, match="ended by SIGKILL"):
        list(answer)
    session.stop()
    with pytest.raises(WorkerDiedError, match="SIGKILL"):
        ask(session, HORSE)
    list(session.load())
    assert finished(ask(session, HORSE)).reason == "end"


def test_an_engine_that_dies_while_its_answer_is_left_is_quiet(opened: Callable[..., Session]) -> None:
    session = opened()
    list(session.load())
    answer = session.reply(*RAMBLE)
    next(iter(answer))
    os.kill(pid_of(session), signal.SIGKILL)
    answer.close()  # type: ignore[attr-defined]
    with pytest.raises(WorkerDiedError, match="SIGKILL"):
        ask(session, HORSE)


def test_closing_ends_the_answer_another_thread_waits_for(opened: Callable[..., Session]) -> None:
    session = opened()
    list(session.load())
    said, errors = threading.Event(), []

    def answer() -> None:
        try:
            for event in session.reply(*RAMBLE):
                if isinstance(event, Piece):
                    said.set()
        except WorkerDiedError as error:
            errors.append(str(error))

    thread = threading.Thread(target=answer)
    thread.start()
    said.wait()
    session.close()
    thread.join()
    assert errors in ([], ["the engine was closed"])  # it may have stopped the answer in time to say so


def test_a_closed_session_says_so_and_closes_again(opened: Callable[..., Session]) -> None:
    session = opened()
    session.stop()
    with pytest.raises(EngineError, match="no model is loaded"):
        ask(session, HORSE)
    session.close()
    session.close()
    session.stop()
    with pytest.raises(EngineError, match="the session is closed"):
        list(session.load())


def test_a_file_that_cannot_be_loaded_is_an_ordinary_error(opened: Callable[..., Session], tmp_path: Path) -> None:
    session = opened(demo_load(tmp_path / "no.gguf"))
    for _ in range(2):
        with pytest.raises(EngineError, match=r"no\.gguf: no such file"):
            list(session.load())
    with pytest.raises(EngineError, match="no model is loaded"):
        ask(session, HORSE)
