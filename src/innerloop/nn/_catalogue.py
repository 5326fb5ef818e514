"""The operations of PyTorch with a missing or wrong derivative, each of them once.

**To enrol an operation**, write its replacement in ``nn/_replacements``, add an `Operation` to
`OPERATIONS`, and give `innerloop doctor` a case under its name. The doctor then shows what the
replacement makes of the derivatives, ``tests/test_audit_contract.py`` trains through it, and
``tests/test_replace.py`` checks that the three belong together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from innerloop._utils import text_table, torch_private
from innerloop.nn._derivative_order import (
    Args,
    Kwargs,
    in_forward_mode,
    in_reverse_over_forward,
    needs_third_derivative,
)
from innerloop.nn._replacements import (
    attention,
    cross_entropy,
    ctc_loss,
    distance,
    dropout,
    elementary,
    embedding_bag,
    grid_sample,
    indexing,
    losses,
    norm,
    norm_positional,
    random_numbers,
    recurrent,
    vector_norm,
    weight_norm,
)

NO_SECOND = "it has no second derivative"
NO_FORWARD = "it has no forward-mode derivative, or none of its gradient"
BY_LAYOUT = (
    "in forward mode it drops other entries than in eager code where its input is a transposed "
    "view, without an error"
)
NAN_AT_ZERO = "for a vector of zeros (a padded row) its second derivative is NaN"
CONSTANT = """
    airy_ai bessel_j0 bessel_j1 bessel_y0 bessel_y1
    modified_bessel_i0 modified_bessel_i1 modified_bessel_k0 modified_bessel_k1
    scaled_modified_bessel_k0 scaled_modified_bessel_k1 spherical_bessel_j0
    hermite_polynomial_h hermite_polynomial_he laguerre_polynomial_l legendre_polynomial_p
    chebyshev_polynomial_t chebyshev_polynomial_u chebyshev_polynomial_v chebyshev_polynomial_w
    shifted_chebyshev_polynomial_t shifted_chebyshev_polynomial_u
    shifted_chebyshev_polynomial_v shifted_chebyshev_polynomial_w
""".split()
"""Functions of ``torch.special`` whose result does not require grad, whatever they are given."""


@dataclass(frozen=True, eq=False)
class Operation:
    """An operation of PyTorch with a missing or wrong derivative, and what innerloop does about it.

    Attributes:
        name: as users write it, and as errors, `innerloop doctor` and docs/doctor.md call it.
        reason: what is missing or wrong.
        replacements: PyTorch's function -> ours, for every function by which users and modules
            reach the operation.
        nodes: the autograd nodes by which the operation is recognised in a graph.
        node_when: True if such a node has the defect; None: every such node has it.
        when: True if a call with these arguments is to be replaced; None: every call is.
        order: the first derivative that is missing or wrong.
        silent: True if PyTorch's own is wrong without an error. It is then replaced even under
            `keep_kernels`.
        instead: what to write, where there is no replacement.
        autocast: what the replacement does under ``torch.autocast``: ``"input"`` computes in the
            dtype of its input, ``"float32"`` widens half precision first, as PyTorch's policy for
            the operation says, ``"own"`` follows the policy by itself.
    """

    name: str
    reason: str
    replacements: Mapping[Callable[..., object], Callable[..., object]] = field(
        default_factory=dict
    )
    nodes: tuple[str, ...] = ()
    node_when: Callable[[object], bool] | None = None
    when: Callable[[Args, Kwargs], bool] | None = None
    order: Literal[2, 3] = 2
    silent: bool = False
    instead: str = ""
    autocast: Literal["input", "float32", "own"] = "input"

    @property
    def nodes_of_derivative(self) -> tuple[str, ...]:
        """Return the nodes that differentiating `nodes` leaves in a graph, if `order` is 3.

        A loss that contains one of them is a function of a gradient through the operation.
        """
        if self.order == 2:
            return ()
        return tuple(name.removesuffix("0") + "Backward0" for name in self.nodes)


def _refused_by_reverse_over_forward(
    name: str, *functions: Callable[..., object], used_by: str = ""
) -> Operation:
    refusal = elementary.refused(
        name,
        "has a wrong second derivative in reverse mode over forward mode, without an error"
        f"{used_by}: differentiate the other way round, jacfwd(jacrev(f)) or autograd twice, with "
        "StoreAll or Checkpointed",
    )
    return Operation(
        name,
        "in reverse over forward mode its second derivative is wrong without an error: refused",
        dict.fromkeys(functions, refusal),
        when=in_reverse_over_forward,
        silent=True,
    )


def _constant(name: str) -> Operation:
    refusal = elementary.refused(
        f"torch.special.{name}",
        "has no derivative, and PyTorch returns a constant without an error: its gradient would be "
        "zero",
    )
    return Operation(
        f"torch.special.{name}",
        "it has no derivative, and its result is a constant without an error: refused",
        {getattr(torch.special, name): refusal},
        when=elementary.is_differentiated,
        silent=True,
    )


_refuse_product = elementary.refused(
    "scatter_reduce(reduce='prod')",
    "has a forward-mode derivative that PyTorch gets wrong without an error (it is zero). "
    'Write product="reverse", or multiply by other means',
)
_refuse_triangular_solve = elementary.refused(
    "torch.triangular_solve",
    "has a forward-mode derivative that PyTorch gets wrong without an error. Write "
    "torch.linalg.solve_triangular",
)
_WRONG_THIRD = (
    "its third derivative, and its second in reverse over forward mode, are wrong without an error"
)

OPERATIONS: tuple[Operation, ...] = (
    # -- wrong without an error ---------------------------------------------------------------
    Operation(
        "torch._weight_norm",
        "its second derivative is wrong without an error",
        {torch_private.weight_norm(): weight_norm.weight_norm},
        nodes=("WeightNormInterfaceBackward0",),
        silent=True,
    ),
    Operation(
        "F.embedding",
        "with scale_grad_by_freq or max_norm, what autograd does not see of it makes the second "
        "derivative wrong without an error: refused for a learned weight",
        {F.embedding: embedding_bag.embedding},
        nodes=("EmbeddingBackward0",),
        node_when=torch_private.divides_by_frequency,
        when=embedding_bag.by_frequency_or_norm,
        silent=True,
        instead="Leave scale_grad_by_freq away inside the loop, and divide the gradient: "
        "loop.step(loss, grad_callback=...)",
    ),
    Operation(
        "torch.cholesky_inverse",
        "its forward-mode derivative, and for a full matrix its gradient, are wrong without an "
        "error",
        {
            torch.cholesky_inverse: elementary.cholesky_inverse,
            Tensor.cholesky_inverse: elementary.cholesky_inverse,
        },
        nodes=("CholeskyInverseBackward0",),
        silent=True,
        autocast="float32",
    ),
    Operation(
        "torch.scatter_reduce",
        "with reduce='prod', its forward-mode derivative is zero without an error: refused",
        {
            torch.scatter_reduce: _refuse_product,
            Tensor.scatter_reduce: _refuse_product,
            Tensor.scatter_reduce_: _refuse_product,
        },
        when=elementary.is_product_in_forward_mode,
        silent=True,
    ),
    Operation(
        "F.l1_loss",
        "under a torch function mode PyTorch ignores its weight without an error",
        {F.l1_loss: losses.l1_loss},
        when=losses.loses_its_weight,
        silent=True,
        autocast="own",
    ),
    *(
        [
            Operation(
                "F.linear_cross_entropy",
                "with options, its second derivative is wrong without an error",
                {F.linear_cross_entropy: losses.linear_cross_entropy},
                when=losses.in_chunks,
                silent=True,
                autocast="own",
            )
        ]
        if hasattr(F, "linear_cross_entropy")
        else []
    ),
    Operation(
        "F.dropout",
        BY_LAYOUT,
        {F.dropout: dropout.dropout, torch.dropout: dropout.torch_dropout},
        when=dropout.by_layout,
        silent=True,
    ),
    Operation(
        "F.alpha_dropout",
        BY_LAYOUT,
        {F.alpha_dropout: dropout.alpha_dropout},
        when=dropout.by_layout,
        silent=True,
    ),
    Operation(
        "F.layer_norm",
        _WRONG_THIRD,
        {F.layer_norm: norm.layer_norm, torch.layer_norm: norm_positional.layer_norm},
        nodes=("NativeLayerNormBackward0",),
        when=needs_third_derivative,
        order=3,
        silent=True,
    ),
    Operation(
        "F.batch_norm or F.instance_norm",
        _WRONG_THIRD,
        {
            F.batch_norm: norm.batch_norm,
            torch.batch_norm: norm_positional.batch_norm,
            F.instance_norm: norm.instance_norm,
            torch.instance_norm: norm_positional.instance_norm,
        },
        nodes=(
            "NativeBatchNormBackward0",
            "CudnnBatchNormBackward0",
            "MiopenBatchNormBackward0",
        ),
        when=needs_third_derivative,
        order=3,
        silent=True,
    ),
    _refused_by_reverse_over_forward(
        "torch.linalg.solve", torch.linalg.solve, torch.linalg.solve_ex, torch.linalg.tensorsolve
    ),
    _refused_by_reverse_over_forward(
        "torch.linalg.det",
        torch.linalg.det,
        torch.det,
        Tensor.det,
        torch.logdet,
        Tensor.logdet,
    ),
    _refused_by_reverse_over_forward(
        "torch.linalg.slogdet", torch.linalg.slogdet, torch.slogdet, Tensor.slogdet
    ),
    _refused_by_reverse_over_forward(
        "torch.linalg.householder_product",
        torch.linalg.householder_product,
        torch.orgqr,
        Tensor.orgqr,
        used_by=" (parametrizations.orthogonal calls it, too)",
    ),
    *(_constant(name) for name in CONSTANT if hasattr(torch.special, name)),
    Operation(
        "torch.triangular_solve",
        "its forward-mode derivative is wrong without an error: refused",
        {
            torch.triangular_solve: _refuse_triangular_solve,
            Tensor.triangular_solve: _refuse_triangular_solve,
        },
        when=in_forward_mode,
        silent=True,
    ),
    Operation(
        "Tensor.__getitem__",
        "an index in NumPy's memory that is written later moves the gradient to other rows without "
        "an error: copied",
        {
            function: indexing.with_own_index(function)
            for function in (
                Tensor.__getitem__,
                torch.index_select,
                Tensor.index_select,
                torch.gather,
                Tensor.gather,
                torch.take_along_dim,
                Tensor.take_along_dim,
            )
        },
        when=indexing.by_foreign_memory,
        silent=True,
    ),
    # -- missing ------------------------------------------------------------------------------
    Operation(
        "F.embedding_bag",
        NO_SECOND,
        {F.embedding_bag: embedding_bag.embedding_bag},
        nodes=("EmbeddingBagBackward0",),
        when=embedding_bag.bag_of_constant_norm,
    ),
    Operation(
        "torch.cdist",
        NO_SECOND,
        {torch.cdist: distance.cdist},
        nodes=("CdistBackward0",),
        autocast="float32",
    ),
    Operation("F.pdist", NO_SECOND, {F.pdist: distance.pdist}, nodes=("PdistBackward0",)),
    Operation(
        "F.ctc_loss",
        NO_SECOND,
        {F.ctc_loss: ctc_loss.ctc_loss},
        nodes=("CtcLossBackward0", "CudnnCtcLossBackward0"),
        autocast="float32",
    ),
    Operation(
        "F.multi_margin_loss",
        NO_SECOND,
        {F.multi_margin_loss: losses.multi_margin_loss},
        nodes=("MultiMarginLossBackward0",),
        autocast="float32",
    ),
    Operation(
        "F.multilabel_margin_loss",
        NO_SECOND,
        {F.multilabel_margin_loss: losses.multilabel_margin_loss},
        nodes=("MultilabelMarginLossBackward0",),
        autocast="float32",
    ),
    Operation(
        "F.hardsigmoid",
        NO_SECOND,
        {F.hardsigmoid: elementary.hardsigmoid},
        nodes=("HardsigmoidBackward0",),
    ),
    Operation(
        "F.huber_loss",
        NO_FORWARD,
        {F.huber_loss: losses.huber_loss},
        when=in_forward_mode,
        autocast="float32",
    ),
    Operation(
        "F.mse_loss",
        NO_FORWARD,
        {F.mse_loss: losses.mse_loss},
        when=in_forward_mode,
        autocast="float32",
    ),
    Operation(
        "F.soft_margin_loss",
        NO_FORWARD,
        {F.soft_margin_loss: losses.soft_margin_loss},
        when=in_forward_mode,
        autocast="float32",
    ),
    Operation(
        "F.grid_sample",
        NO_FORWARD,
        {F.grid_sample: grid_sample.grid_sample},
        when=in_forward_mode,
        autocast="float32",
    ),
    Operation(
        "F.group_norm",
        "on a tensor that is not contiguous (channels_last) it has no forward-mode derivative",
        {F.group_norm: norm.group_norm, torch.group_norm: norm_positional.group_norm},
        when=norm.is_strided,
        autocast="float32",
    ),
    Operation(
        "F.normalize",
        f"{NAN_AT_ZERO}; with out, {NO_FORWARD}",
        {F.normalize: vector_norm.normalize},
        when=vector_norm.is_normalized,
    ),
    Operation(
        "torch.linalg.vector_norm",
        NAN_AT_ZERO,
        {
            torch.linalg.vector_norm: vector_norm.vector_norm,
            torch.norm: vector_norm.norm,
            Tensor.norm: vector_norm.norm,
        },
        when=vector_norm.is_smooth,
        autocast="float32",
    ),
    Operation(
        "torch.linalg.norm",
        NAN_AT_ZERO,
        {torch.linalg.norm: vector_norm.linalg_norm},
        when=vector_norm.is_smooth_vector_norm,
        autocast="float32",
    ),
    Operation(
        "F.cosine_similarity",
        NAN_AT_ZERO,
        {F.cosine_similarity: vector_norm.cosine_similarity},
        when=vector_norm.is_similarity,
        autocast="float32",
    ),
    Operation(
        "nn.RNN, nn.LSTM or nn.GRU on a GPU or under vmap",
        "in cuDNN it has no second derivative; under vmap it writes rows into what has none",
        {function: recurrent.in_plain_code(function) for function in recurrent.FUNCTIONS},
        nodes=("CudnnRnnBackward0", "MiopenRnnBackward0"),
        when=recurrent.needs_help,
    ),
    Operation(
        "torch.normal under vmap",
        "it fills a tensor in place that has no rows",
        {torch.normal: random_numbers.normal},
        when=random_numbers.draws_by_rows,
    ),
    Operation(
        "torch.empty or Tensor.new under vmap",
        "it has no rows, and cannot be filled with random numbers in place",
        {
            function: random_numbers.with_rows(function)
            for function in (torch.empty, torch.empty_like, Tensor.new, Tensor.new_empty)
        },
        when=random_numbers.is_new,
    ),
    Operation(
        "F.scaled_dot_product_attention",
        "the fused kernels have neither a second derivative nor forward mode",
        {F.scaled_dot_product_attention: attention.scaled_dot_product_attention},
        nodes=(
            "ScaledDotProductFlashAttentionForCpuBackward0",
            "ScaledDotProductFlashAttentionBackward0",
            "ScaledDotProductEfficientAttentionBackward0",
            "ScaledDotProductCudnnAttentionBackward0",
            "ScaledDotProductFusedAttentionOverrideableBackward0",
        ),
        autocast="own",
    ),
    Operation(
        "F.cross_entropy",
        "up to seven tensors of the size of the logits are alive in its second derivative, here "
        "three",
        {F.cross_entropy: cross_entropy.cross_entropy},
        when=cross_entropy.has_many_logits,
        autocast="own",
    ),
    # -- missing, and not replaced ------------------------------------------------------------
    Operation(
        "nn.CrossMapLRN2d",
        "its gradient is not the derivative of its forward pass, and has no derivative itself",
        nodes=("CrossMapLRN2dBackward",),
        instead="Its gradient is not that of its forward either. Write nn.LocalResponseNorm",
    ),
    Operation(
        "torch.segment_reduce",
        NO_SECOND,
        nodes=("SegmentReduceBackward0",),
        instead="Write torch.scatter_reduce, or index_add",
    ),
    Operation(
        "torch.distributions.Gamma.rsample",
        NO_SECOND,
        nodes=("StandardGammaBackward0",),
        instead="Draw by another reparametrisation, or hold the sample constant",
    ),
)

LOOK_INSIDE: tuple[Callable[..., object], ...] = (
    F.multi_head_attention_forward,
    F.triplet_margin_with_distance_loss,
)
"""PyTorch's code that is run with the mode on, so that the operations in it are seen."""

CALLS: Mapping[Callable[..., object], Operation] = {
    function: op for op in OPERATIONS for function in op.replacements
}
"""The operation that each function of PyTorch belongs to; `by_call` looks it up."""
HIDDEN: Mapping[object, Callable[..., object]] = {
    torch_private.weight_norm(): weight_norm.weight_norm,
}
"""Replacements of functions that the compiler does not show to a mode: they change its graph."""
NODES: Mapping[str, Operation] = {
    node: op for op in OPERATIONS for node in (*op.nodes, *op.nodes_of_derivative)
}
"""The operation of each autograd node, for the walk through a graph; `by_node` looks it up."""


def by_call(function: Callable[..., object]) -> Operation | None:
    """Find the operation that ``function`` belongs to."""
    return CALLS.get(function)


def by_node(name: str) -> Operation | None:
    """Find the operation that an autograd node comes from, itself or differentiated once."""
    return NODES.get(name)


def to_markdown() -> str:
    """Return the catalogue as a Markdown table, for the reference pages."""
    rows = []
    for op in OPERATIONS:
        reason, _, refused = op.reason.partition(": ")
        action = "replaced" if op.replacements else op.instead
        rows.append((f"`{op.name}`", reason, refused or action))
    return text_table.table(rows, header=("operation", "reason", "innerloop"), markdown=True)
