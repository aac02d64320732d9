import pytest
import torch
from conftest import INPUT_SHAPE, make_classifier
from torch import nn

from art_clat.layers.discovery import find_layers
from art_clat.layers.features import Features, tap
from art_clat.models.tensor_classifier import TensorClassifier


@pytest.fixture
def layers(chain):
    return find_layers(chain, lambda size: chain(torch.rand(size, *INPUT_SHAPE)))


def test_kept_features_are_not_overwritten_in_place(chain, layers):
    x = torch.rand(5, *INPUT_SHAPE)
    features = Features(layers)
    with features.keep():
        chain(x)
    for layer in layers:
        torch.testing.assert_close(features._kept[layer.output][0], chain.features(x)[layer.name])


def test_distances_are_those_of_the_features(chain, layers):
    x, z = torch.rand(5, *INPUT_SHAPE), torch.rand(5, *INPUT_SHAPE)
    features = Features(layers)
    with features.keep():
        chain(x)
    with features.compare():
        chain(z)
    expected = {n: (chain.features(z)[n] - f).flatten(1).norm(dim=1) for n, f in chain.features(x).items()}
    for layer in layers:
        torch.testing.assert_close(features.distance(layer), expected[layer.name])
    torch.testing.assert_close(features.total_distance(), sum(expected.values()))


def test_features_are_forgotten_as_soon_as_they_are_compared(chain, layers):
    x, z = torch.rand(2, 5, *INPUT_SHAPE)
    kept, forgotten, left = Features(layers), Features(layers), []
    chain.hidden.register_forward_hook(lambda *_: left.append(sum(map(len, forgotten._kept.values()))))
    with kept.keep(), forgotten.keep():
        chain(x)
    with kept.compare(), forgotten.compare(forget=True):
        chain(z)
    assert torch.equal(kept.total_distance(), forgotten.total_distance())
    assert left[1] < len(layers) and not any(forgotten._kept.values())


def test_stopping_gives_the_same_features_and_input_gradients_bit_for_bit(chain, layers):
    x, z = torch.rand(5, *INPUT_SHAPE), torch.rand(5, *INPUT_SHAPE, requires_grad=True)
    results = []
    for stop in (False, True):
        features = Features(layers[:2])
        with features.keep(stop=stop):
            chain(x)
        with features.compare(stop=stop):
            chain(z)
        distance = features.total_distance()
        results.append((distance, *torch.autograd.grad(distance.sum(), z)))
    assert all(torch.equal(full, stopped) for full, stopped in zip(*results, strict=True))


def test_distances_of_bfloat16_features_are_measured_in_float32(chain, layers):
    x, z = torch.rand(2, 5, *INPUT_SHAPE)
    features, seen = Features(layers[:1]), []
    with torch.autocast("cpu", torch.bfloat16):
        for measured, data in ((features.keep, x), (features.compare, x + 0.01 * z)):
            with tap([layers[0].output], lambda site, feature: seen.append(feature.clone())), measured():
                chain(data)
    distance = features.distance(layers[0])
    assert seen[0].dtype == torch.bfloat16 and distance.dtype == torch.float32
    assert torch.equal(distance, torch.linalg.vector_norm(seen[1].float() - seen[0].float(), dim=(1, 2, 3)))


def test_stopping_runs_nothing_after_the_last_layer(chain, layers):
    ran = []
    chain.hidden.register_forward_hook(lambda *_: ran.append("hidden"))
    with tap([layer.output for layer in layers[:2]], lambda site, feature: None, stop=True):
        chain(torch.rand(2, *INPUT_SHAPE))
    assert ran == []


def test_gradient_at_zero_distance_is_zero_not_nan(chain, layers):
    x = torch.rand(3, *INPUT_SHAPE, requires_grad=True)
    features = Features(layers)
    with features.keep():
        chain(x.detach())
    with features.compare():
        chain(x)
    (gradient,) = torch.autograd.grad(features.total_distance().sum(), x)
    assert torch.equal(gradient, torch.zeros_like(x))


def test_hooks_are_removed_after_an_exception(chain, layers):
    with pytest.raises(KeyboardInterrupt), tap([layer.output for layer in layers], lambda site, feature: None):
        raise KeyboardInterrupt
    assert not any(module._forward_hooks for module in chain.modules())


class Steps(nn.Module):
    """A convolution on every image in three brightnesses: a sample's entries together, or one batch size apart."""

    def __init__(self, interleaved):
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 4, 3), nn.Linear(4, 4)
        self.interleaved = interleaved

    def forward(self, x):
        steps = torch.stack([x, 2 * x, 3 * x], dim=0 if self.interleaved else 1)
        seen = self.conv(steps.flatten(0, 1)).unflatten(0, steps.shape[:2])
        return self.head(seen.relu().mean(dim=(0 if self.interleaved else 1, 3, 4)))


@pytest.mark.parametrize("interleaved", [True, False])
def test_entries_are_assigned_to_their_samples(interleaved):
    model = Steps(interleaved).eval()
    conv, head = TensorClassifier(make_classifier(model)).find_layers(torch.rand(1, *INPUT_SHAPE))
    assert conv.output.interleaved is conv.input.interleaved is interleaved and head.output.rows == (1,)
    assert conv.shape == (3, 4, 4, 4) and conv.size == 3 * 4 * 4 * 4
    x, z = torch.rand(2, 5, *INPUT_SHAPE)
    z[1:] = x[1:]  # one sample of five is perturbed
    by_hand, entering = (
        torch.stack([factor * (after - before) for factor in (1, 2, 3)], dim=1).flatten(1).norm(dim=1)
        for before, after in ((model.conv(x), model.conv(z)), (x, z))
    )
    assert by_hand[0] > 0.01 and not by_hand[1:].any()
    halves, kept = (Features([conv, head], inputs=True, lengths=True) for _ in range(2))
    with halves.compare_halves():
        model(torch.cat([x, z]))
    with kept.keep():
        model(x)
    with kept.compare():
        model(z)
    for features in (halves, kept):
        bias = model.conv.bias.view(-1, 1, 1)  # the brightness does not multiply it
        torch.testing.assert_close(features.distance(conv), by_hand, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(features.input_distance(conv), entering)
        clean = torch.stack([factor * (model.conv(x) - bias) + bias for factor in (1, 2, 3)], dim=1)
        relative = by_hand / clean.flatten(1).norm(dim=1)
        torch.testing.assert_close(features.relative_distance(conv), relative, rtol=1e-4, atol=1e-5)
