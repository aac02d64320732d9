import pytest
import timm
import torch
from conftest import Normed
from torch import nn
from torch.nn.utils import parametrizations

from art_clat.layers.discovery import find_layers
from art_clat.layers.features import Features
from art_clat.layers.freezing import only_trainable, train_all, train_only
from art_clat.layers.kinds import is_weighted_model


def layers_of(model, *shape, **kwargs):
    model.eval()
    return find_layers(model, lambda size: model(torch.rand(size, *shape)), **kwargs)


def test_residual_backbone_in_execution_order_with_its_shapes():
    layers = layers_of(timm.create_model("resnet18", num_classes=10), 3, 64, 64)
    block = [(f"{i}.{j}.conv{k}") for i in range(4) for j in range(2) for k in (1, 2)]
    names = [layer.name.removeprefix("layer") for layer in layers]
    assert names[0] == "conv1" and names[-1] == "fc" and len(layers) == 21
    assert [n for n in names[1:-1] if "downsample" not in n] == [f"{int(n[0]) + 1}{n[1:]}" for n in block]
    assert names.index("2.0.downsample.0") == names.index("2.0.conv2") + 1  # runs after the block's convolutions
    shapes = {layer.name: layer.shape for layer in layers}
    assert shapes["conv1"] == (64, 32, 32)
    assert shapes["layer1.0.conv1"] == (64, 16, 16)
    assert shapes["layer4.1.conv2"] == (512, 2, 2)
    assert shapes["fc"] == (10,)
    assert [layer.name for layer in layers if layer.is_head] == ["fc"]


def test_transformer_backbone_in_execution_order_with_its_shapes():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=10)
    layers = layers_of(model, 3, 32, 32)
    per_block = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
    expected = ["patch_embed.proj", *(f"blocks.{i}.{name}" for i in range(2) for name in per_block), "head"]
    assert [layer.name for layer in layers] == expected
    shapes = {layer.name: layer.shape for layer in layers}
    assert shapes["patch_embed.proj"] == (192, 4, 4)
    assert shapes["blocks.0.attn.qkv"] == (17, 576)
    assert shapes["blocks.1.mlp.fc1"] == (17, 768)
    assert all(layer.size == torch.Size(layer.shape).numel() for layer in layers)


def test_windowed_features_count_per_sample():
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=56, window_size=7, depths=(1, 1, 1, 1))
    layers = {layer.name: layer for layer in layers_of(model, 3, 56, 56)}
    assert layers["layers.0.blocks.0.attn.qkv"].shape == (4, 49, 288)  # four windows of 7×7 tokens
    assert layers["layers.0.blocks.0.attn.qkv"].size == 4 * 49 * 288


def test_norm_belongs_to_the_layer_whose_output_it_takes():
    model = Normed()
    by_name = {layer.name: layer for layer in layers_of(model, 2, 6, 6)}
    assert by_name["conv2"].modules == (model.conv2, model.bn2)
    assert by_name["conv2"].nb_parameters == 6 * 6 * 9 + 12
    assert by_name["fc"].modules == (model.fc,)


def test_norm_of_another_tensor_belongs_to_no_layer():
    class PreActivation(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.bn = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)
            self.conv, self.fc = nn.Conv2d(2, 2, 1), nn.Linear(2, 4)

        def forward(self, x):
            x = self.stem(x) + x  # the norm's input is the sum, not the stem's output
            return self.fc(self.conv(self.bn(x)).mean((2, 3)))

    model = PreActivation()
    assert all(model.bn not in layer.modules for layer in layers_of(model, 2, 6, 6))


def test_norm_belongs_to_its_layer_if_other_modules_run_in_between():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
            self.norm_a, self.norm_b = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x):
            a, b = self.a(x), self.b(x)
            b, a = self.norm_b(b), self.norm_a(a)
            return (a * b).flatten(1)

    model = Branches()
    a, b = layers_of(model, 3, 4, 4, after_norm=True)
    assert a.modules == (model.a, model.norm_a) and b.modules == (model.b, model.norm_b)
    assert a.output.module is model.norm_a and b.output.module is model.norm_b


@pytest.mark.parametrize("after_norm", [False, True])
def test_feature_is_taken_before_or_after_the_norm(after_norm):
    model = Normed()
    layer = layers_of(model, 2, 6, 6, after_norm=after_norm)[0]
    assert layer.output.module is (model.bn1 if after_norm else model.conv1)


def test_shared_layer_is_one_layer_that_runs_twice():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x):
            return self.head(self.fc(self.fc(x).relu()))

    first, head = layers_of(Shared(), 6)
    assert (first.name, first.output.calls, first.size) == ("fc", 2, 12)
    assert (head.output.calls, head.size) == (1, 4)


def test_module_that_never_runs_and_tables_without_a_batch_are_no_layers():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused, self.table, self.head = nn.Linear(6, 6), nn.Embedding(8, 6), nn.Linear(6, 4)

        def forward(self, x):
            return self.head(x + self.table(torch.arange(8)).sum(0))

    assert [layer.name for layer in layers_of(Odd(), 6)] == ["head"]


def test_attention_module_and_parametrized_weights_are_layers():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
            self.fc = parametrizations.spectral_norm(nn.Linear(6, 4))

        def forward(self, x):
            return self.fc(self.attention(x, x, x)[0].mean(1))

    layers = layers_of(Attention(), 5, 6)
    assert [(layer.name, layer.shape) for layer in layers] == [("attention", (5, 6)), ("fc", (4,))]
    assert layers[0].nb_parameters == 4 * 36 + 4 * 6


def test_hooks_are_removed_if_the_network_fails():
    model = Normed().eval()

    def fail(size):
        model(torch.rand(size, 2, 6, 6))
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        find_layers(model, fail)
    assert not any(module._forward_hooks for module in model.modules())


def test_network_without_weights_is_refused():
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(6))
    assert not is_weighted_model(model)
    with pytest.raises(ValueError, match="no weighted layer"):
        layers_of(model, 6)


def test_only_trainable_freezes_the_rest_and_restores_the_flags():
    model = Normed()
    layers = layers_of(model, 2, 6, 6)
    model.fc.bias.requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    with pytest.raises(KeyboardInterrupt), only_trainable(model, [layers[1], layers[3]]):
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trained == {"conv2.weight", "bn2.weight", "bn2.bias", "fc.weight"}  # the user's frozen bias stays so
        raise KeyboardInterrupt
    assert [p.requires_grad for p in model.parameters()] == before


def test_train_only_puts_the_rest_in_evaluation_mode():
    model = Normed()
    layers = layers_of(model, 2, 6, 6)
    train_only(model, layers[1:2])
    assert {name for name, module in model.named_modules() if module.training} == {"bn2"}


@pytest.mark.parametrize("length", [5, 7, 9, 35])
def test_batch_may_be_the_second_dimension(length):
    class SequenceFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.encoder = nn.Linear(3, 8), nn.TransformerEncoderLayer(8, 2, 16)
            self.positions, self.head = nn.Embedding(length, 8), nn.Linear(8, 4)

        def forward(self, x):
            x = self.embed(x).transpose(0, 1) + self.positions(torch.arange(length))[:, None]
            return self.head(self.encoder(x).mean(0))

    model = SequenceFirst().eval()
    layers = {layer.name: layer for layer in layers_of(model, length, 3)}
    assert list(layers) == ["embed", "encoder.self_attn", "encoder.linear1", "encoder.linear2", "head"]
    assert (layers["encoder.linear1"].output.batch_dim, layers["encoder.linear1"].shape) == (1, (length, 16))
    x, z, features = torch.rand(3, length, 3), torch.rand(3, length, 3), Features([layers["encoder.linear1"]])
    outputs = []
    model.encoder.linear1.register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.no_grad():
        with features.keep():
            model(x)
        with features.compare():
            model(z)
    by_hand = (outputs[1] - outputs[0]).transpose(0, 1).flatten(1).norm(dim=1)
    torch.testing.assert_close(features.total_distance(), by_hand)


def test_distance_of_a_layer_that_runs_twice_is_over_both():
    fc = nn.Linear(6, 6)
    outputs = []
    fc.register_forward_hook(lambda module, args, output: outputs.append(output))

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.head = fc, nn.Linear(6, 4)

        def forward(self, x):
            return self.head(self.fc(self.fc(x).relu()))

    model = Shared()
    features = Features(layers_of(model, 6)[:1])
    outputs.clear()
    with features.keep():
        model(torch.rand(3, 6))
    with features.compare():
        model(torch.rand(3, 6))
    by_hand = torch.cat([outputs[2] - outputs[0], outputs[3] - outputs[1]], dim=1).norm(dim=1)
    torch.testing.assert_close(features.total_distance(), by_hand)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_norm_of_a_tensor_that_was_written_to_belongs_to_no_layer(inplace):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.fc = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.Linear(2, 4)

        def forward(self, x):
            out = self.conv(x)
            out = out.add_(x) if inplace else out + x
            return self.fc(self.bn(out).mean((2, 3)))

    model = Net()
    assert all(model.bn not in layer.modules for layer in layers_of(model, 2, 6, 6))


def test_a_linear_layer_with_norm_in_its_name_is_no_norm():
    class NormedLinear(nn.Linear):
        pass

    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), NormedLinear(48, 4))
    assert [(layer.name, layer.is_head) for layer in layers_of(model, 2, 6, 6)] == [("0", False), ("2", True)]


def test_hidden_layer_as_narrow_as_the_head_is_no_head():
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 4))
    assert [layer.is_head for layer in layers_of(model, 6)] == [False, True]


def test_both_heads_of_a_distilled_transformer():
    model = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, depth=1, num_classes=10)
    assert [layer.name for layer in layers_of(model, 3, 32, 32) if layer.is_head] == ["head", "head_dist"]


def test_norm_shared_by_two_layers_gives_neither_its_feature():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.bn = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)
            self.fc = nn.Linear(2, 4)

        def forward(self, x):
            return self.fc(self.bn(self.two(self.bn(self.one(x)))).mean((2, 3)))

    model = Shared()
    one, two, _ = layers_of(model, 2, 6, 6, after_norm=True)
    assert (one.output.module, two.output.module) == (model.one, model.two)


def test_norm_that_its_owner_has_frozen_keeps_its_statistics():
    model = Normed()
    layers = layers_of(model, 2, 6, 6)
    model.bn2.requires_grad_(False)
    train_only(model, layers[1:2])
    assert not model.bn2.training
    train_all(model)
    assert not model.bn2.training and model.bn1.training and model.dropout.training and model.training


def test_norm_that_the_networks_own_train_keeps_in_evaluation_mode_stays_there():
    class Kept(Normed):
        def train(self, mode=True):
            super().train(mode)
            self.bn1.eval()
            return self

    model = Kept()
    layers = [layer for layer in layers_of(model, 2, 6, 6) if layer.name in ("conv1", "conv2")]
    for put in (lambda: train_all(model), lambda: train_only(model, layers)):
        put()
        assert not model.bn1.training and model.bn2.training
    assert not model.bn3.training and not model.dropout.training and not model.training


def test_dropout_within_a_norm_is_off():
    model = nn.Sequential(nn.Conv2d(2, 6, 3), timm.layers.BatchNormAct2d(6, drop_layer=nn.Dropout), nn.Flatten())
    layers = layers_of(model, 2, 6, 6)
    train_only(model, layers)
    assert model[1].training and not model[1].drop.training


def test_norms_of_a_weight_stay_in_evaluation_mode():
    """In training mode spectral normalisation would move its estimate with every pass, clean or perturbed."""
    model = nn.Sequential(parametrizations.spectral_norm(nn.Conv2d(2, 3, 3)), nn.Flatten(), nn.Linear(48, 4))
    layer, head = layers_of(model, 2, 6, 6)
    assert layer.name == "0" and head.is_head
    train_only(model, [layer])
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(torch.rand(2, 2, 6, 6))
    assert before and all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())
