"""The families that can be read."""

from __future__ import annotations

from typing import Final

from dmt_convert.architectures.architecture import Architecture
from dmt_convert.architectures.deepctr import DEEPCTR
from dmt_convert.architectures.facebook_dlrm import FACEBOOK_DLRM
from dmt_convert.architectures.fuxictr import FUXICTR
from dmt_convert.architectures.hugectr import HUGECTR
from dmt_convert.architectures.nvidia_dlrm import NVIDIA_DLRM
from dmt_convert.architectures.torcheasyrec import TORCHEASYREC
from dmt_convert.architectures.torchrec_dlrm import TORCHREC_DLRM

ARCHITECTURES: Final[tuple[Architecture, ...]] = (
    TORCHREC_DLRM,
    FACEBOOK_DLRM,
    NVIDIA_DLRM,
    DEEPCTR,
    FUXICTR,
    TORCHEASYREC,
    HUGECTR,
)
"""All families."""
