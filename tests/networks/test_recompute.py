"""Activations computed again in the backward pass: the same gradients and weights, less that is kept."""

import copy

import pytest
import torch

from networks import GenerativeDenoiser, PrecondCondition
from networks.unet import set_recompute
from tests.golden_utils import fill_by_name

CONFIG = dict(img_resolution=8, img_channels=1, label_dim=3, model_channels=16, channel_mult=[1, 2], num_blocks=2)
CONFIG |= dict(attn_resolutions=[4], channels_per_head=16)


def one_pass(net, training):
    """Bytes that autograd keeps for the backward pass, after it has run."""
    kept = 0

    def keep(tensor):
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    generator = torch.Generator().manual_seed(0)
    y = torch.randn(4, 1, 8, 8, generator=generator).requires_grad_(not training)
    torch.manual_seed(1)  # of dropout
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = net(y, 1.0, torch.eye(3)[[0, 1, 2, 0]], randn_like=lambda x: torch.zeros_like(x))
    (out.square().mean() * 100).backward()
    return kept, y.grad


@pytest.mark.parametrize("training", [True, False], ids=["being trained", "frozen, on the way to the input"])
def test_recomputing_changes_memory_alone(training):
    plain = GenerativeDenoiser(fill_by_name(PrecondCondition(**CONFIG, dropout=0.2), 5)).train(training)
    plain.requires_grad_(training)
    with torch.no_grad():
        for name, p in plain.named_parameters():
            if "additional_" in name:
                p.fill_(0.3)
    saving = copy.deepcopy(plain)
    set_recompute(saving, True)
    kept, grad = one_pass(plain, training)
    kept_saving, grad_saving = one_pass(saving, training)
    assert kept_saving < 0.35 * kept
    for (name, p), q in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert torch.equal(p, q), name  # normalised once, not again in the backward pass
        assert (p.grad is None) == (q.grad is None) and (p.grad is None or torch.equal(p.grad, q.grad)), name
    assert training == any(p.grad is not None for p in saving.parameters())
    assert training or torch.equal(grad, grad_saving)
    assert all(m.forced for m in saving.modules() if hasattr(m, "forced"))
