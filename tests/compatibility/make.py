"""Write the bundles, exports and documents that later versions must still open.

    python tests/compatibility/make.py --out tests/compatibility/v0

`v0` was made at commit 164d59a. Never make it again with a later version: it stands for what users
of that version have on their disks. A change of the layout adds a folder (`v1`, ...) beside it.

The models and data are generated here; everything else goes through the `dmt` command line:

- `dlrm.pt`, `network.pt`: flat checkpoints. A DLRM under TorchRec's names, with the accumulators of
  row-wise Adagrad; a DCN under DeepCTR-Torch's names.
- `dlrm/`, `dcn/`, `network/`: bundles. DLRM towers that compress, cross towers in fp16, and the
  exact towers of a network. `tuned/`: the first one, fine-tuned over one rank.
- `dlrm-onnx/`, `network-onnx/`: exports. One takes padded ids and one jagged feature, the other one
  id per feature.
- `plan.json`, `partition.json`, `settings.yaml`: the documents that commands take from each other.
- `probe.npz`, `ids.npz`: batches of `ROWS` rows, the first with bags of several ids; `clicks.npz`:
  labelled rows to train on.
- `logits/*.npz`: what `dmt score` of that version said about each of them on its batch.
- `made.json`: the commands, and the arithmetic that gave the logits.

To stay small, bundles keep no report and no figure, which no command needs to open them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

COMMIT = "164d59a"
ROWS = 24
TABLES = {"age": 7, "city": 50, "device": 11, "brand": 6, "shop": 30, "category": 20}
DIM, NUM_DENSE = 8, 4
EBC = "sparse_arch.embedding_bag_collection.embedding_bags"
SETTINGS = """\
# Every key of `dmt finetune --config` at that version.
max_steps: 12
batch_size: 64
eval_every: 4
patience: 5
dense_lr: 0.01
table_lr: 0.05
table_optimizer: rowwise-adagrad
initial_accumulator: null
warmup_steps: 2
lr_decay: cosine
clip_norm: 10.0
seed: 3
dense_optimizer: adam
comm_dtype: fp32
checkpoint_every: null
keep_checkpoints: 1
async_checkpoints: false
prefetch: true
"""
COMMANDS = (
    "partition dlrm.pt --towers 2 --affinity weights --out partition.json",
    "convert dlrm.pt --towers 2 --tower-module dlrm --compression 2 --calibration clicks.npz "
    "--group user=age,city,device --group item=brand,shop,category --distill-steps 20 --out dlrm",
    "convert dcn.pt --towers 2 --tower-module dcn --compression 2 --dtype fp16 "
    "--optimizer-state drop --out dcn",
    "convert network.pt --towers 2 --tower-module passthrough --out network",
    "plan dlrm --hosts 1 --ranks-per-host 1 --out plan.json",
    "finetune dlrm --data clicks.npz --config settings.yaml --plan plan.json --out tuned "
    "--checkpoints checkpoints --quiet",
    "export dlrm --format onnx --pooling-input padded --pooling-input city=jagged --out dlrm-onnx",
    "export network --format onnx --pooling-input single --out network-onnx",
)
SCORED = {
    "dlrm.pt": "probe.npz",
    "dlrm": "probe.npz",
    "tuned": "probe.npz",
    "dlrm-onnx": "probe.npz",
    "dcn": "probe.npz",
    "network": "ids.npz",
    "network-onnx": "ids.npz",
}
"""Model -> the batch that it is scored on."""


def main() -> None:
    """Make everything in a folder, which must not exist."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True)
    write_inputs(out)
    for command in COMMANDS:
        run(command.split(), out)
    shutil.rmtree(out / "checkpoints")
    for drawing in (*out.glob("*/report.html"), *out.glob("*/partition.svg")):
        drawing.unlink()
    (out / "dcn.pt").unlink()
    (out / "logits").mkdir()
    for model, data in SCORED.items():
        run(["score", model, "--data", data, "--out", f"logits/{model}.npz"], out)
    made = {"commit": COMMIT, "commands": COMMANDS, "scored": SCORED, "arithmetic": arithmetic()}
    (out / "made.json").write_text(json.dumps(made, indent=1) + "\n")


def run(words: Sequence[str], folder: Path) -> None:
    """Run `dmt` inside the folder, so that no path of this machine is recorded."""
    command = [sys.executable, "-m", "dmt_convert.cli.main", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)


def arithmetic() -> dict[str, str]:
    """Return what the last bits of a sum depend on: libraries, instructions and their maker."""
    import onnxruntime

    vendor = platform.machine()
    cpu = Path("/proc/cpuinfo")
    if cpu.is_file():
        lines = cpu.read_text().splitlines()
        vendor = next((text.split()[-1] for text in lines if text.startswith("vendor_id")), vendor)
    return {
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "vendor": vendor,
    }


def write_inputs(out: Path) -> None:
    """Write the flat checkpoints, the batches, and the settings."""
    torch.save(trained("dot", seed=1), out / "dlrm.pt")
    torch.save(trained("dcn", seed=2), out / "dcn.pt")
    torch.save(network_state(seed=3), out / "network.pt")
    rng = np.random.default_rng(4)
    np.savez(out / "probe.npz", **batch(rng, longest=3))
    np.savez(out / "ids.npz", **batch(rng, longest=None))
    rows = 400
    ids = [rng.integers(0, count, size=rows) for count in TABLES.values()]
    dense = rng.standard_normal((rows, NUM_DENSE)).astype(np.float32)
    clicked = rng.random(rows) < 1 / (1 + np.exp(-3 * dense[:, 0]))  # which training can learn
    np.savez(
        out / "clicks.npz",
        dense=dense,
        sparse=np.stack(ids, axis=1).astype(np.int32),
        label=clicked.astype(np.uint8),
    )
    schema = {"sparse_features": [{"name": name} for name in TABLES]}
    (out / "schema.json").write_text(json.dumps(schema) + "\n")
    (out / "settings.yaml").write_text(SETTINGS)


def batch(rng: np.random.Generator, *, longest: int | None) -> dict[str, Any]:
    """Draw a probe: bags of up to `longest` ids, empty ones too, or of exactly one id each."""
    arrays: dict[str, Any] = {
        "dense": rng.standard_normal((ROWS, NUM_DENSE)).astype(np.float32),
        "feature_names": np.array(list(TABLES)),
    }
    for i, rows in enumerate(TABLES.values()):
        lengths = np.ones(ROWS, np.int64)
        if longest is not None:
            lengths = rng.integers(0, longest + 1, size=ROWS)
        arrays[f"offsets_{i}"] = np.concatenate([[0], lengths.cumsum()])
        arrays[f"values_{i}"] = rng.integers(0, rows, size=lengths.sum())
    return arrays


def trained(interaction: str, *, seed: int) -> dict[str, Any]:
    """Return what a TorchRec trainer saves: weights, and row-wise Adagrad's accumulators."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    state: dict[str, torch.Tensor] = {}
    sums: dict[str, dict[str, torch.Tensor]] = {}

    def linear(name: str, inputs: int, outputs: int) -> None:
        state[f"{name}.weight"] = draw(outputs, inputs) / inputs**0.5
        state[f"{name}.bias"] = draw(outputs) * 0.1

    for name, rows in TABLES.items():
        state[f"{EBC}.t_{name}.weight"] = draw(rows, DIM) * 0.3
        sums[f"model.{EBC}.t_{name}.weight"] = {f"t_{name}.momentum1": draw(rows).square()}
    linear("dense_arch.model._mlp.0._linear", NUM_DENSE, 12)
    linear("dense_arch.model._mlp.1._linear", 12, DIM)
    vectors = len(TABLES) + 1
    width = DIM + vectors * (vectors - 1) // 2
    if interaction == "dcn":
        width = vectors * DIM
        for layer in range(2):
            state[f"inter_arch.crossnet.W_kernels.{layer}"] = draw(width, 4) / width**0.5
            state[f"inter_arch.crossnet.V_kernels.{layer}"] = draw(4, width) / 2
            state[f"inter_arch.crossnet.bias.{layer}"] = draw(width) * 0.1
    linear("over_arch.model.0._mlp.0._linear", width, 12)
    linear("over_arch.model.1", 12, 1)
    return {"model": state, "optimizer": {"state": sums}}


def network_state(*, seed: int) -> dict[str, torch.Tensor]:
    """Return the state dict of DeepCTR-Torch's DCN: wide part, cross layers, two dense layers."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    width, hidden = len(TABLES) * DIM + NUM_DENSE, (10, 6)
    state: dict[str, torch.Tensor] = {}
    for name, rows in TABLES.items():
        state[f"embedding_dict.{name}.weight"] = draw(rows, DIM) * 0.3
    for name, rows in TABLES.items():
        state[f"linear_model.embedding_dict.{name}.weight"] = draw(rows, 1)
    state["linear_model.weight"] = draw(NUM_DENSE, 1)
    for layer, (inputs, outputs) in enumerate(zip((width, *hidden), hidden, strict=False)):
        state[f"dnn.linears.{layer}.weight"] = draw(outputs, inputs) / inputs**0.5
        state[f"dnn.linears.{layer}.bias"] = draw(outputs) * 0.1
    state["dnn_linear.weight"] = draw(1, width + hidden[-1]) / width**0.5
    state["crossnet.kernels"] = draw(2, width, 1) / width**0.5
    state["crossnet.bias"] = draw(2, width, 1) * 0.1
    state["out.bias"] = draw(1)
    return state


if __name__ == "__main__":
    main()
