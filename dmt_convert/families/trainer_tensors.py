"""The tensors of one model, and everything that is found out about them.

Every family works with one `TrainerTensors`. It takes tensors by the names that their trainer
gives them, puts them under canonical names, and notes facts (`TakenTensors`). What is missing,
misshapen or left over is collected and refused all at once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from dmt_convert.checkpoint import TensorInfo, derived
from dmt_convert.documents import InputRecord
from dmt_convert.families.incomplete_model import incomplete_model
from dmt_convert.families.layer_stacks import Layer, cat_columns, dot_columns, mlp_of
from dmt_convert.families.leftovers import (
    check_remapping,
    counter_of,
    find_matches,
    is_measure,
    refuse_part,
    refuse_unmatched,
)
from dmt_convert.families.model_info import Fact, FlatModelInfo, Source, find_optimizer_state
from dmt_convert.families.taken_tensors import TakenTensors
from dmt_convert.spec import FeatureSpec, InteractionSpec, ModelSpec, NetworkSpec, network_model


@dataclass(slots=True, kw_only=True)
class TrainerTensors(TakenTensors):
    """The tensors of a model under its trainer's names, and what is known about the model."""

    def check(self) -> None:
        """Refuse tensors that are missing, misshapen or left over.

        Raises:
            ArchitectureError: There are such tensors; all of them are listed.
        """
        unused = [info for name, info in self.tensors.items() if name not in self._used]
        extra = self.pass_over([*self.extra, *self.others, *unused])
        if self.missing or self.wrong or extra:
            raise incomplete_model(self, extra)

    def pass_over(self, left: Sequence[TensorInfo]) -> list[TensorInfo]:
        """Pass over what may be: torch's counters, and what the user says to ignore.

        Args:
            left: All tensors of the model's dict that the model has no use for.

        Returns:
            Those that are left over all the same.

        Raises:
            ArchitectureError: A tensor remaps or prunes ids.
            ConfigError: A pattern of the user's matches nothing, or catches tensors that may take
                part.
        """
        rest: dict[str, TensorInfo] = {}
        for info in left:
            counter = counter_of(info)
            if counter is None:
                rest[info.path] = info
            else:
                self.ignore(info, counter)
        check_remapping(self.checkpoint, rest.values())
        for pattern in self.config.ignore:
            matched = find_matches(pattern, self.held)
            if not matched:
                raise refuse_unmatched(pattern, [*rest])
            caught = [info for info in matched if info.path not in self.ignored]
            parts = [
                info
                for info in caught
                if info.path not in rest or (self.is_inside(info) and not is_measure(info))
            ]
            if parts:
                raise refuse_part(pattern, parts)
            for info in caught:
                self.ignore(info, f"`ignore: {pattern}` in --model-config")
        return [info for path, info in rest.items() if path not in self.ignored]

    def finish(
        self, spec: ModelSpec, stored: Mapping[str, TensorInfo] | None = None
    ) -> FlatModelInfo:
        """Return what is known about the model; `canonical` holds all its tensors.

        Args:
            spec: What kind of model it is.
            stored: Canonical name -> tensor as the file holds it, to look for the optimizer's
                state. Default: all tensors that are not derived, since only these have one.
        """
        if stored is None:
            stored = {n: info for n, info in self.canonical.items() if info.derivation is None}
        state = find_optimizer_state(self.checkpoint, self.place, stored, self.parameter_names)
        facts = self.facts
        if not any(fact.subject == "family" for fact in facts):
            facts = [self._family_fact(), *facts]
        inputs = self._name_dense(spec.num_dense)
        facts = [*facts, *_dense_facts(spec, inputs, self.config.dense_features)]
        return FlatModelInfo(
            checkpoint=self.checkpoint,
            spec=spec,
            tensors=self.canonical,
            optimizer_state=self._fitting_state(state, stored),
            facts=tuple(facts),
            ignored=self._list_ignored(),
            ignored_tensors=tuple(self.ignored.values()),
            inputs=inputs,
        )

    def _name_dense(self, num_dense: int) -> InputRecord | None:
        """Return the names of the dense inputs, if there is one for each."""
        names = self.dense_names
        is_whole = names and len({*names}) == len(names) == num_dense
        return InputRecord(dense=names) if is_whole else None

    def describe_network(
        self,
        *,
        features: Sequence[FeatureSpec],
        num_dense: int,
        name: str,
        config: Mapping[str, Any],
        final_sigmoid: bool,
    ) -> FlatModelInfo:
        """Describe a model whose dense part is a network; all its tensors have been taken.

        Args:
            features: All features.
            num_dense: Number of dense inputs.
            name: Name of the network's factory.
            config: Arguments of the factory.
            final_sigmoid: Whether the original model ends in a sigmoid.
        """
        spec = network_model(
            family=self.family,
            tables=self.tables,
            features=features,
            num_dense=num_dense,
            network=NetworkSpec(name=name, config=config),
            final_sigmoid=final_sigmoid,
        )
        return self.finish(spec)

    def describe_dlrm(
        self,
        features: Sequence[FeatureSpec],
        stacks: tuple[Sequence[Layer], Sequence[Layer]],
        *,
        interaction: Literal["dot", "cat"],
        dense_at: int,
        final_sigmoid: bool,
    ) -> FlatModelInfo:
        """Describe a DLRM with plain layers, whose top layer has its columns in another order.

        Ours are [dense, pairs], in which the pairs are the upper triangle with the dense vector
        as row 0, or [dense, features] for cat. Theirs are [pairs, dense], or the vectors in the
        order in which their model has them.

        Args:
            features: All features.
            stacks: The layers over the dense inputs, and those that give the logit.
            interaction: How vectors meet.
            dense_at: Place of the dense vector among the vectors of their model.
            final_sigmoid: Whether the original model ends in a sigmoid.
        """
        bottom, top = stacks
        dims = {table.name: table.dim for table in self.tables}
        widths = [bottom[-1].fan_out, *(dims[feature.table] for feature in features)]
        # our vector i is their vector theirs[i]
        theirs = [dense_at, *(i for i in range(len(widths)) if i != dense_at)]
        columns = (dot_columns if interaction == "dot" else cat_columns)(widths, theirs)
        for stem, layers in (("dense_arch", bottom), ("over_arch", top)):
            for i, layer in enumerate(layers):
                for kind in ("weight", "bias"):
                    self.canonical[f"{stem}.{i}.{kind}"] = layer.tensors[f"linear.{kind}"]
        first = self.canonical["over_arch.0.weight"]
        self.canonical["over_arch.0.weight"] = derived.select_columns(first, columns)
        spec = ModelSpec(
            family=self.family,
            tables=tuple(self.tables),
            features=tuple(features),
            dense_arch=mlp_of(bottom, final_relu=True),
            interaction=InteractionSpec(kind=interaction),
            over_arch=mlp_of(top, final_relu=False),
            final_sigmoid=final_sigmoid,
        )
        return self.finish(spec)

    def _family_fact(self) -> Fact:
        where = ".".join((*self.place.container, self.place.prefix.removesuffix("."))).strip(".")
        reason = "tensor names" + (f" below {where!r}" if where else "")
        return Fact(subject="family", value=self.family, source="inferred", reason=reason)

    def _fitting_state(
        self, state: Mapping[str, TensorInfo], stored: Mapping[str, TensorInfo]
    ) -> dict[str, TensorInfo]:
        """Keep accumulators of tensors that are as they were, and of tables with the same rows."""
        fitting = {}
        for name, info in state.items():
            # a mixed-dimension table has the rows of its narrow one
            target = re.sub(r"^(tables\..+)\.embs$", r"\1.weight", name)
            now = self.canonical.get(target)
            same_rows = now is not None and now.shape[:1] == info.shape[:1]
            if now is stored[name] or (same_rows and target.startswith("tables.")):
                fitting[target] = info
        return fitting

    def _list_ignored(self) -> tuple[str, ...]:
        """Count what the checkpoint holds beside the model, one line per dict."""
        counts: dict[str, int] = {}
        for tensor in self.checkpoint.tensors:
            if tensor.container != self.place.container:
                head = tensor.container[0] if tensor.container else "(top level)"
                counts[head] = counts.get(head, 0) + 1
        return tuple(f"{head}: {count} tensors" for head, count in counts.items())


def _dense_facts(
    spec: ModelSpec, inputs: InputRecord | None, given: Sequence[str] | None
) -> list[Fact]:
    """Say what is known about the dense inputs, and that the trainer's data are not."""
    if not spec.num_dense:
        return []
    names, how, reason = f"none for {spec.num_dense}", "assumed", "not stored: columns by position"
    known = given or (inputs.dense if inputs is not None else None)
    if known:
        names = ", ".join(known[:3]) + (", ..." if len(known) > 3 else "")
        how = "given" if given else "read"
        reason = "--model-config" if given else "the trainer's description of the model"
    fed = "one such as log(x + 3) is not stored: feed what the model was fed"
    return [
        Fact(subject="names of dense inputs", value=names, source=cast(Source, how), reason=reason),
        Fact(subject="dense transform", value="none", source="assumed", reason=fed),
    ]
