"""How much memory a command takes at most."""

import os
import subprocess
import sys
import tempfile

_RUN = """
import os, sys
from pathlib import Path
from dmt_convert.cli.main import main
try:
    main()
finally:
    status = Path("/proc/self/status").read_text()
    Path(os.environ["DMT_TEST_PEAK"]).write_text(status.split("VmHWM:")[1].split()[0])
"""


def peak_memory(*arguments: object) -> int:
    """Run `dmt` in a process of its own, and return its largest resident set in bytes.

    The process says so itself: what the kernel counts for a child (`ru_maxrss`) begins with the
    memory of its parent, here of a worker that ran hundreds of tests.
    """
    with tempfile.NamedTemporaryFile("r") as said:
        command = [sys.executable, "-P", "-c", _RUN, *map(str, arguments)]
        environment = {**os.environ, "DMT_TEST_PEAK": said.name}
        subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
        return int(said.read()) * 1024
