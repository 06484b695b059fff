"""How is a stranger's chat template run safely? Jinja's immutable sandbox, with budgets for steps and text, so that it
ends.

Jinja's sandbox keeps a template from Python's internals, but not from nested loops, doubling strings or a padding of
10^10 spaces. Here every loop step and call, and every character joined or written, is charged to a budget of the
rendering.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.visitor import NodeTransformer

MAX_STEPS = 2_000_000  # loop steps, and calls at CALL_STEPS each, of one rendering: seconds
CALL_STEPS = 5
MAX_LENGTH = 1 << 26  # of one value that a template makes: dozens of times a full context
MAX_TOTAL = (
    1 << 31
)  # of all of them in one rendering; a template that builds its text bit by bit needs many times its length
MAX_WIDTH = 999_999  # to which a template may pad
MAX_BITS = 4096  # of a whole number that a template computes

_BUDGET = "_deltaic_budget"
_SEQUENCES = (str, bytes, list, tuple)
_PADDING = {"center", "ljust", "rjust", "zfill", "expandtabs", "indent", "slice", "batch"}
_FORMATTING = {"format", "format_map"}
_WIDE = re.compile(r"\d{7}")


class Budget:
    """What one rendering may still use up."""

    def __init__(self) -> None:
        self.steps = MAX_STEPS
        self.characters = MAX_TOTAL

    def step(self, steps: int = 1) -> None:
        """Take steps. Raises SecurityError if there are none left."""
        self.steps -= steps
        if self.steps < 0:
            raise SecurityError(f"the template took more than {MAX_STEPS} steps")

    def text(self, value: Any) -> Any:
        """`value`, whose characters or items are taken. Raises SecurityError if there are none left."""
        if isinstance(value, (*_SEQUENCES, range)):
            self.characters -= len(value)
            if len(value) > MAX_LENGTH or self.characters < 0:
                raise SecurityError(
                    f"the template made more than {MAX_LENGTH} characters at once or {MAX_TOTAL} in all"
                )
        return value


class _Counted:
    """An iterable whose every step is charged. Keeps the length, which `loop.last` and `loop.length` need."""

    def __init__(self, items: Iterable[Any], budget: Budget) -> None:
        self._items = items
        self._budget = budget

    def __iter__(self) -> Iterator[Any]:
        for item in self._items:
            self._budget.step()
            yield item

    def __len__(self) -> int:
        return len(self._items)  # type: ignore[arg-type]  # TypeError for an iterator, as loop.length expects


def _budget(context: Context) -> Budget:
    budget = context.parent.get(_BUDGET)  # not resolve(): a template's own variables must not shadow it
    if not isinstance(budget, Budget):
        raise SecurityError("the template was rendered without a budget")
    return budget


@jinja2.pass_context
def _counted(context: Context, items: Any) -> Any:
    return _Counted(items, _budget(context)) if hasattr(items, "__iter__") else items


@jinja2.pass_context
def _charged(context: Context, value: Any) -> Any:
    return _budget(context).text(value)


def _check_width(function: str, arguments: Iterable[Any]) -> None:
    """Refuse a padding to a huge width, or a format that could ask for one. function: a str method's or a filter's
    name."""
    for argument in arguments:
        if function in _PADDING and isinstance(argument, (int, float)) and abs(argument) > MAX_WIDTH:
            raise SecurityError(f"the template called {function} with {argument:g}; at most {MAX_WIDTH} is allowed")
        if function in _FORMATTING and isinstance(argument, str) and _WIDE.search(argument):
            raise SecurityError(
                f"the template formats with a number of seven or more digits; at most {MAX_WIDTH} is allowed"
            )


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter `function` with its arguments checked. Keeps Jinja's pass_context and similar marks."""

    @functools.wraps(function)
    def guarded(*arguments: Any, **keywords: Any) -> Any:
        _check_width(name, [*arguments, *keywords.values()])
        return function(*arguments, **keywords)

    return guarded


class _GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}`, which training tools use to mark answers: only its body counts here."""

    tags = {"generation"}  # noqa: RUF012  # Jinja's interface

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class TemplateSandbox(ImmutableSandboxedEnvironment):
    """The environment in which Hugging Face chat templates are written, with budgets."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, loopcontrols],
            finalize=_charged,
            autoescape=False,
        )
        self.filters = {
            name: _guarded(name, function) if name in _PADDING | _FORMATTING else function
            for name, function in self.filters.items()
        }
        self.filters.update(tojson=_tojson, _counted=_counted, _charged=_charged)
        self.globals.update(raise_exception=_raise_exception, strftime_now=lambda form: datetime.now().strftime(form))

    def load_text(self, source: str) -> jinja2.Template:
        """Compile `source` with its loops and joins charged. Raises jinja2.TemplateSyntaxError."""
        tree = self.parse(source)
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = _filtered(loop.iter, "_counted")
        code = self.compile(_ChargeText().visit(tree))
        return jinja2.Template.from_code(self, code, self.make_globals(None))

    def call(self, context: Context, function: Any, /, *arguments: Any, **keywords: Any) -> Any:  # type: ignore[override]
        """Every call in a template comes here."""
        budget = _budget(context)
        budget.step(CALL_STEPS)
        method = getattr(function, "__wrapped__", function)  # the sandbox wraps str.format
        if isinstance(owner := getattr(method, "__self__", None), str):
            _check_width(method.__name__, [owner, *arguments, *keywords.values()])
        return budget.text(super().call(context, function, *arguments, **keywords))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """`+ * ** %` come here; what would be huge is refused before it is made."""
        if operator == "*":
            for many, times in ((left, right), (right, left)):
                if isinstance(many, _SEQUENCES) and isinstance(times, int) and len(many) * times > MAX_LENGTH:
                    raise SecurityError(
                        f"the template repeats something {times} times; {MAX_LENGTH} characters are allowed"
                    )
        if operator == "**" and isinstance(right, int) and abs(right) > 64:
            raise SecurityError(f"the template raises to the power {right}; at most 64 is allowed")
        if operator == "%" and isinstance(left, str):
            _check_width("format", [left])
        value = super().call_binop(context, operator, left, right)
        if isinstance(value, int) and value.bit_length() > MAX_BITS:
            raise SecurityError(f"the template computed a number of more than {MAX_BITS} bits")
        return _budget(context).text(value)


class _ChargeText(NodeTransformer):
    """Charges what `~` joins and what the template's own text adds each time it is passed."""

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        return _filtered(nodes.Const(node.data, lineno=node.lineno, environment=node.environment), "_charged")

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        return _filtered(self.generic_visit(node), "_charged")


def _filtered(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno, environment=node.environment)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Plain JSON: no HTML escapes and no sorting, unlike Jinja's own filter of that name."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def render(template: jinja2.Template, variables: Mapping[str, Any]) -> str:
    """The text that `template` (from TemplateSandbox.load_text) makes of `variables`, within the budgets."""
    return template.render({**variables, _BUDGET: Budget()})
