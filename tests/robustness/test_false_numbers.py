"""What users run into when they evaluate: false numbers, and binary networks."""

import json
import logging
import subprocess
import sys

import numpy as np
import pytest
import torch
from art.estimators.certification.randomized_smoothing import PyTorchRandomizedSmoothing
from art.estimators.classification import PyTorchClassifier
from conftest import make_attack
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from timm.data import create_dataset
from torch import nn

from art_clat import (
    AdversarialTrainerCLATPyTorch,
    TwoLogits,
    create_backbone,
    evaluate_robustness,
    write_robustbench_entry,
)
from art_clat.models.class_order import natural_key, number_folders
from art_clat.models.datasets import load_data
from art_clat.models.weight_files import load_state_dict
from art_clat.report.page import write_page
from art_clat.robustness.checks import warn_about_labels

LOCAL = {"norm": "Linf", "eps": 1 / 255, "autoattack_version": None}


def write_folders(root, names, colours, per_class=6):
    """Write images of a colour for every class."""
    rng = np.random.default_rng(0)
    for name, colour in zip(names, colours, strict=True):
        (root / name).mkdir(parents=True)
        for number in range(per_class):
            array = np.full((8, 8, 3), colour, np.uint8) + rng.integers(0, 8, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(array).save(root / name / f"{number}.png")


class Nearest(nn.Module):
    """Classifies an image by the colour that is nearest to its mean."""

    def __init__(self, colours):
        super().__init__()
        self.colours = nn.Parameter(torch.tensor(colours, dtype=torch.float32) / 255 + 3.5 / 255)

    def forward(self, x):
        return -100 * (x.mean((1, 2, 3))[:, None] - self.colours).abs()


class TestClassOrder:
    NUMBERS = tuple(str(number) for number in range(12))
    COLOURS = tuple(20 * number for number in range(12))

    @pytest.fixture
    def folder(self, tmp_path):
        write_folders(tmp_path / "images", self.NUMBERS, self.COLOURS)
        return tmp_path / "images"

    def test_an_ambiguous_order_is_refused(self, folder):
        with pytest.raises(ValueError, match=r"0, 1, 10, 11, … as text, .* or 0, 1, 2, 3, … by their numbers, as timm"):
            load_data(str(folder))

    def test_orders_are_timms_and_torchvisions(self, folder):
        network = Nearest(self.COLOURS)
        natural = load_data(str(folder), class_order="natural")
        timms = create_dataset("", root=str(folder))
        assert sorted(natural.y.tolist()) == sorted(label for _, label in timms)
        accuracy = evaluate_robustness(network, natural.x, natural.y, **LOCAL).clean_accuracy
        assert accuracy == 1
        string = load_data(str(folder), class_order="string")
        assert (network(torch.tensor(string.x)).argmax(1).numpy() == string.y).mean() < 0.3

    @pytest.mark.parametrize("kind", ["txt", "list", "object"])
    def test_a_map_says_it(self, folder, tmp_path, kind):
        names = [*self.NUMBERS[::-1], "a class without images"]
        path = tmp_path / ("map.txt" if kind == "txt" else "map.json")
        content = {name: number for number, name in enumerate(names)} if kind == "object" else names
        path.write_text("\n".join(names) + "\n" if kind == "txt" else json.dumps(content))
        data = load_data(str(folder), class_map=path)
        assert data.nb_classes == 13
        shown = (255 * data.x.mean((1, 2, 3)) / 20).round().astype(int)
        np.testing.assert_array_equal(data.y, 11 - shown)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("a\nb\n", r"lacks the folder\(s\) 0, 1, 10, 11, …"), ('["0", "0"]', "names 0 more than once"),
            ('{"0": 1}', "must number its 1 classes 0…0, each once"), ('{"0": "x"}', "a list of names, or names and"),
            ("{", "is no JSON"), (None, "there is no file"),
        ],
    )  # fmt: skip
    def test_a_map_that_does_not_fit_is_refused(self, folder, tmp_path, content, message):
        path = tmp_path / ("map.txt" if content and content[0] == "a" else "map.json")
        if content is not None:
            path.write_text(content)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            load_data(str(folder), class_map=path)

    def test_names_in_several_ways(self):
        assert number_folders(["n02", "n01", "n10"]) == {"n01": 0, "n02": 1, "n10": 2}
        assert number_folders(["cat", "ant", "dog"]) == {"ant": 0, "cat": 1, "dog": 2}
        for names in (["10_dog", "9_cat"], ["Zebra", "ant"], ["v1.10", "v1.9"]):
            with pytest.raises(ValueError, match="can be sorted in two ways"):
                number_folders(names)
            assert list(number_folders(names, order="natural")) == sorted(names, key=natural_key)
        with pytest.raises(ValueError, match="`class_order` must be one of string, natural"):
            number_folders(["a"], order="numeric")
        with pytest.raises(ValueError, match="pass one of them"):
            number_folders(["a"], order="string", class_map="map.txt")

    def test_is_for_folders_only(self):
        with pytest.raises(ValueError, match="are for an image folder, `dataset` is 'digits'"):
            load_data("digits", class_order="natural")

    def test_the_command_line(self, folder, tmp_path):
        """From the folder to the report, the network in a file of the user's."""
        (tmp_path / "mine.py").write_text(
            "import torch\nfrom torch import nn\n\n\nclass Net(nn.Module):\n    def __init__(self):\n"
            "        super().__init__()\n"
            "        self.colours = nn.Parameter(torch.arange(12) * 20 / 255 + 3.5 / 255)\n\n"
            "    def forward(self, x):\n        return -100 * (x.mean((1, 2, 3))[:, None] - self.colours).abs()\n"
        )
        command = [
            *(sys.executable, "-m", "art_clat", "evaluate", "--model", "mine.py:Net", "--dataset", "images"),
            *("--eps", "1/255", "--version", "none", "--pgd-steps", "2", "--output", "out"),
        ]
        refused = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert refused.returncode == 1 and "--class-order" in refused.stderr and not (tmp_path / "out").exists()
        done = subprocess.run([*command, "--class-order", "natural"], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        saved = json.loads((tmp_path / "out" / "report.json").read_text())
        assert saved["clean_accuracy"] == 1 and saved["data"]["class_order"] == "natural"


class Fixed(nn.Module):
    """Predicts what it is told: the class that the first pixel shows, renamed, and wrong as often as is wanted."""

    def __init__(self, nb_classes, names=None, error=0.0):
        super().__init__()
        self.names = torch.arange(nb_classes) if names is None else torch.as_tensor(names)
        self.error, self.scale = error, nn.Parameter(torch.ones(()))

    def forward(self, x):
        shown, other = ((x[:, 0, place, 0] * len(self.names)).long().clamp(0, len(self.names) - 1) for place in (0, 1))
        shown = torch.where(x[:, 0, 0, 1] < self.error, other, shown)
        logits = nn.functional.one_hot(self.names[shown], len(self.names)).float()
        return 5 * self.scale * logits + x.mean((1, 2, 3))[:, None] * torch.linspace(0, 0.1, len(self.names))


def images_of(nb_classes, n):
    rng = np.random.default_rng(1)
    y = rng.integers(0, nb_classes, n)
    x = rng.random((n, 1, 4, 4), dtype=np.float32)
    x[:, 0, 0, 0] = (y + 0.5) / nb_classes
    return x, y


class TestOrderOfTheLabels:
    @pytest.mark.parametrize(
        ("nb_classes", "names", "error", "n", "is_reported"),
        [
            (10, None, 0.0, 400, False), (10, None, 0.7, 400, False), (10, None, 1.0, 400, False),
            (10, range(9, -1, -1), 0.0, 400, True), (10, range(9, -1, -1), 0.7, 600, True),
            (10, [1, 2, 3, 4, 5, 6, 7, 8, 9, 0], 0.2, 400, True), (10, [0, 1, 2, 5, 4, 3, 6, 7, 8, 9], 0.1, 600, True),
            (10, range(9, -1, -1), 0.0, 90, False), (2, [1, 0], 0.1, 40, True), (2, None, 0.9, 400, False),
            (100, range(99, -1, -1), 0.3, 1200, True), (100, None, 0.9, 1200, False),
        ],
    )  # fmt: skip
    def test_another_order_is_reported(self, nb_classes, names, error, n, is_reported):
        x, y = images_of(nb_classes, n)
        report = evaluate_robustness(Fixed(nb_classes, names, error), x, y, pgd_max_iter=1, **LOCAL)
        found = [message for message in report.warnings if "Labels seem to be in another order" in message]
        assert len(found) == is_reported
        if is_reported and names is not None and nb_classes == 2:
            assert "0 is 1, 1 is 0" in found[0]

    def test_a_part_of_a_networks_classes(self):
        """Ten of ImageNet's thousand, say, numbered 0 to 9: far above chance, since one number is right."""
        outputs, labels = torch.tensor([0, 37, 52, 81]), torch.arange(4).repeat(40)

        def predict(x):
            return nn.functional.one_hot(outputs[x[:, 0, 0, 0].long()], 100).float()

        images = labels.view(-1, 1, 1, 1).float()
        arguments = {"nb_classes": 100, "device": torch.device("cpu"), "batch_size": 50}
        (message,) = warn_about_labels(predict, images, labels, **arguments)
        assert "(37 is 1, 52 is 2, 81 is 3)" in message and "100.0% of 80 examples" in message
        assert warn_about_labels(predict, images, outputs[labels], **arguments) == []
        assert warn_about_labels(predict, images[:36], labels[:36], **arguments) == []  # nine of each

    def test_a_network_that_adversaries_trained_is_not_reported(self):
        """A poor but honest network, whose confusions have a pattern."""
        data = load_digits()
        x, y = (data.images[:, None] / 16).astype(np.float32), data.target
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        classifier = PyTorchClassifier(
            model, nn.CrossEntropyLoss(), (1, 8, 8), 10, torch.optim.SGD(model.parameters(), 0.03), clip_values=(0, 1)
        )
        classifier.fit(x[:1000], y[:1000], nb_epochs=1, batch_size=64)
        report = evaluate_robustness(classifier, x[1000:], y[1000:], pgd_max_iter=1, **LOCAL)
        assert 0.15 < report.clean_accuracy < 0.7
        assert not [message for message in report.warnings if "another order" in message]


class TestWeightsOfAnAveragedRun:
    @pytest.fixture(scope="class")
    def run(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("run")
        data = load_digits()
        x, y = (data.images[:64, None] / 16).astype(np.float32), data.target[:64]
        torch.manual_seed(0)
        model = create_backbone("resnet10t", num_classes=10, input_size=(1, 8, 8), channels=(4, 4, 8, 8), stem_width=4)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        classifier = PyTorchClassifier(model, nn.CrossEntropyLoss(), (1, 8, 8), 10, optimizer, clip_values=(0, 1))
        attack = make_attack(classifier, max_iter=1)
        trainer = AdversarialTrainerCLATPyTorch(classifier, attack, warmup=2, ema_decay=0.9, seed=0)
        trainer.fit(x, y, nb_epochs=2, batch_size=16, checkpoint=folder, verbose=False)
        return folder / "last.safetensors", {name: value.clone() for name, value in model.state_dict().items()}

    @staticmethod
    def network():
        return create_backbone("resnet10t", num_classes=10, input_size=(1, 8, 8), channels=(4, 4, 8, 8), stem_width=4)

    @pytest.mark.parametrize(("weights", "are_averages"), [(None, True), ("average", True), ("raw", False)])
    def test_are_read_as_asked_for_and_said(self, run, caplog, weights, are_averages):
        path, end = run  # a run ends with the average
        network = self.network()
        with caplog.at_level(logging.INFO, logger="art_clat.models.weight_files"):
            load_state_dict(network, path, weights)
        equal = [torch.equal(value, end[name]) for name, value in network.named_parameters()]
        assert all(equal) if are_averages else not any(equal)
        (record,) = caplog.records
        assert ("their average is read" if are_averages else "weights of the last step is read") in record.getMessage()

    @pytest.mark.parametrize("weights", ["average", "raw"])
    def test_timms_files_have_both_too(self, tmp_path, weights):
        one, other = self.network().state_dict(), self.network().state_dict()
        torch.save({"state_dict": one, "state_dict_ema": other}, tmp_path / "timm.pth")
        network = self.network()
        load_state_dict(network, tmp_path / "timm.pth", weights)
        expected = other if weights == "average" else one
        assert all(torch.equal(value, expected[name]) for name, value in network.named_parameters())

    def test_an_average_that_is_not_there(self, tmp_path):
        save_file(self.network().state_dict(), tmp_path / "plain.safetensors")
        with pytest.raises(ValueError, match="`weights`: .*plain.safetensors has no average of the weights"):
            load_state_dict(self.network(), tmp_path / "plain.safetensors", "average")
        load_state_dict(self.network(), tmp_path / "plain.safetensors", "raw")
        with pytest.raises(ValueError, match="`weights` must be one of 'average', 'raw', got 'ema'"):
            load_state_dict(self.network(), tmp_path / "plain.safetensors", "ema")

    def test_the_command_line(self, run, tmp_path):
        (tmp_path / "mine.py").write_text(
            "from art_clat import create_backbone\n\n\ndef make():\n    return create_backbone('resnet10t', "
            "num_classes=10, input_size=(1, 8, 8), channels=(4, 4, 8, 8), stem_width=4)\n"
        )
        saved = {}
        for weights in ("average", "raw"):
            command = [
                *(sys.executable, "-m", "art_clat", "evaluate", "--model", "mine.py:make", "--checkpoint", str(run[0])),
                *("--weights", weights, "--dataset", "digits", "--n-examples", "40", "--eps", "0.1"),
                *("--version", "none", "--pgd-steps", "2", "--output", weights),
            ]
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            assert ("their average is read" in done.stderr) == (weights == "average")
            saved[weights] = json.loads((tmp_path / weights / "report.json").read_text())
        assert [saved[weights]["model"]["weights"] for weights in saved] == ["average", "raw"]


class TestFewClasses:
    @pytest.fixture(scope="class", params=[2, 3])
    def few(self, request):
        """A network of two or three digits."""
        data = load_digits()
        chosen = data.target < request.param
        x, y = (data.images[chosen][:, None] / 16).astype(np.float32), data.target[chosen]
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, request.param))
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        for _ in range(30):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(torch.tensor(x)), torch.tensor(y)).backward()
            optimizer.step()
        return model, x[:16], y[:16]

    @pytest.mark.parametrize("norm", ["Linf", "L2"])
    def test_autoattacks_parts(self, few, norm, tmp_path):
        model, x, y = few
        eps = 0.25 if norm == "Linf" else 1.0
        report = evaluate_robustness(model, x, y, norm=norm, eps=eps, autoattack_version="few-classes")
        assert list(report.attacks) == ["apgd-ce", "fab", "square"]
        assert report.clean_accuracy == 1 and report.autoattack_accuracy < 1
        assert report.autoattack_accuracy <= report.pgd_accuracy + 1 / 16
        adversarial = torch.as_tensor(report.adversarial)
        fooled = model(adversarial).argmax(1).numpy() != y
        np.testing.assert_array_equal(~fooled, report.attacks["square"])
        size = (adversarial - torch.tensor(x)).flatten(1)
        assert (size.abs().amax(1) if norm == "Linf" else size.norm(dim=1)).max() <= eps + 1e-5

        assert "AutoAttack's parts for few classes (not standard)" in str(report)
        assert "not standard" in report.plot().get_title()
        report.save(tmp_path / "run")
        assert json.loads((tmp_path / "run" / "report.json").read_text())["autoattack_version"] == "few-classes"
        page = write_page([tmp_path / "run"], tmp_path / "page.html").read_text()
        assert "few-classes version" in page
        with pytest.raises(ValueError, match="parts for few classes, not AutoAttack, and RobustBench has no entries"):
            write_robustbench_entry(report, model_id="A", dataset="digits", directory=tmp_path)

    def test_the_standard_version_points_there(self, few):
        model, x, y = few
        rand = r" \(or 'rand', for a randomised network\)" if len(set(y)) == 3 else ","
        with pytest.raises(ValueError, match=f"at least 4 classes .* `autoattack_version='few-classes'`{rand}"):
            evaluate_robustness(model, x, y, norm="Linf", eps=0.1)

    def test_is_not_for_more_classes(self):
        x = np.random.default_rng(0).random((4, 1, 4, 4))
        with pytest.raises(ValueError, match="is for two or three classes, the network has 4"):
            evaluate_robustness(
                nn.Sequential(nn.Flatten(), nn.Linear(16, 4)), x, np.arange(4), norm="Linf", eps=0.1,
                autoattack_version="few-classes",
            )  # fmt: skip

    def test_one_logit_is_no_class(self):
        with pytest.raises(ValueError, match="returns one logit, .* `art_clat.TwoLogits"):
            evaluate_robustness(
                nn.Sequential(nn.Flatten(), nn.Linear(4, 1)), np.zeros((8, 1, 2, 2), np.float32), np.zeros(8, int),
                norm="Linf", eps=0.1, autoattack_version="few-classes",
            )  # fmt: skip


class TestTwoLogits:
    @pytest.mark.parametrize("flat", [True, False])
    def test_softmax_is_the_sigmoid(self, flat):
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, 1), *([nn.Flatten(0)] if flat else []))
        x, y = torch.rand(9, 1, 8, 8), torch.randint(2, (9,))
        model = TwoLogits(network)
        torch.testing.assert_close(model(x).softmax(1)[:, 1], network(x).sigmoid().flatten())
        torch.testing.assert_close(
            nn.functional.cross_entropy(model(x), y),
            nn.functional.binary_cross_entropy_with_logits(network(x).flatten(), y.float()),
        )

    def test_is_trained_measured_and_evaluated(self):
        data = load_digits()
        chosen = data.target < 2
        x, y = (data.images[chosen][:, None] / 16).astype(np.float32), data.target[chosen]
        torch.manual_seed(0)
        model = TwoLogits(nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 1)))
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        classifier = PyTorchClassifier(model, nn.CrossEntropyLoss(), (1, 8, 8), 2, optimizer, clip_values=(0, 1))
        trainer = AdversarialTrainerCLATPyTorch(classifier, make_attack(classifier), warmup=4, seed=0)
        trainer.fit(x, y, nb_epochs=6, batch_size=32, verbose=False)
        assert trainer.history.selections[0].chosen == ("network.1",)  # the other layer is the head
        report = evaluate_robustness(
            classifier, x[:12], y[:12], norm="Linf", eps=0.02, autoattack_version="few-classes"
        )
        assert report.autoattack_accuracy > 0.5

    def test_another_output_is_refused(self):
        with pytest.raises(ValueError, match=r"must return one logit a sample, shape \(n,\) or \(n, 1\), got \(5, 2\)"):
            TwoLogits(nn.Linear(3, 2))(torch.rand(5, 3))


@pytest.mark.parametrize(("norm", "largest"), [("Linf", 1.0), ("L2", 2.0), ("L1", 8.0)])
def test_an_eps_that_reaches_the_whole_range_is_doubted(norm, largest):
    network, x = nn.Sequential(nn.Flatten(), nn.Linear(16, 4)), np.random.default_rng(0).random((4, 1, 4, 4))
    settings = {"norm": norm, "autoattack_version": None, "pgd_max_iter": 1}
    for eps, is_doubted in ((largest, True), (0.99 * largest, False)):
        report = evaluate_robustness(network, x, np.arange(4), eps=eps, **settings)
        assert any("no network can be robust" in message for message in report.warnings) == is_doubted


def test_norms_without_statistics_are_named(tmp_path):
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten(), nn.Linear(144, 4)
    )
    with pytest.raises(ValueError, match="`classifier_or_model`: 1 has no running statistics, .*track_running_stats"):
        evaluate_robustness(model, np.random.rand(8, 1, 8, 8).astype(np.float32), np.arange(8) % 4, **LOCAL)


def test_a_smoothing_classifier_is_refused():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    smoothed = PyTorchRandomizedSmoothing(
        model, nn.CrossEntropyLoss(), (1, 8, 8), 4, optimizer=torch.optim.SGD(model.parameters(), 0.1),
        clip_values=(0, 1), sample_size=8, scale=0.1, device_type="cpu",
    )  # fmt: skip
    with pytest.raises(TypeError, match="`classifier_or_model` is a PyTorchRandomizedSmoothing"):
        evaluate_robustness(smoothed, np.random.rand(8, 1, 8, 8).astype(np.float32), np.arange(8) % 4, **LOCAL)
