"""Typed Python functions as tools: the schema from the signature, the description from the docstring.

Pydantic, which mistral-common brings, makes the JSON schema of the parameters' annotations and checks what the model
gives. A parameter is described by a text in `Annotated`. The functions are the user's own code and run in this process.
"""

import asyncio
import importlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, PydanticUserError, ValidationError, create_model
from pydantic_core import to_json

from runtime.conversation import NAME
from runtime.messages import Tool
from runtime.tools import Limits, ToolError


@dataclass(frozen=True, slots=True)
class _Function:
    tool: Tool
    parameters: type[BaseModel]
    run: Callable[..., Any]


class Functions:
    """The functions of one module. A `Source` of tools.

    `name` is a file (`~/tools/notes.py`) or a module (`package.module`); with `:function` behind it one function, else
    all that are defined there and whose names do not begin with `_`. Raises ToolError where it cannot be used.
    """

    def __init__(self, name: str, limits: Limits = Limits()) -> None:  # noqa: B008 - it is frozen
        self.limits = limits
        place, colon, wanted = name.rpartition(":")
        module = _module(place if colon else name)
        found = {wanted: getattr(module, wanted, None)} if colon else _public(module)
        if not found or not all(callable(function) for function in found.values()):
            raise ToolError(f"{name}: no such function" if colon else f"{name}: defines no function")
        self._functions = {key: _as_tool(name, key, function) for key, function in found.items()}

    def tools(self) -> Sequence[Tool]:
        return [function.tool for function in self._functions.values()]

    def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        """Its answer: text as it is, None as `done`, other values as JSON. A function cannot be ended."""
        function = self._functions[name]
        try:
            checked = function.parameters.model_validate_json(json.dumps(arguments))
        except ValidationError as error:
            faults = (f"{'.'.join(map(str, each['loc'])) or 'arguments'}: {each['msg']}" for each in error.errors())
            raise ToolError(f"the arguments do not fit: {'; '.join(faults)}") from None
        given = {key: getattr(checked, key) for key in checked.model_fields_set}
        answer = function.run(**given)
        if inspect.iscoroutine(answer):
            answer = asyncio.run(answer)
        if isinstance(answer, str):
            return answer
        if answer is None:
            return "done"
        try:
            return to_json(answer, fallback=str).decode("utf-8")
        except ValueError:  # a lone surrogate, a circle
            return str(answer)

    def close(self) -> None:
        pass


def _module(place: str) -> ModuleType:
    path = Path(place).expanduser()
    try:
        if path.suffix != ".py":
            return importlib.import_module(place)
        if not path.is_file():
            raise ToolError(f"{place}: no such file")
        spec = importlib.util.spec_from_file_location(f"bise_tools_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # where annotations and dataclasses look for it
        spec.loader.exec_module(module)
    except ToolError:
        raise
    except (Exception, SystemExit) as error:
        raise ToolError(f"{place}: cannot be loaded: {type(error).__name__}: {' '.join(str(error).split())}") from None
    return module


def _public(module: ModuleType) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
    }


def _as_tool(place: str, name: str, function: Any) -> _Function:
    if not NAME.fullmatch(name):
        raise ToolError(
            f"{place}: a tool cannot be called {name!r}; letters, digits, _ and - are for names, at most 64"
        )
    try:
        model = create_model(name, __config__=ConfigDict(extra="forbid"), **_fields(function))
        schema = model.model_json_schema()
    except (PydanticUserError, NameError, TypeError, ValueError) as error:
        raise ToolError(f"{place}: the parameters of {name}: {' '.join(str(error).split())}") from None
    schema.pop("title", None)
    for each in schema.get("properties", {}).values():
        each.pop("title", None)  # says no more than the name
    return _Function(Tool(name, inspect.getdoc(function) or "", json.dumps(schema)), model, function)


def _fields(function: Any) -> dict[str, Any]:
    hints = get_type_hints(function, include_extras=True)
    fields: dict[str, Any] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise TypeError(f"{parameter} cannot be given by name")
        if name not in hints:
            raise TypeError(f"{name} has no type")
        texts = (
            [each for each in get_args(hints[name])[1:] if isinstance(each, str)] if _is_annotated(hints[name]) else []
        )
        default = ... if parameter.default is parameter.empty else parameter.default
        fields[name] = (hints[name], Field(default, description=" ".join(texts) or None))
    return fields


def _is_annotated(hint: Any) -> bool:
    return get_origin(hint) is Annotated
