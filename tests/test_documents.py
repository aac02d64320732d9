"""The README and the guides: their code runs, their commands and paths exist, and what is said of the package is so."""

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from art.attacks.evasion import ProjectedGradientDescent
from art.estimators.classification import PyTorchClassifier

import art_clat
from art_clat import cli
from art_clat.selection.rules import SELECTION_RULES
from art_clat.training.objectives import OBJECTIVES

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "examples/README.md", "evaluation/README.md", "evaluation/findings.md", "art_clat/README.md")

#: What makes the examples small: fewer epochs, steps and channels.
SMALLER = {
    "nb_epochs=100": "nb_epochs=2",
    "nb_epochs=20": "nb_epochs=2",
    "warmup=50": "warmup=1",
    "max_iter=10": "max_iter=1",
    'create_backbone("resnet18", ': 'create_backbone("resnet10t", channels=(4, 4, 8, 8), stem_width=4, ',
}


def blocks(document, language):
    text = (ROOT / document).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def commands(document):
    """Every command in a block of shell, or by itself in code font."""
    lines = "".join(blocks(document, "bash")).replace("\\\n", " ").splitlines()
    inline = re.findall(r"`((?:python|art-clat|torchrun) [^`…]+)`", (ROOT / document).read_text(encoding="utf-8"))
    return [part.strip() for line in [*lines, *inline] for part in line.split("&&")]


@pytest.fixture
def registries():
    """The tables of rules and objectives, put back afterwards: examples register."""
    before = [(table, dict(table)) for table in (SELECTION_RULES, OBJECTIVES)]
    yield {"selection": set(SELECTION_RULES), "objective": set(OBJECTIVES)}
    for table, content in before:
        table.clear()
        table.update(content)


@pytest.fixture
def names():
    """What the examples take for granted: a classifier with its optimiser, an attack, and data."""
    model = art_clat.create_backbone(
        "resnet10t", num_classes=10, input_size=(3, 32, 32), channels=(8, 8, 16, 16), stem_width=4
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    classifier = PyTorchClassifier(
        model, torch.nn.CrossEntropyLoss(), (3, 32, 32), 10, optimizer=optimizer, clip_values=(0.0, 1.0)
    )
    rng = np.random.default_rng(0)
    x, y = rng.uniform(size=(32, 3, 32, 32)).astype(np.float32), rng.integers(0, 10, 32)
    attack = ProjectedGradientDescent(classifier, eps=8 / 255, eps_step=2 / 255, max_iter=1, verbose=False)
    trainer = art_clat.AdversarialTrainerCLATPyTorch(classifier, attack, warmup=1, seed=0)
    return {
        **{"torch": torch, "classifier": classifier, "optimizer": optimizer, "attack": attack, "trainer": trainer},
        **{"scheduler": None, "x_train": x[:16], "y_train": y[:16], "x_val": x[16:20], "y_val": y[16:20]},
        **{"x_test": x[20:22], "y_test": y[20:22]},
    }


def run(code, names):
    for old, new in SMALLER.items():
        code = code.replace(old, new)
    exec(compile(code, "<document>", "exec"), names)


@pytest.mark.parametrize("document", ["README.md", "examples/README.md"])
def test_python_blocks_run(document, names, registries, tmp_path, monkeypatch):
    """One after the other, as a reader would type them; a folder of an earlier example's run is removed."""
    monkeypatch.chdir(tmp_path)
    code = blocks(document, "python")
    assert len(code) >= 3
    for block in code:
        shutil.rmtree("runs", ignore_errors=True)
        run(block, names)
    assert Path("heat-map.png").stat().st_size > 5_000
    for option, table in (("selection", SELECTION_RULES), ("objective", OBJECTIVES)):
        for registered in set(table) - registries[option]:  # what an example registers must also train
            trainer = art_clat.AdversarialTrainerCLATPyTorch(
                names["classifier"], names["attack"], **{option: registered}, seed=0
            )
            trainer.fit(names["x_train"], names["y_train"], nb_epochs=1, verbose=False)


def test_the_diff_runs_on_both_sides(names):
    (diff,) = blocks("README.md", "diff")
    for side in "-+":
        lines = [line[1:] for line in diff.splitlines() if not line or line[0] in f"{side} "]
        run("\n".join(lines), names)
    assert names["trainer"].history.selections


def test_readme_is_short_and_has_both_commands():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert 'pip install -e ".[evaluation]" && python examples/quickstart.py' in lines
    assert 'pip install -e ".[test]" && pytest' in lines
    assert 'pip install -q -e ".[test]" && pytest' in (ROOT / ".ci" / "run").read_text()


def test_readme_links_work_outside_the_repository():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert targets and all(target.startswith("https://") for target in targets)
    assert "![" not in text and "<img" not in text


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_and_links_exist(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    folder = (ROOT / document).parent
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", text):
        assert (folder / target).exists(), target
    for path in re.findall(r"`((?:art_clat|examples|evaluation|tests)/[\w./-]*)`", text):
        assert (ROOT / path).exists(), path
    for target, heading in re.findall(r"\]\(([\w./]+\.md)#([\w-]+)\)", text):
        headings = re.findall(r"^#+ (.+)$", (folder / target).read_text(encoding="utf-8"), re.M)
        assert heading in [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in headings], heading


def test_every_room_is_in_the_package_map():
    text = (ROOT / "art_clat" / "README.md").read_text(encoding="utf-8")
    rooms = {path.name + "/" if path.is_dir() else path.name for path in (ROOT / "art_clat").iterdir()}
    rooms -= {"README.md", "py.typed", "__init__.py", "__main__.py", "__pycache__/"}
    assert {name for name in re.findall(r"^\| `([\w./]+)` \|", text, re.M)} == rooms
    row = {room: line for line in text.splitlines() for room in re.findall(r"^\| `(\w+)/`", line)}
    for room, line in row.items():
        for name in re.findall(r"`(\w+(?:\.py|/))`", line)[1:]:
            assert (ROOT / "art_clat" / room / name).exists(), f"{room}/{name}"


def test_the_guide_names_every_rule_and_objective():
    text = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    for title, listed in (("selection", art_clat.list_selection_rules()), ("objective", art_clat.list_objectives())):
        table = text.partition(f"| `{title}=` |")[2].partition("\n\n")[0]
        named = {name for row in table.splitlines()[2:] for name in re.findall(r'`"(\w+)"`', row.split(" | ")[0])}
        assert named == set(listed)


def test_every_example_is_in_the_guide():
    text = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    scripts = {path.name for path in (ROOT / "examples").iterdir() if path.suffix in (".py", ".ipynb")}
    assert set(re.findall(r"^\| `([\w.]+)` \|", text, re.M)) == scripts


@pytest.mark.parametrize(
    ("document", "command"), [(document, command) for document in DOCUMENTS for command in commands(document)]
)
def test_commands_exist(document, command):
    words = shlex.split(command)
    if words[0] == "torchrun":  # torchrun --nproc-per-node 2 SCRIPT, or -m art_clat
        words = ["python", *words[3:]]
    if words[:3] == ["python", "-m", "art_clat"]:
        words = ["art-clat", *words[3:]]
    program, first, *arguments = [*words, ""]
    if program == "art-clat" and arguments == [""]:  # the name of a subcommand in a sentence
        assert first in ("evaluate", "submit", "report")
    elif program == "art-clat":
        assert cli.parser().parse_args([first, *arguments[:-1]]).subcommand == first
    elif program == "python":
        assert (ROOT / first).exists()
        source = source_of(first)
        for option in (word for word in arguments if word.startswith("--")):
            assert f'"{option}"' in source, f"{first} has no {option}"
    else:
        assert command in ('pip install -e ".[evaluation]"', 'pip install -e ".[test]"', "pytest")


def source_of(script):
    """The code that reads a command's arguments: the script, or all modules of its package."""
    path = ROOT / ("evaluation/bare_machine" if script == "evaluation/gpu.py" else script)
    files = [path] if path.is_file() else sorted(path.rglob("*.py"))
    return "".join(file.read_text(encoding="utf-8") for file in files)
