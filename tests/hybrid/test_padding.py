"""Layers filled with zeros compute what they are without."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from hybrid.model import FeedForward
from hybrid.padding import linear_of_wide, wide_linear


@pytest.mark.parametrize("width", [5, 16, 21])
def test_a_padded_product_is_the_layer_itself(width: int) -> None:
    layer = nn.Linear(12, width, bias=False)
    x = torch.randn(3, 7, 12, requires_grad=True)
    share = torch.randn(3, 7, width)
    answers = []
    for y in (wide_linear(x, layer), layer(x)):
        assert not y[..., width:].any()
        y = y[..., :width]
        answers.append([y, *torch.autograd.grad((y * share).sum(), (x, layer.weight))])
    for found, wanted in zip(*answers, strict=True):
        torch.testing.assert_close(found, wanted)
    assert wide_linear(x, layer).stride(1) % 16 == 0


@pytest.mark.parametrize("width", [5, 16, 21])
def test_a_wide_feed_forward_layer_is_the_layer_itself(width: int) -> None:
    layer = FeedForward(12, width)
    x = torch.randn(3, 7, 12, requires_grad=True)
    share = torch.randn(3, 7, 12)
    answers = []
    for y in (linear_of_wide(F.gelu(wide_linear(x, layer.up)), layer.down), layer(x)):
        answers.append([y, *torch.autograd.grad((y * share).sum(), (x, *layer.parameters()))])
    for found, wanted in zip(*answers, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.gpu
def test_on_a_gpu_hidden_channels_are_filled() -> None:
    """And the layer computes what it does on a CPU."""
    layer = FeedForward(12, 21)
    x = torch.randn(3, 7, 12)
    expected = layer(x)
    seen = []
    with torch.no_grad():
        gelu = F.gelu

        def watched(hidden: torch.Tensor) -> torch.Tensor:
            seen.append(hidden.shape[-1])
            return gelu(hidden)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(F, "gelu", watched)
            found = layer.cuda()(x.cuda())
    assert seen == [32]
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-4)
