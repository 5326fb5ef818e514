"""Connectionist temporal classification, with all derivatives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from innerloop._utils.execution import may_read_values
from innerloop.errors import InvalidInputError
from innerloop.nn._replacements.losses import check_labels, reduced

IMPOSSIBLE = -1e30
"""The logarithm of probability zero; a finite one, because the derivatives of -inf are NaN."""
Lengths = Tensor | Sequence[int]


def ctc_loss(
    log_probs: Float[Tensor, "time *batch classes"],
    targets: Int[Tensor, "..."],
    input_lengths: Lengths,
    target_lengths: Lengths,
    blank: int = 0,
    reduction: Literal["none", "mean", "sum"] = "mean",
    zero_infinity: bool = False,
) -> Float[Tensor, "..."]:
    r"""Compute ``F.ctc_loss``, which in PyTorch has no second derivative and no forward mode.

    The loss is that of Graves et al. ("Connectionist temporal classification", 2006).

    With the labels :math:`l` interleaved with blanks, and :math:`\alpha_t(s)` the probability of
    having read the first s of them at t,

    .. math::
        \alpha_t(s) &= p_t(l_s)\, [\alpha_{t-1}(s) + \alpha_{t-1}(s-1) + \alpha_{t-1}(s-2)\,
        \mathbb 1(l_s \ne l_{s-2}, l_s \ne \text{blank})], \\
        L &= -\log [\alpha_T(S) + \alpha_T(S-1)],

    here in logarithms. PyTorch's gradient contains a term :math:`p_t`, which ``log_softmax`` takes
    out again; so does this one, so that training is the same also where ``log_probs`` does not come
    from there. But then the gradient is not the derivative of the loss, in PyTorch as here: for an
    outer loss pass ``log_probs.log_softmax(-1)``, which leaves normalised probabilities as they
    are.

    Args, Returns: as for ``torch.nn.functional.ctc_loss``. Cost: time x batch x labels in memory,
    one short chain of operations per time.

    Example:
        One time, one label: the loss is minus its logarithm.

        >>> import torch
        >>> from innerloop.nn.functional import ctc_loss
        >>> probabilities = torch.tensor([[[0.25, 0.75]]])
        >>> ctc_loss(probabilities.log(), torch.tensor([[1]]), [1], [1]).exp()
        tensor(1.3333)
    """
    batched = log_probs if log_probs.dim() == 3 else log_probs.unsqueeze(1)
    steps, count, classes = batched.shape
    device = batched.device
    lengths, sizes = (_as_tensor(x, device).expand(count) for x in (input_lengths, target_lengths))
    if may_read_values(sizes):
        _check(targets, lengths, sizes, steps, single=log_probs.dim() == 2)
    labels = _padded(targets.to(device), sizes, single=log_probs.dim() == 2)
    # Beyond a target's length there is padding, which need not be a class.
    labels = labels.masked_fill(
        torch.arange(labels.shape[1], device=device) >= sizes[:, None], blank
    )
    check_labels(labels, classes, "targets")
    extended = torch.full((count, 2 * labels.shape[1] + 1), blank, device=device)
    extended[:, 1::2] = labels
    alphas = torch.stack(_forward(batched, extended, blank))
    last = alphas[(lengths - 1).clamp_min(0), torch.arange(count, device=device)]
    ends = torch.stack([2 * sizes, (2 * sizes - 1).clamp_min(0)], dim=1)
    found = last.gather(1, ends)
    second = torch.where(
        (sizes > 0)[:, None], found[:, 1:], torch.full_like(found[:, 1:], IMPOSSIBLE)
    )
    loss = -torch.logsumexp(torch.cat([found[:, :1], second], dim=1), dim=1)
    read = (torch.arange(steps, device=device)[:, None] < lengths)[:, :, None]
    probabilities = torch.where(read, batched, torch.full_like(batched, IMPOSSIBLE)).exp()
    loss = loss + (probabilities - probabilities.detach()).sum((0, 2))
    # With an input length of 0 an empty target is certain, and every other one impossible.
    loss = torch.where(lengths == 0, torch.where(sizes > 0, -IMPOSSIBLE, 0.0).to(loss.dtype), loss)
    impossible = loss > -IMPOSSIBLE / 10
    loss = torch.where(impossible, torch.full_like(loss, 0.0 if zero_infinity else torch.inf), loss)
    if reduction == "mean":
        loss = loss / sizes.clamp_min(1)
    loss = reduced(loss, reduction)
    return loss.reshape(()) if log_probs.dim() == 2 else loss


def _forward(log_probs: Tensor, extended: Tensor, blank: int) -> list[Tensor]:
    """Compute log α at every time."""
    count, size = extended.shape
    jump = torch.zeros(count, size, dtype=torch.bool, device=extended.device)
    jump[:, 2:] = (extended[:, 2:] != blank) & (extended[:, 2:] != extended[:, :-2])
    never = log_probs.new_full((count, 1), IMPOSSIBLE)
    emitted = [frame.gather(1, extended) for frame in log_probs]
    start = torch.arange(size, device=extended.device) < 2
    alpha = torch.where(start, emitted[0], torch.full_like(emitted[0], IMPOSSIBLE))
    alphas = [alpha]
    for frame in emitted[1:]:
        one = torch.cat([never, alpha[:, :-1]], dim=1)
        two = torch.cat([never, never, alpha[:, :-2]], dim=1)[:, :size]
        two = torch.where(jump, two, torch.full_like(two, IMPOSSIBLE))
        alpha = torch.logsumexp(torch.stack([alpha, one, two]), dim=0) + frame
        alphas.append(alpha)
    return alphas


def _check(targets: Tensor, lengths: Tensor, sizes: Tensor, steps: int, single: bool) -> None:
    """Raise for the lengths that torch refuses."""
    if (lengths < 0).any() or (lengths > steps).any():
        raise InvalidInputError(
            f"input_lengths is {lengths.tolist()}, but log_probs has {steps} times: pass lengths "
            f"from 0 to {steps}"
        )
    padded = targets.dim() == 2 or single
    room, wanted = (
        targets.shape[-1] if targets.dim() else 1,
        int(sizes.max() if padded else sizes.sum()) if sizes.numel() else 0,
    )
    if (sizes < 0).any() or wanted > room or (not padded and wanted < room):
        raise InvalidInputError(
            f"target_lengths {sizes.tolist()}, targets {tuple(targets.shape)}: a row must hold "
            "its labels, and of concatenated targets all must be used"
        )


def _as_tensor(lengths: Lengths, device: torch.device) -> Tensor:
    return torch.as_tensor(lengths, dtype=torch.long, device=device).reshape(-1)


def _padded(targets: Tensor, sizes: Tensor, single: bool) -> Tensor:
    """Return the labels of each member of the batch, in rows of one length."""
    if targets.dim() == 2 or single:
        return targets.reshape(sizes.shape[0], -1).long()
    starts = sizes.cumsum(0) - sizes
    width = int(sizes.max()) if sizes.numel() else 0
    places = (starts[:, None] + torch.arange(width, device=targets.device)).clamp_max(
        max(0, targets.shape[0] - 1)
    )
    return targets.long()[places] if width else targets.new_zeros(sizes.shape[0], 0).long()
