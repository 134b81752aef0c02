"""Reading parsed JSON while collecting every problem in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import TypeVar

T = TypeVar("T")


class JsonReader:
    """Takes typed values out of parsed JSON and notes what is wrong, instead of stopping.

    A value that is missing or of another type reads as a stand-in (0, "" or nothing), so that
    reading can go on; whoever reads must look at `problems` before using any of it.
    """

    def __init__(self) -> None:
        self.problems: list[str] = []
        """One line per problem, each naming the place, such as `tables[3].shards[0].rank`."""

    def fields(self, value: object, where: str, names: Collection[str]) -> Mapping[str, object]:
        """Read an object that has exactly these keys."""
        if not isinstance(value, Mapping):
            self.problems.append(f"{where} is {_show(value)}, not an object")
            return {}
        missing = [name for name in names if name not in value]
        unknown = [str(name) for name in value if name not in names]
        self.problems += [f"{where} lacks {name!r}" for name in missing]
        self.problems += [f"{where} has an unknown key {name!r}" for name in unknown]
        return value

    def integer(self, parent: Mapping[str, object], name: str, where: str) -> int:
        """Read an integer that is not negative."""
        value = parent.get(name, 0)
        if type(value) is not int or value < 0:
            self._wrong(where, name, value, "a whole number of at least 0")
            return 0
        return value

    def number(self, parent: Mapping[str, object], name: str, where: str) -> float:
        """Read a finite number that is not negative; integers stay integers."""
        value = parent.get(name, 0)
        if type(value) not in (int, float) or not math.isfinite(value) or value < 0:  # type: ignore[arg-type,operator]
            self._wrong(where, name, value, "a finite number of at least 0")
            return 0
        return value  # type: ignore[return-value]

    def text(
        self, parent: Mapping[str, object], name: str, where: str, choices: Collection[str] = ()
    ) -> str:
        """Read a string, one of `choices` where any are given."""
        value = parent.get(name, "")
        if not isinstance(value, str) or (choices and name in parent and value not in choices):
            self._wrong(where, name, value, " or ".join(choices) if choices else "a string")
            return ""
        return value

    def items(
        self,
        parent: Mapping[str, object],
        name: str,
        where: str,
        read: Callable[[object, str], T],
    ) -> tuple[T, ...]:
        """Read a list, every item by `read(item, its place)`."""
        value = parent.get(name, [])
        if not isinstance(value, list | tuple):
            self._wrong(where, name, value, "a list")
            return ()
        return tuple(read(item, f"{where}{name}[{i}]") for i, item in enumerate(value))

    def integers(self, parent: Mapping[str, object], name: str, where: str) -> tuple[int, ...]:
        """Read a list of integers that are not negative."""
        return self.items(
            parent, name, where, lambda item, place: self.integer({place: item}, place, "")
        )

    def numbers(self, parent: Mapping[str, object], name: str, where: str) -> tuple[float, ...]:
        """Read a list of finite numbers that are not negative."""
        return self.items(
            parent, name, where, lambda item, place: self.number({place: item}, place, "")
        )

    def _wrong(self, where: str, name: str, value: object, expected: str) -> None:
        self.problems.append(f"{where}{name} is {_show(value)}, not {expected}")


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
