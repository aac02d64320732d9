"""The example scripts, run as a user runs them, only smaller."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from art_clat import History, create_backbone

ROOT = Path(__file__).parents[2]
CIFAR10 = ROOT.parent / "shared" / "data" / "cifar10"


def run(script, *arguments):
    result = subprocess.run(
        [sys.executable, str(ROOT / "examples" / script), *map(str, arguments)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout + result.stderr


def test_quickstart(tmp_path):
    output = run("quickstart.py", "--output", tmp_path, "--epochs", 4, "--test-examples", 6)
    assert "| CLAT |" in output and "| PGD-AT continued |" in output
    assert "CLAT, epoch 0: training 1 of" in output
    for arm in ("pgd_at", "clat"):
        entry = json.loads((tmp_path / "model_info" / "digits" / "Linf" / f"Quickstart_{arm}.json").read_text())
        assert "6 examples" in entry["footnote"]
        assert len(History.from_json((tmp_path / f"{arm}-history.json").read_text()).epochs) == 4
        assert (tmp_path / f"{arm}-curves.png").stat().st_size > 5_000
    assert (tmp_path / "heat-map.png").stat().st_size > 5_000
    weights = load_file(tmp_path / "clat.safetensors")
    model = create_backbone("resnet10t", num_classes=10, input_size=(1, 8, 8), channels=(16, 32, 64, 128), stem_width=8)
    model.load_state_dict(weights)
    # both arms start from one checkpoint, and CLAT moves its chosen layer only
    chosen = History.from_json((tmp_path / "clat-history.json").read_text()).selections[0].chosen
    other = load_file(tmp_path / "pgd_at.safetensors")
    same = {name for name in weights if weights[name].equal(other[name])}
    assert f"{chosen[0]}.weight" not in same


@pytest.mark.skipif(not CIFAR10.exists(), reason="no CIFAR-10 at ../shared/data/cifar10")
def test_cifar10(tmp_path):
    subprocess.run([sys.executable, str(CIFAR10 / "unpack.py"), str(tmp_path / "data")], check=True)
    output = run(
        "cifar10_resnet18.py", "--data", tmp_path / "data", "--output", tmp_path / "run", "--subset", 24, "--epochs", 2,
        "--warmup", 1, "--validation", 8, "--test-examples", 2,
    )  # fmt: skip
    assert "epoch   1  clat" in output
    entry = json.loads((tmp_path / "run" / "model_info" / "cifar10" / "Linf" / "CLAT_R18.json").read_text())
    assert entry["eps"] == "8/255" and "evaluated on 2 of the 10000 examples" in entry["footnote"]
