"""The arguments of a call against the JSON schema of its tool: what is wrong with them, in words for the model.

A schema can come from anyone: nothing that it names is fetched, and checking ends in time. One that is faulty itself
must not make its tool useless, so it is told, and its arguments are only checked to be an object.
"""

import contextlib
import json
import re
import signal
import threading
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, NoReturn

from jsonschema import Draft202012Validator, SchemaError
from jsonschema.exceptions import best_match
from jsonschema.validators import validator_for
from referencing import Registry
from referencing.exceptions import Unresolvable

MOST_SECONDS = 2.0
"""To check one call: an expression may take for ever on some text."""

_MOST_CHARS = 300  # of what is wrong: it quotes the arguments


class ArgumentCheck:
    """What checks arguments against `parameters`, the JSON text of a schema."""

    def __init__(self, parameters: str) -> None:
        self.schema: dict[str, Any] = {}
        self.faulty: str | None = None
        """Why the schema cannot be used."""
        self._validator: Any = None
        try:
            schema = json.loads(parameters or "{}")
            if not isinstance(schema, dict):
                raise ValueError("it is not an object")
            kind = validator_for(schema, default=Draft202012Validator)
            with _in_time():
                kind.check_schema(schema)
            self.schema, self._validator = schema, kind(schema, registry=Registry())
        except SchemaError as error:
            self.faulty = f"{error.json_path}: {error.message}"[:_MOST_CHARS]
        except Exception as error:  # a schema from anywhere can fail anyhow
            self.faulty = f"{type(error).__name__}: {error}"[:_MOST_CHARS]

    def fault(self, arguments: str) -> str | None:
        """What is wrong with the arguments, any text; None where nothing is."""
        try:
            value = json.loads(arguments, parse_constant=_refuse)
        except ValueError as error:
            return f"the arguments are not JSON: {error}"
        except RecursionError:
            return "the arguments are nested too deeply"
        if not isinstance(value, dict):
            return "the arguments are not a JSON object"
        if self._validator is None:
            return None
        try:
            with _in_time():
                found = best_match(self._validator.iter_errors(value))
        except (Unresolvable, re.error):  # the schema's fault
            return None
        except (RecursionError, TimeoutError):
            return "the arguments cannot be checked against the tool's schema: they are too long, or nested too deeply"
        except Exception as failure:
            return f"the arguments cannot be checked against the tool's schema: {failure}"[:_MOST_CHARS]
        if found is None:
            return None
        return f"the arguments do not fit the tool's schema: {found.json_path}: {found.message}"[:_MOST_CHARS]


@lru_cache(maxsize=256)
def argument_check(parameters: str) -> ArgumentCheck:
    """The same check for the same text."""
    return ArgumentCheck(parameters)


def call_fault(checks: Mapping[str, ArgumentCheck], name: str, arguments: str) -> str | None:
    """What is wrong with a call of one of the tools that are checked so; None where nothing is."""
    if name not in checks:
        return f"there is no tool {name[:64]!r}; there are: {', '.join(checks)}"
    return checks[name].fault(arguments)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


@contextlib.contextmanager
def _in_time() -> Iterator[None]:
    """End with TimeoutError what takes too long, in the main thread, where alone Python can do so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_: object) -> NoReturn:
        raise TimeoutError("it takes too long to check")

    before = signal.signal(signal.SIGALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, MOST_SECONDS)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before or signal.SIG_DFL)
