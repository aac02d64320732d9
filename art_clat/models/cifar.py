"""The CIFAR networks of the CLAT paper, registered with timm: RobustBench's where it has them, timm's otherwise."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import timm
from timm.layers import ClassifierHead
from timm.models import generate_default_cfgs, register_model
from torch import nn

from art_clat.models.recipe import BackboneRecipe, Call, replace_module
from art_clat.utils.robustbench_import import robustbench_utils

default_cfgs = generate_default_cfgs(
    {
        name: {
            "url": "",
            "num_classes": 10,
            "input_size": (3, 32, 32),
            "fixed_input_size": True,
            "mean": (0.4914, 0.4822, 0.4465),
            "std": (0.2471, 0.2435, 0.2616),
            "first_conv": first_conv,
            "classifier": classifier,
        }
        for name, first_conv, classifier in (
            ("preactresnet18_cifar", "conv1", "linear"),
            ("resnet18_cifar", "conv1", "linear"),
            ("wideresnet28_10_cifar", "conv1", "fc"),
            ("wideresnet34_10_cifar", "conv1", "fc"),
            ("densenet121_cifar", "features.conv0", "classifier"),
            ("vgg16_bn_cifar", "features.0", "head.fc"),
        )
    }
)


def preactresnet18_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PreActResNet-18, RobustBench's, with a BatchNorm before the classifier (as in Rice et al., arXiv 2002.11569)."""
    resnet = _architectures("resnet")
    settings = {"bn_before_fc": True, "out_shortcut": True, **_settings("preactresnet18_cifar", pretrained, kwargs)}
    return _made("preactresnet18_cifar", Call(resnet.PreActResNet, (resnet.PreActBlock, [2, 2, 2, 2]), settings))


def resnet18_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-18 with a 3×3 stem, RobustBench's."""
    resnet = _architectures("resnet")
    settings = _settings("resnet18_cifar", pretrained, kwargs)
    return _made("resnet18_cifar", Call(resnet.ResNet, (resnet.BasicBlock, [2, 2, 2, 2]), settings))


def wideresnet28_10_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """WideResNet-28-10, RobustBench's."""
    return _wideresnet("wideresnet28_10_cifar", 28, pretrained, kwargs)


def wideresnet34_10_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """WideResNet-34-10, RobustBench's."""
    return _wideresnet("wideresnet34_10_cifar", 34, pretrained, kwargs)


def densenet121_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DenseNet-121, timm's, with a 3×3 stem of stride 1 and without the first pooling."""
    settings = _settings("densenet121_cifar", pretrained, kwargs, in_chans=3)
    width = 2 * settings.get("growth_rate", 32)
    stem = Call(nn.Conv2d, (settings["in_chans"], width, 3), {"padding": 1, "bias": False})
    model: Any = _made(
        "densenet121_cifar",
        Call(timm.create_model, ("densenet121",), settings),
        Call(replace_module, ("features.conv0", stem)),
        Call(replace_module, ("features.pool0", Call(nn.Identity))),
    )
    nn.init.kaiming_normal_(model.features.conv0.weight)
    return model  # type: ignore[no-any-return]


def vgg16_bn_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VGG-16 with BatchNorm, timm's, with one linear layer after the convolutions."""
    settings = _settings("vgg16_bn_cifar", pretrained, kwargs, in_chans=3)
    classes, drop_rate = settings["num_classes"], settings.get("drop_rate", 0.0)
    model: Any = _made(
        "vgg16_bn_cifar",
        Call(timm.create_model, ("vgg16_bn",), {**settings, "num_classes": 0}),
        Call(replace_module, ("pre_logits", Call(nn.Identity))),
        Call(replace_module, ("head", Call(ClassifierHead, (512, classes), {"drop_rate": drop_rate}))),
        num_classes=classes,
    )
    model.head_hidden_size = model.num_features
    return model  # type: ignore[no-any-return]


def _wideresnet(name: str, depth: int, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    """Make a WideResNet of ten times the width."""
    settings = _settings(name, pretrained, kwargs)
    return _made(name, Call(_architectures("wide_resnet").WideResNet, (depth,), {"widen_factor": 10, **settings}))


def _architectures(module: str) -> Any:
    """Import one of RobustBench's modules of architectures: alone, if the rest of RobustBench lacks something."""
    name = f"robustbench.model_zoo.architectures.{module}"
    try:
        robustbench_utils()
        return importlib.import_module(name)
    except ImportError as error:
        package = importlib.util.find_spec("robustbench")
        if package is None or not package.submodule_search_locations:
            raise ImportError(
                "This network is made of RobustBench's architectures, and RobustBench is not installed: "
                '`pip install "art_clat[evaluation]"` brings it.'
            ) from error
        if name in sys.modules:  # it had been imported when the rest failed
            return sys.modules[name]
        file = Path(package.submodule_search_locations[0], "model_zoo", "architectures", f"{module}.py")
        spec = importlib.util.spec_from_file_location(name, file)
        if spec is None or spec.loader is None or not file.is_file():
            raise
    loaded = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def _settings(name: str, pretrained: bool, kwargs: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Keep of timm's arguments those that the network takes; raise a `ValueError` for what it cannot do."""
    if pretrained:
        raise ValueError(f"`pretrained`: there are no weights for {name}.")
    of_timm = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
    settings = {"num_classes": 10, **more, **{key: value for key, value in kwargs.items() if key not in of_timm}}
    size = settings.pop("img_size", 32)
    if size not in (32, (32, 32), [32, 32]):
        raise ValueError(f"`img_size`: {name} is made for images of 32×32, got {size}.")
    if "in_chans" not in more and settings.pop("in_chans", 3) != 3:
        raise ValueError(f"`in_chans`: {name} takes images of 3 channels, got {kwargs['in_chans']}.")
    return settings


def _made(name: str, create: Call, *adaptations: Call, num_classes: int | None = None) -> nn.Module:
    """Make a network, and let it say of itself what timm's networks say, and how it was made."""
    recipe = BackboneRecipe(create, adaptations)
    model: Any = recipe.make()
    model.num_classes = create.keywords["num_classes"] if num_classes is None else num_classes
    model.pretrained_cfg = model.default_cfg = default_cfgs[name].default.to_dict()
    model.recipe = recipe
    return model  # type: ignore[no-any-return]


for _function in (
    preactresnet18_cifar,
    resnet18_cifar,
    wideresnet28_10_cifar,
    wideresnet34_10_cifar,
    densenet121_cifar,
    vgg16_bn_cifar,
):
    register_model(_function)
