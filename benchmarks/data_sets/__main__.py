"""Prepare a data set: `python -m benchmarks.data_sets NAME`, in the root of the repository."""

import argparse
import os
import sys
from pathlib import Path

from . import DATA_SETS, RawDataError, prepare


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data_sets")
    parser.add_argument("name", choices=sorted(DATA_SETS), nargs="?")
    parser.add_argument("--raw", type=Path, help="folder of the raw files")
    parser.add_argument("--out", type=Path, help="folder to write")
    parser.add_argument("--list", action="store_true", help="say where the raw files come from")
    options = parser.parse_args(arguments)
    if options.list or options.name is None:
        for each in DATA_SETS.values():
            print(each.describe(), end="\n\n")
        return 0
    raw = options.raw
    if raw is None:
        if "DMT_DATA_SETS" not in os.environ:
            parser.error("pass --raw, or set DMT_DATA_SETS to the folder that holds NAME/")
        raw = Path(os.environ["DMT_DATA_SETS"]) / options.name
    if options.out is None:
        parser.error("pass --out")
    try:
        schema = prepare(DATA_SETS[options.name], raw, options.out)
    except RawDataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    print(f"wrote {options.out}: {schema['rows']}, positives {schema['positives']}")
    return 0


sys.exit(main(sys.argv[1:]))
