import numpy as np
import pytest
import torch
from conftest import make_attack, make_classifier
from torch import nn

from art_clat.attacks.tensor_attack import TensorAttack
from art_clat.layers.batch_norm import BatchNorms
from art_clat.models.tensor_classifier import TensorClassifier
from art_clat.utils.batch import Batch
from art_clat.utils.processes import Ranks


def trained_norm(cls=nn.BatchNorm2d, **kwargs):
    norm = cls(6, **kwargs)
    for tensor in norm.state_dict().values():
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5)
    return norm.eval()


def output_and_gradient(norm, x, upstream):
    x = x.clone().requires_grad_()
    y = norm(x)
    return y.detach(), torch.autograd.grad(y, x, upstream)[0]


@pytest.mark.parametrize("arguments", [{}, {"affine": False}, {"eps": 0.1}])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_frozen_norms_compute_the_same_bits_as_torch(arguments, memory_format):
    norm = trained_norm(**arguments).requires_grad_(False)
    x, upstream = (torch.randn(5, 6, 7, 7).contiguous(memory_format=memory_format) for _ in range(2))
    expected = output_and_gradient(norm, x, upstream)
    with BatchNorms(Ranks()):
        y, gradient = output_and_gradient(norm, x, upstream)
    assert torch.equal(y, expected[0]) and torch.equal(gradient, expected[1])


def test_constants_are_computed_once_an_attack_and_anew_for_the_next(normed, data):
    """A write to ``.data``, as by an optimiser, is noticed too, although no version counter changes."""
    network = TensorClassifier(make_classifier(normed))
    attack = TensorAttack(make_attack(network.estimator, max_iter=5), network)
    x, y = map(torch.tensor, data)
    with pytest.MonkeyPatch.context() as patch:
        calls, sqrt = [], torch.sqrt
        patch.setattr(torch, "sqrt", lambda *args: calls.append(1) or sqrt(*args))
        attack(Batch.whole(x, y))
    assert len(calls) == 3  # one for each norm
    normed.bn1.weight.data.mul_(-1)
    normed.bn2.running_var.data.mul_(9)
    np.testing.assert_array_equal(attack(Batch.whole(x, y)).numpy(), attack.attack.generate(*data))


@pytest.mark.parametrize(
    ("cls", "shape"), [(nn.BatchNorm1d, (5, 6)), (nn.BatchNorm1d, (5, 6, 4)), (nn.BatchNorm3d, (3, 6, 2, 2, 2))]
)
def test_any_number_of_dimensions(cls, shape):
    norm = trained_norm(cls).requires_grad_(False)
    x, upstream = torch.randn(shape), torch.randn(shape)
    expected = output_and_gradient(norm, x, upstream)
    with BatchNorms(Ranks()):
        torch.testing.assert_close(output_and_gradient(norm, x, upstream), expected)


def test_frozen_norms_neither_reduce_nor_keep_the_input():
    """What makes them fast: no reduction over the batch in the backward pass, so no input is kept for it."""
    norm = trained_norm().requires_grad_(False)
    x = torch.randn(5, 6, 7, 7, requires_grad=True)
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.shape) or tensor, lambda tensor: tensor
    )
    with BatchNorms(Ranks()), hooks:
        y = norm(x)
    assert x.shape not in kept
    with torch.profiler.profile() as profile:
        torch.autograd.grad(y, x, torch.ones_like(y))
    assert not any("batch_norm" in event.key for event in profile.key_averages())


@pytest.mark.parametrize("part", ["weights", "bias", "statistics"])
def test_torch_computes_norms_that_train(part):
    norm, reference = trained_norm(), trained_norm()
    reference.load_state_dict(norm.state_dict())
    if part == "statistics":
        norm.train().requires_grad_(False), reference.train().requires_grad_(False)
    if part == "bias":
        norm.weight.requires_grad_(False), reference.weight.requires_grad_(False)
    x, upstream = torch.randn(5, 6, 7, 7), torch.randn(5, 6, 7, 7)
    expected = output_and_gradient(reference, x, upstream)
    with BatchNorms(Ranks()):
        assert all(map(torch.equal, output_and_gradient(norm, x, upstream), expected))
        if part != "statistics":
            norm(x.clone().requires_grad_()).sum().backward()
            assert norm.bias.grad is not None and (norm.weight.grad is not None) == (part == "weights")
    assert torch.equal(norm.running_mean, reference.running_mean)


def test_the_mode_ends_with_its_context():
    norm = trained_norm().requires_grad_(False)
    with pytest.raises(KeyboardInterrupt), BatchNorms(Ranks()):
        raise KeyboardInterrupt
    assert "BatchNorm" in type(norm(torch.randn(2, 6, 3, 3, requires_grad=True)).grad_fn).__name__
    assert "Frozen" not in type(norm(torch.randn(2, 6, 3, 3, requires_grad=True)).grad_fn).__name__
