"""What a user can do wrong is answered in words, with exit code 3, by headers alone."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from support.checkpoints.flat import make_flat
from support.commands import run_dmt
from support.paths import read_files
from support.refusals import Arguments, Scene, check_refusal

Call = Callable[..., Any]


class Payload:
    """Runs code where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def dcp_without_payload(scene: Scene) -> Arguments:
    folder = make_flat(scene.folder / "dcp")
    next(folder.glob("*.distcp")).unlink()
    return folder, "--towers", 2


def three_problems(scene: Scene) -> Arguments:
    def edit(state: dict[str, Any]) -> None:
        del state["over_arch.model.1.bias"]
        state["over_arch.model.7.weight"] = torch.zeros(2)
        state["dense_arch.model._mlp.1._linear.bias"] = torch.zeros(3)

    return make_flat(scene.folder / "broken.pt", edit=edit), "--towers", 2


def inside_the_checkpoint(scene: Scene) -> Arguments:
    folder = make_flat(scene.folder / "dcp")
    return folder, "--towers", 2, "--out", folder / "out"


def inside_by_one_of_its_files(scene: Scene) -> Arguments:
    folder = make_flat(scene.folder / "dcp")
    return folder / ".metadata", "--towers", 2, "--out", folder / "out"


def forced_onto_a_folder(scene: Scene) -> Arguments:
    (scene.folder / "out").mkdir()
    (scene.folder / "out" / "thesis.txt").write_text("x")
    return scene.good, "--towers", 2, "--out", scene.folder / "out", "--force"


def forced_onto_a_link(scene: Scene) -> Arguments:
    (scene.folder / "link").symlink_to(scene.bundle())
    return scene.good, "--towers", 2, "--out", scene.folder / "link", "--force"


def other_model(scene: Scene) -> Arguments:
    layers = {f"layer{i}.conv.weight": torch.zeros(2, 2) for i in range(9)}
    return scene.saved(layers), "--towers", 2


F = ["cat_0", "cat_1", "cat_2", "cat_3"]
CASES: dict[str, tuple[Callable[[Scene], Arguments], str, str]] = {
    # checkpoints
    "missing": (lambda s: (s.folder / "no.pt", "--towers", 2), "CheckpointError", "does not exist"),
    "empty": (lambda s: (s.file("e.pt", b""), "--towers", 2), "CheckpointError", "is empty"),
    "cut .pt": (lambda s: (s.cut("c.pt", 0.6), "--towers", 2), "CheckpointError", "not a whole"),
    "cut .safetensors": (
        lambda s: (s.cut("c.safetensors", 0.9), "--towers", 2),
        "CheckpointError",
        "its header describes",
    ),
    "DCP without payload": (dcp_without_payload, "CheckpointError", "lacks 1 of its"),
    "text": (lambda s: (s.file("t.pt", "hello"), "--towers", 2), "CheckpointError", "begins with"),
    "a bundle": (lambda s: (s.bundle(), "--towers", 2), "CheckpointError", "is a bundle, not"),
    "an empty folder": (
        lambda s: (s.subfolder("empty"), "--towers", 2),
        "CheckpointError",
        "is a directory",
    ),
    "pickle with code": (
        lambda s: (s.saved({"x": Payload(s.folder / "RAN")}), "--towers", 2),
        "CheckpointError",
        "system",
    ),
    "old pickle with code": (
        lambda s: (
            s.saved(Payload(s.folder / "RAN"), _use_new_zipfile_serialization=False),
            "--towers",
            2,
        ),
        "CheckpointError",
        "system",
    ),
    "no tensors": (
        lambda s: (s.saved({"epoch": 3}), "--towers", 2),
        "CheckpointError",
        "does not hold any tensor",
    ),
    "other model": (other_model, "ArchitectureError", "holds no model of a known family"),
    "three problems": (three_problems, "ArchitectureError", "1 missing, 1 misshapen, 1 extra"),
    # towers
    "no towers given": (lambda s: (s.good,), "UsageError", "towers is missing"),
    "no tower": (
        lambda s: (s.good, "--towers", 0),
        "UsageError",
        "--towers must be an integer >= 1",
    ),
    "less than none": (lambda s: (s.good, "--towers", -1), "UsageError", "--towers must be"),
    "too many": (lambda s: (s.good, "--towers", 5), "PartitionError", "5 towers"),
    "forgotten": (lambda s: s.partition({"towers": [F[:3]]}), "PartitionError", "missing: cat_3"),
    "repeated": (
        lambda s: s.partition({"towers": [F, F[:1]]}),
        "PartitionError",
        "repeated: cat_0",
    ),
    "invented": (lambda s: s.partition({"towers": [[*F, "x"]]}), "PartitionError", "unknown: x"),
    "empty tower": (
        lambda s: s.partition({"towers": [F, []]}),
        "PartitionError",
        "tower 1 is empty",
    ),
    "no key": (lambda s: s.partition({"tower": [F]}), "PartitionError", "towers.json"),
    "no names": (lambda s: s.partition({"towers": [[1, 2]]}), "PartitionError", "towers.json"),
    "no JSON": (
        lambda s: (s.good, "--partition", s.file("t.json", "{towers")),
        "PartitionError",
        "t.json",
    ),
    "no file": (
        lambda s: (s.good, "--partition", s.folder / "t.json"),
        "UsageError",
        "neither a strategy",
    ),
    "another number": (
        lambda s: (*s.partition({"towers": [F]}), "--towers", 3),
        "PartitionError",
        "1 tower",
    ),
    "unknown feature": (
        lambda s: (s.good, "--towers", 2, "--together", "cat_0,nobody"),
        "PartitionError",
        "nobody",
    ),
    "together and apart": (
        lambda s: (s.good, "--towers", 2, "--together", "cat_0,cat_1", "--apart", "cat_0,cat_1"),
        "PartitionError",
        "cat_0",
    ),
    "group without name": (
        lambda s: (s.good, "--towers", 2, "--group", "cat_0,cat_1"),
        "UsageError",
        "NAME=f,g",
    ),
    # targets
    "output exists": (
        lambda s: (s.good, "--towers", 2, "--out", s.bundle()),
        "BundleError",
        "exists",
    ),
    "forced onto a folder": (forced_onto_a_folder, "BundleError", "is not a bundle"),
    "forced onto a link": (forced_onto_a_link, "BundleError", "is a symbolic link"),
    "forced onto a file": (
        lambda s: (s.good, "--towers", 2, "--out", s.file("out", "x"), "--force"),
        "BundleError",
        "is not a bundle",
    ),
    "forced onto the checkpoint": (
        lambda s: (s.good, "--towers", 2, "--out", s.good, "--force"),
        "BundleError",
        "is not a bundle",
    ),
    "inside the checkpoint": (inside_the_checkpoint, "BundleError", "lies in the checkpoint"),
    "inside, by a file": (inside_by_one_of_its_files, "BundleError", "lies in the checkpoint"),
    "no parent": (
        lambda s: (s.good, "--towers", 2, "--out", s.folder / "a" / "b"),
        "BundleError",
        "does not exist",
    ),
    # options
    "passthrough and c": (
        lambda s: (s.good, "--towers", 2, "--tower-module", "passthrough", "--c", 1),
        "UsageError",
        "passthrough with",
    ),
    "dim and compression": (
        lambda s: (s.good, "--towers", 2, "--dim", 4, "--compression", 2),
        "UsageError",
        "together",
    ),
    "dcn for a dot model": (
        lambda s: (s.good, "--towers", 2, "--tower-module", "dcn"),
        "ConfigError",
        "dot interaction",
    ),
    "nothing emitted": (
        lambda s: (s.good, "--towers", 2, "--c", 0, "--p", 0, "--dim", 4),
        "ConfigError",
        "c=0, p=0",
    ),
    "negative c": (lambda s: (s.good, "--towers", 2, "--c", -1), "UsageError", "--c must be"),
    "zero dim": (lambda s: (s.good, "--towers", 2, "--dim", 0), "UsageError", "--dim must be"),
    "expansion": (lambda s: (s.good, "--towers", 2, "--compression", 0.5), "ConfigError", "0.5"),
    "too much": (lambda s: (s.good, "--towers", 2, "--compression", 99), "ConfigError", "99"),
    "not a number": (
        lambda s: (s.good, "--towers", 2, "--compression", "nan"),
        "UsageError",
        "--compression must be a finite number",
    ),
    "unknown dtype": (
        lambda s: (s.good, "--towers", 2, "--dtype", "int8"),
        "UsageError",
        "--dtype",
    ),
    "unknown module": (
        lambda s: (s.good, "--towers", 2, "--tower-module", "mlp"),
        "UsageError",
        "--tower-module must be one of",
    ),
    "unknown affinity": (
        lambda s: (s.good, "--towers", 2, "--affinity", "x"),
        "UsageError",
        "--affinity",
    ),
    "negative seed": (
        lambda s: (s.good, "--towers", 2, "--seed", -1),
        "UsageError",
        "--seed must be",
    ),
    "no hosts": (lambda s: (s.good, "--towers", 2, "--hosts", 0), "UsageError", "--hosts must be"),
    "memory nan": (
        lambda s: (s.good, "--towers", 2, "--hbm-gib", "nan"),
        "UsageError",
        "--hbm-gib must be",
    ),
    "memory inf": (
        lambda s: (s.good, "--towers", 2, "--hbm-gib", "inf"),
        "UsageError",
        "--hbm-gib must be",
    ),
    "no model config": (
        lambda s: (s.good, "--towers", 2, "--model-config", s.folder / "m.yaml"),
        "ConfigError",
        "m.yaml",
    ),
}


def check_case(scene: Scene, case: str, call: Call) -> None:
    make, error, found = CASES[case]
    arguments = make(scene)
    before = read_files(scene.folder)
    check_refusal(call("convert", *arguments, "--json"), error, found)
    assert read_files(scene.folder) == before
    assert not any(".dmt-tmp" in path.name for path in scene.folder.rglob("*"))
    assert not (scene.folder / "RAN").exists()


@pytest.mark.parametrize("case", CASES)
def test_refused_by_headers_alone(case: str, scene: Scene, call_dmt: Call) -> None:
    check_case(scene, case, call_dmt)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    ["missing", "cut .pt", "pickle with code", "three problems", "no tower", "output exists"],
)
def test_refused_in_a_process_of_its_own(case: str, scene: Scene) -> None:
    check_case(scene, case, run_dmt)


def test_every_broken_tensor_is_named(scene: Scene, call_dmt: Call) -> None:
    run = call_dmt("convert", *three_problems(scene), "--json")
    details = "\n".join(json.loads(run.stdout)["details"])
    assert "missing: over_arch.model.1.bias" in details
    assert "extra: over_arch.model.7.weight" in details
    assert "dense_arch.model._mlp.1._linear.bias has shape [3], expected [8]" in details
