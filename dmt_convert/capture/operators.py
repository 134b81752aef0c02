"""The operators that a captured graph may have, by name. No torch.

A name is that of an ATen operator, as torch's core decompositions leave it. All of them return new
tensors, draw nothing at random, write nowhere, and give a result whose size follows from the sizes
of what they take. What is not listed is refused, at capture and when a bundle is opened.
"""

from __future__ import annotations

from typing import Final


def _aten(names: str) -> tuple[str, ...]:
    return tuple(f"aten.{name}" for name in names.split())


MOVES: Final = frozenset(
    {
        "aten.alias.default",
        "aten.cat.default",
        "aten.clone.default",
        "aten.detach.default",
        "aten.expand.default",
        "aten.index_select.default",
        "aten.permute.default",
        "aten.select.int",
        "aten.slice.Tensor",
        "aten.split_with_sizes.default",
        "aten.squeeze.dim",
        "aten.squeeze.dims",
        "aten.unsqueeze.default",
        "aten.view.default",
        "getitem",
    }
)
"""Operators that only move elements: where each one comes from can be followed."""

ELEMENTWISE: Final = frozenset(
    _aten(
        "_to_copy.default abs.default acos.default add.Scalar add.Tensor asin.default "
        "atan.default atan2.default bitwise_and.Scalar bitwise_and.Tensor bitwise_not.default "
        "bitwise_or.Scalar bitwise_or.Tensor bitwise_xor.Scalar bitwise_xor.Tensor ceil.default "
        "clamp.Tensor clamp.default clamp_max.default clamp_min.default cos.default "
        "cosh.default div.Scalar div.Scalar_mode div.Tensor div.Tensor_mode elu.default "
        "eq.Scalar eq.Tensor erf.default exp.default expm1.default floor.default fmod.Scalar "
        "fmod.Tensor ge.Scalar ge.Tensor gelu.default gt.Scalar gt.Tensor hardtanh.default "
        "isinf.default isnan.default le.Scalar le.Tensor leaky_relu.default log.default "
        "log10.default log1p.default log2.default logical_and.default logical_not.default "
        "logical_or.default logical_xor.default lt.Scalar lt.Tensor maximum.default "
        "minimum.default mul.Scalar mul.Tensor ne.Scalar ne.Tensor neg.default pow.Scalar "
        "pow.Tensor_Scalar pow.Tensor_Tensor reciprocal.default relu.default remainder.Scalar "
        "remainder.Tensor round.default rsqrt.default rsub.Scalar sigmoid.default sign.default "
        "silu.default sin.default sinh.default softplus.default sqrt.default sub.Scalar "
        "sub.Tensor tan.default tanh.default trunc.default where.self"
    )
)
_REDUCTIONS: Final = frozenset(
    _aten(
        "_log_softmax.default _softmax.default amax.default amin.default any.default any.dim "
        "any.dims argmax.default argmin.default argsort.default cumsum.default "
        "logsumexp.default max.dim mean.default mean.dim min.dim prod.dim_int sort.default "
        "sum.default sum.dim_IntList topk.default var.correction var.dim"
    )
)
_PRODUCTS: Final = frozenset(
    _aten(
        "_native_batch_norm_legit_no_training.default addmm.default avg_pool1d.default "
        "avg_pool2d.default baddbmm.default bmm.default convolution.default dot.default "
        "max_pool2d_with_indices.default mm.default mv.default native_group_norm.default "
        "native_layer_norm.default"
    )
)
_SHAPES: Final = frozenset(
    _aten(
        "arange.start_step constant_pad_nd.default copy.default diagonal.default "
        "embedding.default fill.Scalar flip.default full.default full_like.default "
        "gather.default index.Tensor repeat.default scalar_tensor.default "
        "select_scatter.default slice_scatter.default tril.default triu.default"
    )
)
NUMBERS: Final = frozenset({"size", "add", "sub", "mul", "floordiv", "mod"})
"""Sizes, and arithmetic with them."""
OPERATORS: Final = MOVES | ELEMENTWISE | _REDUCTIONS | _PRODUCTS | _SHAPES | NUMBERS
"""All operators that a captured graph may have."""
MAKES: Final = frozenset(
    {"aten.arange.start_step", "aten.full.default", "aten.scalar_tensor.default"}
)
"""Operators that make a tensor of numbers alone, on the device on which the graph runs."""
SQUASHES: Final = frozenset({"aten.sigmoid.default", "aten._softmax.default"})
"""Operators that give probabilities."""
LOOKS_UP: Final = frozenset(
    _aten(
        "_embedding_bag.default _embedding_bag_forward_only.default embedding.default "
        "embedding_bag.padding_idx gather.default index.Tensor index_select.default "
        "take.default"
    )
)
"""Operators that choose rows of their first argument by the others."""
DTYPES: Final = frozenset(
    {"float32", "float64", "int64", "int32", "int16", "int8", "uint8", "bool"}
)
"""Types of elements that a captured graph may have."""
