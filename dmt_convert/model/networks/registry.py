"""Dense parts that are neither DLRM's nor DCN's: modules over dense inputs and embeddings.

A network is an `nn.Module` whose `forward(dense_BD, pooled)` takes the dense inputs, shape (B, D),
and one tensor (B, N_f) per feature, in the features' order, and gives the logit before any
sigmoid, shape (B,). Its tensors' canonical names are `network.` and their names in its state dict.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import nn

from dmt_convert.adapter import USER, build_user_network
from dmt_convert.capture import CAPTURED, CapturedNetwork
from dmt_convert.errors import ConfigError
from dmt_convert.model.networks.deep_cross import DeepCross
from dmt_convert.model.networks.layer_graph import LayerGraph
from dmt_convert.model.networks.paired_dlrm import PairedDlrm
from dmt_convert.spec import NetworkSpec

Factory = Callable[[Mapping[str, Any], Sequence[int], int], nn.Module]
"""Builds a network of its config, the embedding dims N_f of the features, and D."""

NETWORKS: Final[Mapping[str, Factory]] = {
    CAPTURED: CapturedNetwork,
    "deep-cross": DeepCross,
    "dot-pairs": PairedDlrm,
    "layer-graph": LayerGraph,
}
"""All built-in networks, by name."""


def build_network(spec: NetworkSpec, dims: Sequence[int], num_dense: int) -> nn.Module:
    """Build a network in memory, initialised as its author does.

    Args:
        spec: The network.
        dims: Embedding dims N_f of the features, in their order.
        num_dense: Number of dense inputs D.

    Raises:
        ConfigError: The network is unknown, or the user's file that defines it was not given.
    """
    # models are built on the meta device, where values that a network computes when it is built
    # would be lost
    with torch.device("cpu"):
        if spec.name == USER:
            return build_user_network(spec, dims, num_dense)
        return _factory(spec)(spec.config, tuple(dims), num_dense)


def _factory(spec: NetworkSpec) -> Factory:
    if spec.name not in NETWORKS:
        raise ConfigError(
            f"the model's dense part is a network {spec.name!r}",
            expected="one of " + (", ".join(sorted(NETWORKS)) or "none"),
            hint="use the version of dmt-convert that wrote the bundle, or a newer one",
        )
    return NETWORKS[spec.name]
