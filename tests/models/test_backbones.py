import sys

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


@pytest.mark.parametrize(
    ("name", "kwargs", "sides"),
    [
        ("densenet121", {"block_config": (1, 1, 1, 1)}, [32, 16, 8, 4]),  # a first convolution and a pooling
        ("convnext_atto", {}, [32, 16, 8, 4]),  # patches of 4×4
        ("regnetx_002", {}, [32, 16, 8, 4]),  # a first convolution and a block with a shortcut
        ("mobilenetv3_small_050", {}, [32, 16, 8, 4]),  # depth-wise; squeeze-excite
        ("maxvit_pico_rw_256", {}, [32, 16, 8, 4]),  # made for one size
    ],
)
def test_stems_of_any_kind_keep_the_resolution_of_small_images(name, kwargs, sides):
    model = create_backbone(name, num_classes=10, **kwargs).eval()
    seen = set()
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d) and module.kernel_size != (1, 1):
            module.register_forward_hook(lambda module, args, output: seen.add(output.shape[-1]))
    with torch.no_grad():
        assert model(torch.rand(1, 3, 32, 32)).shape == (1, 10)
    assert sorted(seen - {1}, reverse=True) == sides
    if timm.get_pretrained_cfg(name).fixed_input_size:
        return  # tables of positions have another size
    timms = timm.create_model(name, num_classes=10, **kwargs)
    stem = next(m for m in model.modules() if isinstance(m, torch.nn.Conv2d))
    unlike = {n for n, p in model.model.named_parameters() if p.shape != timms.get_parameter(n).shape}
    assert unlike <= {n for n, p in model.model.named_parameters() if p is stem.weight}  # only the kernel of the stem


@pytest.mark.parametrize(
    ("name", "kwargs", "tokens"),
    [
        ("vit_tiny_patch16_224", {"depth": 1}, 64),
        ("mixer_s32_224", {}, 64),
        ("swin_tiny_patch4_window7_224", {"depths": (1, 1, 1, 1), "embed_dim": 12, "num_heads": (1, 1, 1, 1)}, 1024),
    ],
)
def test_patches_of_a_small_image(name, kwargs, tokens):
    model = create_backbone(name, num_classes=10, **kwargs)
    (patches,) = (m for m in model.modules() if isinstance(m, timm.layers.PatchEmbed))
    assert patches.num_patches == tokens
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def test_what_timm_is_told_of_patches_stays():
    model = create_backbone("vit_tiny_patch16_224", num_classes=10, depth=1, patch_size=16)
    assert model.model.patch_embed.num_patches == 4
    model = create_backbone("convnext_atto", num_classes=10, patch_size=2)
    assert model.model.stem[0].stride == (2, 2)


class TestCIFAR:
    """The networks of the paper."""

    @pytest.mark.parametrize(
        ("name", "parameters"),
        [  # as their papers, and what is built on them, have them
            ("preactresnet18_cifar", 11_172_170),
            ("resnet18_cifar", 11_173_962),
            ("wideresnet28_10_cifar", 36_479_194),
            ("wideresnet34_10_cifar", 46_160_474),
            ("vgg16_bn_cifar", 14_728_266),
            ("densenet121_cifar", 6_956_426),
        ],
    )
    def test_under_timms_names(self, name, parameters):
        assert timm.list_models("*_cifar", module="cifar").count(name) == 1
        model = create_backbone(name, num_classes=10)
        assert sum(p.numel() for p in model.parameters()) == parameters
        assert model.normalize.mean.flatten().tolist() == pytest.approx([0.4914, 0.4822, 0.4465])
        if not name.startswith("wide"):
            assert model.eval()(torch.rand(2, 3, 32, 32)).shape == (2, 10)

    def test_robustbench_architecture_is_the_same_network(self):
        from robustbench.model_zoo.architectures.resnet import ResNet18

        model = timm.create_model("resnet18_cifar", num_classes=7).eval()
        theirs = ResNet18().eval()
        theirs.linear = torch.nn.Linear(512, 7)
        theirs.load_state_dict(model.state_dict())
        x = torch.rand(2, 3, 32, 32)
        assert torch.equal(model(x), theirs(x)) and model.num_classes == 7

    @pytest.mark.parametrize(
        ("kwargs", "match"),
        [
            ({"input_size": (3, 64, 64)}, "resnet18_cifar is made for images of 32×32, got 64"),
            ({"input_size": (1, 32, 32)}, "`in_chans`: resnet18_cifar takes images of 3 channels, got 1"),
            ({"pretrained": True}, "`pretrained`: there are no weights for resnet18_cifar"),
        ],
    )
    def test_what_they_cannot_do(self, kwargs, match):
        with pytest.raises(ValueError, match=match):
            create_backbone("resnet18_cifar", num_classes=10, **kwargs)

    def test_without_robustbench_it_says_how_to_get_it(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "robustbench", None)
        monkeypatch.setitem(sys.modules, "robustbench.utils", None)
        with pytest.raises(ImportError, match=r'pip install "art_clat\[evaluation\]"'):
            timm.create_model("wideresnet28_10_cifar")


def test_images_of_other_channels_are_refused():
    model = create_backbone("resnet10t", num_classes=4, input_size=(3, 32, 32))
    with pytest.raises(ValueError, match="The images have 1 channels, the network is for 3"):
        model(torch.zeros(2, 1, 32, 32))


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
        ({"name": "tnt_s_patch16_224"}, "tnt_s_patch16_224 does not take images of \\(3, 32, 32\\)"),
        ({"name": "vit_tiny_patch16_224", "input_size": (3, 33, 40)}, "cannot be cut into patches of 4×4"),
        ({"name": "resnet18", "input_size": (3, 0, 32)}, "`input_size`"),
        ({"name": "resnet18", "input_size": 32}, "`input_size`"),
        ({"name": "resnet18", "mean": 0.5}, "`mean` must have one value"),
        ({"name": "resnet18", "mean": (0.5,)}, "`mean` has 1 values"),
        ({"name": "resnet18", "depth_of_field": 3}, "timm cannot make resnet18 with"),
    ],
)
def test_bad_input(kwargs, match):
    with pytest.raises(ValueError, match=match):
        create_backbone(num_classes=10, **kwargs)
