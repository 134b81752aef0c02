"""Write docs/settings.md: every setting of every command, from `dmt_convert.config`.

Run as `python scripts/settings_page.py`; with `--check` it only says whether the page is current.
"""

from __future__ import annotations

import sys
from pathlib import Path

from dmt_convert.config import COMMANDS, Config, describe_settings, option_name

PAGE = Path(__file__).resolve().parents[1] / "docs" / "settings.md"
HEADING = """\
# Settings

<!-- Written by scripts/settings_page.py from dmt_convert/config. Do not edit. -->

Each command takes its settings in three ways, with the same names, checks and defaults:

- as options: `dmt convert ckpt.pt --towers 16 --tower-module linear`
- from a YAML file: `dmt convert ckpt.pt --config recipe.yaml`, where options override the file
- in Python: `dmt.convert("ckpt.pt", towers=16, tower_module="linear")`

```yaml
# recipe.yaml
towers: 16
compression: 4
group: {user: [user_id, age], item: [item_id, brand]}
```

A bundle records the settings that made it, so
`dmt convert ckpt.pt --config bundle/dmt.json --out again` repeats a conversion.

Every command also takes `--json` (one JSON document on stdout) and `--quiet`.
"""


def main() -> None:
    """Write the page, or compare it with what it should be."""
    text = HEADING + "".join(section(kind) for kind in COMMANDS)
    if "--check" not in sys.argv:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
        sys.exit("docs/settings.md is not current: run python scripts/settings_page.py")


def section(kind: type[Config]) -> str:
    """Return the settings of one command as a Markdown table."""
    rows = [
        f"| `{option_name(key)}` | {cell(values)} | {cell(default)} | {cell(text)} |"
        for key, values, default, text in describe_settings(kind)
    ]
    table = "\n".join(["| option | values | default | what it does |", "|---|---|---|---|", *rows])
    return f"\n## dmt {kind.command}\n\n{table}\n"


def cell(text: str) -> str:
    """Escape what would end a cell of a Markdown table."""
    return text.replace("|", "\\|")


if __name__ == "__main__":
    main()
