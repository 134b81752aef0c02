"""The families that can be read."""

from __future__ import annotations

from typing import Final

from dmt_convert.families.architecture import Architecture
from dmt_convert.families.deepctr import DEEPCTR
from dmt_convert.families.facebook_dlrm import FACEBOOK_DLRM
from dmt_convert.families.fuxictr import FUXICTR
from dmt_convert.families.hugectr import HUGECTR
from dmt_convert.families.nvidia_dlrm import NVIDIA_DLRM
from dmt_convert.families.torcheasyrec import TORCHEASYREC
from dmt_convert.families.torchrec_dlrm import TORCHREC_DLRM

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
