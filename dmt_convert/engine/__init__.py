"""The converted model over many ranks: TorchRec's towers, mended, with SPTT's exchanges.

What needs torch and torchrec is imported when it is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dmt_convert.engine.wire import COMM_DTYPES, CommDtype

if TYPE_CHECKING:
    from dmt_convert.engine.cluster_model import ClusterModel, ShardedModel, shard_model
    from dmt_convert.engine.jagged import JaggedBatch, to_jagged
    from dmt_convert.engine.ranks import RankLayout, start_ranks, stop_ranks
    from dmt_convert.engine.shard_loading import load_shards, table_shards
    from dmt_convert.engine.table_optimizer import FusedTables, fused_parameters

_LAZY = {
    "ClusterModel": "cluster_model",
    "FusedTables": "table_optimizer",
    "JaggedBatch": "jagged",
    "RankLayout": "ranks",
    "ShardedModel": "cluster_model",
    "fused_parameters": "table_optimizer",
    "load_shards": "shard_loading",
    "shard_model": "cluster_model",
    "start_ranks": "ranks",
    "stop_ranks": "ranks",
    "table_shards": "shard_loading",
    "to_jagged": "jagged",
}

__all__ = [
    "COMM_DTYPES",
    "ClusterModel",
    "CommDtype",
    "FusedTables",
    "JaggedBatch",
    "RankLayout",
    "ShardedModel",
    "fused_parameters",
    "load_shards",
    "shard_model",
    "start_ranks",
    "stop_ranks",
    "table_shards",
    "to_jagged",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
