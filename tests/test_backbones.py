import pytest
import timm
import torch

from art_clat import create_backbone


def test_resnet_for_cifar_keeps_the_resolution():
    model = create_backbone("resnet18", num_classes=10, input_size=(3, 32, 32))
    shapes = []
    model.model.layer1.register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    model.model.layer4.register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    assert shapes == [(2, 64, 32, 32), (2, 512, 4, 4)]
    assert sum(p.numel() for p in model.parameters()) == 11_173_962  # the usual CIFAR ResNet-18


@pytest.mark.parametrize(
    ("name", "size", "kwargs"),
    [
        ("resnet10t", (1, 8, 8), {"channels": (8, 8, 16, 16)}),
        ("resnet26d", (3, 32, 32), {}),
        ("seresnet18", (3, 16, 16), {}) if timm.is_model("seresnet18") else ("resnet26", (3, 16, 16), {}),
        ("vit_tiny_patch16_224", (3, 32, 32), {"depth": 2}),
        ("vit_tiny_patch16_224", (1, 8, 8), {"depth": 2}),
        ("resnet18", (3, 96, 96), {}),
    ],
)
def test_other_sizes_and_networks(name, size, kwargs):
    model = create_backbone(name, num_classes=7, input_size=size, **kwargs).eval()
    assert model(torch.rand(2, *size)).shape == (2, 7)


def test_vit_has_64_patches_of_a_small_image():
    model = create_backbone("vit_tiny_patch16_224", num_classes=10, depth=1)
    assert model.model.patch_embed.num_patches == 64


def test_large_images_leave_the_network_as_timm_makes_it():
    model = create_backbone("resnet18", num_classes=10, input_size=(3, 224, 224))
    assert model.model.conv1.stride == (2, 2)
    assert isinstance(model.model.maxpool, torch.nn.MaxPool2d)


def test_normalisation_is_inside():
    model = create_backbone("resnet10t", num_classes=10, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.5)).eval()
    x = torch.rand(2, 3, 32, 32)
    by_hand = (x - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / torch.tensor([0.2, 0.25, 0.5]).view(3, 1, 1)
    torch.testing.assert_close(model(x), model.model(by_hand))
    default = create_backbone("resnet10t", num_classes=10)
    assert default.normalize.mean.flatten().tolist() == pytest.approx(default.model.default_cfg["mean"])


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"name": "ResNet-18"}, "`name` must be a model that timm knows.*resnet18"),
        ({"name": "convnext_atto"}, "small stem, which is available for"),
        ({"name": "resnet18", "input_size": (3, 0, 32)}, "`input_size`"),
        ({"name": "resnet18", "input_size": 32}, "`input_size`"),
        ({"name": "resnet18", "mean": 0.5}, "`mean` must have one value"),
        ({"name": "mixer_s16_224"}, "timm cannot make"),
        ({"name": "resnet18", "mean": (0.5,)}, "`mean` has 1 values"),
        ({"name": "resnet18", "depth_of_field": 3}, "timm cannot make resnet18 with"),
    ],
)
def test_bad_input(kwargs, match):
    with pytest.raises(ValueError, match=match):
        create_backbone(**{"num_classes": 10, **kwargs})
