"""Small representatives of timm's families, under the same checks as in ``evaluation/timm_sweep.py``."""

import importlib.util
from pathlib import Path

import pytest
import timm
import torch
from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg

from art_clat.layers.discovery import find_layers

NB_CLASSES = 10


@pytest.fixture(scope="module")
def sweep():
    path = Path(__file__).parents[2] / "evaluation" / "timm_sweep.py"
    spec = importlib.util.spec_from_file_location("timm_sweep", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def made_by_timm(name, **kwargs):
    return lambda: timm.create_model(name, num_classes=NB_CLASSES, **kwargs)


SMALL = {
    "beit": (made_by_timm("beit_base_patch16_224", img_size=32, depth=2, embed_dim=24, num_heads=2), 32),
    "eva": (made_by_timm("eva02_tiny_patch14_224", img_size=28, depth=2, embed_dim=24, num_heads=2), 28),
    "swin_transformer_v2": (
        made_by_timm(
            "swinv2_tiny_window8_256",
            img_size=64,
            window_size=4,
            embed_dim=12,
            depths=(1, 1, 1, 1),
            num_heads=(1, 2, 2, 4),
        ),
        64,
    ),
    "coat": (
        made_by_timm(
            "coat_tiny", img_size=32, embed_dims=(16, 16, 16, 16), serial_depths=(1, 1, 1, 1), parallel_depth=1
        ),
        32,
    ),
    "mvitv2": (
        lambda: MultiScaleVit(
            MultiScaleVitCfg(depths=(1, 1, 1, 1), embed_dim=(12, 12, 24, 24), num_heads=(1, 1, 2, 2)),
            img_size=(32, 32),
            num_classes=NB_CLASSES,
        ),
        32,
    ),
    "sequencer": (
        made_by_timm("sequencer2d_s", layers=(1, 1, 1, 1), embed_dims=(16,) * 4, hidden_sizes=(4,) * 4),
        64,
    ),
    "densenet": (made_by_timm("densenet121", block_config=(2, 1, 1, 1), growth_rate=8), 32),
    "efficientnet": (made_by_timm("test_efficientnet"), 32),
    "mlp_mixer": (
        lambda: MlpMixer(
            img_size=32,
            patch_size=8,
            num_blocks=2,
            embed_dim=32,
            num_classes=NB_CLASSES,
            block_layer=ResBlock,
            norm_layer=Affine,
            mlp_ratio=4,
        ),
        32,
    ),
}


def layers_of(family):
    make, side = SMALL[family]
    model = make().eval()
    return model, find_layers(model, lambda size: model(torch.rand(size, 3, side, side)))


@pytest.mark.parametrize("family", SMALL)
def test_measured_and_trained_as_it_is_and_handed_back(sweep, family):
    make, side = SMALL[family]
    result = sweep.try_model(make(), side, seed=0)
    assert result["layers"] >= 5 and result["chosen"] and result["blocks"] >= 3


@pytest.mark.parametrize("family", ["beit", "eva", "swin_transformer_v2"])
def test_attention_whose_weight_is_used_without_calling_it(family):
    model, layers = layers_of(family)
    attention = [module for module in model.modules() if hasattr(module, "qkv")]
    found = [layer for layer in layers if layer.name.endswith(".qkv")]
    assert [layer.modules[0] for layer in found] == [module.qkv for module in attention]
    for layer, module in zip(found, attention, strict=True):
        assert set(layer.parameters()) == {module.qkv.weight, module.q_bias, module.v_bias}


def test_shared_layers_are_one_that_runs_twice():
    _, layers = layers_of("coat")
    calls = {layer.name: layer.output.calls for layer in layers}
    assert calls["cpe2.proj"] == 2
    assert len({id(p) for layer in layers for p in layer.parameters()}) == sum(len(x.parameters()) for x in layers)


def test_scales_are_no_layers():
    _, layers = layers_of("mlp_mixer")
    assert not any(isinstance(layer.modules[0], Affine) for layer in layers)
    assert len(layers) == 1 + 2 * 3 + 1  # patches; tokens, and two for channels, in every block; the head


def test_every_family_of_timm_is_in_the_sweep(sweep):
    assert len(sweep.FAMILIES) >= 81 and "cifar" not in sweep.FAMILIES
    name, _ = sweep.smallest_model("densenet")
    assert name == "densenet121"
