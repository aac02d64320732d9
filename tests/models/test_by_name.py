"""Models by name."""

import os
import sys

import numpy as np
import pytest
import torch
from conftest import Code, Normed
from PIL import Image

from art_clat import create_backbone
from art_clat.models.by_name import imagenet_preprocessing, load_function, load_model
from art_clat.utils.robustbench_import import robustbench_utils

robustbench_utils()  # makes the next ones importable
from robustbench.model_zoo import model_dicts  # noqa: E402
from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel  # noqa: E402

TIMM = {"dataset": "cifar10", "norm": "Linf", "nb_classes": 5, "input_size": (3, 32, 32)}


def test_a_timm_network_with_weights(tmp_path):
    torch.save(create_backbone("resnet10t", num_classes=5).state_dict(), tmp_path / "x.pt")
    model = load_model("resnet10t", checkpoint=tmp_path / "x.pt", **TIMM)
    assert not model.training and model(torch.rand(2, 3, 32, 32)).shape == (2, 5)
    with pytest.raises(ValueError, match="resnet10t is a timm network without weights"):
        load_model("resnet10t", **TIMM)


def test_a_function_of_a_module_or_a_file(tmp_path):
    assert isinstance(load_model("conftest:Normed", **TIMM), Normed)
    (tmp_path / "mine.py").write_text("from conftest import Normed\ndef make():\n    return Normed().train()\n")
    model = load_model(f"{tmp_path}/mine.py:make", **TIMM)
    assert isinstance(model, Normed) and not model.training


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("conftest:Nothing", "has no function Nothing"),
        ("nowhere.at_all:make", "nowhere.at_all of nowhere.at_all:make cannot be imported"),
        ("nowhere.py:make", "cannot be imported"),
        ("conftest:make_data", "must return a torch.nn.Module"),
        ("resnet-18", "or module:function, got 'resnet-18'; similar names: .*resnet18"),
        ("Carmon2019Unlabelled", "similar names: Carmon2019Unlabeled"),
    ],
)
def test_names_of_no_model(name, match):
    with pytest.raises(ValueError, match=match):
        load_model(name, **TIMM)


def test_a_function_that_fails(tmp_path):
    (tmp_path / "mine.py").write_text("def make():\n    raise KeyError('weights')\n")
    with pytest.raises(ValueError, match="mine.py:make failed: KeyError: 'weights'"):
        load_model(f"{tmp_path}/mine.py:make", **TIMM)


def test_robustbenchs_model_with_weights_in_its_folder_or_in_a_file(tmp_path):
    settings = {**TIMM, "nb_classes": 10}
    with torch.random.fork_rng():
        model = model_dicts[BenchmarkDataset.cifar_10][ThreatModel.Linf]["Wong2020Fast"]["model"]()
    (tmp_path / "cifar10" / "Linf").mkdir(parents=True)
    torch.save(model.state_dict(), tmp_path / "cifar10" / "Linf" / "Wong2020Fast.pt")
    torch.save({"state_dict": model.state_dict()}, tmp_path / "x.pt")
    x = torch.rand(2, 3, 32, 32)
    for where in ({"model_dir": tmp_path}, {"checkpoint": tmp_path / "x.pt", "model_dir": tmp_path / "nothing"}):
        loaded = load_model("Wong2020Fast", **settings, **where)
        assert not loaded.training and torch.equal(loaded(x), model.eval()(x))
    assert not (tmp_path / "nothing").exists()


def test_code_in_a_file_of_robustbenchs_is_not_executed(tmp_path, monkeypatch):
    """Even if torch would execute it: before version 2.6, or with this variable."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    code = Code()
    code.path = str(tmp_path / "executed")
    (tmp_path / "cifar10" / "Linf").mkdir(parents=True)
    torch.save({"state_dict": code}, tmp_path / "cifar10" / "Linf" / "Wong2020Fast.pt")
    with pytest.raises(OSError, match="RobustBench's Wong2020Fast could not be loaded"):
        load_model("Wong2020Fast", model_dir=tmp_path, **TIMM)
    assert not (tmp_path / "executed").exists() and "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("Salman2020Do_R18", "Res256Crop224"),
        ("Liu2023Comprehensive_Swin-L", "BicubicRes256Crop224"),
        ("resnet18", "Res256Crop224"),
        ("conftest:Normed", "Res256Crop224"),
        ("of_no_such_model", "Res256Crop224"),
    ],
)
def test_imagenet_is_resized_as_robustbench_does_it_for_its_models(model, expected):
    assert imagenet_preprocessing(model, "Linf") == expected


def test_imagenet_is_resized_as_robustbench_derives_it_from_timm():
    made = imagenet_preprocessing("Debenedetti2022Light_XCiT-S12", "Linf")
    image = Image.fromarray(np.zeros((300, 400, 3), np.uint8))
    assert made(image).shape == (3, 224, 224) and "size=224, interpolation=bicubic" in repr(made)


def test_a_users_file_may_hold_dataclasses(tmp_path):
    (tmp_path / "network.py").write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from torch import nn\n"
        "@dataclass\nclass Width:\n    value: int = 3\n"
        "def make():\n    return nn.Linear(Width().value, 2)\n"
    )
    assert load_function(f"{tmp_path / 'network.py'}:make")().in_features == 3


@pytest.mark.parametrize("code", ["def make(:\n", "make = missing\n"])
def test_a_users_file_that_fails_is_named(tmp_path, code):
    (tmp_path / "network.py").write_text(code)
    before = set(sys.modules)
    with pytest.raises(ValueError, match=r"network\.py.* cannot be imported: (Syntax|Name)Error"):
        load_function(f"{tmp_path / 'network.py'}:make")
    assert not {name for name in set(sys.modules) - before if "network" in name}
