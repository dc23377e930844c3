"""The saved conversations: one SQLite file.

Messages form a tree: each knows its parent, and a conversation points at its tip, the last message of the path that
is shown. To answer again or to edit a message appends a sibling and moves the tip: forks cost nothing and lose
nothing. A message is written when it begins and updated as it grows. Every call is one transaction that is on its way
to the disk when the call returns. The file belongs to its owner alone (mode 0600).

Every fault of the file or the disk is raised as `HistoryError`. For one thread; knows nothing of screens and engines.
"""

import json
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Final, Literal

from runtime.errors import UserError
from runtime.events import StopReason
from runtime.messages import ToolCall
from runtime.tools import Result

TurnRole = Literal["user", "assistant"]

SCHEMA: Final = 2
"""The schema this program writes, kept in the file's `user_version`."""

TITLE_LENGTH: Final = 80
"""Longest title, in characters."""

_TABLES: Final = """
CREATE TABLE conversations (
    id INTEGER PRIMARY KEY,
    title TEXT NOT NULL,
    system TEXT,
    model TEXT NOT NULL,
    tip INTEGER REFERENCES messages(id),
    updated REAL NOT NULL  -- seconds since 1970
);
CREATE TABLE messages (
    id INTEGER PRIMARY KEY,
    conversation INTEGER NOT NULL REFERENCES conversations(id) ON DELETE CASCADE,
    parent INTEGER REFERENCES messages(id),
    role TEXT NOT NULL CHECK (role IN ('user', 'assistant')),
    content TEXT NOT NULL,
    model TEXT,
    level TEXT,
    stop TEXT,
    n_tokens INTEGER NOT NULL DEFAULT 0,
    tokens_per_second REAL NOT NULL DEFAULT 0,
    calls TEXT  -- of tools, with their results, as JSON
);
CREATE INDEX messages_of_conversation ON messages(conversation);
CREATE INDEX messages_of_parent ON messages(parent);
"""

_FROM_1: Final = "ALTER TABLE messages ADD COLUMN calls TEXT;\n"

# The index holds no text of its own; triggers keep it in step with the messages.
_INDEX: Final = """
CREATE VIRTUAL TABLE IF NOT EXISTS message_index USING fts5(content, content = 'messages', content_rowid = 'id');
INSERT INTO message_index(message_index) VALUES ('rebuild');
CREATE TRIGGER index_insert AFTER INSERT ON messages BEGIN
    INSERT INTO message_index(rowid, content) VALUES (new.id, new.content);
END;
CREATE TRIGGER index_delete AFTER DELETE ON messages BEGIN
    INSERT INTO message_index(message_index, rowid, content) VALUES ('delete', old.id, old.content);
END;
CREATE TRIGGER index_update AFTER UPDATE OF content ON messages BEGIN
    INSERT INTO message_index(message_index, rowid, content) VALUES ('delete', old.id, old.content);
    INSERT INTO message_index(rowid, content) VALUES (new.id, new.content);
END;
"""
_NO_INDEX: Final = """
DROP TRIGGER index_insert;
DROP TRIGGER index_delete;
DROP TRIGGER index_update;
"""

_SUMMARIES: Final = """
WITH RECURSIVE path(conversation, parent, role) AS (
    SELECT c.id, m.parent, m.role FROM conversations c JOIN messages m ON m.id = c.tip
    UNION ALL
    SELECT path.conversation, m.parent, m.role FROM path JOIN messages m ON m.id = path.parent
)
SELECT id, title, system, model, updated, coalesce(n_turns, 0)
FROM conversations LEFT JOIN
    (SELECT conversation, count(*) AS n_turns FROM path WHERE role = 'user' GROUP BY conversation) ON conversation = id
"""


class HistoryError(UserError):
    """The saved conversations cannot be read or written."""


@dataclass(frozen=True, slots=True)
class TurnCall:
    """A call that an answer made, and what became of it."""

    call: ToolCall
    result: Result | None = None
    """None: not carried out, because the engine or the program ended."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One saved message. The last six fields are an answer's."""

    id: int
    role: TurnRole
    content: str
    model: str | None = None
    """Key of the model that wrote it."""
    level: str | None = None
    stop: StopReason | None = None
    """None: cut off, because the engine or the program ended."""
    n_tokens: int = 0
    tokens_per_second: float = 0.0
    calls: tuple[TurnCall, ...] = ()
    """Of tools; the answer that they lead to is the next turn."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """A saved conversation, without its messages."""

    id: int
    title: str
    """The first line of the first message."""
    system: str | None
    model: str
    """Key of the model it was begun with."""
    updated: datetime
    """Local time of its last message."""
    n_turns: int
    """The user's messages on the path that is shown."""


class History:
    """An open history file. Missing folders and a missing file are made."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        except OSError as error:
            raise HistoryError(f"cannot open the history {path}: {error.strerror}") from error
        # Autocommit: transactions are begun and ended by _writing alone.
        self._db = sqlite3.connect(path, isolation_level=None)
        try:
            self._searchable = self._prepare()
        except BaseException:
            self._db.close()
            raise

    def _prepare(self) -> bool:
        """Check the file and bring it to `SCHEMA`. Return whether there is a full-text index."""
        with self._faults():
            self._db.execute("PRAGMA journal_mode = WAL")
            # In WAL mode a killed program loses nothing with NORMAL; only a power cut may take the last commits.
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._db.execute("PRAGMA foreign_keys = ON")
            compiled = self._one("SELECT count(*) FROM pragma_compile_options WHERE compile_options = 'ENABLE_FTS5'")
        with self._writing():
            (schema,) = self._one("PRAGMA user_version")
            if schema > SCHEMA:
                raise HistoryError(
                    f"the history {self._path} has schema {schema}, this Bise knows {SCHEMA}: "
                    "update Bise, or choose another file"
                )
            if schema == 0:
                if self._one("SELECT count(*) FROM sqlite_master") != (0,):
                    raise HistoryError(f"{self._path} is another program's database: choose another file")
                self._script(_TABLES)
            elif schema == 1:
                self._script(_FROM_1)
            self._db.execute(f"PRAGMA user_version = {SCHEMA}")
            # A SQLite without FTS5 could not run the triggers, so it drops them; the next one with it starts afresh.
            indexed = self._one("SELECT count(*) FROM sqlite_master WHERE name = 'index_insert'") == (1,)
            if indexed and not compiled[0]:
                self._script(_NO_INDEX)
            elif compiled[0] and not indexed:
                self._script(_INDEX)
        return bool(compiled[0])

    def close(self) -> None:
        """Close the file. Allowed any number of times."""
        self._db.close()

    def create(self, *, model: str, system: str | None = None) -> int:
        """Begin a conversation; return its number."""
        with self._writing():
            return self._insert(
                "INSERT INTO conversations(title, system, model, updated) VALUES ('', ?, ?, ?)",
                (system, model, time.time()),
            )

    def append(
        self,
        conversation: int,
        parent: int | None,
        role: TurnRole,
        content: str,
        *,
        model: str | None = None,
        level: str | None = None,
    ) -> Turn:
        """Add a message after `parent` (None: as the first) and make it the tip."""
        with self._writing():
            identity = self._insert(
                "INSERT INTO messages(conversation, parent, role, content, model, level) VALUES (?, ?, ?, ?, ?, ?)",
                (conversation, parent, role, content, model, level),
            )
            self._db.execute(
                "UPDATE conversations SET tip = ?, updated = ? WHERE id = ?", (identity, time.time(), conversation)
            )
            if parent is None:
                title = (content.strip() or "untitled").splitlines()[0][:TITLE_LENGTH].rstrip()
                self._db.execute("UPDATE conversations SET title = ? WHERE id = ?", (title, conversation))
        return Turn(identity, role, content, model, level)

    def update(self, turn: Turn) -> None:
        """Write a turn's text, its calls, and what is known of its end."""
        with self._writing():
            self._db.execute(
                "UPDATE messages SET content = ?, stop = ?, n_tokens = ?, tokens_per_second = ? WHERE id = ?",
                (turn.content, turn.stop, turn.n_tokens, turn.tokens_per_second, turn.id),
            )
            self._db.execute("UPDATE messages SET calls = ? WHERE id = ?", (_as_json(turn.calls), turn.id))

    def set_system(self, conversation: int, system: str | None) -> None:
        """Change a conversation's system prompt; None removes it."""
        with self._writing():
            self._db.execute("UPDATE conversations SET system = ? WHERE id = ?", (system, conversation))

    def messages(self, conversation: int) -> list[Turn]:
        """The path from the first message to the tip."""
        with self._faults():
            rows = self._db.execute(
                """
                WITH RECURSIVE path(id, depth) AS (
                    SELECT tip, 0 FROM conversations WHERE id = ? AND tip IS NOT NULL
                    UNION ALL
                    SELECT m.parent, depth + 1 FROM path JOIN messages m ON m.id = path.id WHERE m.parent IS NOT NULL
                )
                SELECT m.id, role, content, model, level, stop, n_tokens, tokens_per_second, calls
                FROM path JOIN messages m ON m.id = path.id ORDER BY depth DESC
                """,
                (conversation,),
            )
            return [replace(Turn(*row[:-1]), calls=self._calls(row[-1])) for row in rows]

    def conversation(self, conversation: int) -> Conversation:
        """One conversation by its number."""
        found = self._summaries("WHERE id = ?", conversation)
        if not found:
            raise HistoryError(f"there is no conversation {conversation} in {self._path}")
        return found[0]

    def conversations(self) -> list[Conversation]:
        """Every conversation, the latest first."""
        return self._summaries("")

    def search(self, text: str) -> list[Conversation]:
        """The conversations that have a message with every word of `text`, on any branch; the latest first.

        With FTS5 a word matches the beginning of words, whatever the case and accents; without, any part of the text.
        """
        words = text.split()
        if not words:
            return self.conversations()
        if self._searchable:
            query = " ".join('"' + word.replace('"', '""') + '"*' for word in words)
            matches, values = "id IN (SELECT rowid FROM message_index WHERE message_index MATCH ?)", [query]
        else:
            matches, values = " AND ".join(["instr(lower(content), lower(?))"] * len(words)), words
        return self._summaries(f"WHERE id IN (SELECT conversation FROM messages WHERE {matches})", *values)

    def delete(self, conversation: int) -> None:
        """Delete a conversation with all its branches."""
        with self._writing():
            self._db.execute("DELETE FROM conversations WHERE id = ?", (conversation,))

    def _summaries(self, where: str, *values: Any) -> list[Conversation]:
        with self._faults():
            rows = self._db.execute(f"{_SUMMARIES} {where} ORDER BY updated DESC, id DESC", values)
            return [
                Conversation(identity, title, system, model, datetime.fromtimestamp(updated), n_turns)
                for identity, title, system, model, updated, n_turns in rows
            ]

    def _calls(self, text: str | None) -> tuple[TurnCall, ...]:
        try:
            return tuple(
                TurnCall(ToolCall(**each["call"]), Result(**each["result"]) if each["result"] is not None else None)
                for each in json.loads(text or "[]")
            )
        except (ValueError, TypeError, KeyError):
            raise HistoryError(f"the history {self._path} holds calls that cannot be read: {text!r:.100}") from None

    def _one(self, sql: str) -> tuple[Any, ...]:
        row: tuple[Any, ...] = self._db.execute(sql).fetchone()
        return row

    def _insert(self, sql: str, values: tuple[Any, ...]) -> int:
        identity = self._db.execute(sql, values).lastrowid
        assert identity is not None  # every table here has a rowid
        return identity

    def _script(self, sql: str) -> None:
        # Connection.executescript would commit the transaction that is open.
        statement = ""
        for line in sql.splitlines(keepends=True):
            statement += line
            if sqlite3.complete_statement(statement):
                self._db.execute(statement)
                statement = ""

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """One transaction: all of it or nothing."""
        with self._faults():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    @contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise HistoryError(f"the history {self._path} cannot be used: {error}") from error


def _as_json(calls: tuple[TurnCall, ...]) -> str | None:
    return json.dumps([asdict(each) for each in calls]) if calls else None
