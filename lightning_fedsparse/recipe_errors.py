"""One sentence out of jsonargparse's error: the key that is wrong and what was expected there.

jsonargparse reports every branch of every union as an indented tree. Its deepest leaf that says something about the
user's input is the error; the keys above that leaf are where it is.
"""

from __future__ import annotations

import ast
import inspect
import linecache
import pkgutil
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from types import TracebackType

__all__ = ["explain", "is_own_sentence", "near_matches", "raised_in"]

_KEY = re.compile(r'^Parser key "(.+)":$')
_CLASS = re.compile(r"^Problem with given class_path '(.+)':$")
_EXPECTED = re.compile(r"^Expected an? (.+?)(?:\. Got value: (.*))?$")
_UNKNOWN = re.compile(r"(?:Group '(?P<group>.+)' does not accept |)[oO]ption '(?P<key>[\w.-]+)'")
_UNRECOGNIZED = re.compile(r"^[uU]nrecognized arguments: -*([\w.-]+)")
_REQUIRED = re.compile(r"required: (.+)$|^Key \"(.+)\" is required")
_NOT_A_SUBCLASS = re.compile(
    r"(?:Import path (?P<given>\S+) does not correspond to|Not a valid) (?:a )?subclass of (\w+)"
)
_IMPORT_PATH = re.compile(r"dot import path string: (.*)$")
# what the tree says about its own branches
_STRUCTURE = re.compile(
    r"^(Does not validate against any|Subtypes:|Errors:|Given value type:|Given value:|Subclass types expect|"
    r"a class path \(str\)|a dict (with|without) )"
)
# branches of unions that the user's input is unlikely to have meant
_ALTERNATIVE = re.compile(
    r"^(Expected an? (<class '(NoneType|list|collections.abc.Sequence)'>|path)|Not a valid subclass of)|not .* subclass of Callback"
)


@dataclass(frozen=True)
class _Leaf:
    keys: tuple[str, ...]
    class_path: str | None
    text: str
    depth: int

    @property
    def where(self) -> str:
        return ".".join(self.keys)

    @property
    def rank(self) -> tuple[bool, bool, int]:
        # an import path is tried wherever text could be one: anything else says more
        return not _ALTERNATIVE.search(self.text), not _IMPORT_PATH.search(self.text), self.depth


def explain(message: str, known_keys: Iterable[str]) -> str:
    r"""Condense a message of jsonargparse.

    Args:
        message: The text of its ``ArgumentError``.
        known_keys: The parser's own keys, dotted, to suggest from.

    Returns:
        One sentence that names the key and what was expected.

    Example:
        >>> explain("Parser key \"loop.rounds\":\n  Expected a <class 'int'>. Got value: many", [])
        "expected loop.rounds to be an int, got 'many'"
    """
    leaves = _leaves(message)
    leaf = max(leaves, key=lambda leaf: leaf.rank)
    if match := _UNRECOGNIZED.match(leaf.text):
        return _unknown_key(match[1], known_keys)
    if match := _UNKNOWN.search(leaf.text):
        if leaf.class_path is None and not leaf.keys:
            return _unknown_key(".".join(filter(None, (match["group"], match["key"]))), known_keys)
        return _unknown_argument(leaf, match["key"])
    if match := _REQUIRED.search(leaf.text):
        return f"expected a value for {'.'.join(filter(None, (leaf.where, match[1] or match[2])))}, got none"
    if "Key must be a string" in leaf.text:
        return (
            f"expected text as the keys of {leaf.where}, got a boolean: YAML takes a bare on, off, yes or no for one, "
            "so quote it"
        )
    if match := _IMPORT_PATH.search(leaf.text):
        return f"expected {leaf.where} to be a class by its import path, such as package.module.Name, got {match[1]!r}"
    if match := _NOT_A_SUBCLASS.search(leaf.text):
        return f"expected {leaf.where} to be {_article(match[2])}, got {match['given'] or _given(None, message)}"
    if match := _EXPECTED.match(leaf.text):
        types = [other.text for other in leaves if (other.keys, other.depth) == (leaf.keys, leaf.depth)]
        return f"expected {leaf.where} to be {_types(types)}, got {_given(match[2], message)}"
    return ": ".join(filter(None, (leaf.where, leaf.text.rstrip("."))))


def near_matches(name: str, known: Iterable[str]) -> str:
    """The two closest of the known names as a question, empty if nothing is close.

    Example:
        >>> near_matches("quikstart", ["quickstart", "other"])
        'did you mean quickstart?'
    """
    close = get_close_matches(name, sorted(set(known)), n=2, cutoff=0.65)
    return f"did you mean {' or '.join(close)}?" if close else ""


def raised_in(error: BaseException, package: str) -> bool:
    """Whether an error comes from a package's own code, however deep it was called."""
    frame = _raising_frame(error)
    return frame is not None and f"{frame.tb_frame.f_globals.get('__name__')}.".startswith(f"{package}.")


def is_own_sentence(error: BaseException) -> bool:
    """Whether an error was raised by a ``raise`` of this library: then its message was written for the user.

    Any other error is a bug, of the library or of the user's code, and needs its traceback; so does what a client's training
    raised, where it has ended the run.
    """
    from lightning_fedsparse.failures import TooFewClientsError  # it imports Lightning, which takes seconds

    if isinstance(error, TooFewClientsError) and error.__cause__ is not None:
        return is_own_sentence(error.__cause__)
    frame = _raising_frame(error)
    if frame is None or not raised_in(error, "lightning_fedsparse"):
        return False
    return linecache.getline(frame.tb_frame.f_code.co_filename, frame.tb_lineno).lstrip().startswith("raise")


def _raising_frame(error: BaseException) -> TracebackType | None:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace


def _leaves(message: str) -> list[_Leaf]:
    stack: list[tuple[int, str | None, str | None]] = []
    leaves: list[_Leaf] = []
    for line in filter(str.strip, message.splitlines()):
        text = line.strip()
        indent = len(line) - len(line.lstrip())
        if text.startswith("- "):
            text, indent = text[2:], indent + 2
        while stack and stack[-1][0] >= indent:
            stack.pop()
        if _STRUCTURE.match(text):
            continue
        if match := _KEY.match(text):
            stack.append((indent, match[1], None))
        elif match := _CLASS.match(text):
            stack.append((indent, None, match[1]))
        else:
            named = re.search(r"class_path='([\w.]+)'", text)
            class_path = named[1] if named else stack[-1][2] if stack else None
            leaves.append(_Leaf(tuple(key for _, key, _ in stack if key), class_path, text, len(stack)))
    return leaves or [_Leaf((), None, "the recipe can't be read", 0)]


def _unknown_key(key: str, known: Iterable[str]) -> str:
    """The first part of a dotted key that the parser does not have."""
    known = list(known)
    parts = key.split(".")
    for depth, part in enumerate(parts):
        prefix = ".".join(parts[:depth])
        start = f"{prefix}." if prefix else ""
        siblings = {name.removeprefix(start).split(".")[0] for name in known if name.startswith(start)}
        if part not in siblings:
            key = ".".join(parts[: depth + 1])
            elsewhere = [name for name in known if name.endswith(f".{part}")]
            hint = near_matches(part, siblings) or near_matches(key, elsewhere)
            return f"unknown key {key}" + (
                f": {hint}" if hint else f": {prefix or 'a recipe'} has {', '.join(sorted(siblings))}"
            )
    return f"unknown key {key}"


def _unknown_argument(leaf: _Leaf, name: str) -> str:
    parameters = _parameters(leaf.class_path)
    text = f"unknown key {leaf.where}.{name}"
    if hint := near_matches(name, parameters):
        return f"{text}: {hint}"
    if parameters and leaf.class_path is not None:
        return f"{text}: {leaf.class_path.rpartition('.')[2]} has {', '.join(parameters)}"
    return text


def _parameters(class_path: str | None) -> list[str]:
    module, _, name = (class_path or "").rpartition(".")
    try:
        # with a colon: feddip, say, is a function in a package that also has a module of that name
        signature = inspect.signature(pkgutil.resolve_name(f"{module}:{name}"))
    except (ValueError, TypeError, ImportError, AttributeError):
        return []
    return [name for name in signature.parameters if name not in ("self", "args", "kwargs")]


def _types(texts: Sequence[str]) -> str:
    names = []
    for match in filter(None, map(_EXPECTED.match, texts)):
        name = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", match[1]).replace("typing.", "").replace("NoneType", "null")
        names.append(re.sub(r"^Literal\[(.+)\]$", r"one of \1", name))
    joined = " or ".join(dict.fromkeys(names))
    return joined if joined.startswith(("one of", "null")) else _article(joined)


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeioAEIO' else 'a'} {noun}"


def _given(value: str | None, message: str) -> str:
    if value is None:
        found = re.search(r"Given value: (.*)", message)
        value = found[1] if found else "something else"
        nested = re.search(r"val=(.*)\)$", value)
        value = nested[1] if nested else value
    try:
        return repr(ast.literal_eval(value))
    except (ValueError, SyntaxError):
        return repr(value)
