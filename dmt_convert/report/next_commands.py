"""What to do with a bundle next, as a report says it."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from dmt_convert.adapter import model_option

if TYPE_CHECKING:
    from dmt_convert.bundle import Manifest


def next_commands(manifest: Manifest, folder: str) -> tuple[tuple[str, str], ...]:
    """Return purposes and commands.

    Args:
        manifest: What the bundle says of itself.
        folder: Its folder.
    """
    spec, name = manifest.model, manifest.source.name
    source, bundle, towers = shlex.quote(name), shlex.quote(folder), len(spec.sending_towers)
    option = model_option(spec.flat)
    again = f"dmt convert {source} --towers {towers}"
    verify = (
        "Compare the logits of both models, stage by stage",
        f"dmt verify {source} {bundle}{option}",
    )
    evaluate = (
        "AUC, log loss and NE on data with labels",
        f"dmt evaluate {bundle} --data DATA{option}",
    )
    plan = ("Plan for another cluster", f"dmt plan {bundle} --hosts {towers} --ranks-per-host 8")
    exact = (
        "Convert again, exactly",
        f"{again} --tower-module passthrough --out {bundle}-exact{option}",
    )
    finetune = ("Train further on labelled rows", f"dmt finetune {bundle} --data DATA{option}")
    export = (
        "Graphs for serving, checked against this bundle",
        f"dmt export {bundle} --format onnx --out DIR{option}",
    )
    score = ("Logits of a data set", f"dmt score {bundle} --data DATA --out scores.npz{option}")
    if manifest.initialisation.finetune is not None:
        return evaluate, score, export, plan
    if not name:
        return evaluate, finetune, export, plan
    if spec.is_passthrough:
        return verify, evaluate, finetune, export, plan
    return evaluate, finetune, export, plan, exact
