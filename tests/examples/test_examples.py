"""The example scripts, run as a user runs them, only smaller."""

import json
import subprocess
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest
import torch
from safetensors.torch import load_file

from art_clat import History, create_backbone
from art_clat.models.by_name import load_model

ROOT = Path(__file__).parents[2]
CIFAR10 = ROOT.parent / "shared" / "data" / "cifar10"


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory):
    """A folder with torchvision's CIFAR-10."""
    if not CIFAR10.exists():
        pytest.skip("no CIFAR-10 at ../shared/data/cifar10")
    folder = tmp_path_factory.mktemp("data")
    subprocess.run([sys.executable, str(CIFAR10 / "unpack.py"), str(folder)], check=True)
    return folder


def run(script, *arguments, cwd=None):
    result = subprocess.run(
        [sys.executable, str(ROOT / "examples" / script), *map(str, arguments)], capture_output=True, text=True, cwd=cwd
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


def test_cifar10(tmp_path, cifar10):
    output = run(
        "cifar10_resnet18.py", "--data", cifar10, "--output", tmp_path / "run", "--subset", 24, "--epochs", 2,
        "--warmup", 1, "--validation", 8, "--test-examples", 2,
    )  # fmt: skip
    assert "epoch   1  clat" in output
    entry = json.loads((tmp_path / "run" / "model_info" / "cifar10" / "Linf" / "CLAT_R18.json").read_text())
    assert entry["eps"] == "8/255" and "evaluated on 2 of the 10000 examples" in entry["footnote"]


def test_minimal(tmp_path, cifar10):
    """As it is, with fewer images, epochs and attack steps."""
    (tmp_path / "data").symlink_to(cifar10)
    script = (ROOT / "examples" / "minimal.py").read_text()
    for old, new in (
        ("1500, 50, 20", "48, 4, 2"),
        ("max_iter=5", "max_iter=1"),
        ("reselect_every=5", "reselect_every=1"),
    ):
        assert script.count(old) == 1
        script = script.replace(old, new)
    (tmp_path / "minimal.py").write_text(script)
    output = run(tmp_path / "minimal.py", cwd=tmp_path)
    assert "AutoAttack (standard)" in output
    # RobustBench's benchmark, at the end, sees the clean accuracy that the package's own evaluation has seen
    ours, theirs = (output.partition(title)[2].split("%")[0].strip() for title in ("\n  clean ", "Clean accuracy:"))
    assert ours == theirs
    assert "Adversarial accuracy:" in output
    assert (tmp_path / "heat-map.png").stat().st_size > 5_000
    assert len(code_lines(script)) <= 30


def code_lines(script):
    return [line for line in script.splitlines() if line.strip() and not line.startswith(('"""', "#"))]


CHECKPOINTS = {
    # by RobustBench's identifier: the file is where RobustBench keeps it
    "identifier": ("Wong2020Fast", lambda folder: folder / "models" / "cifar10" / "Linf" / "Wong2020Fast.pt", False),
    # by file: saved by somebody else, from a network in DataParallel
    "file": ("preactresnet18_cifar", lambda folder: folder / "theirs.pt", True),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_from_checkpoint(kind, tmp_path, cifar10):
    name, place, is_named = CHECKPOINTS[kind]
    path = place(tmp_path)
    path.parent.mkdir(parents=True, exist_ok=True)
    before = made_up_weights(name)
    torch.save({"state_dict": {f"module.{key}": value for key, value in before.items()}} if is_named else before, path)
    output = run(
        "from_checkpoint.py", "--model", name, *(["--checkpoint", path] if is_named else []), "--data", cifar10,
        "--subset", 8, "--validation", 4, "--epochs", 1, "--test-examples", 2, "--output", "run", cwd=tmp_path,
    )  # fmt: skip
    assert "as it came: clean" in output and "after CLAT: clean" in output
    history = History.from_json((tmp_path / "run" / "history.json").read_text())
    (selection,) = history.selections
    assert selection.trainable_parameters <= 0.05 * selection.total_parameters
    after = load_file(tmp_path / "run" / "clat.safetensors")
    moved = {key for key, value in before.items() if not torch.equal(after[key], value)}
    assert moved and moved <= {f"{layer}.{tensor}" for layer in selection.chosen for tensor in ("weight", "bias")}
    entry = tmp_path / "run" / "model_info" / "cifar10" / "Linf" / "CLAT_from_checkpoint.json"
    assert f"{name}, then 1 epochs of CLAT." in json.loads(entry.read_text())["footnote"]
    # what the guide says next: the weights go on under the same name
    reloaded = load_model(
        name, dataset="cifar10", norm="Linf", nb_classes=10, input_size=(3, 32, 32),
        checkpoint=tmp_path / "run" / "clat.safetensors",
    )  # fmt: skip
    assert all(torch.equal(reloaded.state_dict()[key], value) for key, value in after.items())


def made_up_weights(name):
    """Weights of a network, as if somebody had trained it; names as in the network that is loaded."""
    if name == "Wong2020Fast":
        from robustbench.model_zoo.cifar10 import linf

        return linf[name]["model"]().state_dict()
    return create_backbone(name, num_classes=10, input_size=(3, 32, 32)).state_dict()


NOTEBOOK = ROOT / "examples" / "clat_in_art.ipynb"


def test_notebook(tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    sizes = "WARMUP, EPOCHS, N_TEST = 15, 30, 50"
    assert sizes in cells[0].source
    cells[0].source = cells[0].source.replace(sizes, "WARMUP, EPOCHS, N_TEST = 1, 2, 4")
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    printed = "".join(output.get("text", "") for cell in cells for output in cell.outputs)
    assert "CLAT, epoch 1: training" in printed and "AutoAttack (standard)" in printed and "(4 examples)" in printed
    assert sum("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs) == 3


def test_notebook_has_its_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    texts = [output.get("text", "") + str(output.get("data", {}).get("text/plain", "")) for output in outputs]
    assert any("CLAT, epoch 15: training" in text for text in texts)
    assert not [text for text in texts if str(ROOT) in text or "site-packages" in text or "/home/" in text]
