"""Small flat models without a fault: their tensors, rows to score, and their logits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .case import Case, Logits

State = dict[str, Any]


@dataclass
class Model:
    """A model as its trainer saves it, in a container whose reading is not in question."""

    family: str
    folder: Path
    """Holds the clean checkpoint, the rows and a bundle."""
    state: State
    """Tensors in the trainer's order."""
    source: Path
    """The clean checkpoint."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What a user has to say of it."""
    config: Mapping[str, str] = field(default_factory=dict)
    """Files that describe it, beside its tensors."""
    is_never: bool = False
    """Whether no answer can be right."""

    @cached_property
    def spec(self) -> Any:
        import dmt_convert as dmt

        return dmt.inspect(self.source, **self.settings).spec

    @property
    def settings(self) -> dict[str, Any]:
        return {"model_config": dict(self.facts)} if self.facts else {}

    @property
    def features(self) -> tuple[str, ...]:
        return tuple(self.spec.feature_names)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Rows of the table of every feature."""
        return {name: self.spec.table_of(name).rows for name in self.features}

    @cached_property
    def batch(self) -> Any:
        """48 labelled rows of one id per feature; every row of a small table is among them."""
        from dmt_convert.data import Bag, Batch

        rng, count = np.random.default_rng(11), 48
        bags = []
        for size in self.sizes.values():
            ids = np.resize(rng.permutation(np.arange(min(1, size - 1), size)), count)
            bags.append(Bag(values=ids.astype(np.int64), offsets=np.arange(count + 1)))
        return Batch(
            bags=tuple(bags),
            dense=rng.standard_normal((count, self.spec.num_dense)).astype(np.float32),
            feature_names=self.features,
            labels=rng.integers(0, 2, count).astype(np.float32),
        )

    @property
    def labels(self) -> npt.NDArray[np.float32]:
        labels: npt.NDArray[np.float32] = self.batch.labels
        return labels

    @cached_property
    def rows(self) -> Path:
        """The rows as a probe: features by name."""
        path = self.folder / "probe.npz"
        arrays: dict[str, Any] = {"feature_names": np.array(self.features)}
        for i, bag in enumerate(self.batch.bags):
            arrays |= {f"values_{i}": bag.values, f"offsets_{i}": bag.offsets}
        np.savez(path, dense=self.batch.dense, **arrays)
        return path

    @cached_property
    def labelled(self) -> Path:
        """The same rows with labels, features by name in schema.json."""
        return write_clicks(self.folder / "labelled", self.batch)

    @cached_property
    def logits(self) -> Logits:
        """The logits of the clean checkpoint, shape (B,)."""
        import dmt_convert as dmt

        logits = dmt.score(self.source, self.rows, **self.settings).logits
        assert np.std(logits) > 0.01, "logits that say nothing"
        return logits

    def never(self) -> Model:
        """The same model where no answer can be right: any logits but a refusal are wrong."""
        other = Model(self.family, self.folder, self.state, self.source, self.facts, self.config)
        other.is_never = True
        other.__dict__.update({"spec": self.spec, "logits": self.logits + 1})
        return other

    def clean_bundle(self, **options: Any) -> Path:
        """Convert the clean checkpoint, once."""
        import dmt_convert as dmt

        path = self.folder / "clean-bundle"
        if not path.exists():
            options = {"tower_module": "passthrough", **options}
            dmt.convert(self.source, path, towers=2, distill_steps=0, **options, **self.settings)
        return path


def write_clicks(folder: Path, batch: Any, name: str = "rows") -> Path:
    """Write a batch of one id per feature as the npz of `recipes/generate_clicks.py`."""
    folder.mkdir(parents=True, exist_ok=True)
    sparse = np.stack([bag.values for bag in batch.bags], axis=1).astype(np.int32)
    np.savez(folder / f"{name}.npz", dense=batch.dense, sparse=sparse, label=batch.labels)
    schema = {"sparse_features": [{"name": feature} for feature in batch.feature_names]}
    (folder / "schema.json").write_text(json.dumps(schema))
    return folder / f"{name}.npz"


PLAIN = (
    ("torchrec", "dot"),
    ("torchrec", "dcn"),
    ("facebook", "dot"),
    ("facebook", "cat"),
    ("torchrec", "projection"),
    ("facebook", "self-pairs"),
)
"""Names and interactions of models that any container may hold."""


def plain_model(case: Case, *, scale: float = 1.0, **options: Any) -> Model:
    """A DLRM or DCNv2 of four tables; which one goes by the number of the case.

    Args:
        case: Gives seed and folder.
        scale: Of the tables' rows.
        options: Of `support.checkpoints.flat.flat_state`; `model` is one of `PLAIN`.
    """
    import torch

    from support.checkpoints.flat import flat_state

    names, interaction = options.pop("model", None) or PLAIN[case.number % len(PLAIN)]
    options = {"dim": case.choose(4, 8), "rows": (7, 50, 11, 6), **options}
    state = flat_state(names=names, interaction=interaction, seed=case.seed, **options)
    if scale != 1:
        state = {n: t * scale if t.ndim == 2 and "emb" in n else t for n, t in state.items()}
    folder = case.folder / "clean"
    folder.mkdir()
    torch.save(state, folder / "clean.pt")
    facts: dict[str, Any] = {}
    if interaction in ("cat", "self-pairs"):
        facts = {"interaction": "cat"} if interaction == "cat" else {"self_pairs": True}
    return Model(
        family=f"{names} {interaction}",
        folder=folder,
        state=state,
        source=folder / "clean.pt",
        facts=facts,
    )


def deepctr_model(case: Case, **options: Any) -> Model:
    """A model of DeepCTR-Torch, saved as model.h5."""
    import torch

    from support.trainers import deepctr_models
    from support.trainers.comparison import stir

    rows = {"user": 11, "item": 7, "day": 9}
    options = options or case.turn(
        {"cross": "vector"}, {"cross": "matrix", "bn": True}, {"cross": "mix"}, {"fm": True}
    )
    model = stir(deepctr_models.DeepCtr(rows, dict.fromkeys(rows, 4), 3, **options))
    folder = case.folder / "clean"
    folder.mkdir()
    state = dict(model.state_dict())
    torch.save(state, folder / "model.h5")
    facts = {"fm": True} if options.get("fm") else {}  # a plain dict does not name the module
    source = folder / "model.h5"
    return Model(family="deepctr", folder=folder, state=state, source=source, facts=facts)


FUXICTR = {
    "user": {"type": "categorical", "vocab_size": 11, "padding_idx": 0},
    "price": {"type": "numeric"},
    "item": {"type": "categorical", "vocab_size": 7, "padding_idx": 0},
    "age": {"type": "numeric"},
    "day": {"type": "categorical", "vocab_size": 5, "padding_idx": 0},
}


def fuxictr_model(case: Case) -> Model:
    """A model folder of FuxiCTR: expid.model, feature_map.json, params.json."""
    import torch

    from support.trainers import fuxictr_models
    from support.trainers.comparison import stir

    if case.number % 2:
        model = fuxictr_models.DcnV2(FUXICTR, 4, "parallel")
    else:
        model = fuxictr_models.Dlrm(FUXICTR, 4, dropout=True)
    stir(model)
    features = [{name: spec} for name, spec in FUXICTR.items()]
    config = {
        "feature_map.json": json.dumps({"features": features}),
        "params.json": json.dumps({"task": "binary_classification"}),
    }
    folder = case.folder / "clean"
    source = folder / "expid"
    source.mkdir(parents=True)
    state = dict(model.state_dict())
    torch.save(state, source / "expid.model")
    for name, text in config.items():
        (source / name).write_text(text)
    return Model(family="fuxictr", folder=folder, state=state, source=source, config=config)


_TZREC = """
feature_configs { id_feature { feature_name: "user" embedding_dim: 4 num_buckets: 11 } }
feature_configs { id_feature { feature_name: "item" embedding_dim: 4 num_buckets: 7 } }
feature_configs { id_feature { feature_name: "day" embedding_dim: 4 num_buckets: 5 } }
feature_configs { raw_feature { feature_name: "price" } }
feature_configs { raw_feature { feature_name: "look" value_dim: 2 } }
model_config {
  feature_groups { group_name: "all" feature_names: ["user", "price", "day", "item", "look"]
                   group_type: DEEP }
  dcn_v2 { cross {} }
}
"""


def torcheasyrec_model(case: Case) -> Model:
    """A model folder of TorchEasyRec: model.ckpt-20/model (DCP) and pipeline.config."""
    from support.checkpoints.containers import save_dcp
    from support.trainers import tzrec_models
    from support.trainers.comparison import stir

    tables = {"user_emb": 11, "item_emb": 7, "day_emb": 5}
    features = {name.removesuffix("_emb"): (name, False) for name in tables}
    model = stir(tzrec_models.DcnV2(tables, features, ["user", [0], "day", "item", [1, 2]]))
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    folder = case.folder / "clean"
    source = folder / "run"
    (source / "model.ckpt-20").mkdir(parents=True)
    save_dcp(state, source / "model.ckpt-20").rename(source / "model.ckpt-20" / "model")
    (source / "pipeline.config").write_text(_TZREC)
    return Model(
        family="torcheasyrec",
        folder=folder,
        state=state,
        source=source,
        config={"pipeline.config": _TZREC},
    )


def hugectr_model(case: Case) -> Model:
    """A folder of HugeCTR: a DLRM of three slots."""
    from support.trainers import hugectr_files

    weights, dim = hugectr_files.Weights(), hugectr_files.DIM
    layers = [
        hugectr_files.data_layer(),
        hugectr_files.embedding("deep_data", "deep", dim, [6, 9, 4]),
        hugectr_files.fc("dense", "bottom", dim, fused=True),
        {"type": "Interaction", "bottom": ["bottom", "deep"], "top": "pairs"},
        hugectr_files.fc("pairs", "logit", 1),
        hugectr_files.LOSS,
    ]
    weights(hugectr_files.DENSE, dim), weights(dim)
    weights(dim + 6 + 1, 1), weights(1)
    rng = np.random.default_rng(case.seed)
    keys = rng.permutation(19)
    vectors = rng.standard_normal((19, dim)).astype(np.float32)
    folder = case.folder / "clean"
    source = folder / "run"
    source.mkdir(parents=True)
    hugectr_files.write(source, layers, weights, [(keys, vectors)])
    return Model(family="hugectr", folder=folder, state={}, source=source)


def nvidia_model(case: Case) -> Model:
    """A folder of NVIDIA's DLRM on two devices."""
    import torch

    torch.manual_seed(case.seed)
    rows, dim = (9, 30, 12), 4
    folder = case.folder / "clean"
    source = folder / "run"
    source.mkdir(parents=True)
    width = dim + 6
    padded = width + 1  # a column of zeros is fed to the first layer
    parts: dict[str, Any] = {
        "metadata.pt": {"data": {"device_mapping": {"embedding": [[2, 0], [1]]}}, "config": {}},
        "bottom_model.mlp.pt": {"weights": [torch.randn(dim, 3)], "biases": [torch.randn(dim)]},
        "top_model.mlp.pt": {"weights": [torch.randn(5, padded)], "biases": [torch.randn(5)]},
        "top_model.out.pt": {"weight": torch.randn(1, 5), "bias": torch.randn(1)},
    }
    for number, count in enumerate(rows):
        table = torch.randn(count, dim)
        (source / f"bottom_model.embeddings.{number}.bin").write_bytes(table.numpy().tobytes())
        parts[f"embeddings.{number}.meta.pt"] = {"shape": table.shape}
    for name, value in parts.items():
        torch.save(value, source / name)
    return Model(family="nvidia-dlrm", folder=folder, state={}, source=source)


TRAINERS: dict[str, Callable[[Case], Model]] = {
    "deepctr": deepctr_model,
    "fuxictr": fuxictr_model,
    "torcheasyrec": torcheasyrec_model,
    "hugectr": hugectr_model,
    "nvidia": nvidia_model,
}


def copy_source(model: Model, to: Path) -> Path:
    """Copy a clean checkpoint, to be damaged."""
    if model.source.is_dir():
        return Path(shutil.copytree(model.source, to / model.source.name))
    to.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(model.source, to / model.source.name))
