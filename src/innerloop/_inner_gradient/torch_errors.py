"""PyTorch's errors inside an inner loss, explained."""

from __future__ import annotations

from innerloop._inner_gradient.loss import INDEPENDENT
from innerloop._utils import torch_private
from innerloop.errors import InnerLoopError, NotDifferentiableError

BATCHED = (
    "a module writes in place a buffer that has no batch dimension in vmap (the running statistics "
    "of PyTorch's norms get one): assign a new tensor to it (self.count = self.count + x), or pass "
    "a carry whose buffers are batched"
)

CURES = {
    "nference tensor": "a tensor was made under torch.inference_mode (data, a buffer, a weight "
    "of the model): write tensor.clone() outside of that mode, or make it under torch.no_grad",
    "torch.utils.checkpoint": "activation checkpointing (torch.utils.checkpoint) inside the "
    "loss: switch it off",
    "ZeroTensors": "a fused loss function lacks this derivative: write it out, (a - "
    "b).square().mean() for mse_loss",
    "modified by an inplace operation": "a tensor that a step had used was written in place "
    "afterwards (a batch that the iterator fills again, say): yield a new one, batch.clone()",
    "saved tensor "
    "hooks": "activation checkpointing (torch.utils.checkpoint) or other saved-tensor hooks, "
    "inside the loss or around a loop that is differentiated by torch.func: switch it off (or "
    "write use_reentrant=True around the loop)",
    "Cannot access data "
    "pointer": 'packed sequences do not run inside torch.func: use product="reverse" outside '
    "of vmap, or pad",
    "in-place": "a module writes a tensor in place that is not an argument: use "
    "Problem.from_module, which threads buffers",
    "not implemented": "an operation of the loss lacks a derivative: use another form of it "
    "(attention: SDPBackend.MATH)",
    "add(sparse, dense)": "the loss looks a table up with sparse=True and uses it densely as "
    "well (a penalty on it), and PyTorch adds the two gradients in neither order if they are "
    "to be differentiated again: write sparse=False in the look-up",
    "does not require grad": INDEPENDENT,
}
"""Parts of PyTorch's messages -> what to write instead."""

BELOW_VMAP = {
    "vmap: we do not yet support": "vmap cannot run an operation of the loss for all its rows "
    "at once: write the operation out (rrelu: torch.where(x < 0, x * torch.empty_like(x)"
    ".uniform_(lower, upper), x)), or run the tasks one after another",
    "inplace randomness": "the loss fills a tensor with random numbers that has no rows of "
    "vmap (torch.empty(3).exponential_()): fill torch.empty_like(x) of one that has, or write "
    "torch.rand and torch.randn",
    "setup_context": "the loss runs a torch.autograd.Function without setup_context (that of "
    "torch.distributions.Dirichlet, for one), which vmap and torch.func cannot: write it with "
    "setup_context and vmap, or without such a function",
    "Batching rule not implemented": "vmap cannot run an operation of the loss that writes "
    "into a given tensor, out=... (spectral_norm in training writes its vectors so): write it "
    "without out=, or call model.eval() before for spectral_norm",
}
"""What PyTorch says of operations that ``vmap`` cannot run -> what to write instead."""


def writes_without_rows(text: str, below_vmap: bool) -> bool:
    """True if PyTorch refuses to write, for each row, a tensor that all rows of ``vmap`` share.

    Args:
        text: its message.
        below_vmap: a plain error of broadcasting is one as well: that of a single number.
    """
    return (
        "vmap: inplace" in text
        or "Batch norm got a batched tensor" in text
        or (below_vmap and "doesn't match the broadcast shape" in text)
    )


def explain(error: RuntimeError) -> RuntimeError:
    """Return torch's error with what to write instead, where we know it."""
    if isinstance(error, InnerLoopError):
        return error
    text, below_vmap = str(error), torch_private.inside_vmap()
    if writes_without_rows(text, below_vmap):
        return NotDifferentiableError(f"{BATCHED}. PyTorch says: {text}")
    cures = BELOW_VMAP | CURES if below_vmap else CURES
    for sign, cure in cures.items():
        if sign in text:
            return NotDifferentiableError(f"{cure}. PyTorch says: {text}")
    return error
