"""The operations that are replaced, and why: the one list.

**To enrol an operation**: write its form, and register it here under every function of PyTorch by
which users and modules reach it. `innerloop doctor` then shows what the form makes of the
derivatives, and ``tests/test_audit_contract.py`` trains through it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from innerloop._utils import torch_private
from innerloop.nn._derivative_order import beyond_norms, reverse_over_forward
from innerloop.nn._mode import open_up, register
from innerloop.nn._replacements import (
    attention,
    cross_entropy,
    ctc_loss,
    distance,
    elementary,
    embedding_bag,
    grid_sample,
    norm,
    recurrent,
)
from innerloop.nn._replacements import losses as loss
from innerloop.nn._replacements import norm_positional as direct
from innerloop.nn._replacements.weight_norm import weight_norm

ATTENTION = "F.scaled_dot_product_attention"
KERNELS = {
    "WeightNormInterfaceBackward0": "torch._weight_norm",
    "CrossMapLRN2dBackward": "nn.CrossMapLRN2d",
    "CdistBackward0": "torch.cdist",
    "PdistBackward0": "F.pdist",
    "CtcLossBackward0": "F.ctc_loss",
    "CudnnCtcLossBackward0": "F.ctc_loss",
    "EmbeddingBagBackward0": "F.embedding_bag",
    "MultiMarginLossBackward0": "F.multi_margin_loss",
    "MultilabelMarginLossBackward0": "F.multilabel_margin_loss",
    "HardsigmoidBackward0": "F.hardsigmoid",
    "SegmentReduceBackward0": "torch.segment_reduce",
    "StandardGammaBackward0": "torch.distributions.Gamma.rsample",
    "CholeskyInverseBackward0": "torch.cholesky_inverse",
    "EmbeddingBackward0": "F.embedding(scale_grad_by_freq=True)",
    "CudnnRnnBackward0": "a recurrent layer in cuDNN",
    "MiopenRnnBackward0": "a recurrent layer in MIOpen",
    "ScaledDotProductFlashAttentionForCpuBackward0": ATTENTION,
    "ScaledDotProductFlashAttentionBackward0": ATTENTION,
    "ScaledDotProductEfficientAttentionBackward0": ATTENTION,
    "ScaledDotProductCudnnAttentionBackward0": ATTENTION,
    "ScaledDotProductFusedAttentionOverrideableBackward0": ATTENTION,
}
"""Nodes of the autograd graph whose second derivative is missing, or wrong without an error: what a user called to get them."""
WRONG = frozenset(
    {"WeightNormInterfaceBackward0", "CholeskyInverseBackward0", "EmbeddingBackward0"}
)
"""Those of them where it is wrong without an error (the second: for a full matrix)."""
CURES = {
    "F.embedding(scale_grad_by_freq=True)": "Leave it away inside the loop, and divide the "
    "gradient: loop.step(loss, grad_callback=...)",
    "nn.CrossMapLRN2d": "Its gradient is not that of its forward either. Write "
    "nn.LocalResponseNorm",
    "torch.segment_reduce": "Write torch.scatter_reduce, or index_add",
    "torch.distributions.Gamma.rsample": "Draw by another reparametrisation, or hold the sample "
    "constant",
}
"""What to write instead of an operation that innerloop does not replace."""
WRONG_THIRD = {
    "NativeLayerNormBackward0": "layer_norm",
    "NativeBatchNormBackward0": "batch_norm (or instance_norm)",
    "CudnnBatchNormBackward0": "batch_norm (or instance_norm)",
    "MiopenBatchNormBackward0": "batch_norm (or instance_norm)",
}
"""Nodes whose second derivative is right, and whose third is wrong without an error."""
DIFFERENTIATED = frozenset(kind.removesuffix("0") + "Backward0" for kind in WRONG_THIRD)
"""What differentiating those leaves in the graph: a loss that contains one is a function of a gradient."""


CONSTANT = """
    airy_ai bessel_j0 bessel_j1 bessel_y0 bessel_y1 modified_bessel_i0 modified_bessel_i1 modified_bessel_k0 modified_bessel_k1
    scaled_modified_bessel_k0 scaled_modified_bessel_k1 spherical_bessel_j0 hermite_polynomial_h hermite_polynomial_he
    laguerre_polynomial_l legendre_polynomial_p chebyshev_polynomial_t chebyshev_polynomial_u chebyshev_polynomial_v
    chebyshev_polynomial_w shifted_chebyshev_polynomial_t shifted_chebyshev_polynomial_u shifted_chebyshev_polynomial_v
    shifted_chebyshev_polynomial_w
""".split()
"""Functions of ``torch.special`` whose result does not require grad, whatever they are given."""
NO_SECOND = "it has no second derivative"
NO_FORWARD = "it has no forward-mode derivative, or none of its gradient"


def forward_mode(args: Any, kwargs: Any) -> bool:
    """Whether a forward-mode derivative is being taken; otherwise PyTorch's kernel has all that is needed."""
    return torch_private.forward_mode()


def many_logits(args: Any, kwargs: Any) -> bool:
    """Whether the form takes so many logits on itself."""
    logits = args[0] if args else kwargs["input"]
    return isinstance(logits, Tensor) and logits.numel() >= cross_entropy.TAKES_CHUNKS


def differentiated(args: Any, kwargs: Any) -> bool:
    """Whether anything differentiates an argument."""
    return not torch.compiler.is_compiling() and any(
        isinstance(x, Tensor) and torch_private.has_derivative(x) for x in (*args, *kwargs.values())
    )


def by_frequency_or_norm(args: Any, kwargs: Any) -> bool:
    """Whether ``F.embedding`` was asked to divide gradients by counts, or to rescale its weight."""
    by_norm = kwargs.get("max_norm", args[3] if len(args) > 3 else None) is not None
    return by_norm or bool(kwargs.get("scale_grad_by_freq", args[5] if len(args) > 5 else False))


def loses_its_weight(args: Any, kwargs: Any) -> bool:
    """Whether ``F.l1_loss`` was called with a weight."""
    if torch.compiler.is_compiling() or "weight" in kwargs:
        return False
    given = dict(zip(("input", "target"), args, strict=False)) | kwargs
    return loss.weight_of_l1_loss(given["input"], given["target"]) is not None


def in_chunks(args: Any, kwargs: Any) -> bool:
    """Whether ``F.linear_cross_entropy`` was asked to take the logits some rows at a time."""
    return kwargs.get("options") is not None


def into_out(args: Any, kwargs: Any) -> bool:
    """Whether a result is to be written into a given tensor while a forward-mode derivative is taken."""
    return kwargs.get("out") is not None and torch_private.forward_mode()


def product_in_forward_mode(args: Any, kwargs: Any) -> bool:
    """Whether ``scatter_reduce`` multiplies while a forward-mode derivative is taken."""
    return (
        kwargs.get("reduce", args[4] if len(args) > 4 else None) == "prod"
        and torch_private.forward_mode()
    )


register(
    weight_norm,
    torch_private.weight_norm(),
    name="torch._weight_norm",
    reason="its second derivative is wrong without an error",
    silent=True,
)


register(
    embedding_bag.embedding,
    F.embedding,
    name="F.embedding(scale_grad_by_freq=..., max_norm=...)",
    reason="what autograd does not see of it makes the second derivative wrong without an error: "
    "refused for a learned weight",
    silent=True,
    when=by_frequency_or_norm,
)


register(
    elementary.cholesky_inverse,
    torch.cholesky_inverse,
    Tensor.cholesky_inverse,
    name="torch.cholesky_inverse",
    reason="its forward-mode derivative, and for a full matrix its gradient, are wrong without an "
    "error",
    silent=True,
    autocast="float32",
)


register(
    elementary.refused(
        "scatter_reduce(reduce='prod')",
        "has a forward-mode derivative that PyTorch gets wrong without an error (it is zero). "
        'Write product="reverse", or multiply by '
        "other means",
    ),
    torch.scatter_reduce,
    Tensor.scatter_reduce,
    Tensor.scatter_reduce_,
    name="torch.scatter_reduce(reduce='prod')",
    reason="its forward-mode derivative is zero without an error: refused",
    silent=True,
    when=product_in_forward_mode,
)


register(
    loss.l1_loss,
    F.l1_loss,
    name="F.l1_loss(weight=...)",
    reason="under a torch function mode PyTorch ignores the weight without an error",
    silent=True,
    when=loses_its_weight,
    autocast="own",
)


if hasattr(F, "linear_cross_entropy"):
    register(
        loss.linear_cross_entropy,
        F.linear_cross_entropy,
        name="F.linear_cross_entropy(options=...)",
        reason="its second derivative is wrong without an error",
        silent=True,
        when=in_chunks,
        autocast="own",
    )


for form, originals in (
    (norm.layer_norm, (F.layer_norm,)),
    (norm.batch_norm, (F.batch_norm,)),
    (norm.instance_norm, (F.instance_norm,)),
    (direct.layer_norm, (torch.layer_norm,)),
    (direct.batch_norm, (torch.batch_norm,)),
    (direct.instance_norm, (torch.instance_norm,)),
):
    register(
        form,
        *originals,
        name=f"F.{form.__name__} differentiated three times",
        reason="its third derivative, and its second in reverse over forward mode, are wrong "
        "without an error",
        silent=True,
        when=beyond_norms,
    )


register(
    embedding_bag.embedding_bag,
    F.embedding_bag,
    name="F.embedding_bag",
    reason=NO_SECOND,
    when=embedding_bag.bag_of_constant_norm,
)


register(distance.cdist, torch.cdist, name="torch.cdist", reason=NO_SECOND, autocast="float32")


register(distance.pdist, F.pdist, name="F.pdist", reason=NO_SECOND)


register(ctc_loss.ctc_loss, F.ctc_loss, name="F.ctc_loss", reason=NO_SECOND, autocast="float32")


register(
    loss.multi_margin_loss,
    F.multi_margin_loss,
    name="F.multi_margin_loss",
    reason=NO_SECOND,
    autocast="float32",
)


register(
    loss.multilabel_margin_loss,
    F.multilabel_margin_loss,
    name="F.multilabel_margin_loss",
    reason=NO_SECOND,
    autocast="float32",
)


register(elementary.hardsigmoid, F.hardsigmoid, name="F.hardsigmoid", reason=NO_SECOND)


register(
    loss.huber_loss,
    F.huber_loss,
    name="F.huber_loss",
    reason=NO_FORWARD,
    when=forward_mode,
    autocast="float32",
)


register(
    loss.mse_loss,
    F.mse_loss,
    name="F.mse_loss",
    reason=NO_FORWARD,
    when=forward_mode,
    autocast="float32",
)


register(
    loss.soft_margin_loss,
    F.soft_margin_loss,
    name="F.soft_margin_loss",
    reason=NO_FORWARD,
    when=forward_mode,
    autocast="float32",
)


register(
    grid_sample.grid_sample,
    F.grid_sample,
    name="F.grid_sample",
    reason=NO_FORWARD,
    when=forward_mode,
    autocast="float32",
)


register(
    elementary.normalize, F.normalize, name="F.normalize(out=...)", reason=NO_FORWARD, when=into_out
)


for operation in (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu):
    register(
        recurrent.without_cudnn(operation),
        operation,
        name=f"torch.{operation.__name__} in cuDNN",
        reason=NO_SECOND,
        when=recurrent.on_cuda,
    )


for operations, cure in (
    ((torch.linalg.solve, torch.linalg.solve_ex, torch.linalg.tensorsolve), ""),
    ((torch.linalg.det, torch.det, Tensor.det, torch.logdet, Tensor.logdet), ""),
    ((torch.linalg.slogdet, torch.slogdet, Tensor.slogdet), ""),
    (
        (torch.linalg.householder_product, torch.orgqr, Tensor.orgqr),
        " (parametrizations.orthogonal calls it, too)",
    ),
):
    name = f"torch.linalg.{operations[0].__name__.removeprefix('linalg_')}"
    register(
        elementary.refused(
            name,
            "has a wrong second derivative in reverse mode over forward mode, without an "
            f"error{cure}: differentiate the other way "
            "round, jacfwd(jacrev(f)) or autograd twice, with StoreAll or Checkpointed",
        ),
        *operations,
        name=f"{name} in reverse over forward mode",
        reason="its second derivative is wrong there without an error: refused",
        silent=True,
        when=reverse_over_forward,
    )


for name in CONSTANT:
    if hasattr(torch.special, name):
        register(
            elementary.refused(
                f"torch.special.{name}",
                "has no derivative, and PyTorch returns a constant without an error: its gradient "
                "would be zero",
            ),
            getattr(torch.special, name),
            name=f"torch.special.{name}",
            reason="it has no derivative, and its result is a constant without an error: refused",
            silent=True,
            when=differentiated,
        )


register(
    elementary.refused(
        "torch.triangular_solve",
        "has a forward-mode derivative that PyTorch gets wrong without an error. Write "
        "torch.linalg.solve_triangular",
    ),
    torch.triangular_solve,
    Tensor.triangular_solve,
    name="torch.triangular_solve",
    reason="its forward-mode derivative is wrong without an error: refused",
    silent=True,
    when=forward_mode,
)


register(
    attention.scaled_dot_product_attention,
    F.scaled_dot_product_attention,
    name="F.scaled_dot_product_attention",
    reason="the fused kernels have neither a second derivative nor forward mode",
    autocast="own",
)


register(
    cross_entropy.cross_entropy,
    F.cross_entropy,
    name="F.cross_entropy",
    reason="up to seven tensors of the size of the logits are alive in its second derivative, "
    "here three",
    when=many_logits,
    autocast="own",
)


open_up(F.multi_head_attention_forward)


open_up(F.triplet_margin_with_distance_loss)
