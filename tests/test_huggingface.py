"""Models of Hugging Face with their default attention: the meta-gradient of the same model with
eager attention.

Tiny ones, randomly initialised. Nothing is set by the user: the fused attention that they call has
no second derivative.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import sdpa

transformers = pytest.importorskip("transformers")

VOCABULARY, LENGTH, BATCH = 50, 12, 3
DROPOUTS = (
    "attn_pdrop",
    "embd_pdrop",
    "resid_pdrop",
    "attention_dropout",
    "attention_probs_dropout_prob",
    "hidden_dropout_prob",
)


def gpt2() -> tuple[Any, Any]:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=16,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel, config


def llama() -> tuple[Any, Any]:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
    )
    return transformers.LlamaForCausalLM, config


def bert() -> tuple[Any, Any]:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
    )
    return transformers.BertForMaskedLM, config


def vit() -> tuple[Any, Any]:
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=5,
    )
    return transformers.ViTForImageClassification, config


MODELS = {made.__name__: made for made in (gpt2, llama, bert, vit)}


def build(name: str, attention: str | None, train: bool) -> nn.Module:
    """With the same weights whatever the attention; ``None`` leaves its choice to the library."""
    cls, config = MODELS[name]()
    for dropout in DROPOUTS:
        if hasattr(config, dropout):
            setattr(config, dropout, 0.0)
    if attention is not None:
        config._attn_implementation = attention
    torch.manual_seed(1)
    model = cls(config)
    model.config.use_cache = False
    for p in (
        model.parameters()
    ):  # as initialised attention is so uniform that its second derivative hardly counts
        p.data.mul_(3.0 if p.ndim > 1 else 1.0)
    return model.train(train)


def batches(name: str, padded: bool) -> list[dict[str, Tensor]]:
    def draw() -> dict[str, Tensor]:
        if name == "vit":
            return {
                "pixel_values": torch.randn(BATCH, 1, 8, 8),
                "labels": torch.randint(5, (BATCH,)),
            }
        # Not the padding token: PyTorch's own loop drops the outer derivative of its row.
        tokens = torch.randint(1, VOCABULARY, (BATCH, LENGTH))
        batch = {"input_ids": tokens, "labels": tokens}
        if padded:
            seen = torch.arange(LENGTH) < torch.tensor([LENGTH, LENGTH - 3, LENGTH - 7]).unsqueeze(
                1
            )
            batch |= {"attention_mask": seen.long(), "labels": tokens.masked_fill(~seen, -100)}
        return batch

    torch.manual_seed(2)
    return [draw() for _ in range(sdpa.STEPS + 1)]


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    found: Tensor = model(**batch).loss
    return found


@pytest.mark.covering(2)
@pytest.mark.parametrize("meta_gradient", [sdpa.tracked, sdpa.unrolled])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("name", "padded"), [(n, p) for n in MODELS for p in (False, True) if not (n == "vit" and p)]
)
def test_two_steps_give_the_meta_gradient_of_eager_attention(
    name: str, padded: bool, train: bool, meta_gradient: Callable[..., dict[str, Tensor]]
):
    model: Any = build(name, None, train)
    assert model.config._attn_implementation == "sdpa"
    data = batches(name, padded)
    truth = sdpa.by_hand(build(name, "eager", train), loss, data)
    sdpa.assert_equal(meta_gradient(model, loss, data), truth, 1e-5)


@pytest.mark.parametrize("name", list(MODELS))
def test_second_derivatives_count(name: str):
    """What the comparison above could miss: without second derivatives the meta-gradient is ten
    times its tolerance off, or more."""
    data, eager = batches(name, padded=False), build(name, "eager", train=False)
    truth = sdpa.by_hand(eager, loss, data)
    with pytest.raises(AssertionError, match="off by"):
        sdpa.assert_equal(sdpa.by_hand(eager, loss, data, first_order=True), truth, 1e-4)
