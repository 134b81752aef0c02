"""Protobuf's text format, read without a schema.

A message becomes a dict from field name to the list of its values, as any field may be repeated.
Source: the text format specification of Protocol Buffers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

Message = dict[str, list[Any]]

_TOKEN: Final = re.compile(
    r"""(?P<space>(?:\s+|\#[^\n]*)+)
    |(?P<string>"[^"\\\n]*(?:\\.[^"\\\n]*)*"|'[^'\\\n]*(?:\\.[^'\\\n]*)*')
    |(?P<number>[-+]?(?:0[xX][0-9a-fA-F]+|(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?)[fF]?(?![\w.]))
    |(?P<name>-?[A-Za-z_][\w.]*|\[[\w./-]+\](?=\s*[:{<]))
    |(?P<mark>[{}<>:\[\],;])""",
    re.VERBOSE,
)
_MAX_DEPTH: Final = 64
_CLOSING: Final = {"{": "}", "<": ">"}
_ESCAPES: Final = {"n": "\n", "t": "\t", "r": "\r", "0": "\0"}

_Token = tuple[str, str]


def parse_protobuf_text(text: str) -> Message:
    """Parse a message.

    Args:
        text: The whole document.

    Returns:
        Field name -> values in order: messages, strings, numbers, booleans (a bare name, such as
        an enum's, is a string).

    Raises:
        ValueError: It is not the text format, or nests too deep.
    """
    parser = _Parser(_tokens(text))
    message = parser.message("", 0)
    return message


def _tokens(text: str) -> Iterator[_Token]:
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            line = text.count("\n", 0, position) + 1
            raise ValueError(f"line {line}: {text[position : position + 20]!r}")
        position = match.end()
        kind = match.lastgroup or ""
        if kind != "space":
            yield kind, match.group()
    yield "end", ""


class _Parser:
    def __init__(self, tokens: Iterator[_Token]) -> None:
        self._tokens = tokens
        self._next = next(tokens)

    def message(self, closing: str, depth: int) -> Message:
        """Parse fields up to the closing mark, or to the end."""
        if depth > _MAX_DEPTH:
            raise ValueError(f"messages nested more than {_MAX_DEPTH} deep")
        fields: Message = {}
        while self._next != (("mark", closing) if closing else ("end", "")):
            if self._next in (("mark", ","), ("mark", ";")):
                self._take()
                continue
            kind, name = self._take()
            if kind not in ("name", "number"):
                raise ValueError(f"{name or 'the end'!r} where a field is expected")
            fields.setdefault(name, []).extend(self._values(depth))
        return fields

    def _take(self) -> _Token:
        token = self._next
        if token[0] != "end":
            self._next = next(self._tokens)
        return token

    def _values(self, depth: int) -> list[Any]:
        colon = self._next == ("mark", ":")
        if colon:
            self._take()
        if colon and self._next == ("mark", "["):
            self._take()
            values = []
            while self._next != ("mark", "]"):
                if self._next == ("mark", ","):
                    self._take()
                    continue
                values.append(self._value(depth))
            self._take()
            return values
        if not colon and self._next[1] not in _CLOSING:
            raise ValueError(f"{self._next[1] or 'the end'!r} where a value is expected")
        return [self._value(depth)]

    def _value(self, depth: int) -> Any:
        kind, text = self._take()
        if text in _CLOSING and kind == "mark":
            message = self.message(_CLOSING[text], depth + 1)
            self._take()
            return message
        if kind == "string":
            parts = [text]
            while self._next[0] == "string":
                parts.append(self._take()[1])
            return "".join(_unquote(part) for part in parts)
        if kind == "number":
            return _number(text)
        if kind == "name":
            return {"true": True, "false": False}.get(text.lower(), text)
        raise ValueError(f"{text or 'the end'!r} where a value is expected")


def _unquote(text: str) -> str:
    return re.sub(r"\\(.)", lambda match: _ESCAPES.get(match[1], match[1]), text[1:-1])


def _number(text: str) -> int | float:
    if text.lower().lstrip("+-").startswith("0x"):
        return int(text, 16)
    if re.fullmatch(r"[-+]?\d{1,40}", text):
        return int(text)
    return float(text.rstrip("fF"))
