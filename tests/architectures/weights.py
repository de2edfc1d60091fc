"""For tests that hold a network of ours against a public one: same weights, same values, same gradients."""

import torch

from medfast.architectures.names import Names, rename


def count(module):
    return sum(p.numel() for p in module.parameters())


def weighted_sum(outputs):
    """A scalar that every entry of every output has a weight of its own in."""
    generator = torch.Generator().manual_seed(7)
    return sum((x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum() for x in outputs)


def share_weights(ours, theirs, names: Names, std=0.3):
    """Random weights for theirs, the same for ours through the map: all of ours come from there, nothing is left."""
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=std)
    state = rename(theirs.state_dict(), names)
    left = [name for name in state if name not in ours.state_dict()]
    assert all(set(name.split(".")) & set(names.unread) for name in left), left
    ours.load_state_dict({name: x for name, x in state.items() if name not in left}, strict=True)


def assert_same(ours, theirs, names: Names, got, expected, tolerance=1e-9):
    """Values of two lists of outputs, and the gradients they give to weights that mean the same."""
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance * y.abs().max().item())
    weighted_sum(got).backward()
    weighted_sum(expected).backward()
    reference = rename({name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}, names)
    gradients = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert gradients.keys() == reference.keys()
    largest = max(gradient.abs().max().item() for gradient in reference.values())
    for name, gradient in gradients.items():
        # a bias before a norm, or on a key, has a gradient of zero: rounding is then all there is
        atol = tolerance * max(reference[name].abs().max().item(), 1e-4 * largest)
        torch.testing.assert_close(gradient, reference[name], rtol=tolerance, atol=atol, msg=name)
