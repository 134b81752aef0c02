"""What a path is if no reader knows it: its kind by its first bytes, and the next command."""

from __future__ import annotations

import re
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

from dmt_convert.errors import CheckpointError

_EXPECTED: Final = "a checkpoint: a file of torch.save or safetensors, or a folder of a trainer"
_SAVE: Final = (
    "save the weights where the model was trained: torch.save(model.state_dict(), 'weights.pt')"
)
_HEAD_BYTES: Final = 512
_REMOTE: Final = re.compile(r"([a-z][a-z0-9+.-]{1,20}):/{1,2}(?=[^/])(.*)", re.IGNORECASE)
"""A URL; `Path` makes one slash of two."""
_COPY: Final = {
    "s3": "aws s3 cp s3://{} checkpoint",
    "gs": "gcloud storage cp gs://{} checkpoint",
    "hf": "hf download {}",
    "http": "curl -L -O http://{}",
    "https": "curl -L -O https://{}",
}

_MAGIC: Final[tuple[tuple[bytes, str, str], ...]] = (
    (b"\x1f\x8b", "is compressed with gzip", "gunzip -k {}"),
    (b"\x28\xb5\x2f\xfd", "is compressed with zstd", "zstd -d {}"),
    (b"BZh", "is compressed with bzip2", "bunzip2 -k {}"),
    (b"\xfd7zXZ\x00", "is compressed with xz", "unxz -k {}"),
    (b"\x04\x22\x4d\x18", "is compressed with lz4", "lz4 -d {}"),
    (b"7z\xbc\xaf\x27\x1c", "is a 7z archive", "7z x {}"),
    (b"Rar!\x1a\x07", "is a RAR archive", "unrar x {}"),
    (b"\x89HDF\r\n\x1a\n", "is an HDF5 file (of Keras or h5py)", _SAVE),
    (b"PAR1", "is a parquet file: data, not a model", "dmt score CHECKPOINT --data {}"),
    (b"\x93NUMPY", "is an array of numpy", _SAVE),
    (b"version https://git-lfs", "is a pointer of git-lfs, not the file itself", "git lfs pull"),
    (b"GGUF", "is a GGUF file", _SAVE),
    (b"\x7fELF", "is a program or a library", _SAVE),
    (b"%PDF", "is a PDF document", _SAVE),
)
"""First bytes, what such a file is, and the next command."""


def refuse_remote(path: Path) -> CheckpointError | None:
    """Refuse a URL; None if the path is none, or exists all the same."""
    match = _REMOTE.fullmatch(str(path))
    if match is None or path.exists():
        return None
    scheme, rest = match[1].lower(), match[2]
    command = _COPY.get(scheme, "copy {} to this machine").format(rest)
    if not Path(rest).suffix:  # a folder
        command = command.replace(" cp ", " cp --recursive ")
    return CheckpointError(
        f"{scheme}://{rest} is a remote path; remote paths are not read",
        expected="a file or a folder on this machine",
        hint=f"copy it first, for example: {command}",
    )


def refuse_special(path: Path) -> CheckpointError | None:
    """Refuse what is neither a file nor a folder, without opening it; None if it is."""
    mode = path.stat().st_mode
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return None
    kinds: tuple[tuple[Callable[[int], bool], str], ...] = (
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
    )
    kind = next((name for test, name in kinds if test(mode)), "a device")
    return CheckpointError(
        f"{path} is {kind}, not a file",
        expected=_EXPECTED,
        hint=f"write it to a file first, for example: cat {path} > model.pt",
    )


def refuse_unknown_file(path: Path) -> CheckpointError:
    """Say what a file is that no reader knows."""
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    names = _zip_names(path) if head.startswith(b"PK") else []
    if names:
        return refuse_other_zip(path, names)
    what, hint = _identify(path, head)
    return CheckpointError(f"{path} {what}", expected=_EXPECTED, hint=hint)


def check_stand_in(path: Path) -> None:
    """Refuse a file that is not what its name says: a pointer, a page, an archive.

    Raises:
        CheckpointError: It is.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if _known(head) or not any(head):
        raise refuse_unknown_file(path)


def _known(head: bytes) -> bool:
    magic = tuple(first for first, _, _ in _MAGIC)
    return head.startswith(magic) or head[257:262] == b"ustar" or bool(_page(head))


def _identify(path: Path, head: bytes) -> tuple[str, str]:
    for magic, what, command in _MAGIC:
        if head.startswith(magic):
            return what, command.format(path)
    if head[257:262] == b"ustar":
        return "is a tar archive", f"tar -xf {path}"
    page = _page(head)
    if path.suffix == ".json":
        return "is a JSON document", "name the weights, or the folder that it describes"
    if page:
        return f"is {page}, not the file itself", "download it again; the text says what went wrong"
    if path.suffix == ".onnx":
        return "is an ONNX graph", _SAVE
    if path.suffix == ".pb" or b"saved_model" in head:
        return "is a graph of TensorFlow", _SAVE
    if not any(head):
        return "begins with zeros only: its space was reserved, and nothing was written", (
            "copy it again and compare its checksum"
        )
    return (
        f"begins with the bytes {head[:8].hex(' ')}",
        "if it is whole, save the weights with torch.save or safetensors",
    )


def _page(head: bytes) -> str:
    """Name the kind of text that servers send instead of a file; empty if it is none."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head")):
        return "a web page (HTML)"
    if text.startswith(b"<"):
        return "an XML document, such as a storage service's error message"
    if re.match(rb'[{[]\s*["{}\]]', text):
        return "a JSON document, such as a server's error message"
    return ""


def refuse_other_zip(path: Path, names: list[str]) -> CheckpointError:
    """Say what a zip archive is that `torch.save` did not write.

    Args:
        path: The file.
        names: Names of its members.
    """
    ends = {name.partition("/")[2] for name in names} | set(names)
    if any(name.startswith(".data/") and name.endswith("extern_modules") for name in ends):
        what, hint = (
            "was written by torch.package: code and pickles, which are not read",
            (
                "load it with torch.package.PackageImporter where you trust it, and save the "
                "weights: torch.save(model.state_dict(), 'weights.pt')"
            ),
        )
    elif any(name in ("archive_format", "serialized_exported_program.json") for name in ends):
        what, hint = (
            "is an exported program (.pt2)",
            ("save its weights: torch.save(torch.export.load(path).state_dict, 'weights.pt')"),
        )
    elif names and all(name.endswith(".npy") for name in names):
        what, hint = "is an archive of numpy arrays (.npz)", _SAVE
    elif any(name.endswith((".keras", "model.weights.h5")) for name in names):
        what, hint = "is a model of Keras", _SAVE
    elif any(
        name.endswith(
            (
                ".pt",
                ".pth",
                ".ckpt",
                ".bin",
                ".safetensors",
                ".distcp",
                ".metadata",
                ".model",
                "data.pkl",
            )
        )
        for name in names
    ):
        what, hint = "is a zip archive of other files", f"unzip {path}, and name what lies in it"
    else:
        what, hint = "is a zip archive of other files", _SAVE
    shown = ", ".join(name[:80] for name in names[:4])
    return CheckpointError(
        f"{path} {what}",
        expected="a zip archive with data.pkl and its storages, as torch.save writes it",
        hint=hint,
        details=[f"it holds {len(names)} files: {shown}"],
    )


def _zip_names(path: Path) -> list[str]:
    """Return the names in a zip archive; empty if it cannot be listed."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError, UnicodeError):
        return []
