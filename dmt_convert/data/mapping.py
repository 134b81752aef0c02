"""Which column of a data set feeds which input of a model.

By name, wherever there are names. A model names its features; its dense inputs have names only if
the user or a bundle's record gives them. Where one side's names only count (`C1`, `C2`, ...),
numbers meet numbers. What neither names nor numbers settle is asked for: the order in which columns
stand in a file is not taken for their meaning.

Letters: D dense inputs, F features.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from dmt_convert.data.column_names import (
    SCHEMA_NAME,
    compress_names,
    compress_pairs,
    count_columns,
)
from dmt_convert.data.dataset import Dataset
from dmt_convert.data.dense_transforms import FORMS, STORED
from dmt_convert.documents import InputRecord
from dmt_convert.errors import BundleError, DataError
from dmt_convert.spec import ModelSpec

MAX_NAMES: Final = 8
"""Names that a message lists before it counts the rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InputMap:
    """Which columns of a data set feed a model."""

    features: tuple[int, ...]
    """For every feature of the model, in its order, the index of the data's bag."""
    dense: tuple[int, ...]
    """For every dense input, the index of the data's dense column; empty for the constant 1.0."""
    constant: bool
    """Whether the model's one dense input is fed 1.0."""
    record: InputRecord
    """The same by name."""
    unused: tuple[str, ...]
    """Columns of ids or numbers that feed nothing."""
    notes: tuple[str, ...]
    """What a user should know of it, one line each."""


def map_inputs(
    dataset: Dataset, spec: ModelSpec, recorded: InputRecord | None = None
) -> tuple[InputMap | None, list[DataError]]:
    """Match a data set's columns to a model's inputs.

    Args:
        dataset: What a reader opened.
        spec: The flat model.
        recorded: What is known of the columns that fed the model so far.

    Returns:
        The map, None if there are faults; and all faults.
    """
    recorded = recorded or InputRecord()
    faults: list[DataError] = []
    features = _match_features(dataset, spec, recorded, faults)
    dense = _match_dense(dataset, spec, recorded, faults)
    form = _check_form(dataset, recorded, faults) if dense else recorded.dense_form
    if features is None or dense is None or faults:
        return None, faults
    constant = not dense and spec.num_dense == 1
    dense_names = tuple(dataset.dense_names[i] for i in dense)
    hashed = dataset.hash_ids and recorded.hashed is not False
    record = InputRecord(
        data=dataset.path.name,
        features={
            name: dataset.feature_names[i]
            for name, i in zip(spec.feature_names, features, strict=True)
        },
        dense=recorded.dense if dense and dataset.dense_order == "fed" else dense_names,
        dense_form=form,
        hashed=recorded.hashed if dataset.feature_order == "fed" else hashed,
    )
    used = {*dense_names, *record.features.values()}
    return InputMap(
        features=features,
        dense=dense,
        constant=constant,
        record=record,
        unused=tuple(
            name for name in (*dataset.dense_names, *dataset.feature_names) if name not in used
        ),
        notes=tuple(_notes(dataset, spec, record, recorded)),
    ), []


def merge_records(known: InputRecord | None, found: InputRecord | None) -> InputRecord | None:
    """Add what is found to what is known already, which stays."""
    if known is None or found is None:
        return known or found
    return InputRecord(
        data=known.data or found.data,
        features=known.features or found.features,
        dense=found.dense if known.dense is None else known.dense,
        dense_form=known.dense_form or found.dense_form,
        hashed=found.hashed if known.hashed is None else known.hashed,
    )


def check_inputs(record: InputRecord, spec: ModelSpec) -> None:
    """Refuse a record that is not of this model.

    Raises:
        BundleError: It names features that the model does not have, or too few dense inputs.
    """
    known = {*spec.feature_names}
    problems = [f"feature {name!r}" for name in record.features if name not in known]
    if record.features:
        problems += [f"no column for {name!r}" for name in known if name not in record.features]
    dense = record.dense
    constant = dense == () and spec.num_dense == 1
    if dense is not None and not constant and len(dense) != spec.num_dense:
        problems.append(f"{len(dense)} dense columns for {spec.num_dense} dense inputs")
    if record.dense_form not in (None, *FORMS):
        problems.append(f"dense inputs in the form {record.dense_form!r}")
    if problems:
        raise BundleError(
            "the record of the data's columns is not of this model",
            expected="a column for every feature and every dense input",
            hint="convert the checkpoint again",
            details=problems[:MAX_NAMES],
        )


def describe_inputs(record: InputRecord) -> str:
    """Say in one line which columns feed a model."""
    parts = [compress_pairs([(column, name) for name, column in record.features.items()])]
    if record.dense is not None:
        parts.append(f"dense inputs {compress_names(record.dense) or 'none'}")
    if record.dense_form is not None:
        parts.append(f"fed as {FORMS[record.dense_form]}")
    return "; ".join(filter(None, parts))


def list_names(names: Sequence[str]) -> str:
    """List names, the first of many."""
    rest = len(names) - MAX_NAMES
    return ", ".join(names[:MAX_NAMES]) + (f" and {rest} more" if rest > 0 else "")


def _match_features(
    dataset: Dataset, spec: ModelSpec, recorded: InputRecord, faults: list[DataError]
) -> tuple[int, ...] | None:
    index = {name: i for i, name in enumerate(dataset.feature_names)}
    found: list[int | None] = []
    torn = []
    for name in spec.feature_names:
        column = recorded.features.get(name, name)
        if column != name and {column, name} <= index.keys():
            torn.append(f"{name}: {column}, as the model was fed so far, or {name}")
        found.append(index.get(name, index.get(column)))
    if torn:
        faults.append(
            DataError(
                f"{dataset.path} has two columns for {len(torn)} of the model's features",
                expected="one column for every feature",
                hint="leave one of each pair out",
                details=torn,
            )
        )
        return None
    missing = [n for n, i in zip(spec.feature_names, found, strict=True) if i is None]
    made_up = dataset.names_are_positional and dataset.feature_order == "array"
    if not missing and not (made_up and len(index) != len(spec.features)):
        return tuple(i for i in found if i is not None)
    counted = _match_numbers(dataset, spec) if len(missing) == len(spec.features) else None
    if counted is None:
        faults.append(_refuse_features(dataset, spec, missing))
    return counted


def _match_numbers(dataset: Dataset, spec: ModelSpec) -> tuple[int, ...] | None:
    """Match names that only count, on both sides or on the model's."""
    wanted = count_columns(spec.feature_names)
    if wanted is None or len(dataset.feature_names) != len(spec.features):
        return None
    in_order = tuple(range(len(wanted)))
    numbers = count_columns(dataset.feature_names)
    if numbers is None:
        # names that mean something, in an order that means something
        return in_order if dataset.feature_order != "file" and wanted == in_order else None
    if dataset.lists_file_columns("feature_order") and numbers != in_order:
        return None  # the list says one thing, the numbers another
    at = {number: i for i, number in enumerate(numbers)}
    return tuple(at[number] for number in wanted)


def _refuse_features(dataset: Dataset, spec: ModelSpec, missing: list[str]) -> DataError:
    types = dataset.column_types
    wrong = [name for name in missing if name in types]
    absent = [name for name in missing if name not in types]
    details = [_wrong_type(name, types[name], spec) for name in wrong]
    if wrong and not absent:
        return DataError(
            f"{dataset.path}: {len(wrong)} of the model's {len(spec.features)} features have "
            f"columns that do not hold ids: "
            + list_names([f"{name} ({types[name]})" for name in wrong]),
            expected="integers, or lists of integers",
            hint=details[0],
            details=details[1:],
        )
    if absent:
        details.append(f"missing: {list_names(absent)}")
    details.append(f"the data have {len(dataset.feature_names)}: {_listing(dataset)}")
    return DataError(
        f"{dataset.path} lacks {len(missing)} of the model's {len(spec.features)} features"
        if missing
        else f"{dataset.path} has {len(dataset.feature_names)} columns of ids without names, the "
        f"model has {len(spec.features)} features",
        expected="every feature of the model as a column of ids, by name; or as many columns as "
        "features, if the names on both sides only count (C1, C2, ...)",
        hint=_features_hint(dataset, spec),
        details=details,
    )


def _listing(dataset: Dataset) -> str:
    return compress_names(dataset.feature_names) or "none"


def _wrong_type(name: str, kind: str, spec: ModelSpec) -> str:
    if kind in ("float", "double", "halffloat"):
        return f'{name} holds {kind}: write it as integers, in pandas df["{name}"].astype("Int64")'
    if kind == "null":
        return f"{name} is empty: give it the type int64"
    return (
        f"{name} holds {kind}: map its values to the {spec.table_of(name).rows:,} rows of its "
        "table, as for training (docs/data.md shows how)"
    )


def _features_hint(dataset: Dataset, spec: ModelSpec) -> str:
    count = len(spec.features)
    names = dataset.feature_names
    rename = "rename the columns, or name the features with --model-config"
    if dataset.feature_order == "file" and count_columns(spec.feature_names) is not None:
        group = _counted_group(names, count)
        line = _line("features", group) if group else '{"features": ["...", ...]}'
        why = "the columns in the order of training" if group is None else "those that count"
        return f"write {SCHEMA_NAME} beside the data, with {why}: {line}; or {rename}"
    if dataset.names_are_positional:
        return (
            f"name the columns in {SCHEMA_NAME} beside the data: "
            f"{_line('features', spec.feature_names)}, in the order of the array"
        )
    return rename


def _line(key: str, names: Sequence[str]) -> str:
    """Write a line of schema.json; of many names the first and the last ones."""
    shown = [json.dumps(name, ensure_ascii=False) for name in names]
    if len(shown) > 40:
        shown = [*shown[:3], "...", shown[-1]]
    return f'{{"{key}": [{", ".join(shown)}]}}'


def _counted_group(names: Sequence[str], count: int) -> tuple[str, ...] | None:
    """Return the one group of `count` names that count, in their order; None if there is none."""
    prefixes: dict[str, list[str]] = {}
    for name in names:
        prefixes.setdefault(name.rstrip("0123456789"), []).append(name)
    groups = []
    for group in prefixes.values():
        numbers = count_columns(group) if len(group) == count else None
        if numbers is not None:
            groups.append(tuple(name for _, name in sorted(zip(numbers, group, strict=True))))
    return groups[0] if len(groups) == 1 else None


def _match_dense(
    dataset: Dataset, spec: ModelSpec, recorded: InputRecord, faults: list[DataError]
) -> tuple[int, ...] | None:
    """Return the index of the dense column of every dense input; () for the constant 1.0."""
    if dataset.dense_order != "file":
        return _choose_dense(dataset, spec, recorded, faults)
    # a feature's column may hold floats by mistake: it is no dense input
    names = _strangers(dataset.dense_names, spec)
    own = replace(dataset, dense_names=names, num_dense=len(names))
    found = _choose_dense(own, spec, recorded, faults)
    return found and tuple(dataset.dense_names.index(names[i]) for i in found)


def _choose_dense(
    dataset: Dataset, spec: ModelSpec, recorded: InputRecord, faults: list[DataError]
) -> tuple[int, ...] | None:
    names, wanted = dataset.dense_names, spec.num_dense
    settled = dataset.dense_order != "file"
    if wanted == 0 and not settled:
        return ()
    known = recorded.dense if dataset.dense_order != "fed" else None
    if not names and wanted == 1 and not known:
        return ()
    if known == () and wanted == 1 and not settled:
        return ()
    if not names or (settled and len(names) != wanted):
        faults.append(_refuse_count(dataset, spec, recorded))
        return None
    if known is not None:
        found = _match_known(dataset, known)
        if found is None:
            faults.append(_refuse_other(dataset, known))
        return found
    if settled:
        return tuple(range(wanted))
    numbers = count_columns(names)
    if len(names) == wanted > 1 and numbers is not None:  # one may be a stranger to the model
        at = {number: i for i, number in enumerate(numbers)}
        return tuple(at[number] for number in range(wanted))
    faults.append(_ask_dense(dataset, spec))
    return None


def _strangers(names: Sequence[str], spec: ModelSpec) -> tuple[str, ...]:
    own = {*spec.feature_names}
    return tuple(name for name in names if name not in own)


def _match_known(dataset: Dataset, known: tuple[str, ...]) -> tuple[int, ...] | None:
    """Match dense columns to those that fed the model so far; None if they are others."""
    names = dataset.dense_names
    numbers, wanted = count_columns(names), count_columns(known)
    index = {name: i for i, name in enumerate(names)}
    if all(name in index for name in known):
        found = tuple(index[name] for name in known)
    elif len(names) != len(known) or wanted is None:
        return None
    elif numbers is not None:
        at = {number: i for i, number in enumerate(numbers)}
        found = tuple(at[number] for number in wanted)
    else:  # names that mean something, in the order that the user lists
        return tuple(range(len(known))) if dataset.dense_order == "listed" else None
    # a list of a file's columns in an order of its own contradicts the record
    in_order = found == tuple(range(len(names)))
    return None if dataset.lists_file_columns("dense_order") and not in_order else found


def _refuse_count(dataset: Dataset, spec: ModelSpec, recorded: InputRecord) -> DataError:
    names, wanted = dataset.dense_names, spec.num_dense
    own = f": {compress_names(names)}" if names else ""
    integers = _strangers(dataset.feature_names, spec)
    hint = "give the data that the model was trained on; `dmt inspect` shows the model"
    if dataset.column_types and len(names) < wanted:
        group = recorded.dense or _counted_group((*names, *integers), wanted)
        line = _line("dense_features", group) if group else '{"dense_features": ["...", ...]}'
        hint = (
            f"dense columns that hold integers are named in {SCHEMA_NAME} beside the data, in the "
            f"order of training: {line}"
        )
    elif dataset.dense_order == "listed":
        hint = f"correct the dense_features of {SCHEMA_NAME}"
    return DataError(
        f"{dataset.path} has {len(names)} dense inputs, the model takes {wanted}{own}",
        expected=f"{wanted} dense columns",
        hint=hint,
        details=[f"integer columns: {compress_names(integers)}"]
        if dataset.column_types and integers
        else (),
    )


def _ask_dense(dataset: Dataset, spec: ModelSpec) -> DataError:
    """Ask which columns are dense: their number, or their names, do not settle it."""
    names, wanted = dataset.dense_names, spec.num_dense
    group = _counted_group(names, wanted)
    order = "in the order of training" if group is None else "which leaves the others out"
    example = group or (names if len(names) == wanted else (*names[:wanted],))
    line = _line("dense_features", example)
    hint = f"write {SCHEMA_NAME} beside the data, {order}: {line}"
    if wanted == 1:
        hint = (
            f'write {SCHEMA_NAME} beside the data: {{"dense_features": []}} if the model takes the '
            f"constant 1.0, otherwise for example {line}"
        )
    if len(names) == wanted:
        found = f"does not say in which order its {wanted} float columns are the dense inputs"
        found = found if wanted > 1 else "does not say whether its float column is the dense input"
    else:
        found = f"has {len(names)} float columns, the model takes {wanted} dense inputs"
    return DataError(
        f"{dataset.path} {found}: {compress_names(names)}",
        expected="the dense inputs by name, in the order of training, or names that only count "
        "(I1, I2, ...)",
        hint=hint,
    )


def _refuse_other(dataset: Dataset, known: tuple[str, ...]) -> DataError:
    names = dataset.dense_names
    absent = [name for name in known if name not in names]
    others = [name for name in names if name not in known]
    details = [f"missing: {list_names(absent)}"] if absent else ["in another order"]
    if others:
        details.append(f"others: {list_names(others)}")
    made_up = dataset.dense_order == "array"
    return DataError(
        f"{dataset.path} has the dense inputs {compress_names(names)}; the model was fed "
        f"{compress_names(known) or 'the constant 1.0'} so far",
        expected=f"the dense inputs {compress_names(known)}" if known else "no dense inputs",
        hint=f"name the columns of the array in {SCHEMA_NAME} beside the data: "
        f"{_line('dense_features', known)}"
        if made_up
        else f"rename the columns, or name the same ones in {SCHEMA_NAME}: "
        f"{_line('dense_features', known)}",
        details=details,
    )


def _check_form(dataset: Dataset, recorded: InputRecord, faults: list[DataError]) -> str | None:
    """Compare the form of the dense inputs with that of the model so far; return it."""
    mine, known = dataset.dense_form, recorded.dense_form
    if mine is None or known is None or mine == known:
        return mine or known
    if known == STORED and dataset.form_is_stated:
        return mine
    name = mine if known == STORED else known
    faults.append(
        DataError(
            f"{dataset.path}: dense inputs would be fed as {FORMS[mine]}, the model was fed "
            f"{FORMS[known]} so far",
            expected="dense inputs in the same form as before",
            hint=f'write {SCHEMA_NAME} beside the data: {{"dense_transform": "{name}"}}'
            + (
                f", if that is the form of the dense inputs: {FORMS[name]} of the raw counts"
                if STORED in (mine, known)
                else ""
            ),
        )
    )
    return None


def _notes(
    dataset: Dataset, spec: ModelSpec, record: InputRecord, recorded: InputRecord
) -> list[str]:
    """Say how columns were matched, unless the model's own record says the same."""
    notes = []
    others = [(column, name) for name, column in record.features.items() if column != name]
    if others and dict(record.features) != dict(recorded.features):
        notes.append(f"columns -> features: {compress_pairs(others)}")
    if record.dense == () and spec.num_dense == 1:
        if recorded.dense != ():
            notes.append("no dense inputs: the model's one is fed 1.0")
    elif dataset.dense_order != "fed" and spec.num_dense:
        if record.dense != recorded.dense:
            notes.append(f"dense inputs, in this order: {compress_names(record.dense or ())}")
        if record.dense_form not in (None, STORED, recorded.dense_form):
            notes.append(
                f"dense inputs are fed as {FORMS[str(record.dense_form)]} of the raw counts; "
                f"`dense_transform` in {SCHEMA_NAME} can say otherwise"
            )
    if record.hashed and not recorded.hashed:
        notes.append("ids are taken modulo the tables' rows")
    if dataset.hash_ids and recorded.hashed is False:
        notes.append("ids are not taken modulo the tables' rows: so far the model was fed others")
    return notes
