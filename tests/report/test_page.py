"""`art-clat report`: one page about several runs, which loads nothing and lets nothing through."""

import base64
import json
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from conftest import Chain, make_attack, make_classifier

from art_clat import AdversarialTrainerCLATPyTorch, RobustnessReport
from art_clat.report.page import Page, write_page

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "evaluation" / "results" / "quickstart"
EVIL = """<script>alert("1")</script>'&"""


class Parsed(HTMLParser):
    """Tags with their attributes, the cells of every table, and what is wrong with the nesting."""

    VOID = frozenset(("meta", "img", "wbr", "link"))

    def __init__(self, html):
        super().__init__()
        self.tags, self.tables, self.text, self.open = [], [], "", []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] in ("th", "td"):
            self.tables[-1][-1][-1] += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def save_evaluation(folder, robust, *, eps=8 / 255, warnings=(), attacks=True, **about):
    verdicts = np.arange(50)
    steps = {"apgd-ce": robust + 5, "apgd-t": robust + 1, "fab-t": robust + 1, "square": robust}
    RobustnessReport(
        norm="Linf", eps=eps, nb_examples=50, clean=verdicts < 45, pgd=verdicts < robust + 6, pgd_max_iter=20,
        autoattack_version="standard" if attacks else None, warnings=warnings, seconds=1.0, seed=0,
        attacks={name: verdicts < left for name, left in steps.items()} if attacks else {},
    ).save(folder, **about)  # fmt: skip
    return folder


def save_history(path, robust=(0.3, 0.5, 0.4), layer="conv", **more):
    """One of the quickstart's, cut to a few epochs and one selection."""
    content = json.loads((QUICKSTART / "clat-history.json").read_text())
    accuracies = [{"clean_accuracy": 0.7, "robust_accuracy": value} for value in robust]
    content["epochs"] = [{**epoch, **new} for epoch, new in zip(content["epochs"], accuracies, strict=False)]
    selection = {**content["selections"][0], "trainable_parameters": 10, "total_parameters": 40}
    (renamed,) = (item for item in selection["measured"]["layers"] if [item["name"]] == selection["chosen"])
    renamed["name"], selection["chosen"] = layer, [layer]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**content, "selections": [selection], **more}))
    return path.parent


def page_of(*folders):
    output = folders[0].parent / "page.html"
    write_page(folders, output)
    return Parsed(output.read_text(encoding="utf-8"))


def test_everything_is_on_the_page(tmp_path):
    data, model = {"name": "cifar10"}, {"name": "resnet18", "checkpoint": None}
    strong = save_evaluation(tmp_path / "strong", 30, data=data, model=model, command="art-clat evaluate x")
    weak = save_evaluation(tmp_path / "weak", 20, data=data, warnings=("Gradients are zero.",))
    other = save_evaluation(tmp_path / "other", 10, eps=4 / 255, data=data)
    training = save_history(tmp_path / "training" / "clat-history.json")
    save_history(tmp_path / "training" / "pgd-history.json", robust=(0.2, 0.3, 0.35))
    (training / "run.json").write_text(
        json.dumps({"command": "python examples/quickstart.py", "versions": {"torch": "2"}})
    )
    page = page_of(weak, strong, other, training)

    ranked, alone, *_ = page.tables
    assert [row[1:] for row in ranked[1:]] == [
        ["strong", "90.00 %", "72.00 %", "60.00 %"],
        ["weak", "90.00 %", "52.00 %", "40.00 %"],
    ]
    assert [row[1] for row in alone[1:]] == ["other"]  # another ε: not to be compared
    waterfalls = [table for table in page.tables if table[0] == ["After", "Accuracy", "Taken"]]
    assert waterfalls[1][1:] == [
        ["clean", "90.00 %", "–"],
        ["apgd-ce", "70.00 %", "20.00 %"],
        ["apgd-t", "62.00 %", "8.00 %"],
        ["fab-t", "62.00 %", "0.00 %"],
        ["square", "60.00 %", "2.00 %"],
    ]
    best = next(table for table in page.tables if table[0][1] == "Best epoch")
    assert best[1] == ["training/clat", "1", "50.00 %", "70.00 %", "2", "40.00 %", "70.00 %", "10.00 %"]
    assert best[2] == ["training/pgd", "2", "35.00 %", "70.00 %", "2", "35.00 %", "70.00 %", "0.00 %"]
    chosen = next(table for table in page.tables if table[0][0] == "Before epoch")
    assert chosen[1] == ["0", "conv", "10", "25.00 %"]
    for text in (
        "python examples/quickstart.py", "art-clat evaluate x", "torch 2", "Gradients are zero.",
        "evaluated on 50 of the 10000 examples", "two standard errors: up to 14.1 points",
        "The command was not recorded",
    ):  # fmt: skip
        assert text in page.text
    figures = [attributes["alt"] for attributes in page.all("img")]
    assert len(figures) == 3 + 1 + 2 + 2  # waterfalls, comparison, curves, heat maps
    assert "best, 50.00 %, in epoch 1 and 40.00 % in the last, 2" in figures[4]


def test_what_cannot_be_compared_is_not_ranked_together(tmp_path):
    folders = [
        save_evaluation(tmp_path / "standard", 15, data="x"), save_evaluation(tmp_path / "random", 22, data="x"),
        save_evaluation(tmp_path / "one", 10), save_evaluation(tmp_path / "other", 12),
    ]  # fmt: skip
    told = json.loads((tmp_path / "random" / "report.json").read_text())
    (tmp_path / "random" / "report.json").write_text(json.dumps({**told, "autoattack_version": "rand"}))
    page = Page()
    for folder in folders:
        page.add(folder)
    assert sorted([row.name for row in rows] for rows in page.groups().values()) == [
        ["one"], ["other"], ["random"], ["standard"]
    ]  # fmt: skip


def test_nothing_left_ranks_above_not_run(tmp_path):
    page = Page()
    page.add(save_evaluation(tmp_path / "not-run", 20, data="x", attacks=False))
    page.add(save_evaluation(tmp_path / "nothing-left", 0, data="x"))
    (rows,) = page.groups().values()
    assert [row.name for row in rows] == ["nothing-left", "not-run"]


def test_the_page_stands_alone_and_is_accessible(tmp_path):
    page = page_of(save_evaluation(tmp_path / "one", 30), save_history(tmp_path / "two" / "history.json"))
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "iframe", "object", "base", "form"}
    for _, attributes in page.tags:
        for key in ("src", "href", "srcset", "action"):
            assert attributes.get(key, "#").startswith(("#", "data:"))
        assert not any(key.startswith("on") for key in attributes)
    for image in page.all("img"):
        assert len(image["alt"]) > 20
        drawing = ElementTree.fromstring(base64.b64decode(image["src"].removeprefix("data:image/svg+xml;base64,")))
        links = [value for node in drawing.iter() for key, value in node.attrib.items() if key.endswith("href")]
        assert all(link.startswith(("#", "data:")) for link in links)
    assert all(attributes.get("scope") in ("row", "col") for attributes in page.all("th"))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {attributes["href"].removeprefix("#") for attributes in page.all("a")} <= set(ids)
    assert page.all("html") == [{"lang": "en"}] and len(page.all("h1")) == 1 == len(page.all("main"))
    style = (tmp_path / "page.html").read_text().split("<style>")[1].split("</style>")[0]
    assert "url(" not in style and "@import" not in style and "prefers-color-scheme: dark" in style


def test_text_is_escaped(tmp_path):
    evaluation = save_evaluation(
        tmp_path / "<b>run&", 30, warnings=(EVIL,), data={"name": EVIL}, command=EVIL, machine={EVIL: [EVIL]}
    )
    training = save_history(tmp_path / "training" / "<i>-history.json", layer=EVIL)
    entry = training / "model_info" / "digits" / "Linf" / "<u>.json"
    entry.parent.mkdir(parents=True)
    entry.write_text(json.dumps({"clean_acc": "90", "autoattack_acc": "50", "eps": EVIL, "footnote": EVIL}))
    page = page_of(evaluation, training)
    assert not {"script", "i", "u"} & {tag for tag, _ in page.tags}
    assert page.text.count(EVIL) >= 6


def test_the_quickstarts_results(tmp_path):
    write_page([QUICKSTART], tmp_path / "page.html")
    page = Parsed((tmp_path / "page.html").read_text())
    table = (QUICKSTART / "table.md").read_text()
    for row in page.tables[0][1:]:
        assert f"{float(row[-1].rstrip(' %')):.1f} %" in table
    assert "python examples/quickstart.py" in page.text and "no leaderboard for digits" in page.text


def test_without_validation_data_or_autoattack(tmp_path):
    training = save_history(tmp_path / "training" / "history.json", robust=(None, None))
    page = page_of(training, save_evaluation(tmp_path / "pgd", 30, attacks=False))
    assert page.tables[0][1][-2:] == ["72.00 %", "–"]
    assert "AutoAttack was not run" in page.text and "no validation data" in page.all("img")[0]["alt"]


def test_only_its_own_page_is_overwritten(tmp_path):
    run, output = save_evaluation(tmp_path / "run", 30), tmp_path / "page.html"
    write_page([run], output)
    write_page([run], output)
    output.write_text("<!DOCTYPE html><p>mine")
    with pytest.raises(ValueError, match="is something else than a page of this command; it is not overwritten"):
        write_page([run], output)
    assert output.read_text().endswith("mine")
    with pytest.raises(ValueError, match="not overwritten"):
        write_page([run], tmp_path)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "is not the folder of a run: it has none of report.json"),
        ({"report.json": "{}"}, "its format is None"),
        ({"report.json": '{"format": 2}'}, "its format is 2, this version of art_clat reads 1"),
        ({"report.json": "[]"}, "cannot be read"),
        ({"history.json": "{}"}, "is not the history of a training: KeyError"),
        ({"history.json": '{"epochs": [], "selections": []}'}, "is not the history of a training: IndexError"),
        ({"history.json": "no"}, "is not the history of a training: JSONDecodeError"),
        ({"mine.json": '{"epochs": [{}], "selections": []}'}, "mine.json is not the history of a training: TypeError"),
        ({"mine.json": "no", "other.json": "[]"}, "is not the folder of a run"),
        ({"model_info/digits/Linf/M.json": '{"clean_acc": "1"}'}, "M.json is not a RobustBench entry"),
        ({"model_info/digits/Linf/M.json": "no"}, "M.json is not JSON"),
    ],
)
def test_what_is_no_run(tmp_path, files, said):
    (tmp_path / "run").mkdir()
    for name, text in files.items():
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text(text)
    with pytest.raises(ValueError, match=said):
        write_page([tmp_path / "run"], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_the_folder_of_a_training(tmp_path, data):
    """As ``fit(checkpoint=)`` leaves it."""
    trainer = AdversarialTrainerCLATPyTorch(classifier := make_classifier(Chain()), make_attack(classifier), seed=0)
    trainer.fit(*data, nb_epochs=1, checkpoint=tmp_path / "run", verbose=False)
    write_page([tmp_path / "run"], tmp_path / "page.html")
    assert trainer.history.selections[0].chosen[0] in Parsed((tmp_path / "page.html").read_text()).text


def test_a_history_under_any_name(tmp_path):
    """Beside JSON files of other things."""
    training = save_history(tmp_path / "training" / "my_run.json")
    save_history(training / "second_history.json", robust=(0.1, 0.2))
    for name, content in (("settings.json", '{"epochs": 3}'), ("list.json", "[1]"), ("damaged.json", "{")):
        (training / name).write_text(content)
    best = next(table for table in page_of(training).tables if table[0][1] == "Best epoch")
    assert [row[0] for row in best[1:]] == ["training/my_run", "training/second"]


def test_the_folder_of_a_submission(tmp_path):
    """It has the evaluation in a subfolder, and RobustBench's entry."""
    folder = tmp_path / "submission"
    save_evaluation(folder / "evaluation", 30, data={"name": "cifar10"}, command="art-clat evaluate x")
    entry = folder / "model_info" / "cifar10" / "Linf" / "Mine.json"
    entry.parent.mkdir(parents=True)
    entry.write_text(json.dumps({"clean_acc": "90", "autoattack_acc": "60", "eps": "8/255"}))
    page = page_of(folder)
    rows = [row[1:] for table in page.tables for row in table[1:] if table[0][0] == "#"]
    assert sorted(rows) == [["Mine", "90.00 %", "–", "60.00 %"], ["submission", "90.00 %", "72.00 %", "60.00 %"]]
    assert "art-clat evaluate x" in page.text and len(page.all("img")) == 1


def test_what_a_training_was_made_with(tmp_path):
    """ε as a quotient where it is one."""
    told = {
        "selection": {"rule": "criticality", "samples": 1024},
        "attack": {"eps": 8 / 255, "eps_step": 0.1},
        "a": None,
    }
    training = save_history(tmp_path / "training" / "history.json", configuration=told)
    tables = page_of(training).tables
    assert next(table for table in tables if table[0][0] == "Setting")[:2] == [
        ["Setting", "Value"],
        ["selection", "rule criticality, samples 1024"],
    ]
    assert next(table for table in tables if table[0][0] == "Setting")[2:] == [
        ["attack", "eps 8/255, eps_step 0.1"],
        ["a", "–"],
    ]
    before = page_of(save_history(tmp_path / "older" / "history.json"))
    assert not any(table[0][0] == "Setting" for table in before.tables)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        write_page([tmp_path / "nowhere"], tmp_path / "page.html")
