"""`art-clat submit` on the folder of an evaluation, made here without the attacks."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys

import numpy as np
import pytest
import torch

from art_clat import RobustnessReport
from art_clat.cli import main
from art_clat.leaderboard.definitions import load_from_robustbench
from art_clat.leaderboard.form import without_paths
from art_clat.leaderboard.submission import Submission, write_submission
from art_clat.models.by_name import load_function
from art_clat.models.datasets import EvaluationData
from art_clat.utils.robustbench_import import robustbench_utils

ID = "Someone2026Title_R10"
NETWORK = '''"""A user's own network."""
import torch
from torch import nn


def make():
    """Give it, with weights of its own."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 5, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(392, 10))
'''


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    return EvaluationData(rng.random((32, 3, 32, 32), dtype=np.float32), rng.integers(0, 10, 32), 10)


@pytest.fixture
def run(tmp_path, data):
    """An evaluation's folder: half of the labels are what the network says, and noise changes some of that."""
    (tmp_path / "network.py").write_text(NETWORK)
    name = f"{tmp_path / 'network.py'}:make"
    network = load_function(name)().eval()
    torch.save({"state_dict": {f"module.{k}": v for k, v in network.state_dict().items()}}, tmp_path / "weights.pt")
    x = torch.as_tensor(data.x)
    with torch.no_grad():
        data.y[::2] = network(x).argmax(1).numpy()[::2]
        clean = network(x).argmax(1).numpy() == data.y
        noisy = (x + 8 / 255 * torch.randn(x.shape).sign()).clamp(0, 1)
        fooled = clean & (network(noisy).argmax(1).numpy() != data.y)
    adversarial = torch.where(torch.as_tensor(fooled)[:, None, None, None], noisy, x)
    robust = clean & ~fooled
    assert fooled.any() and robust.any()
    report = RobustnessReport(
        norm="Linf", eps=8 / 255, nb_examples=32, clean=clean, pgd=robust, pgd_max_iter=20,
        autoattack_version="standard", warnings=(), seconds=1.0, seed=3,
        attacks=dict.fromkeys(("apgd-ce", "apgd-t", "fab-t", "square"), robust), adversarial=adversarial.numpy(),
    )  # fmt: skip
    report.save(
        tmp_path / "run", model={"name": name, "checkpoint": str(tmp_path / "weights.pt")},
        data={"name": "cifar10", "shape": [32, 3, 32, 32], "preprocessing": None}, batch_size=16,
        versions={"torch": "2"},
        command=f"art-clat evaluate --model {name} --checkpoint={tmp_path / 'weights.pt'} --eps 8/255",
    )  # fmt: skip
    (tmp_path / "run" / "autoattack.log").write_text("initial accuracy\n")
    return tmp_path / "run"


def submission(run, **changes):
    settings = {
        "run": run, "output": run.parent / "out", "model_id": ID, "title": "A Title", "authors": "Some One",
        "link": "https://example.org/paper", "venue": "ICML 2026", "architecture": "ConvNet",
    }  # fmt: skip
    return Submission(**{**settings, **changes})


def refused(run, data, **changes):
    with pytest.raises(ValueError) as stopped:
        write_submission(submission(run, **changes), data=data)
    return str(stopped.value)


def change(run, **values):
    path = run / "report.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_the_folder_has_what_the_form_asks_for(run, data):
    doubts = write_submission(submission(run, license="MIT", code_url="https://example.org/code"), data=data)
    out = run.parent / "out"
    report, _ = RobustnessReport.load(out / "evaluation")
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert files == {
        "ISSUE.md", "leaderboard_row.md", "model_zoo_entry.py", f"model_info/cifar10/Linf/{ID}.json",
        f"models/cifar10/Linf/{ID}.pt", "robustbench/model_zoo/architectures/someone2026title_r10.py",
        "evaluation/report.json", "evaluation/verdicts.npz", "evaluation/autoattack.log", "evaluation/adversarial.pt",
        "evaluation/waterfall.png",
    }  # fmt: skip
    entry = json.loads((out / f"model_info/cifar10/Linf/{ID}.json").read_text())
    robustbench_utils().ModelInfo(**entry)
    assert entry["clean_acc"] == str(round(100 * report.clean_accuracy, 2))
    assert entry.items() >= {
        "name": "A Title", "authors": "Some One", "link": "https://example.org/paper", "venue": "ICML 2026",
        "architecture": "ConvNet", "eps": "8/255", "additional_data": False, "number_forward_passes": 1,
    }.items()  # fmt: skip
    issue = (out / "ISSUE.md").read_text()
    for line in (
        "- **Paper Title**: A Title", "- **Threat Model**: Linf", "- **eps**: 8/255", "- **Additional data**: false",
        f"- **Robust accuracy**: {report.autoattack_accuracy:.2%}", "checkpoint: TODO, code: https://example.org/code",
        "- [x] I agree to release my model(s) under MIT license", "evaluated as network.py:make, ",
        "- [ ] I want to add my models to the Model Zoo",
        "> **Not a leaderboard claim as it stands:**", "> - evaluated on 32 of the 10000 examples",
    ):  # fmt: skip
        assert line in issue
    assert any("evaluated on 32 of the 10000 examples" in doubt for doubt in doubts)
    row = (out / "leaderboard_row.md").read_text()
    assert f"**{ID}**" in row and f"{report.autoattack_accuracy:.2%}" in row and "evaluated on 32 of" in row


def test_no_file_has_a_local_path(run, data):
    """Nor does the copy of the evaluation; what else it says is all there."""
    write_submission(submission(run), data=data)
    out = run.parent / "out"
    for path in out.rglob("*"):
        if path.is_file():
            assert str(run.parent).encode() not in path.read_bytes(), path
    _, about = RobustnessReport.load(out / "evaluation")
    assert about == {
        **RobustnessReport.load(run)[1],
        "model": {"name": "network.py:make", "checkpoint": "weights.pt"},
        "command": "art-clat evaluate --model network.py:make --checkpoint=weights.pt --eps 8/255",
    }
    assert f"`{about['command']}`" in (out / "ISSUE.md").read_text()


@pytest.mark.parametrize(
    ("given", "left"),
    [
        ("python x.py --model pkg.mod:make --eps 8/255", "python x.py --model pkg.mod:make --eps 8/255"),
        ("art-clat evaluate '/a b/net.py:f' --output ~/runs/", "art-clat evaluate net.py:f --output runs"),
        (
            r"art-clat evaluate 'C:\\me\\w.pt' --transfer-checkpoint=../w.pt",
            "art-clat evaluate w.pt --transfer-checkpoint=w.pt",
        ),
    ],
)
def test_paths_in_a_command(given, left):
    about = {"command": given, "model": {"name": "resnet18", "checkpoint": None}, "transfer_from": None}
    assert without_paths(about) == {**about, "command": left}


def test_the_forms_code_runs_elsewhere(run, data, tmp_path_factory):
    """As a stranger runs it, who has installed packages and got the folder, and has a script of an unlucky name."""
    write_submission(submission(run), data=data)
    elsewhere = tmp_path_factory.mktemp("stranger")
    shutil.copytree(run.parent / "out", elsewhere / "submission")
    (elsewhere / "submission" / "autoattack.py").write_text("raise SystemExit('not the package')\n")
    (snippet,) = re.findall(r"```python\n(.*?)```", (elsewhere / "submission" / "ISSUE.md").read_text(), re.DOTALL)
    assert snippet.startswith("import art_clat")
    (elsewhere / "submission" / "try.py").write_text(
        f"{snippet}\nimport torch; torch.save(model.state_dict(), 'loaded.pt')\n"
    )
    for path in (run.parent / "network.py", run.parent / "weights.pt"):
        path.rename(path.with_suffix(".moved"))
    done = subprocess.run(
        [sys.executable, "try.py"], cwd=elsewhere / "submission", capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    loaded = torch.load(elsewhere / "submission" / "loaded.pt")
    packed = torch.load(elsewhere / "submission" / "models" / "cifar10" / "Linf" / f"{ID}.pt")
    assert loaded.keys() == packed.keys() and all(torch.equal(loaded[name], packed[name]) for name in packed)


@pytest.mark.skipif(os.name == "nt", reason="permissions are others there")
@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_files_are_as_readable_as_the_umask_says(run, data, umask):
    before = os.umask(umask)
    try:
        write_submission(submission(run), data=data)
    finally:
        os.umask(before)
    for path in (run.parent / "out", *(run.parent / "out").rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~umask, path


def test_robustbench_loads_the_packed_model(run, data, monkeypatch):
    """With the definition and the zoo's entry as they are, where RobustBench has them."""
    write_submission(submission(run), data=data)
    out = run.parent / "out"
    setting = {"model_id": ID, "dataset": "cifar10", "norm": "Linf"}
    definition = out / "robustbench" / "model_zoo" / "architectures" / "someone2026title_r10.py"
    loaded = load_from_robustbench(definition, out / "models" / "cifar10" / "Linf" / f"{ID}.pt", **setting)
    network = load_function(f"{run.parent / 'network.py'}:make")().eval()
    assert torch.equal(loaded(torch.as_tensor(data.x)), network(torch.as_tensor(data.x)))

    import robustbench.model_zoo.architectures

    monkeypatch.setattr(robustbench.model_zoo.architectures, "someone2026title_r10", definition, raising=False)
    text = (out / "model_zoo_entry.py").read_text()
    scope = {}
    exec(text.replace(f"('{ID}'", f"entry = ('{ID}'", 1), scope)
    ((name, entry),) = scope["entry"]
    assert name == ID and entry["gdrive_id"] is None
    with pytest.warns(UserWarning, match="without CHECKPOINT_URL"):
        assert entry["model"]().state_dict().keys() == network.state_dict().keys()


def test_benchmark_is_run_and_must_agree(run, data):
    report, _ = RobustnessReport.load(run)
    asked = []

    def benchmark(model, **kwargs):
        asked.append(kwargs)
        return 0.0, 0.0, theirs

    theirs = ~report.autoattack
    with pytest.raises(ValueError, match="`benchmark`.* decides otherwise than in the evaluation for 32 of 32"):
        write_submission(submission(run, benchmark=True), data=data, benchmark=benchmark)
    assert not (run.parent / "out").exists()
    theirs = report.autoattack
    write_submission(submission(run, benchmark=True), data=data, benchmark=benchmark)
    assert (asked[0]["seed"], asked[0]["batch_size"], asked[0]["nb_examples"], asked[0]["eps"]) == (3, 16, 32, 8 / 255)
    assert (
        "own `benchmark`, with the same seed: 32 of 32 verdicts are those of the evaluation"
        in (run.parent / "out" / "ISSUE.md").read_text()
    )


def test_additional_data_and_licence(run, data):
    write_submission(submission(run, additional_data=True, license="https://example.org/licence"), data=data)
    issue = (run.parent / "out" / "ISSUE.md").read_text()
    assert "- **Additional data**: true" in issue and "> - additional training data" in issue
    assert "- [ ] I agree to release" in issue and "located here: https://example.org/licence" in issue


def test_a_folder_with_something_in_it_is_refused(run, data):
    (run.parent / "out").mkdir()
    (run.parent / "out" / "mine.txt").write_text("mine")
    assert "holds something already" in refused(run, data)
    assert [path.name for path in (run.parent / "out").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda run: (run / "report.json").unlink(), "holds no evaluation: there is no report.json"),
        (lambda run: (run / "report.json").write_text("{"), "cannot be read"),
        (lambda run: change(run, format=99), "its format is 99, this version of art_clat reads 1"),
        (lambda run: change(run, clean_accuracy=1.0), "its figures are not those of the verdicts"),
        (lambda run: (run / "verdicts.npz").unlink(), "cannot be read"),
        (lambda run: (run / "verdicts.npz").write_bytes(b"PK"), "cannot be read"),
        (lambda run: (run / "autoattack.log").unlink(), "lacks autoattack.log"),
        (lambda run: change(run, model=None), "does not say of which model and data"),
        (lambda run: change(run, data={"name": "digits"}), "RobustBench's load_model knows cifar10"),
        (lambda run: change(run, model={"name": "Carmon2019Unlabeled"}), "one of RobustBench's own models"),
        (lambda run: torch.save(torch.zeros(2, 3, 4, 4), run / "adversarial.pt"), "for each of the 32 examples"),
        (lambda run: torch.save(torch.zeros(32, 3, 32, 32), run / "adversarial.pt"), "is not within ε"),
        (lambda run: (run / "adversarial.pt").write_bytes(b"no"), "adversarial.pt cannot be read"),
    ],
)
def test_bad_runs(run, data, damage, said):
    damage(run)
    assert said in refused(run, data)
    assert sorted(path.name for path in run.parent.iterdir()) == ["network.py", "run", "weights.pt"]


def test_other_weights_than_those_evaluated(run, data):
    other = {
        name: torch.randn_like(value.float())
        for name, value in torch.load(run.parent / "weights.pt")["state_dict"].items()
    }
    torch.save(other, run.parent / "other.pt")
    said = refused(run, data, checkpoint=run.parent / "other.pt")
    assert "the network decides otherwise than in the evaluation" in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_id": "Carmon2019Unlabeled"}, "`--model-id`: RobustBench has a model Carmon2019Unlabeled"),
        ({"title": "…"}, "`--title` '…' is a placeholder"),
        ({"link": "https://…"}, "`--link` 'https://…' is a placeholder"),
    ],
)
def test_placeholders_and_models_that_are_there_already(run, data, change, said):
    assert said in refused(run, data, **change)


def test_bad_identifier(run, data):
    assert "`model_id` must be letters, digits" in refused(run, data, model_id="2026 Title")


def test_the_command_reports_in_one_line(run, data):
    """And loads the data by their name."""
    arguments = [
        str(run),
        "--output",
        str(run.parent / "out"),
        "--model-id",
        ID,
        "--title",
        "A Title",
        "--authors",
        "A",
    ]
    arguments += ["--link", "https://example.org", "--architecture", "ConvNet", "--data-dir", str(run.parent / "none")]
    change(run, data={"name": "digits"})
    with pytest.raises(SystemExit, match="^art-clat submit: `dataset`: RobustBench's load_model knows cifar10"):
        main(["submit", *arguments])
    assert not (run.parent / "out").exists()
