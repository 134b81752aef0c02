"""Generate click data with planted feature groups, for demonstrations and tests.

    python -m dmt_convert.recipes.generate_clicks --out clicks --rows 100000 --seed 0

writes `train.npz`, `valid.npz`, `test.npz` and `schema.json`, all that `--data` and
`--calibration` need. The same configuration always gives the same numbers.

The truth is a factorisation machine that acts inside groups. Every id has a latent vector; the
logit adds the dot products of the latent vectors of all pairs of features in the same group, a
little of the pairs across groups, a term per id, a linear term of the dense inputs, and noise. A
partition that keeps a group together keeps its interactions inside one tower.

Every id also belongs to a topic of its group, and its latent vector lies near the topic's. A row
draws one topic per group, which some of its features follow. The latent vectors have one dimension
by default: a model that learns the dot products of a group can then do so along one direction of
its own embeddings, so that the cosines inside groups come out larger than those across.

Letters: B rows, D dense inputs, F features, L latent dims.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from dmt_convert.errors import ConfigError, DmtError

_LOG = logging.getLogger(__name__)

_SPLITS: Final = {"train": (0.0, 0.8), "valid": (0.8, 0.9), "test": (0.9, 1.0)}

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClickConfig:
    """What to generate."""

    rows: int = 100_000
    """B, over all three files: 80 % train, 10 % valid, 10 % test."""
    num_dense: int = 4
    """D; may be 0."""
    groups: int = 4
    """Number of planted feature groups."""
    features_per_group: int = 4
    """Number of categorical features in every group."""
    min_cardinality: int = 10
    """Fewest ids of a feature."""
    max_cardinality: int = 300
    """Most ids of a feature; cardinalities are log-uniform between the two."""
    zipf_exponent: float = 1.0
    """The id of rank r is drawn in proportion to (r + 10) ** -exponent."""
    rank: int = 1
    """L, dimensions of the latent vectors."""
    topics: int = 8
    """Topics per group."""
    correlation: float = 0.5
    """Probability that a feature follows its group's topic in a row."""
    strength_within: float = 2.0
    """Standard deviation of what the pairs inside groups add to the logit."""
    strength_across: float = 0.1
    """The same of the pairs across groups."""
    strength_first_order: float = 0.1
    """The same of the terms per id."""
    strength_dense: float = 0.3
    """The same of the dense inputs."""
    noise: float = 0.3
    """Standard deviation of the part of the logit that no input explains."""
    positives: float = 0.25
    """Expected share of rows with label 1."""
    seed: int = 0
    """Seed of everything that is drawn."""

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {getattr(self, name)}, which is below {least}"
            for name, least in (
                ("rows", 10),
                ("num_dense", 0),
                ("groups", 1),
                ("features_per_group", 1),
                ("min_cardinality", 1),
                ("max_cardinality", self.min_cardinality),
                ("rank", 1),
                ("topics", 1),
                ("seed", 0),
            )
            if getattr(self, name) < least
        ]
        if not 0 <= self.correlation <= 1:
            problems.append(f"correlation is {self.correlation}, not between 0 and 1")
        if not 0 < self.positives < 1:
            problems.append(f"positives is {self.positives}, not between 0 and 1")
        if problems:
            raise ConfigError(
                "click data of this shape cannot be generated",
                expected="at least 10 rows, one group, one feature per group and one id per "
                "feature; probabilities between 0 and 1",
                hint="change the values listed",
                details=problems,
            )

    @property
    def num_features(self) -> int:
        """F."""
        return self.groups * self.features_per_group


@dataclass(frozen=True, slots=True, kw_only=True)
class Clicks:
    """Generated rows and the truth behind them."""

    dense: npt.NDArray[np.float32]
    """Dense inputs, shape (B, D)."""
    sparse: npt.NDArray[np.int32]
    """One id per row and feature, shape (B, F)."""
    label: npt.NDArray[np.uint8]
    """0 or 1, shape (B,)."""
    logits: Floats
    """What the labels were drawn from, shape (B,)."""
    group_of: Ints
    """Planted group of every feature, shape (F,)."""
    latents: tuple[Floats, ...]
    """Latent vectors of the ids of every feature, each of shape (cardinality, L)."""

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Names of the categorical features; the groups cannot be told from them."""
        return tuple(f"cat_{i:02d}" for i in range(len(self.group_of)))

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Feature names of every planted group."""
        names = np.array(self.feature_names)
        return tuple(
            tuple(names[self.group_of == g].tolist()) for g in range(self.group_of.max() + 1)
        )


def sample_clicks(config: ClickConfig) -> Clicks:
    """Draw rows, in memory."""
    rng = np.random.default_rng(config.seed)
    group_of = rng.permutation(np.repeat(np.arange(config.groups), config.features_per_group))
    low, high = np.log(config.min_cardinality), np.log(config.max_cardinality)
    cardinalities = np.exp(rng.uniform(low, high, config.num_features)).round().astype(np.int64)
    topic_vectors = rng.normal(size=(config.groups, config.topics, config.rank))
    # Of length 1, or an id's usual partners would tell as much as the id does.
    topic_vectors /= np.linalg.norm(topic_vectors, axis=-1, keepdims=True)
    row_topics = rng.integers(config.topics, size=(config.groups, config.rows))

    columns: list[Ints] = []
    latents: list[Floats] = []
    for group, cardinality in zip(group_of, cardinalities, strict=True):
        topic_of = rng.permutation(cardinality) % config.topics
        columns.append(_sample_ids(rng, config, topic_of, row_topics[group]))
        jitter = 0.3 * rng.normal(size=(cardinality, config.rank))
        latents.append(topic_vectors[group, topic_of] + jitter)

    dense = rng.normal(size=(config.rows, config.num_dense))
    logits = (
        config.strength_within * _standardise(_pairs_within(columns, latents, group_of))
        + config.strength_across * _standardise(_pairs_across(rng, columns, latents, group_of))
        + config.strength_first_order * _standardise(_first_order(rng, columns, latents))
        + config.strength_dense * _standardise(dense @ rng.normal(size=config.num_dense))
        + config.noise * rng.normal(size=config.rows)
    )
    logits += _bias_for(logits, config.positives)
    return Clicks(
        dense=dense.astype(np.float32),
        sparse=np.stack(columns, axis=1).astype(np.int32),
        label=(rng.random(config.rows) < _sigmoid(logits)).astype(np.uint8),
        logits=logits,
        group_of=group_of,
        latents=tuple(latents),
    )


def generate_clicks(config: ClickConfig, out: Path) -> Clicks:
    """Write `train.npz`, `valid.npz`, `test.npz` and `schema.json` into a folder.

    Args:
        config: What to generate.
        out: The folder; made where it is missing, its files of these names replaced.

    Returns:
        What was written, with the truth behind it.
    """
    clicks = sample_clicks(config)
    out.mkdir(parents=True, exist_ok=True)
    for split, (begin, end) in _SPLITS.items():
        rows = slice(round(begin * config.rows), round(end * config.rows))
        np.savez(
            out / f"{split}.npz",
            dense=clicks.dense[rows],
            sparse=clicks.sparse[rows],
            label=clicks.label[rows],
        )
    schema = {
        "name": f"generated clicks, seed {config.seed}",
        "label": "label (uint8, 1 = click)",
        "dense_features": [f"dense_{i}" for i in range(config.num_dense)],
        "sparse_features": [
            {"name": name, "cardinality": len(latent)}
            for name, latent in zip(clicks.feature_names, clicks.latents, strict=True)
        ],
        "groups": clicks.groups,
    }
    (out / "schema.json").write_text(json.dumps(schema, indent=1) + "\n", encoding="utf-8")
    _LOG.info("wrote %d rows, %.1f %% clicks, to %s", config.rows, 100 * clicks.label.mean(), out)
    return clicks


def _sample_ids(
    rng: np.random.Generator, config: ClickConfig, topic_of: Ints, row_topics: Ints
) -> Ints:
    """Draw one id per row, shape (B,), from its topic's ids where the row follows the topic."""
    weights = (np.arange(len(topic_of)) + 10.0) ** -config.zipf_exponent
    # With the ids of a topic side by side, a topic is an interval of the cumulative distribution.
    order = np.argsort(topic_of, kind="stable")
    cumulative = np.cumsum(weights[order]) / weights.sum()
    ends = np.searchsorted(topic_of[order], np.arange(config.topics), side="right")
    edges = np.concatenate([[0.0], np.append(0.0, cumulative)[ends]])
    # A feature with fewer ids than there are topics has ids of the first few topics only.
    topics = row_topics % min(config.topics, len(topic_of))
    position = rng.random(config.rows)
    follows = rng.random(config.rows) < config.correlation
    begin, end = edges[topics], edges[topics + 1]
    position = np.where(follows, begin + position * (end - begin), position)
    found = np.searchsorted(cumulative, position, side="right")
    ids: Ints = order[np.minimum(found, len(order) - 1)]
    return ids


def _pairs_within(columns: Sequence[Ints], latents: Sequence[Floats], group_of: Ints) -> Floats:
    """Sum of the dot products of all pairs inside groups, shape (B,)."""
    total = np.zeros(len(columns[0]))
    for group in range(group_of.max() + 1):
        members = np.flatnonzero(group_of == group).tolist()
        total += _all_pairs([columns[f] for f in members], [latents[f] for f in members])
    return total


def _pairs_across(
    rng: np.random.Generator,
    columns: Sequence[Ints],
    latents: Sequence[Floats],
    group_of: Ints,
) -> Floats:
    """Sum of the dot products of all pairs across groups, of other vectors, shape (B,)."""
    vectors = [rng.normal(size=latent.shape) for latent in latents]
    return _all_pairs(columns, vectors) - _pairs_within(columns, vectors, group_of)


def _all_pairs(columns: Sequence[Ints], vectors: Sequence[Floats]) -> Floats:
    """Sum of <v_i, v_j> over i < j, as half of |sum v|^2 - sum |v|^2, shape (B,)."""
    total = np.zeros((len(columns[0]), vectors[0].shape[1]))
    squares = np.zeros(len(columns[0]))
    for ids, table in zip(columns, vectors, strict=True):
        total += table[ids]
        squares += np.square(table).sum(axis=1)[ids]
    pairs: Floats = (np.square(total).sum(axis=1) - squares) / 2
    return pairs


def _first_order(
    rng: np.random.Generator, columns: Sequence[Ints], latents: Sequence[Floats]
) -> Floats:
    """Sum of one weight per id, shape (B,)."""
    total = np.zeros(len(columns[0]))
    for ids, latent in zip(columns, latents, strict=True):
        total += rng.normal(size=len(latent))[ids]
    return total


def _standardise(values: Floats) -> Floats:
    """Shift and scale to mean 0 and standard deviation 1; a constant becomes 0."""
    spread = values.std()
    centred: Floats = values - values.mean()
    return centred / spread if spread > 0 else centred


def _sigmoid(logits: Floats) -> Floats:
    probabilities: Floats = 1 / (1 + np.exp(-logits))
    return probabilities


def _bias_for(logits: Floats, positives: float) -> float:
    """Constant that gives the logits this mean probability, by bisection."""
    low, high = -50.0, 50.0
    for _ in range(60):
        middle = (low + high) / 2
        if _sigmoid(logits + middle).mean() < positives:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and generate."""
    default = ClickConfig()
    parser = argparse.ArgumentParser(
        description="Generate click data with planted feature groups.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    for option in ("rows", "num_dense", "groups", "features_per_group", "seed"):
        flag = "--" + option.replace("_", "-")
        parser.add_argument(flag, type=int, default=getattr(default, option), help=" ")
    values = vars(parser.parse_args(arguments))
    out = values.pop("out")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        generate_clicks(ClickConfig(**values), out)
    except DmtError as error:
        parser.exit(3, f"{error}\n")


if __name__ == "__main__":
    main()
