"""Which releases of torch, torchrec and fbgemm-gpu go together.

They share a binary interface: each fbgemm-gpu fits one minor version of torch. This table is the
only list of them. `scripts/setup` runs this file before anything is installed, so it imports the
standard library alone; tests compare the extras in `pyproject.toml` and the README with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """Three releases that go together."""

    name: str
    """What scripts and extras call it."""
    torch: str
    """The release of torch that the tests ran with; its patch releases fit, too."""
    torchrec: str
    fbgemm: str

    @property
    def torch_series(self) -> str:
        """The minor version of torch, as in 2.13."""
        return self.torch.rpartition(".")[0]

    @property
    def suffix(self) -> str:
        """What follows `cpu` and `cuda` in the names of its extras."""
        return "" if self is DEFAULT else f"-{self.name}"

    def __str__(self) -> str:
        return f"torch {self.torch_series} with torchrec {self.torchrec} and fbgemm {self.fbgemm}"


STACKS: Final = (
    Stack(name="torch213", torch="2.13.0", torchrec="1.8.0", fbgemm="1.8.0"),
    Stack(name="torch214", torch="2.14.1", torchrec="1.9.2", fbgemm="1.9.0"),
)
"""Those that the whole suite ran on."""
DEFAULT: Final = STACKS[0]
"""What `scripts/setup` and the extras `cpu` and `cuda` install."""
