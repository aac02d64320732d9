"""What a network says of how it was made."""

import copy
import pickle

import pytest
import timm
import torch
from torch import nn

from art_clat import create_backbone
from art_clat.models.backbones import remake
from art_clat.models.recipe import BackboneRecipe, Call, replace_module, set_convolution, set_patches

NAMES = {
    "resnet10t": {"channels": (4, 8, 8, 8), "stem_width": 4},
    "convnext_atto": {"depths": (1, 1, 1, 1)},
    "vit_tiny_patch16_224": {"depth": 1},
    "maxvit_pico_rw_256": {},
    "densenet121_cifar": {"block_config": (1, 1, 1, 1)},
    "resnet18_cifar": {},
}


@pytest.mark.parametrize("name", NAMES)
def test_a_network_is_made_again_as_it_was(name):
    model = create_backbone(name, num_classes=7, **NAMES[name]).eval()
    again = remake(model.recipe).eval()
    assert repr(again) == repr(model) and again.recipe == model.recipe
    again.load_state_dict(model.state_dict())
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(again(x), model(x))


def test_is_what_timm_was_asked_for_and_what_was_changed():
    model = create_backbone("resnet18", num_classes=7, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.3), drop_rate=0.1)
    assert model.recipe == BackboneRecipe(
        Call(timm.create_model, ("resnet18",), {"num_classes": 7, "in_chans": 3, "drop_rate": 0.1}),
        (
            Call(set_convolution, ("conv1",), {"kernel_size": (3, 3), "stride": (1, 1), "padding": (1, 1)}),
            Call(replace_module, ("maxpool", Call(nn.Identity))),
        ),
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.2, 0.3),
    )
    patches = create_backbone("vit_tiny_patch16_224", num_classes=7, depth=1).recipe
    assert patches.create.keywords["img_size"] == 128
    assert patches.adaptations == (Call(set_patches, ("patch_embed",), {"img_size": (32, 32), "patch_size": 4}),)
    assert create_backbone("resnet18", num_classes=7, input_size=(3, 96, 96)).recipe.adaptations == ()


def test_is_the_constructor_of_robustbenchs_architectures():
    from robustbench.model_zoo.architectures.resnet import PreActBlock, PreActResNet

    recipe = create_backbone("preactresnet18_cifar", num_classes=7).recipe
    settings = {"bn_before_fc": True, "out_shortcut": True, "num_classes": 7}
    assert recipe.create == Call(PreActResNet, (PreActBlock, [2, 2, 2, 2]), settings)
    assert timm.create_model("preactresnet18_cifar", num_classes=7).recipe == BackboneRecipe(recipe.create)


def test_says_nothing_of_weights(monkeypatch):
    create, asked = timm.create_model, []

    def offline(name, pretrained=False, **kwargs):
        asked.append(pretrained)
        return create(name, **kwargs)

    monkeypatch.setattr(timm, "create_model", offline)
    recipe = create_backbone("resnet10t", num_classes=7, pretrained=True).recipe
    assert asked == [True] and "pretrained" not in recipe.create.keywords


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_goes_with_copies_and_not_into_the_weights(copied):
    model = create_backbone("resnet10t", num_classes=7)
    assert copied(model).recipe == model.recipe
    assert all(isinstance(value, torch.Tensor) for value in model.state_dict().values())
    assert not any("recipe" in name for name in model.state_dict())


def test_a_convolution_of_another_kernel_gets_other_weights_and_one_of_the_same_keeps_them():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 5, padding=2))
    before = model[0].weight
    set_convolution(model, "0", kernel_size=(5, 5), stride=(2, 2), padding=(2, 2))
    assert model[0].weight is before and model(torch.rand(1, 3, 8, 8)).shape == (1, 4, 4, 4)
    set_convolution(model, "0", kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
    assert model[0].weight.shape == (4, 3, 3, 3) and model[0].weight.std() > 0.1
    assert model(torch.rand(1, 3, 8, 8)).shape == (1, 4, 8, 8)
