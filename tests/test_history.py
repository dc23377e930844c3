"""The saved conversations: what is written is there after reopening, and a bad file gives one line."""

import os
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest

from tui.history import SCHEMA, TITLE_LENGTH, History, HistoryError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "history.db"


@pytest.fixture
def history(path: Path) -> Iterator[History]:
    history = History(path)
    yield history
    history.close()


def begin(history: History, *contents: str) -> int:
    """A conversation with these messages, the user's first."""
    conversation = history.create(model="large")
    parent = None
    for index, content in enumerate(contents):
        parent = history.append(conversation, parent, "assistant" if index % 2 else "user", content).id
    return conversation


def texts(history: History, conversation: int) -> list[str]:
    return [turn.content for turn in history.messages(conversation)]


def test_everything_is_there_after_reopening(history: History, path: Path) -> None:
    conversation = history.create(model="large", system="Be brief.")
    asked = history.append(conversation, None, "user", "Why?\nTell me.")
    answer = history.append(conversation, asked.id, "assistant", "", model="large", level="Q4_K_M")
    answer = replace(answer, content="Because.", stop="length", n_tokens=2, tokens_per_second=12.5)
    history.update(answer)
    history.close()
    again = History(path)
    assert again.messages(conversation) == [asked, answer]
    (summary,) = again.conversations()
    assert (summary.id, summary.title, summary.system, summary.model, summary.n_turns) == (
        conversation,
        "Why?",
        "Be brief.",
        "large",
        1,
    )
    assert abs((datetime.now() - summary.updated).total_seconds()) < 3600
    assert again.conversation(conversation) == summary
    again.close()


def test_a_fork_moves_the_tip_and_loses_nothing(history: History, path: Path) -> None:
    conversation = begin(history, "one", "first answer", "two")
    first = history.messages(conversation)[0]
    history.append(conversation, first.id, "assistant", "second answer")
    assert texts(history, conversation) == ["one", "second answer"]
    history.append(conversation, None, "user", "one, edited")
    assert texts(history, conversation) == ["one, edited"]
    assert history.conversation(conversation).title == "one, edited"
    rows = sqlite3.connect(path)
    assert rows.execute("SELECT count(*) FROM messages").fetchone() == (5,)
    rows.close()


def test_turns_are_those_of_the_shown_path(history: History) -> None:
    conversation = begin(history, "one", "answer", "two", "answer", "three")
    assert history.conversation(conversation).n_turns == 3
    history.append(conversation, None, "user", "anew")
    assert history.conversation(conversation).n_turns == 1


def test_the_latest_conversation_comes_first(history: History) -> None:
    older, newer = begin(history, "older"), begin(history, "newer")
    assert [found.id for found in history.conversations()] == [newer, older]
    history.append(older, history.messages(older)[-1].id, "assistant", "answer")
    assert [found.id for found in history.conversations()] == [older, newer]


def test_titles_are_short_and_never_empty(history: History) -> None:
    assert history.conversation(begin(history, "\n\n  first line\nsecond")).title == "first line"
    assert history.conversation(begin(history, " \n ")).title == "untitled"
    assert history.conversation(begin(history, "x" * 500)).title == "x" * TITLE_LENGTH


def test_the_system_prompt_can_change(history: History) -> None:
    conversation = begin(history, "hello")
    history.set_system(conversation, "Be kind.")
    assert history.conversation(conversation).system == "Be kind."
    history.set_system(conversation, None)
    assert history.conversation(conversation).system is None


def test_deleting_takes_the_branches_along_and_nothing_else(history: History, path: Path) -> None:
    doomed, kept = begin(history, "one", "two"), begin(history, "three")
    history.append(doomed, None, "user", "a branch")
    history.delete(doomed)
    assert [found.id for found in history.conversations()] == [kept]
    rows = sqlite3.connect(path)
    assert rows.execute("SELECT content FROM messages").fetchall() == [("three",)]
    rows.close()
    assert history.search("branch") == []
    with pytest.raises(HistoryError, match=f"no conversation {doomed}"):
        history.conversation(doomed)


@pytest.mark.parametrize(
    ("text", "titles"),
    [
        ("wind", ["The wind", "Air"]),
        ("WIN", ["The wind", "Air"]),
        ("cold wind", ["Air"]),
        ("wind warm", []),
        ("grown", ["Air"]),
        ('"', []),
        ("100% (a_b) OR *", []),
        ("  ", ["The wind", "Air"]),
    ],
)
def test_search_finds_the_message_with_every_word(history: History, text: str, titles: list[str]) -> None:
    air = begin(history, "Air", "a cold wind")
    begin(history, "The wind")
    grown = history.messages(air)[1]
    history.update(replace(grown, content="a cold wind, grown while it streamed"))
    assert [found.title for found in history.search(text)] == titles


def test_search_ignores_accents(history: History) -> None:
    conversation = begin(history, "La vallée du Rhône")
    assert [found.id for found in history.search("vallee rhone")] == [conversation]


def test_the_index_is_made_anew_for_a_file_that_lost_it(history: History, path: Path) -> None:
    """As a SQLite without FTS5 leaves it: no triggers, and messages that the index has not seen."""
    history.close()
    rows = sqlite3.connect(path)
    for trigger in ("index_insert", "index_update", "index_delete"):
        rows.execute(f"DROP TRIGGER {trigger}")
    rows.execute("INSERT INTO conversations VALUES (1, 'unseen', NULL, 'large', NULL, 0)")
    rows.execute("INSERT INTO messages(conversation, role, content) VALUES (1, 'user', 'unseen')")
    rows.commit()
    rows.close()
    again = History(path)
    assert [found.id for found in again.search("unseen")] == [1]
    again.close()


def test_the_file_belongs_to_its_owner(history: History, path: Path) -> None:
    begin(history, "secret")
    files = list(path.parent.iterdir())
    assert len(files) == 3  # the database, its write-ahead log and its shared memory
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_what_was_written_survives_without_closing(history: History, path: Path, tmp_path: Path) -> None:
    """The files as a killed program leaves them."""
    conversation = begin(history, "hello", "half an ans")
    copy = tmp_path / "copy.db"
    for suffix in ("", "-wal"):
        Path(f"{copy}{suffix}").write_bytes(Path(f"{path}{suffix}").read_bytes())
    other = History(copy)
    assert texts(other, conversation) == ["hello", "half an ans"]
    other.close()


def test_a_newer_schema_is_refused_and_left_alone(history: History, path: Path) -> None:
    history.close()
    rows = sqlite3.connect(path)
    rows.execute(f"PRAGMA user_version = {SCHEMA + 1}")
    rows.close()
    before = path.read_bytes()
    with pytest.raises(HistoryError, match=f"schema {SCHEMA + 1}, this Bise knows {SCHEMA}"):
        History(path)
    assert path.read_bytes() == before


def test_another_programs_database_is_refused(path: Path) -> None:
    path.parent.mkdir()
    rows = sqlite3.connect(path)
    rows.execute("CREATE TABLE bookmarks (url TEXT)")
    rows.close()
    with pytest.raises(HistoryError, match="another program's database"):
        History(path)


def test_a_damaged_file_is_one_line(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"not a database at all" * 100)
    with pytest.raises(HistoryError, match="not a database") as caught:
        History(path)
    assert "\n" not in str(caught.value)


def test_damage_inside_is_one_line(history: History, path: Path) -> None:
    begin(history, *["text " * 500] * 40)
    history.close()
    data = bytearray(path.read_bytes())
    page = 4096
    data[2 * page :] = os.urandom(len(data) - 2 * page)
    path.write_bytes(data)
    with pytest.raises(HistoryError) as caught, closing(History(path)) as damaged:
        damaged.messages(1)
    assert "\n" not in str(caught.value)


def test_a_path_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(HistoryError, match="cannot open the history"):
        History(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(HistoryError, match="cannot open the history"):
        History(tmp_path / "file" / "history.db")


def test_a_call_that_fails_half_way_leaves_nothing_behind(history: History, path: Path) -> None:
    conversation = begin(history, "hello")
    rows = sqlite3.connect(path)
    rows.execute("CREATE TRIGGER stop BEFORE UPDATE OF tip ON conversations BEGIN SELECT RAISE(ABORT, 'no tip'); END")
    with pytest.raises(HistoryError, match="no tip"):
        history.append(conversation, history.messages(conversation)[-1].id, "assistant", "a new message")
    assert rows.execute("SELECT content FROM messages").fetchall() == [("hello",)]
    rows.close()
