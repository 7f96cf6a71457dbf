"""Renders a chat template in a process of its own, because a template comes with a model and is not to be trusted.

As a script this file reads {"template", "variables", "conversations"} as JSON and writes {"texts"} or {"error"}.
Inside, jinja2's immutable sandbox keeps a template from Python's objects; the process bounds its time and its memory,
which no sandbox does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

SECONDS, MEMORY, CHARACTERS = 5, 1 << 29, 1 << 24
"""Most processor seconds, bytes of address space, and characters of text that a template may take."""
TOGETHER = 200
"""Conversations that one process renders."""
_CLOCK = 12
"""Times SECONDS by the clock: a busy machine gives a process a small share."""
_ENVIRONMENT = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "SYSTEMROOT", "TZ")


def render(template: str, variables: dict[str, Any]) -> str:
    """The text that a template makes of plain JSON values, as transformers' `apply_chat_template` does.

    Raises InputError with one line where the template does not parse, raises an exception, or takes too much.
    """
    return render_all(template, variables, [variables.get("messages", [])])[0]


def render_all(template: str, variables: dict[str, Any], conversations: Sequence[Any]) -> list[str]:
    """As `render` for conversations one after another, TOGETHER of them in a process."""
    parts = [conversations[at : at + TOGETHER] for at in range(0, len(conversations), TOGETHER)]
    return [text for part in parts for text in _rendered(template, variables, part)]


def _rendered(template: str, variables: dict[str, Any], conversations: Sequence[Any]) -> list[str]:
    answer: dict[str, Any]
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    request = json.dumps({"template": template, "variables": variables, "conversations": list(conversations)}).encode()
    try:
        done = subprocess.run(
            [sys.executable, "-P", __file__],
            input=request,
            capture_output=True,
            timeout=_CLOCK * SECONDS,
            env=environment,
        )
        answer = (
            json.loads(done.stdout)
            if done.returncode == 0
            else {"error": f"it did not end within {SECONDS} seconds or {MEMORY >> 20} MiB"}
        )
    except subprocess.TimeoutExpired:
        answer = {"error": f"it did not end within {_CLOCK * SECONDS} seconds"}
    except (OSError, ValueError) as error:
        answer = {"error": f"its process failed ({error})"}
    if "texts" not in answer:
        said = " ".join(str(answer.get("error")).split()).removesuffix(".")
        from .errors import InputError  # the script has no package

        raise InputError(
            f"The chat template must render the conversation, got: {said:.300}. Pass the prompt as it is instead "
            "(--raw)."
        )
    return answer["texts"]


def _generation() -> Any:
    """The extension of {% generation %}, which marks what the assistant said; only training reads the marks."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

        def _body(self, caller: Any) -> str:
            return caller()

    return Generation


class _Dict:
    """`dict` without the type's attributes."""

    def __call__(self, *args: Any, **fields: Any) -> dict:
        return dict(*args, **fields)

    def fromkeys(self, *args: Any) -> dict:
        return dict.fromkeys(*args)


def _namespace() -> Any:
    """`namespace` without attributes that Python itself reads."""
    from jinja2.exceptions import SecurityError
    from jinja2.utils import Namespace

    class SafeNamespace(Namespace):
        def __init__(*args: Any, **fields: Any) -> None:  # as jinja2's, so that a field may be called self
            for name in dict(*args[1:], **fields):
                SafeNamespace.check(name)
            Namespace.__init__(*args, **fields)

        def __setitem__(self, name: str, value: Any) -> None:
            SafeNamespace.check(name)
            Namespace.__setitem__(self, name, value)

        @staticmethod
        def check(name: Any) -> None:
            if isinstance(name, str) and name.startswith("_"):
                raise SecurityError(f"a namespace must have no field that starts with an underscore, got {name!r}")

    return SafeNamespace


def _environment() -> Any:
    """jinja2's immutable sandbox with what transformers gives a template."""
    from datetime import datetime

    from jinja2.exceptions import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: Any) -> None:
        raise TemplateError(str(message))

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_generation(), loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": strftime_now,
        "dict": _Dict(),
        "namespace": _namespace(),
    }
    return environment


def _limit() -> None:
    """Bound this process, where the system can: time, memory, and no writing of files."""
    try:
        import resource
    except ImportError:  # no such thing on Windows: the time limit of `render` holds there
        return
    for name, most in (("RLIMIT_CPU", SECONDS), ("RLIMIT_AS", MEMORY), ("RLIMIT_FSIZE", 0)):
        try:
            resource.setrlimit(getattr(resource, name), (most, most))
        except (OSError, ValueError):  # a system without this limit, or a lower one
            continue


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    try:
        environment = _environment()
        _limit()
        compiled = environment.from_string(request["template"])
        texts = [
            compiled.render(**{**request["variables"], "messages": messages}) for messages in request["conversations"]
        ]
    except MemoryError:
        return {"error": f"it takes more than {MEMORY >> 20} MiB"}
    except Exception as error:  # a template can raise every kind
        return {"error": str(error) or type(error).__name__}
    length = sum(map(len, texts))
    return (
        {"texts": texts}
        if length <= CHARACTERS
        else {"error": f"its text has {length} characters, more than {CHARACTERS}"}
    )


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_answer(json.load(sys.stdin))))
