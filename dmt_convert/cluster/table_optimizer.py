"""The tables' optimizer, which TorchRec fuses with the backward pass.

Letters: R rows of a shard, N its columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, Literal

import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torchrec.distributed.fbgemm_qcomm_codec import CommType  # noqa: F401  registers fbgemm's ops

from dmt_convert.cluster.cluster_model import ShardedModel, table_of
from dmt_convert.errors import ConfigError

TableOptimizerKind = Literal["rowwise-adagrad", "adagrad", "sgd", "adam"]

EPSILON: Final = 1e-8
"""Added to the root of squared gradients."""


def fused_parameters(
    kind: TableOptimizerKind, *, lr: float, device_type: str = "cpu"
) -> dict[str, Any]:
    """Say in fbgemm's words which optimizer moves the tables.

    Args:
        kind: The optimizer.
        lr: Its learning rate.
        device_type: cpu or cuda.

    Raises:
        ConfigError: fbgemm does not have it on this device.
    """
    from fbgemm_gpu.split_embedding_configs import EmbOptimType

    if kind == "adam" and device_type == "cpu":
        raise ConfigError(
            "tables moved by adam on CPU ranks",
            expected="rowwise-adagrad, adagrad or sgd, which fbgemm fuses on CPUs",
            hint="use --table-optimizer rowwise-adagrad, or run one process without torchrun",
        )
    kinds = {
        "rowwise-adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        "adagrad": EmbOptimType.EXACT_ADAGRAD,
        "sgd": EmbOptimType.EXACT_SGD,
        "adam": EmbOptimType.ADAM,
    }
    return {"optimizer": kinds[kind], "learning_rate": lr, "eps": EPSILON}


class FusedTables:
    """Learning rate and state of the tables' optimizer.

    Args:
        model: The sharded model.
    """

    def __init__(self, model: ShardedModel) -> None:
        self._optimizer = model.parallel.fused_optimizer
        self._model = model
        # tables whose gradients are multiplied are in kernels of their own
        factors = {
            id(value): model.widths[table_of(name)].factor
            for name, value in self._optimizer.params.items()
        }
        self._factors = [
            factors[id(group["params"][0])] if group["params"] else 1.0
            for group in self._optimizer.param_groups
        ]

    def set_lr(self, lr: float) -> None:
        """Set the learning rate; the next backward pass moves tables by it."""
        for group, factor in zip(self._optimizer.param_groups, self._factors, strict=True):
            group["lr"] = lr / factor
        self._optimizer.step()  # hands it to the kernels; nothing moves

    def accumulators(self) -> Iterator[tuple[str, Tensor]]:
        """Yield Adagrad's squared gradients of every shard here: table, state (R,) or (R, N)."""
        for name, state in self.state_dict().items():
            table = table_of(name)
            for key, value in state.items():
                if key.endswith("momentum1"):
                    for part in _local_parts(value):
                        yield table, part

    def state_dict(self) -> dict[str, Any]:
        """Return the state by parameter, sharded as the tables are."""
        found: dict[str, dict[str, Any]] = self._optimizer.state_dict()["state"]
        return {
            name: {
                key: self._model.trim({name: value})[name] if _is_per_element(value) else value
                for key, value in state.items()
            }
            for name, state in found.items()
        }


def _is_per_element(value: Any) -> bool:
    return isinstance(value, ShardedTensor) and len(value.size()) == 2


def _local_parts(value: Any) -> list[Tensor]:
    if hasattr(value, "local_shards"):
        return [shard.tensor for shard in value.local_shards()]
    if hasattr(value, "to_local"):
        return [value.to_local()]
    assert isinstance(value, torch.Tensor)
    return [value]
