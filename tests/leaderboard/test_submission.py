"""`evaluation/robustbench_submission.py` on the folder of an evaluation, made here without the attacks."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from art_clat import RobustnessReport
from art_clat.leaderboard.definitions import load_from_robustbench
from art_clat.models.by_name import load_function
from art_clat.models.datasets import EvaluationData
from art_clat.utils.robustbench_import import robustbench_utils

SCRIPT = Path(__file__).parents[2] / "evaluation" / "robustbench_submission.py"
ID = "Someone2026Title_R10"
NETWORK = '''"""A user's own network."""
import torch
from torch import nn


def make():
    """Give it, with weights of its own."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 5, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(392, 10))
'''


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("robustbench_submission", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    return EvaluationData(rng.random((32, 3, 32, 32), dtype=np.float32), rng.integers(0, 10, 32), 10)


@pytest.fixture
def run(tmp_path, data, script, monkeypatch):
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
        command="python evaluation/autoattack.py ...", versions={"torch": "2"},
    )  # fmt: skip
    (tmp_path / "run" / "autoattack.log").write_text("initial accuracy\n")
    monkeypatch.setattr(script, "load_data", lambda *args, **kwargs: data)
    return tmp_path / "run"


def arguments(run, *more):
    return [
        str(run), "--output", str(run.parent / "out"), "--model-id", ID, "--title", "A Title", "--authors", "Some One",
        "--link", "https://example.org/paper", "--venue", "ICML 2026", "--architecture", "ConvNet", *more,
    ]  # fmt: skip


def refused(script, capsys, *args):
    with pytest.raises(SystemExit) as stopped:
        script.main(list(args))
    return str(stopped.value)


def change(run, **values):
    path = run / "report.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_the_folder_has_what_the_form_asks_for(script, run, data, capsys):
    script.main(arguments(run, "--license", "MIT", "--code-url", "https://example.org/code"))
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
        "- [x] I agree to release my model(s) under MIT license", f"evaluated as {run.parent / 'network.py'}:make, ",
        "- [ ] I want to add my models to the Model Zoo",
        "> **Not a leaderboard claim as it stands:**", "> - evaluated on 32 of the 10000 examples",
    ):  # fmt: skip
        assert line in issue
    assert "evaluated on 32 of the 10000 examples" in capsys.readouterr().out
    row = (out / "leaderboard_row.md").read_text()
    assert f"**{ID}**" in row and f"{report.autoattack_accuracy:.2%}" in row and "evaluated on 32 of" in row


def test_robustbench_loads_the_packed_model(script, run, data, monkeypatch):
    """With the definition and the zoo's entry as they are, where RobustBench has them."""
    script.main(arguments(run))
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


def test_benchmark_is_run_and_must_agree(script, run, monkeypatch):
    report, _ = RobustnessReport.load(run)
    asked = []

    def benchmark(model, **kwargs):
        asked.append(kwargs)
        return 0.0, 0.0, theirs

    monkeypatch.setattr(script, "run_benchmark", benchmark)
    theirs = ~report.autoattack
    with pytest.raises(SystemExit, match="`benchmark`.* decides otherwise than in the evaluation for 32 of 32"):
        script.main(arguments(run, "--benchmark"))
    assert not (run.parent / "out").exists()
    theirs = report.autoattack
    script.main(arguments(run, "--benchmark"))
    assert (asked[0]["seed"], asked[0]["batch_size"], asked[0]["nb_examples"], asked[0]["eps"]) == (3, 16, 32, 8 / 255)
    assert (
        "own `benchmark`, with the same seed: 32 of 32 verdicts are those of the evaluation"
        in (run.parent / "out" / "ISSUE.md").read_text()
    )


def test_additional_data_and_licence(script, run):
    script.main(arguments(run, "--additional-data", "--license", "https://example.org/licence"))
    issue = (run.parent / "out" / "ISSUE.md").read_text()
    assert "- **Additional data**: true" in issue and "> - additional training data" in issue
    assert "- [ ] I agree to release" in issue and "located here: https://example.org/licence" in issue


def test_a_folder_with_something_in_it_is_refused(script, run, capsys):
    (run.parent / "out").mkdir()
    (run.parent / "out" / "mine.txt").write_text("mine")
    assert "holds something already" in refused(script, capsys, *arguments(run))
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
def test_bad_runs(script, run, capsys, damage, said):
    damage(run)
    assert said in refused(script, capsys, *arguments(run))
    assert sorted(path.name for path in run.parent.iterdir()) == ["network.py", "run", "weights.pt"]


def test_other_weights_than_those_evaluated(script, run, capsys):
    other = {
        name: torch.randn_like(value.float())
        for name, value in torch.load(run.parent / "weights.pt")["state_dict"].items()
    }
    torch.save(other, run.parent / "other.pt")
    said = refused(script, capsys, *arguments(run, "--checkpoint", str(run.parent / "other.pt")))
    assert "the network decides otherwise than in the evaluation" in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("--model-id", "Carmon2019Unlabeled"), "`--model-id`: RobustBench has a model Carmon2019Unlabeled"),
        (("--title", "…"), "`--title` '…' is a placeholder"),
        (("--link", "https://…"), "`--link` 'https://…' is a placeholder"),
    ],
)
def test_placeholders_and_models_that_are_there_already(script, run, capsys, change, said):
    assert said in refused(script, capsys, *arguments(run, *change))


def test_bad_identifier(script, run, capsys):
    said = refused(script, capsys, *arguments(run, "--model-id", "2026 Title"))
    assert "`model_id` must be letters, digits" in said
