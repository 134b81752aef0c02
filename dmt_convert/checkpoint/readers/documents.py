"""The small documents in which trainers describe a model beside its weights.

JSON, and protobuf's text format read without a schema: a message becomes a dict from field name to
the list of its values, since any field may be repeated. `google.protobuf.text_format` needs a
descriptor, drops fields that it lacks (here they tell what a model has that we cannot convert), and
takes quadratic time on lists in such fields.
Source: the text format specification of Protocol Buffers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from dmt_convert.errors import CheckpointError

_MAX_BYTES: Final = 16 << 20


def read_document(path: Path) -> Any:
    """Read a description: JSON, or protobuf's text format if the name ends in `.config`.

    Returns:
        Dicts, lists and scalars.

    Raises:
        CheckpointError: It is damaged, or too large for what it should be.
    """
    size = path.stat().st_size
    if size > _MAX_BYTES:
        raise CheckpointError(
            f"{path} has {size} bytes",
            expected=f"a description of a model, at most {_MAX_BYTES} bytes",
            hint="check that it is the trainer's own file",
        )
    protobuf = path.suffix == ".config"
    try:
        text = path.read_text(encoding="utf-8")
        if protobuf:
            return parse_protobuf_text(text)
        value = json.loads(text, parse_constant=_refuse_constant)
        # a lone surrogate cannot be written to a file or a terminal
        json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{path} cannot be read ({reason[:200]})",
            expected="protobuf's text format" if protobuf else "JSON",
            hint="the file is damaged; copy it again",
        ) from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"JSON has no number {name}")


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
_MAX_HEX: Final = 20
_CLOSING: Final = {"{": "}", "<": ">"}
_ESCAPE: Final = re.compile(
    rb"\\(?:([0-7]{1,3})|[xX]([0-9a-fA-F]{1,2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))", re.DOTALL
)
_ESCAPES: Final = {
    b"n": b"\n",
    b"t": b"\t",
    b"r": b"\r",
    b"a": b"\a",
    b"b": b"\b",
    b"f": b"\f",
    b"v": b"\v",
}

_Token = tuple[str, str]


def parse_protobuf_text(text: str) -> Message:
    """Parse a message.

    Args:
        text: The whole document.

    Returns:
        Field name -> values in order: messages, strings, numbers, booleans (a bare name, such as
        an enum's, is a string).

    Raises:
        ValueError: It is not in the text format, or nests too deeply.
    """
    return _Parser(_tokens(text)).message("", 0)


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
                raise ValueError(f"{name or 'the end'!r} instead of a field")
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
            raise ValueError(f"{self._next[1] or 'the end'!r} instead of a value")
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
            return b"".join(map(_unquote, parts)).decode()
        if kind == "number":
            return _number(text)
        if kind == "name":
            return {"true": True, "false": False}.get(text.lower(), text)
        raise ValueError(f"{text or 'the end'!r} instead of a value")


def _unquote(text: str) -> bytes:
    """Return the bytes of a string in quotes.

    Bytes are escaped one by one, as protobuf writes names that are not ASCII, so that they become
    text only together.
    """
    return _ESCAPE.sub(_unescape, text[1:-1].encode())


def _unescape(match: re.Match[bytes]) -> bytes:
    octal, byte, short, long, other = match.groups()
    if octal is not None or byte is not None:
        value = int(octal, 8) if octal is not None else int(byte, 16)
        if value > 0xFF:
            raise ValueError(f"the escape {match[0]!r}")
        return bytes([value])
    if short is not None or long is not None:
        return chr(int(short or long, 16)).encode()
    return _ESCAPES.get(other, other)


def _number(text: str) -> int | float:
    if text.lower().lstrip("+-").startswith("0x"):
        if len(text) > _MAX_HEX:
            raise ValueError(f"a number of {len(text)} digits")
        return int(text, 16)
    if re.fullmatch(r"[-+]?\d{1,40}", text):
        return int(text)
    return float(text.rstrip("fF"))
