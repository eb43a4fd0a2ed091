"""Renders a chat template, for one conversation or several: a program of its own, which `chat` runs as `python -I` with
hard limits on its time and memory. A request comes as JSON on standard input, the answers go as JSON to standard
output.

It imports nothing of ours, so that it starts in about a tenth of a second and holds nothing worth reaching for.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import datetime
from functools import partial
from typing import Any


def main() -> None:
    request = json.loads(sys.stdin.buffer.read())
    sys.path += sys.argv[1:]  # isolated mode leaves out where the caller may have found jinja2
    sys.stdout.write(json.dumps(answers(request)))


def answers(request: dict[str, Any]) -> list[dict[str, str]]:
    """The text of a template, or what went wrong, for `each` set of variables."""
    template, wrong = _tried(partial(_compiled, request))
    if wrong is not None:
        return [{"error": wrong} for _ in request["each"]]
    out = []
    for own in request["each"]:
        text, wrong = _tried(partial(_written, template, {**request["variables"], **own}, request["length"]))
        out.append({"text": text} if wrong is None else {"error": wrong})
    return out


def _tried(task: Callable[[], Any]) -> tuple[Any, str | None]:
    """What comes out, or what is said of the error: a template can make Python raise anything."""
    try:
        return task(), None
    except MemoryError:
        return None, "it takes too much memory"
    except RecursionError:
        return None, "it nests or calls itself too deeply"
    except Exception as error:
        return None, _said(error)


def _compiled(request: dict[str, Any]) -> Any:
    environment = _environment()
    _limit(request["seconds"], request["memory"])  # before it is compiled, where jinja2 computes constants already
    return environment.from_string(request["source"])


def _written(template: Any, variables: dict[str, Any], length: int) -> str:
    pieces, size = [], 0
    for piece in template.generate(**variables):
        size += len(piece)
        if size > length:
            raise ValueError(f"it writes more than {length:,} characters")
        pieces.append(piece)
    return "".join(pieces)


def _limit(seconds: int, memory: int) -> None:
    """Hold this process to seconds of processor time and bytes of memory, and let it write no files. Where there are
    no such limits (Windows, memory on macOS), the caller's clock remains."""
    try:
        import resource
    except ImportError:
        return
    for kind, most in ((resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, 0)):
        try:
            resource.setrlimit(kind, (most, most))
        except (ValueError, OSError):  # a system that does not offer it, or has set less already
            continue


def _environment() -> Any:
    """What published templates are written for: jinja2's immutable sandbox, and transformers' few additions."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """{% generation %} marks what the assistant says, for training; here it only stands for what is in it."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("inside"), [], [], body).set_lineno(line)

        def inside(self, caller: Callable[[], str]) -> str:
            return caller()

    class Attributes(Namespace):
        """A namespace without names that mean something to Python."""

        def __init__(*args: Any, **named: Any):
            for name in dict(*args[1:], **named):
                _plain_name(name)
            Namespace.__init__(*args, **named)

        def __setitem__(self, name: str, value: Any) -> None:
            _plain_name(name)
            Namespace.__setitem__(self, name, value)

    def _plain_name(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace takes no names that begin with _, as {name!r} does")

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def to_json(
        x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = to_json  # jinja2's own escapes HTML
    made.globals |= {
        "raise_exception": raise_exception, "strftime_now": lambda form: datetime.now().strftime(form),
        "namespace": Attributes, "dict": lambda *args, **named: dict(*args, **named),
    }  # fmt: skip
    return made


def _said(error: Exception) -> str:
    """What an error says, its kind before it where jinja2 or Python raised it, at most 500 characters."""
    from jinja2.exceptions import TemplateError, TemplateSyntaxError

    text = str(error)[:500]
    if isinstance(error, TemplateSyntaxError):
        return f"its line {error.lineno} is no jinja2: {text}"
    return text if type(error) in (TemplateError, ValueError) else f"{type(error).__name__}: {text}"


if __name__ == "__main__":
    main()
