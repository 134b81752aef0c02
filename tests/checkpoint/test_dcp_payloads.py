"""Directories of torch.distributed.checkpoint whose payload is not what torch writes by default."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import IO, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint import _extension
from torch.distributed.checkpoint.filesystem import FileSystemWriter, SerializationFormat

from dmt_convert.checkpoint import open_checkpoint, read_tensor
from dmt_convert.errors import CheckpointError
from support.checkpoints.containers import save_dcp, tiny_state

pytestmark = pytest.mark.filterwarnings("ignore")


def refuse(path: Path, match: str) -> CheckpointError:
    with pytest.raises(CheckpointError, match=match) as caught:
        open_checkpoint(path)
    assert caught.value.expected and caught.value.hint
    return caught.value


def save(state: Any, folder: Path, **options: Any) -> Path:
    writer = FileSystemWriter(folder / "dcp", **options)
    dcp.save(state, storage_writer=writer, no_dist=True)
    return folder / "dcp"


def same(folder: Path) -> None:
    found = {info.name: read_tensor(info).tolist() for info in open_checkpoint(folder).tensors}
    assert found == {name: tensor.tolist() for name, tensor in tiny_state().items()}


@pytest.mark.parametrize("files", [True, False])
def test_payloads_of_safetensors(files, tmp_path):
    same(
        save(
            tiny_state(),
            tmp_path,
            serialization_format=SerializationFormat.SAFETENSORS,
            single_file_per_rank=not files,
        )
    )


def test_payloads_of_safetensors_that_are_not_what_the_metadata_say(tmp_path):
    state = tiny_state()
    folder = save(state, tmp_path, serialization_format=SerializationFormat.SAFETENSORS)
    payload = folder / "__0_0.distcp"
    starts = {name: {"saved_offsets": [0] * tensor.dim()} for name, tensor in state.items()}
    # one rank held two parts of a table: the format kept the last
    starts["emb_l.2.weight"] = {"saved_offsets": [5, 0]}
    save_file(state, payload, {"DCP_SHARDING_INFO": json.dumps(starts)})
    refuse(folder, r"does not hold the part of emb_l\.2\.weight at \[0, 0\]")
    save_file(state | {"bot_l.0.bias": torch.ones(5)}, payload)
    refuse(folder, r"does not hold the part of bot_l\.0\.bias")
    save_file({"w": torch.ones(1000)}, payload)
    refuse(folder, "does not hold the part")


def test_a_state_dict_that_was_not_flattened(tmp_path):
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False)
    content = {"model": tiny_state(), "step": 3}
    dcp.save(content, checkpoint_id=tmp_path / "dcp", planner=planner, no_dist=True)
    same(tmp_path / "dcp")
    checkpoint = open_checkpoint(tmp_path / "dcp")
    assert {info.container for info in checkpoint.tensors} == {("model",)}
    assert {*checkpoint.unread} == {"step"}
    dcp.save({"step": 3}, checkpoint_id=tmp_path / "none", planner=planner, no_dist=True)
    error = refuse(tmp_path / "none", "does not hold any tensor that can be read, but 1 other")
    assert "flatten_state_dict=False" in error.details[0]


def test_other_dtypes_beside_are_named(tmp_path):
    others = {
        "fp8": torch.ones(2, 3).to(torch.float8_e4m3fn),
        "count": torch.ones(2, dtype=torch.uint16),
    }
    folder = save_dcp(tiny_state() | others, tmp_path)
    same(folder)
    assert open_checkpoint(folder).unread == {
        "fp8": "a tensor of shape [2, 3] in float8_e4m3fn",
        "count": "a tensor of shape [2] in uint16",
    }


class Inverted(_extension.StreamTransformExtension):
    """Stands for zstd, which needs a package, and for encryption."""

    @staticmethod
    def from_descriptor(_: str) -> Inverted:
        return Inverted()

    @staticmethod
    def registry_name() -> str:
        return "stream.inverted"

    def get_descriptor(self) -> str:
        return "stream.inverted/1"

    def transform_to(self, output: IO[bytes]) -> IO[bytes]:
        class Writer(io.BytesIO):
            def close(self) -> None:
                output.write(bytes(255 - byte for byte in self.getvalue()))
                super().close()

        return Writer()

    def transform_from(self, stream: IO[bytes]) -> IO[bytes]:
        return stream


def test_payloads_that_went_through_an_extension(tmp_path):
    folder = save(tiny_state(), tmp_path, _extensions=[Inverted()])
    error = refuse(folder, r"saved with the extension stream\.inverted/1")
    assert "without stream extensions" in error.hint and "damaged" not in str(error)


def test_globals_of_the_metadata_that_are_no_dtypes_are_refused(tmp_path):
    folder = save_dcp(tiny_state(), tmp_path)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.planner_data = torch.nn.Linear
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    refuse(folder, r"torch\.nn\.modules\.linear\.Linear")
