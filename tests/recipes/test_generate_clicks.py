"""Generated clicks: the same every time, and the planted structure is there."""

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmt_convert.errors import ConfigError
from dmt_convert.recipes.generate_clicks import (
    ClickConfig,
    Clicks,
    generate_clicks,
    main,
    sample_clicks,
)

Floats = npt.NDArray[np.float64]


@pytest.fixture(scope="module")
def clicks() -> Clicks:
    return sample_clicks(ClickConfig(rows=20_000))


def cosine_affinity(clicks: Clicks, *, rank: int) -> Floats:
    """Mean |cos| of the true latent vectors, each in its group's own dimensions, shape (F, F)."""
    groups = clicks.group_of.max() + 1
    vectors = np.zeros((*clicks.sparse.shape, groups, rank))
    for f, (group, table) in enumerate(zip(clicks.group_of, clicks.latents, strict=True)):
        vectors[:, f, group] = table[clicks.sparse[:, f]]
    flat = vectors.reshape(*clicks.sparse.shape, -1)
    flat /= np.linalg.norm(flat, axis=-1, keepdims=True)
    affinity: Floats = np.abs(np.einsum("bfl,bgl->bfg", flat, flat)).mean(axis=0)
    return affinity


def nearest_are_of_the_group(affinity: Floats, group_of: npt.NDArray[np.int64]) -> bool:
    same = group_of[:, None] == group_of
    off_diagonal = ~np.eye(len(group_of), dtype=bool)
    return bool(affinity[same & off_diagonal].min() > affinity[~same].max())


def pair_effect(clicks: Clicks, targets: npt.NDArray[np.float64]) -> Floats:
    """|correlation| of the targets with the product of two features' latents, shape (F, F)."""
    values = np.stack([t[clicks.sparse[:, f], 0] for f, t in enumerate(clicks.latents)])
    values -= values.mean(axis=1, keepdims=True)
    products = values[:, None] * values[None]
    products -= products.mean(axis=-1, keepdims=True)
    centred = targets - targets.mean()
    effect: Floats = np.abs(products @ centred) / (
        np.linalg.norm(products, axis=-1) * np.linalg.norm(centred)
    )
    return effect


def test_the_same_seed_gives_the_same_numbers(clicks: Clicks) -> None:
    again = sample_clicks(ClickConfig(rows=20_000))
    for name in ("dense", "sparse", "label", "logits", "group_of"):
        np.testing.assert_array_equal(getattr(again, name), getattr(clicks, name))
    other = sample_clicks(ClickConfig(rows=20_000, seed=1))
    assert not np.array_equal(other.label, clicks.label)


def test_a_quarter_are_clicks(clicks: Clicks) -> None:
    assert clicks.label.mean() == pytest.approx(0.25, abs=0.01)


def test_true_latents_show_the_groups(clicks: Clicks) -> None:
    affinity = cosine_affinity(clicks, rank=1)
    assert nearest_are_of_the_group(affinity, clicks.group_of)
    assert not nearest_are_of_the_group(affinity, np.roll(clicks.group_of, 1))


def test_labels_depend_on_pairs_inside_groups(clicks: Clicks) -> None:
    effect = pair_effect(clicks, clicks.label.astype(np.float64))
    assert nearest_are_of_the_group(effect, clicks.group_of)


def test_without_interactions_labels_show_no_groups() -> None:
    flat = sample_clicks(ClickConfig(rows=20_000, strength_within=0.0, correlation=0.0))
    effect = pair_effect(flat, flat.label.astype(np.float64))
    assert not nearest_are_of_the_group(effect, flat.group_of)


def test_groups_are_neither_contiguous_nor_round_robin(clicks: Clicks) -> None:
    planted = {frozenset(group) for group in clicks.groups}
    names = clicks.feature_names
    assert planted.isdisjoint(frozenset(names[i : i + 4]) for i in range(0, 16, 4))
    assert planted.isdisjoint(frozenset(names[i::4]) for i in range(4))


def test_files_hold_all_rows_and_the_schema(tmp_path: Path) -> None:
    config = ClickConfig(rows=1_000, num_dense=3, groups=2, features_per_group=3)
    clicks = generate_clicks(config, tmp_path / "clicks")
    parts = {
        name: np.load(tmp_path / "clicks" / f"{name}.npz") for name in ("train", "valid", "test")
    }
    assert [len(part["label"]) for part in parts.values()] == [800, 100, 100]
    for key, dtype in (("dense", np.float32), ("sparse", np.int32), ("label", np.uint8)):
        joined = np.concatenate([part[key] for part in parts.values()])
        assert joined.dtype == dtype
        np.testing.assert_array_equal(joined, getattr(clicks, key))
    schema = json.loads((tmp_path / "clicks" / "schema.json").read_text("utf-8"))
    assert schema["dense_features"] == ["dense_0", "dense_1", "dense_2"]
    assert [f["name"] for f in schema["sparse_features"]] == list(clicks.feature_names)
    assert [f["cardinality"] for f in schema["sparse_features"]] == [len(t) for t in clicks.latents]
    assert sorted(name for group in schema["groups"] for name in group) == list(
        clicks.feature_names
    )


@given(
    groups=st.integers(1, 3),
    features=st.integers(1, 3),
    dense=st.integers(0, 2),
    cardinality=st.integers(1, 12),
    topics=st.integers(1, 9),
    correlation=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_any_shape_is_in_range(
    groups: int, features: int, dense: int, cardinality: int, topics: int, correlation: float
) -> None:
    clicks = sample_clicks(
        ClickConfig(
            rows=50,
            num_dense=dense,
            groups=groups,
            features_per_group=features,
            min_cardinality=cardinality,
            max_cardinality=cardinality,
            topics=topics,
            correlation=correlation,
        )
    )
    assert clicks.dense.shape == (50, dense)
    assert clicks.sparse.shape == (50, groups * features)
    assert clicks.sparse.min() >= 0
    assert clicks.sparse.max() < cardinality
    assert np.isfinite(clicks.logits).all()


def test_a_row_that_follows_its_topic_has_ids_of_it() -> None:
    config = ClickConfig(rows=500, groups=1, min_cardinality=8, topics=8, correlation=1.0, rank=3)
    clicks = sample_clicks(config)
    pairs = cosine_affinity(clicks, rank=3)
    free = cosine_affinity(
        sample_clicks(
            ClickConfig(rows=500, groups=1, min_cardinality=8, topics=8, correlation=0.0, rank=3)
        ),
        rank=3,
    )
    off_diagonal = ~np.eye(4, dtype=bool)
    assert pairs[off_diagonal].min() > 0.8 > free[off_diagonal].max()


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"rows": 9}, "rows is 9"),
        ({"groups": 0}, "groups is 0"),
        ({"max_cardinality": 3}, "max_cardinality is 3"),
        ({"correlation": 1.5}, "correlation is 1.5"),
        ({"positives": 0.0}, "positives is 0.0"),
    ],
)
def test_impossible_shapes_are_refused(change: dict[str, float], found: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ClickConfig(**change)  # type: ignore[arg-type]
    assert any(found in line for line in caught.value.details)


def test_command_line_refuses_with_code_3(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--out", str(tmp_path), "--rows", "1"])
    assert caught.value.code == 3
    assert "rows is 1" in capsys.readouterr().err


def test_command_line_writes(tmp_path: Path) -> None:
    main(["--out", str(tmp_path), "--rows", "100", "--seed", "7"])
    assert len(np.load(tmp_path / "train.npz")["label"]) == 80
