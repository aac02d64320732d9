import pytest
import torch
from conftest import INPUT_SHAPE

from art_clat.features import Features, tap
from art_clat.layers import find_layers


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
        torch.testing.assert_close(features.distance(layer, 5), expected[layer.name])
    torch.testing.assert_close(features.total_distance(5), sum(expected.values()))


def test_features_are_forgotten_as_soon_as_they_are_compared(chain, layers):
    x, z = torch.rand(2, 5, *INPUT_SHAPE)
    kept, forgotten, left = Features(layers), Features(layers), []
    chain.hidden.register_forward_hook(lambda *_: left.append(sum(map(len, forgotten._kept.values()))))
    with kept.keep(), forgotten.keep():
        chain(x)
    with kept.compare(), forgotten.compare(forget=True):
        chain(z)
    assert torch.equal(kept.total_distance(5), forgotten.total_distance(5))
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
        distance = features.total_distance(5)
        results.append((distance, *torch.autograd.grad(distance.sum(), z)))
    assert all(torch.equal(full, stopped) for full, stopped in zip(*results, strict=True))


def test_distances_of_features_of_half_precision_are_measured_in_float32(chain, layers):
    x, z = torch.rand(2, 5, *INPUT_SHAPE)
    features, seen = Features(layers[:1]), []
    with torch.autocast("cpu", torch.bfloat16):
        for measured, data in ((features.keep, x), (features.compare, x + 0.01 * z)):
            with tap([layers[0].output], lambda site, feature: seen.append(feature.clone())), measured():
                chain(data)
    distance = features.distance(layers[0], 5)
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
    (gradient,) = torch.autograd.grad(features.total_distance(3).sum(), x)
    assert torch.equal(gradient, torch.zeros_like(x))


def test_hooks_are_gone_also_after_an_exception(chain, layers):
    with pytest.raises(KeyboardInterrupt), tap([layer.output for layer in layers], lambda site, feature: None):
        raise KeyboardInterrupt
    assert not any(module._forward_hooks for module in chain.modules())
