"""Large checkpoints: headers cost nothing, memory stays small. The files are sparse."""

import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from support.checkpoints.flat import make_flat, make_sparse_flat
from support.peak_memory import peak_memory

GIB = 1 << 30
LOOK = """
import sys
from pathlib import Path
from dmt_convert.cli.main import main
try:
    main()
finally:
    read = Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0]
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    print(read, peak, "torch" in sys.modules, file=sys.stderr)
"""


def enlarge(folder: Path, rows: int) -> int:
    """Let a DCP directory say that its first table is large; the payload becomes a hole."""
    path = folder / ".metadata"
    with path.open("rb") as file:
        metadata = pickle.load(file)
    name = next(n for n in metadata.state_dict_metadata if n.endswith("t_cat_0.weight"))
    entry = metadata.state_dict_metadata[name]
    dim = entry.size[1]
    entry.size = torch.Size([rows, dim])
    entry.chunks[0].sizes = torch.Size([rows, dim])
    payload = next(folder.glob("*.distcp"))
    begin, length = payload.stat().st_size, rows * dim * 4
    for index, info in list(metadata.storage_data.items()):
        if index.fqn == name:
            metadata.storage_data[index] = replace(info, offset=begin, length=length)
    os.truncate(payload, begin + length)
    with path.open("wb") as file:
        pickle.dump(metadata, file)
    return length


@pytest.fixture(scope="module")
def giants(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("giants")
    rows = 20 * GIB // (4 * 64 * 4)
    flat = make_sparse_flat(folder / "giant.safetensors", rows=[rows] * 4, dim=64)
    dcp = make_flat(folder / "giant")
    enlarge(dcp, 20 * GIB // 32)
    assert sum(path.stat().st_size for path in (flat, *dcp.iterdir())) > 40 * 10**9
    return {"safetensors": flat, "dcp": dcp}


@pytest.mark.slow
@pytest.mark.parametrize("container", ["safetensors", "dcp"])
@pytest.mark.parametrize("command", ["inspect", "dry-run"])
def test_headers_alone_are_read(
    giants: dict[str, Path], container: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = giants[container]
    arguments = ["inspect", source, "--json"]
    if command == "dry-run":
        # the fixture's disk need not have 20 GB: where it has not, the refusal reads as little
        arguments = ["convert", source, "--towers", 2, "--dry-run", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", LOOK, *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode in ((0, 3) if command == "dry-run" else (0,)), done.stderr
    value: dict[str, Any] = json.loads(done.stdout)
    if done.returncode == 0:
        assert value["spec"]["tables"][0]["rows"] > 10**7
    else:
        assert "GiB left" in value["found"]
    read, peak, torch_was_imported = done.stderr.split()[-3:]
    assert torch_was_imported == "False"
    # mostly Python's own modules; what is mapped and looked at counts as memory
    assert int(read) < GIB // 4 and int(peak) < GIB // 2
    assert not any(".dmt-tmp" in path.name for path in source.parent.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--dtype", "bf16")], ids=["as it is", "recoded"])
def test_memory_stays_small(tmp_path: Path, options: tuple[str, ...]) -> None:
    size = 3 * GIB if not options else GIB
    rows = size // (4 * 64 * 4)
    source = make_sparse_flat(tmp_path / "ckpt.safetensors", rows=[rows] * 4, dim=64)
    assert peak_memory("convert", source, "--towers", 2, "--quiet", *options) < GIB
    weights = (tmp_path / "ckpt-dmt2" / "weights").iterdir()
    assert sum(path.stat().st_size for path in weights) > size / (2 if options else 1)
