"""Run the benchmark: `python -m benchmarks.cluster`, in the root of the repository."""

import sys

from .bench import main

main(sys.argv[1:])
