"""Chat templates are programs of others: one that would loop for ever, or fill the memory, ends with an error.

transformers compiles them in Jinja's sandbox, which bounds `range` alone. Here each pass of a loop, each call, and
each piece of text or list that is built takes a step, and a rendering has so many of them.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from typing import Any

MAX_STEPS = 10_000_000
"""Of one rendering: 2,000 messages whose template looks at all others for each take 4 million."""
ITEMS_A_STEP = 64
"""Characters or elements that are built in a step."""
MAX_POWER_BITS = 4096


class TooManySteps(Exception):
    """A template took more steps than one rendering may."""

    def __init__(self) -> None:
        super().__init__(f"it takes more than {MAX_STEPS:,} steps: a loop without an end?")


class _Steps(threading.local):
    left: float | None = None  # None: nobody counts


_steps = _Steps()


@contextlib.contextmanager
def limited_steps() -> Iterator[None]:
    """Inside the block, templates that this thread renders have MAX_STEPS together."""
    _bound_templates()
    _steps.left = MAX_STEPS
    try:
        yield
    finally:
        _steps.left = None


def _take(steps: float) -> None:
    if _steps.left is not None:
        _steps.left -= steps
        if _steps.left < 0:
            raise TooManySteps


def _bound_templates() -> None:
    """Have transformers compile templates with counted loops from now on."""
    from transformers.utils import chat_template_utils

    compile_template = chat_template_utils._cached_compile_jinja_template
    if compile_template is not _compiled:
        _original.append(compile_template)
        chat_template_utils._cached_compile_jinja_template = _compiled
        chat_template_utils._compile_jinja_template.cache_clear()


_original: list[Any] = []


def _compiled(chat_template: str) -> Any:
    """A template in the environment of transformers, with counted loops, calls and sizes."""
    from jinja2 import nodes, pass_context

    environment = _original[-1]("").environment  # works nothing out yet, as compiling the template would
    # With the context they are never worked out while a template is compiled.
    environment.filters |= {"grape_counted": pass_context(_counted), "grape_sized": pass_context(_sized)}
    environment.intercepted_binops = frozenset(["+", "*", "**"])
    call, operate = environment.call, environment.call_binop

    def counted_call(context: Any, function: Any, *arguments: Any, **named: Any) -> Any:
        _take(1)
        return call(context, function, *arguments, **named)

    def counted_operation(context: Any, operator: str, left: Any, right: Any) -> Any:
        _take(_size_of(operator, left, right) / ITEMS_A_STEP)
        return operate(context, operator, left, right)

    environment.call, environment.call_binop = counted_call, counted_operation
    tree = environment.parse(chat_template)
    for loop in list(tree.find_all(nodes.For)):
        loop.iter = nodes.Filter(loop.iter, "grape_counted", [], [], None, None, lineno=loop.lineno)
    _size_concats(tree)
    tree.set_environment(environment)
    return environment.template_class.from_code(
        environment, environment.compile(tree), environment.make_globals(None), None
    )


def _size_concats(node: Any) -> None:
    """Put every `a ~ b` into the filter that takes steps for its length."""
    from jinja2 import nodes

    for name, value in list(node.iter_fields()):
        if isinstance(value, nodes.Node):
            _size_concats(value)
            setattr(node, name, _sized_node(value))
        elif isinstance(value, list):
            for child in value:
                if isinstance(child, nodes.Node):
                    _size_concats(child)
            setattr(node, name, [_sized_node(child) for child in value])


def _sized_node(node: Any) -> Any:
    from jinja2 import nodes

    if isinstance(node, nodes.Concat):
        return nodes.Filter(node, "grape_sized", [], [], None, None, lineno=node.lineno)
    return node


def _size_of(operator: str, left: Any, right: Any) -> float:
    """Items that an operation builds, about."""
    if operator == "+" and isinstance(left, str) and isinstance(right, str):
        return len(left) + len(right)
    sizes = [len(side) for side in (left, right) if isinstance(side, str | list | tuple)]
    numbers = [side for side in (left, right) if isinstance(side, int)]
    if operator == "*" and sizes and numbers:
        return max(0, sizes[0] * numbers[0])
    if operator == "**" and len(numbers) == 2 and left.bit_length() * abs(right) > MAX_POWER_BITS:
        raise TooManySteps
    return sum(sizes)


def _counted(_context: Any, items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        _take(1)
        yield item


def _sized(_context: Any, text: str) -> str:
    _take(len(text) / ITEMS_A_STEP)
    return text
