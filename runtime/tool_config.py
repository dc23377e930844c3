"""The file that names a user's tools → a toolbox: `~/.config/bise/tools.yaml`.

    functions:
      - ~/tools/notes.py                 # every public function in it, or notes.py:search for one
      - {from: package.module, timeout: 5}
    servers:
      files: {command: npx, args: [-y, "@scope/server", /data], env: {TOKEN: "${FILES_TOKEN}"}}
      search: {url: "https://host/mcp", headers: {Authorization: "Bearer ${SEARCH_TOKEN}"}, output_limit: 5000}
    policy:                              # the first that matches; else the user is asked
      files_read_*: allow
      files_*: deny
    timeout: 60                          # seconds of a call
    output_limit: 20000                  # characters of a result

`${NAME}` is the user's environment variable, which must be there.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, get_args

from runtime.tools import OUTPUT_LIMIT, TIMEOUT_SECONDS, Limits, Policy, Rule, Source, Toolbox, ToolError

_SERVER_NAME = re.compile(r"[a-zA-Z0-9-]{1,32}")
_VARIABLE = re.compile(r"\$\{(\w+)\}")
_LIMITS = ("timeout", "output_limit")


@dataclass(frozen=True, slots=True)
class Entry:
    """One source that the file names, to be opened."""

    name: str
    open: Callable[[], Source]


@dataclass(frozen=True, slots=True)
class Config:
    """What the file says."""

    entries: tuple[Entry, ...] = ()
    rules: tuple[Rule, ...] = ()


def default_path() -> Path:
    import platformdirs

    return platformdirs.user_config_path("bise") / "tools.yaml"


def read(path: Path | None = None) -> Config:
    """What the file says; nothing where there is none. Raises ToolError with the place of what is wrong."""
    import yaml

    path = path or default_path()
    try:
        text = path.read_text(encoding="utf-8")
        value = yaml.safe_load(text)
    except FileNotFoundError:
        return Config()
    except (OSError, UnicodeDecodeError) as error:
        raise ToolError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or 'not text in UTF-8'}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ToolError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    try:
        return _config(value if value is not None else {})
    except ToolError as error:
        raise ToolError(f"{path}: {error}") from None


def open_toolbox(config: Config, say: Callable[[str], None]) -> Toolbox:
    """Open all sources side by side. One that cannot be used is told by `say`, and the others are there.

    Raises ToolError where two tools have one name.
    """
    opened: list[Source] = []
    with ThreadPoolExecutor(max_workers=max(1, len(config.entries))) as pool:
        waiting = [pool.submit(entry.open) for entry in config.entries]
        for future in waiting:
            try:
                opened.append(future.result())
            except ToolError as error:
                say(str(error))
    try:
        return Toolbox(opened, config.rules)
    except BaseException:
        for source in opened:
            source.close()
        raise


def _config(value: Any) -> Config:
    file = _mapping(value, "the file", ("functions", "servers", "policy", *_LIMITS))
    limits = _limits(file, "", Limits(TIMEOUT_SECONDS, OUTPUT_LIMIT))
    rules = tuple(_rules(_mapping(file.get("policy") or {}, "policy")))
    functions = file.get("functions") or []
    if not isinstance(functions, list):
        _wrong("functions", functions, "a list of files or modules")
    servers = _mapping(file.get("servers") or {}, "servers")
    entries = [_function(each, f"functions[{i}]", limits) for i, each in enumerate(functions)]
    return Config((*entries, *(_server(name, each, limits) for name, each in servers.items())), rules)


def _function(value: Any, where: str, limits: Limits) -> Entry:
    if isinstance(value, Mapping):
        known = _mapping(value, where, ("from", *_LIMITS))
        limits, value = _limits(known, f"{where}.", limits), known.get("from")
    if not isinstance(value, str) or not value:
        _wrong(where, value, "a file, a module, or {from: …}")
    name: str = value

    def open_functions() -> Source:
        from runtime.tool_functions import Functions

        return Functions(name, limits)

    return Entry(name, open_functions)


def _server(name: Any, value: Any, limits: Limits) -> Entry:
    where = f"servers.{name}"
    if not isinstance(name, str) or not _SERVER_NAME.fullmatch(name):
        raise ToolError(f"{where}: letters, digits and - are for names, at most 32")
    known = _mapping(value, where, ("command", "args", "env", "url", "headers", *_LIMITS))
    limits = _limits(known, f"{where}.", limits)
    if ("command" in known) == ("url" in known):
        raise ToolError(f"{where}: either a command or a url is wanted")
    for key in ("args", "env") if "url" in known else ("headers",):
        if key in known:
            raise ToolError(f"{where}.{key}: goes with a {'command' if 'url' in known else 'url'}")
    target = known.get("command", known.get("url"))
    if not isinstance(target, str) or not target:
        _wrong(f"{where}.{'command' if 'command' in known else 'url'}", target, "text")
    arguments = known.get("args") or []
    if not isinstance(arguments, list) or not all(isinstance(each, str | int | float) for each in arguments):
        _wrong(f"{where}.args", arguments, "a list of texts")
    texts = tuple(os.path.expanduser(str(each)) for each in arguments)
    variables = {key: _texts(known.get(key) or {}, f"{where}.{key}") for key in ("env", "headers")}

    def open_server() -> Source:
        from runtime.tool_servers import Address, Command, Server

        if "url" in known:
            return Server(name, Address(target, variables["headers"]), limits)
        return Server(name, Command(os.path.expanduser(target), texts, variables["env"]), limits)

    return Entry(name, open_server)


def _rules(policy: Mapping[str, Any]) -> Iterator[Rule]:
    for pattern, wanted in policy.items():
        if wanted not in get_args(Policy):
            _wrong(f"policy.{pattern}", wanted, "ask, allow or deny")
        yield Rule(pattern, wanted)


def _limits(known: Mapping[str, Any], prefix: str, default: Limits) -> Limits:
    seconds, characters = (
        known.get(name, getattr(default, own)) for name, own in zip(_LIMITS, ("seconds", "characters"), strict=True)
    )
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds <= 86400:
        _wrong(f"{prefix}timeout", seconds, "a number of seconds")
    if isinstance(characters, bool) or not isinstance(characters, int) or characters < 1:
        _wrong(f"{prefix}output_limit", characters, "a number of characters")
    return Limits(float(seconds), characters)


def _texts(value: Any, where: str) -> Mapping[str, str]:
    """Names → texts, with the user's environment variables in them."""
    return {name: _expanded(str(each), f"{where}.{name}") for name, each in _mapping(value, where).items()}


def _expanded(text: str, where: str) -> str:
    def variable(found: re.Match[str]) -> str:
        if found[1] not in os.environ:
            raise ToolError(f"{where}: there is no environment variable {found[1]}; set it")
        return os.environ[found[1]]

    return _VARIABLE.sub(variable, text)


def _mapping(value: Any, where: str, keys: tuple[str, ...] | None = None) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        _wrong(where, value, "names with values")
    if keys is not None and (unknown := [key for key in value if key not in keys]):
        raise ToolError(f"{where}: {unknown[0]!r} is not known here; known: {', '.join(keys)}")
    return value


def _wrong(where: str, value: Any, wanted: str) -> NoReturn:
    raise ToolError(f"{where}: {value!r:.80} is found where {wanted} is wanted")
