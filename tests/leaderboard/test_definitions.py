"""Definitions and weights that RobustBench's `load_model` loads."""

import pickle
import subprocess
import sys
import types

import pytest
import timm
import torch
from conftest import Code
from torch import nn

from art_clat import create_backbone
from art_clat.leaderboard.definitions import (
    load_from_robustbench,
    model_definition,
    timm_name,
    write_checkpoint,
    zoo_entry,
)
from art_clat.leaderboard.entries import preprocessing_shortfalls
from art_clat.models.by_name import load_function
from art_clat.utils.robustbench_import import robustbench_utils

robustbench_utils()  # makes the next one importable
from robustbench.model_zoo.architectures.resnet import PreActBlock, PreActResNet  # noqa: E402

BACKBONE = {
    "name": "resnet10t", "num_classes": 10, "input_size": (3, 32, 32), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.3),
    "channels": (4, 8, 8, 8), "stem_width": 4,
}  # fmt: skip
ID = "Someone2026Small-R10"
SETTING = {"model_id": ID, "dataset": "cifar10", "norm": "Linf"}


OWN = """from conftest import Normed

from art_clat import create_backbone


def changed():
    model = create_backbone("resnet10t", num_classes=10, channels=(4, 8, 8, 8), stem_width=4)
    model.model.layer1[0].act1 = Normed().dropout
    return model


def unchanged():
    return create_backbone("resnet10t", num_classes=10, channels=(4, 8, 8, 8), stem_width=4)
"""


def defined(network, text, folder):
    """The network as RobustBench's `load_model` makes it from a definition, with the weights of the one given."""
    (folder / "definition.py").write_text(text)
    write_checkpoint(network, folder / "weights.pt", folder / "definition.py", **SETTING)
    return load_from_robustbench(folder / "definition.py", folder / "weights.pt", **SETTING)


class TestModelZoo:
    @pytest.fixture
    def packed(self, tmp_path):
        """A network with weights of its own, its definition and its weights."""
        model = create_backbone(**BACKBONE)
        model(torch.rand(32, 3, 32, 32))  # BatchNorm's statistics too
        (tmp_path / "definition.py").write_text(model_definition(create_backbone, BACKBONE, **SETTING))
        write_checkpoint(model, tmp_path / "weights.pt", tmp_path / "definition.py", **SETTING)
        return model.eval(), tmp_path / "definition.py", tmp_path / "weights.pt"

    def test_name_is_what_robustbench_asks_timm_for(self):
        robustbench_utils()  # registers its networks with timm
        assert timm_name("Debenedetti2022Light_XCiT-S12", "cifar10", "Linf") in timm.list_models("*_cifar10_linf")

    def test_robustbenchs_load_model_gives_the_same_logits(self, packed):
        model, definition, weights = packed
        loaded = load_from_robustbench(definition, weights, **SETTING)
        x = torch.rand(4, 3, 32, 32)
        assert not loaded.training
        assert torch.equal(loaded(x), model(x))

    def test_has_the_normalisations_constants_without_weights_too(self, packed):
        _, definition, _ = packed
        normalize = load_from_robustbench(definition, None, **SETTING).normalize
        assert normalize.mean.flatten().tolist() == pytest.approx(BACKBONE["mean"])
        assert normalize.std.flatten().tolist() == pytest.approx(BACKBONE["std"])

    def test_needs_nothing_else_of_this_package(self, packed, tmp_path):
        """As RobustBench would have it: its load_model, the zoo's entry, and no art_clat."""
        model, _, weights = packed
        x = torch.rand(4, 3, 32, 32)
        torch.save(x, tmp_path / "x.pt")
        code = f"""
import sys, timm, torch
from art_clat.utils.robustbench_import import robustbench_utils  # where RobustBench finds AutoAttack
load_model = robustbench_utils().load_model
for name in [name for name in sys.modules if name.split(".")[0] == "art_clat"]:
    sys.modules[name] = None  # importing it fails
sys.path.insert(0, {str(tmp_path)!r})
import definition
zoo = dict([{zoo_entry(**SETTING)}])
x = torch.load({str(tmp_path / "x.pt")!r})
loaded = load_model({ID!r}, dataset="cifar10", threat_model="Linf", custom_checkpoint={str(weights)!r})
other = zoo[{ID!r}]["model"]().eval()  # of random weights
assert zoo[{ID!r}]["gdrive_id"] is None and other.state_dict().keys() == loaded.state_dict().keys()
torch.save((loaded(x), other(x)), {str(tmp_path / "logits.pt")!r})
"""
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-3000:]
        assert "without CHECKPOINT_URL the weights are those of `custom_checkpoint`, or random" in result.stderr
        logits, random = torch.load(tmp_path / "logits.pt")
        assert torch.equal(logits, model(x)) and not torch.allclose(random, logits)

    def test_downloads_published_weights(self, packed, tmp_path, monkeypatch):
        _, definition, weights = packed
        text = model_definition(create_backbone, BACKBONE, **SETTING, checkpoint_url=f"file://{weights}")
        definition.write_text(text)
        load_from_robustbench(definition, weights, **SETTING)  # registers it
        name = timm_name(**SETTING)
        monkeypatch.setattr(sys.modules[name], "CHECKPOINT_URL", f"file://{weights}")
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
        loaded = robustbench_utils().load_model(ID, dataset="cifar10", threat_model="Linf")
        assert f"CHECKPOINT_URL = 'file://{weights}'" in text
        assert all(torch.equal(value, torch.load(weights)[key]) for key, value in loaded.state_dict().items())

    def test_published_weights_with_code_are_not_executed(self, packed, tmp_path, monkeypatch):
        _, definition, weights = packed
        load_from_robustbench(definition, weights, **SETTING)  # registers it
        code = Code()
        code.path = str(tmp_path / "executed")
        torch.save({"conv.weight": code}, tmp_path / "hostile.pt")
        name = timm_name(**SETTING)
        monkeypatch.setattr(sys.modules[name], "CHECKPOINT_URL", f"file://{tmp_path / 'hostile.pt'}")
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
        with pytest.raises(pickle.UnpicklingError):
            timm.create_model(name, pretrained=True)
        assert not (tmp_path / "executed").exists()

    @pytest.mark.parametrize(
        ("make", "arguments"),
        [
            (create_backbone, BACKBONE),
            (create_backbone, {"name": "vit_tiny_patch16_224", "num_classes": 10, "depth": 1}),
            (create_backbone, {"name": "convnext_atto", "num_classes": 10}),
            (create_backbone, {"name": "mobilenetv3_small_050", "num_classes": 10}),
            (create_backbone, {"name": "resnet18", "num_classes": 10, "norm_layer": nn.InstanceNorm2d}),
            (create_backbone, {"name": "densenet121_cifar", "num_classes": 10, "block_config": (1, 1, 1, 1)}),
            (create_backbone, {"name": "vgg16_bn_cifar", "num_classes": 10, "mlp_ratio": 0.01}),
            (create_backbone, {"name": "preactresnet18_cifar", "num_classes": 10}),
            (create_backbone, {"name": "wideresnet28_10_cifar", "num_classes": 10}),
            (timm.create_model, {"model_name": "resnet10t", "num_classes": 10, "in_chans": 3}),
            (timm.create_model, {"model_name": "resnet18_cifar", "num_classes": 10}),
            (PreActResNet, {"block": PreActBlock, "num_blocks": [1, 1, 1, 1], "num_classes": 10, "out_shortcut": True}),
        ],
    )
    def test_networks_of_timm_and_robustbench_need_nothing_else(self, tmp_path, make, arguments):
        text = model_definition(make, arguments, **SETTING)
        assert "art_clat" not in text and "pytest" not in text
        network = make(**arguments)
        network(torch.rand(8, 3, 32, 32))  # BatchNorm's statistics too
        loaded = defined(network.eval(), text, tmp_path)
        if make is not create_backbone:
            assert repr(loaded) == repr(network)
        else:  # the normalisation is RobustBench's
            assert repr(loaded.model) == repr(network.model)
        x = torch.rand(2, 3, 32, 32)
        assert torch.equal(loaded(x), network(x))

    def test_a_function_that_returns_a_backbone_needs_nothing_else(self, tmp_path):
        (tmp_path / "own.py").write_text(OWN)
        make = load_function(f"{tmp_path / 'own.py'}:unchanged")
        text = model_definition(make, {}, **SETTING)
        assert "art_clat" not in text
        network = make().eval()
        x = torch.rand(2, 3, 32, 32)
        assert torch.equal(defined(network, text, tmp_path)(x), network(x))

    def test_a_backbone_that_was_changed_is_defined_by_its_module(self, tmp_path):
        """Its recipe is of another network."""
        (tmp_path / "own.py").write_text(OWN)
        make = load_function(f"{tmp_path / 'own.py'}:changed")
        text = model_definition(make, {}, **SETTING)
        assert OWN.rstrip() in text
        loaded = defined(make(), text, tmp_path)
        assert isinstance(loaded.model.layer1[0].act1, nn.Dropout)

    def test_a_network_that_others_register_with_timm_is_not_taken_for_timms(self, tmp_path):
        (tmp_path / "own.py").write_text(
            "import timm\nfrom timm.models import register_model\n\nfrom art_clat import create_backbone\n\n\n"
            "@register_model\ndef somebodys_net(pretrained=False, **kwargs):\n"
            "    return timm.create_model('resnet10t', **kwargs)\n\n\n"
            "def make():\n    return create_backbone('somebodys_net', num_classes=10)\n"
        )
        sys.modules["own"] = types.ModuleType("own")  # where timm looks
        make = load_function(f"{tmp_path / 'own.py'}:make")
        try:
            assert "def somebodys_net" in model_definition(make, {}, **SETTING)
        finally:
            del sys.modules["own"]

    def test_making_a_definition_draws_no_random_numbers(self):
        torch.manual_seed(7)
        expected = torch.rand(3)
        torch.manual_seed(7)
        model_definition(create_backbone, BACKBONE, **SETTING)
        assert torch.equal(torch.rand(3), expected)

    @pytest.mark.parametrize("network", ["backbone", "own"])
    @pytest.mark.parametrize("preprocessing", ["Res256Crop224", "BicubicRes256Crop224", "Crop288"])
    def test_robustbench_makes_imagenets_images_as_the_evaluation_did(self, tmp_path, network, preprocessing):
        setting = {"model_id": f"Me2026{network}-{preprocessing}", "dataset": "imagenet", "norm": "Linf"}
        make, arguments = create_backbone, {**BACKBONE, "num_classes": 1000}
        if network == "own":
            (tmp_path / "own.py").write_text("from torch import nn\n\n\ndef make():\n    return nn.Linear(4, 1000)\n")
            make, arguments = load_function(f"{tmp_path / 'own.py'}:make"), {}
        text = model_definition(make, arguments, **setting, preprocessing=preprocessing)
        (tmp_path / "definition.py").write_text(text)
        load_from_robustbench(tmp_path / "definition.py", None, **setting)
        found = preprocessing_shortfalls(preprocessing, **setting)
        if preprocessing == "Crop288":  # which timm's configurations cannot say
            assert len(found) == 1 and "evaluated on images made by Compose( CenterCrop(size=(288, 288))" in found[0]
        else:
            assert found == []
        other = preprocessing_shortfalls("Res224", **setting)
        assert len(other) == 1 and "Resize(size=[224, 224]" in other[0]
        assert preprocessing_shortfalls(None, **{**setting, "dataset": "cifar10"}) == []

    def test_other_networks_are_defined_by_their_module(self, tmp_path, monkeypatch):
        """What is more than an adaptation that is known is not guessed."""
        (tmp_path / "own_networks.py").write_text(
            "import timm\nfrom torch import nn\n\n\ndef make(activation):\n"
            "    model = timm.create_model('resnet10t', num_classes=10)\n"
            "    model.layer1 = nn.Sequential(model.layer1, getattr(nn, activation)())\n    return model\n"
        )
        monkeypatch.syspath_prepend(str(tmp_path))
        from own_networks import make

        (tmp_path / "definition.py").write_text(model_definition(make, {"activation": "Sigmoid"}, **SETTING))
        network = make("Sigmoid").eval()
        write_checkpoint(network, tmp_path / "weights.pt", tmp_path / "definition.py", **SETTING)
        loaded = load_from_robustbench(tmp_path / "definition.py", tmp_path / "weights.pt", **SETTING)
        x = torch.rand(2, 3, 32, 32)
        assert torch.equal(loaded(x), network(x))

    def test_weights_of_another_network(self, packed, tmp_path):
        _, definition, _ = packed
        other = create_backbone(**{**BACKBONE, "channels": (4, 8, 8, 16)})
        with pytest.raises(ValueError, match="`definition` is of another network: model.fc.weight, model.layer4"):
            write_checkpoint(other, tmp_path / "other.pt", definition, **SETTING)

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"dataset": "digits"}, "`dataset`: RobustBench's load_model knows cifar10, cifar100, imagenet"),
            ({"model_id": "2026Name"}, "`model_id` must be letters, digits"),
            ({"model_id": "a.b"}, "`model_id` must be letters, digits"),
        ],
    )
    def test_names_that_robustbench_cannot_load(self, change, match):
        with pytest.raises(ValueError, match=match):
            timm_name(**{**SETTING, **change})

    def test_a_maker_without_a_module_to_copy(self):
        with pytest.raises(ValueError, match="`make` must be at the top of a module"):
            model_definition(lambda: nn.Identity(), {}, **SETTING)
        with pytest.raises(ValueError, match="the source of Built is not available"):
            model_definition(type("Built", (nn.Module,), {"__module__": "builtins"}), {}, **SETTING)
