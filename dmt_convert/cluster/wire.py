"""In what precision vectors cross hosts.

Letters: n samples, O elements per sample, V vectors of D elements each (V * D = n * O).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from dmt_convert.spec import CommDtype

if TYPE_CHECKING:
    import torch
    from torch import Tensor


_HEADER_BYTES: Final = 4
"""Of the power of two in front of gradients."""
_SCALE_BYTES: Final = {"int8": 8, "fp8": 4}
"""Per vector: int8 keeps a scale and a bias, fp8 a scale, float32 each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wire:
    """Turns float32 into the bytes that travel, and back.

    int8 and fp8 scale every vector by its largest element; fp8 keeps more of the mantissa
    forward (e4m3) and more of the exponent backward (e5m2), as TorchRec's codec does. Gradients
    of a mean over a large batch are tiny: as fp16 and int8 they are first multiplied by a power of
    two, which travels in front of them.
    """

    dtype: CommDtype
    """Precision on the network."""
    vector_dim: int
    """D: elements that share a scale; divides every O."""
    backward: bool = False
    """Whether gradients travel."""

    def nbytes(self, elements: int) -> int:
        """Bytes of so many elements."""
        if not elements:
            return 0
        if self.dtype == "fp32":
            return 4 * elements
        header = _HEADER_BYTES if self._lifts else 0
        if self.dtype in ("fp16", "bf16"):
            return header + 2 * elements
        return header + elements + elements // self.vector_dim * _SCALE_BYTES[self.dtype]

    @property
    def _lifts(self) -> bool:
        """Whether numbers are multiplied before they are packed."""
        return self.backward and self.dtype in ("fp16", "int8")

    def encode(self, x: Tensor) -> Tensor:
        """Return the bytes of a float32 tensor: uint8, shape (nbytes,)."""
        import torch

        if not self._lifts or not x.numel():
            return self._pack(x.contiguous())
        largest = x.abs().max()
        lift = torch.exp2(-torch.floor(torch.log2(largest)).clamp(-100, 100))
        lift = torch.where((largest > 0) & torch.isfinite(largest), lift, 1.0)
        header = lift.reshape(1).view(torch.uint8)
        return torch.cat([header, self._pack((x * lift).contiguous())])

    def decode(self, data: Tensor) -> Tensor:
        """Return what `encode` was given, flattened, as float32."""
        import torch

        if not self._lifts or not data.numel():
            return self._unpack(data)
        header, rest = data.tensor_split([_HEADER_BYTES])
        return self._unpack(rest) / header.clone().view(torch.float32)

    def _pack(self, x: Tensor) -> Tensor:
        import torch

        if self.dtype == "fp32":
            return x.view(-1).view(torch.uint8)
        if self.dtype == "bf16":
            return x.to(torch.bfloat16).view(-1).view(torch.uint8)
        if self.dtype == "fp16":
            largest = torch.finfo(torch.float16).max
            return x.clamp(-largest, largest).to(torch.float16).view(-1).view(torch.uint8)
        vectors = x.view(-1, self.vector_dim)
        if self.dtype == "int8":
            quantized: Tensor = torch.ops.fbgemm.FloatToFused8BitRowwiseQuantized(vectors)
            # fbgemm passes over NaN; a scale of NaN shows that training diverged
            quantized[~torch.isfinite(vectors).all(dim=1), -_SCALE_BYTES["int8"] :] = 255
            return quantized.view(-1)
        kind = self._fp8()
        scale = vectors.abs().amax(dim=1, keepdim=True) / torch.finfo(kind).max
        scale = torch.where(scale >= torch.finfo(torch.float32).tiny, scale, 1.0)
        small = (vectors / scale).to(kind).view(torch.uint8)
        return torch.cat([small.view(-1), scale.view(-1).view(torch.uint8)])

    def _unpack(self, data: Tensor) -> Tensor:
        import torch

        if self.dtype == "fp32":
            return data.view(torch.float32)
        if self.dtype == "bf16":
            return data.view(torch.bfloat16).float()
        if self.dtype == "fp16":
            return data.view(torch.float16).float()
        vectors = data.numel() // (self.vector_dim + _SCALE_BYTES[self.dtype])
        if self.dtype == "int8":
            rows: Tensor = torch.ops.fbgemm.Fused8BitRowwiseQuantizedToFloat(data.view(vectors, -1))
            return rows.view(-1)
        small, scale = data.tensor_split([vectors * self.vector_dim])
        found = small.view(self._fp8()).view(vectors, -1).float()
        scaled: Tensor = found * scale.clone().view(torch.float32).unsqueeze(1)
        return scaled.view(-1)

    def _fp8(self) -> torch.dtype:
        import torch

        return torch.float8_e5m2 if self.backward else torch.float8_e4m3fn
