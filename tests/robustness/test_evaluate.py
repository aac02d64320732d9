import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import evaluation_run
import numpy as np
import pytest
import torch
from art.attacks.evasion import ProjectedGradientDescentPyTorch
from art.estimators.classification import PyTorchClassifier
from conftest import Normed, make_classifier
from sklearn.datasets import load_digits
from torch import nn

from art_clat import RobustnessReport, create_backbone, evaluate_robustness
from art_clat.models.by_name import load_model
from art_clat.models.datasets import load_data
from art_clat.robustness.autoattack import Ensemble
from art_clat.utils.robustbench_import import autoattack

CIFAR10 = Path(__file__).parents[3] / "shared" / "data" / "cifar10"


def small_network(channels):
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip


@pytest.fixture(scope="module")
def digits():
    """A naturally trained classifier of real digits, and 24 digits it has not seen."""
    torch.manual_seed(0)
    data = load_digits()
    x, y = (data.images[:, None] / 16).astype(np.float32), data.target
    model = small_network(1)
    classifier = PyTorchClassifier(
        model, nn.CrossEntropyLoss(), (1, 8, 8), 10, torch.optim.Adam(model.parameters(), 0.01), clip_values=(0, 1),
        device_type="cpu",
    )  # fmt: skip
    classifier.fit(x[:1500], y[:1500], nb_epochs=8, batch_size=64)
    return classifier, x[1500:1524], y[1500:1524]


@pytest.fixture(scope="module")
def report(digits):
    return evaluate_robustness(*digits, norm="Linf", eps=0.04)


class TestEvaluation:
    def test_clean_accuracy_is_the_classifiers(self, digits, report):
        classifier, x, y = digits
        np.testing.assert_array_equal(report.clean, classifier.predict(x).argmax(1) == y)
        assert report.clean_accuracy == pytest.approx((classifier.predict(x).argmax(1) == y).mean())
        assert report.clean_accuracy > 0.6

    def test_pgd_agrees_with_arts(self, digits, report):
        classifier, x, y = digits
        attack = ProjectedGradientDescentPyTorch(
            classifier, eps=0.04, eps_step=0.01, max_iter=20, num_random_init=1, verbose=False
        )
        art = (classifier.predict(attack.generate(x, y)).argmax(1) == y).mean()
        assert report.pgd_accuracy == pytest.approx(art, abs=2.1 / 24)
        assert (report.pgd <= report.clean).all()

    def test_autoattack_is_the_authors_own_and_stronger(self, digits, report):
        classifier, x, y = digits
        network = classifier.model.eval()
        adversary = autoattack().AutoAttack(network, norm="Linf", eps=0.04, seed=0, device="cpu", verbose=False)
        assert any(base.__module__.split(".")[0] in ("autoattack", "pyautoattack") for base in type(adversary).__mro__)
        x_adv = adversary.run_standard_evaluation(torch.tensor(x), torch.tensor(y), bs=128)
        assert (x_adv - torch.tensor(x)).abs().max() <= 0.04 + 1e-6
        np.testing.assert_array_equal(report.adversarial, x_adv.numpy())  # to the last bit
        with torch.no_grad():
            np.testing.assert_array_equal(report.autoattack, (network(x_adv).argmax(1) == torch.tensor(y)).numpy())
        assert 0 < report.autoattack_accuracy <= report.pgd_accuracy + 1 / 24
        assert report.autoattack_accuracy < report.clean_accuracy

    def test_the_verdicts_after_each_attack_are_those_of_the_authors(self, digits, caplog, monkeypatch):
        """Also where survivors fill several batches."""
        classifier, x, y = digits
        x, y = x[:10], y[:10]
        monkeypatch.setattr(Ensemble, "make_attack", evaluation_run.quick)
        with caplog.at_level("INFO", "art_clat"):
            report = evaluate_robustness(classifier, x, y, norm="Linf", eps=0.06, seed=5, batch_size=4)
        names = ["apgd-ce", "apgd-t", "fab-t", "square"]
        assert list(report.attacks) == names
        network = classifier.model.eval()
        adversary = autoattack().AutoAttack(network, norm="Linf", eps=0.06, seed=5, device="cpu", verbose=False)
        adversary.logger.setLevel("DEBUG")
        adversary.square.n_queries = evaluation_run.QUERIES
        for attack in (adversary.apgd, adversary.apgd_targeted, adversary.fab):
            attack.n_iter = evaluation_run.STEPS
        adversary.verbose = True  # its own account of what is left after each attack
        with caplog.at_level("DEBUG", "auto-attack"):
            x_adv = adversary.run_standard_evaluation(torch.tensor(x), torch.tensor(y), bs=4)
        np.testing.assert_array_equal(report.adversarial, x_adv.numpy())
        said = {"ours": [], "theirs": []}
        for record in caplog.records:
            for name in names:
                if record.getMessage().startswith(f"robust accuracy after {name.upper()}:"):
                    whose = "theirs" if record.name == "auto-attack" else "ours"
                    said[whose].append(record.getMessage().split(" (")[0])
        assert said["ours"] == said["theirs"] and len(said["ours"]) == len(names)
        cumulative = np.array([report.clean, *report.attacks.values()])
        assert (cumulative[1:] <= cumulative[:-1]).all() and (cumulative[-1] == report.autoattack).all()
        assert len({int(verdicts.sum()) for verdicts in cumulative}) > 1

    def test_classifier_and_network_get_the_same_verdicts(self, digits, report):
        classifier, x, y = digits
        again = evaluate_robustness(classifier.model, x, np.eye(10)[y], norm=np.inf, eps=0.04, autoattack_version=None)
        np.testing.assert_array_equal(again.pgd, report.pgd)
        assert again.autoattack is None and again.autoattack_accuracy is None

    def test_the_classifiers_preprocessing_is_attacked_through(self, digits):
        classifier, x, y = digits
        scaled = PyTorchClassifier(
            nn.Sequential(*classifier.model, nn.Identity()), nn.CrossEntropyLoss(), (1, 8, 8), 10, clip_values=(0, 1),
            preprocessing=(0.0, 0.5), device_type="cpu",
        )  # fmt: skip

        class Doubled(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = classifier.model

            def forward(self, x):
                return self.inner(x / 0.5)

        first, second = (
            evaluate_robustness(c, x, y, norm=2, eps=0.2, autoattack_version=None) for c in (scaled, Doubled())
        )
        np.testing.assert_array_equal(first.pgd, second.pgd)

    def test_an_example_that_only_pgd_gets_right_is_not_robust(self):
        class Backwards(nn.Module):
            """Its loss gradient leads to the right class."""

            def forward(self, x):
                value = x.mean((1, 2, 3))
                score = torch.where(value > 0.5, value, 1 - value)
                return torch.stack([score, 0.6 - score, 0 * score, 0 * score], dim=1) * 20

        x, y = np.full((4, 1, 2, 2), 0.45, np.float32), np.ones(4, int)
        report = evaluate_robustness(Backwards(), x, y, norm="Linf", eps=0.3, autoattack_version=None)
        assert (report.clean_accuracy, report.pgd_accuracy) == (0, 0)

    def test_pgd_starts_at_random_and_steps_by_a_quarter(self, digits):
        classifier, x, y = digits
        seen = []  # the inputs of every pass, and whether it is for a gradient
        handle = classifier.model[0].register_forward_pre_hook(
            lambda module, args: seen.append((torch.is_grad_enabled(), args[0].detach().clone()))
        )
        report = evaluate_robustness(
            classifier, x, y, norm="Linf", eps=0.04, pgd_max_iter=1, autoattack_version=None, seed=3, batch_size=24
        )
        handle.remove()
        _, start = (inputs for is_attack, inputs in seen if is_attack)  # the first looks whether there are gradients
        _, end = seen[-1]
        x = torch.tensor(x)[torch.tensor(report.clean)]  # what is misclassified anyway is not attacked
        inside = (x > 0.05) & (x < 0.95)
        assert (start - x).abs().max() <= 0.04 + 1e-6 and (start - x)[inside].std() > 0.015
        free = inside & ((end - x).abs() < 0.0399)
        assert (end - start)[free].abs().max() == pytest.approx(0.01, abs=1e-6)

    def test_l2(self, digits, monkeypatch):
        monkeypatch.setattr(Ensemble, "make_attack", evaluation_run.quick)
        classifier, x, y = digits
        report = evaluate_robustness(classifier, x[:8], y[:8], norm="L2", eps=0.3)
        distance = np.linalg.norm((report.adversarial - x[:8]).reshape(8, -1), axis=1)
        assert report.norm == "L2" and 0.2 < distance.max() <= 0.3 + 1e-5
        assert (distance[~report.clean] == 0).all() and (distance[report.autoattack] == 0).all()

    def test_restarts_and_steps_make_pgd_stronger(self, digits):
        classifier, x, y = digits
        few, many = (
            evaluate_robustness(
                classifier, x, y, norm="Linf", eps=0.06, autoattack_version=None, pgd_max_iter=4, pgd_restarts=restarts
            )
            for restarts in (1, 20)
        )
        assert many.pgd.sum() < few.pgd.sum()
        assert (many.pgd <= few.pgd).all()  # the first start is the same
        with torch.no_grad():
            fooled = classifier.model(torch.tensor(many.adversarial)).argmax(1).numpy() != y
        np.testing.assert_array_equal(~many.pgd, fooled)

    def test_transfer(self, digits):
        """From itself it is PGD; from a network of other weights it is weaker, and never better than clean."""
        classifier, x, y = digits
        settings = {"norm": "Linf", "eps": 0.06, "autoattack_version": None}
        torch.manual_seed(7)
        other = small_network(1)
        optimizer = torch.optim.Adam(other.parameters(), 0.01)
        data = load_digits()
        inputs, labels = torch.tensor(data.images[:1500, None] / 16).float(), torch.tensor(data.target[:1500])
        for _ in range(60):
            optimizer.zero_grad()
            nn.functional.cross_entropy(other(inputs), labels).backward()
            optimizer.step()
        other.train()
        other[0].weight.requires_grad_(False)
        itself = evaluate_robustness(classifier, x, y, transfer_from=classifier, **settings)
        report = evaluate_robustness(classifier, x, y, transfer_from=other, **settings)
        assert other.training and not other[0].weight.requires_grad and other[2].weight.requires_grad
        assert itself.transfer.sum() == pytest.approx(itself.pgd.sum(), abs=1)
        assert report.pgd.sum() < report.transfer.sum() <= report.clean.sum()
        assert (report.transfer <= report.clean).all() and report.pgd_accuracy == itself.pgd_accuracy
        with pytest.raises(ValueError, match="`transfer_from` must have the 10 classes"):
            evaluate_robustness(
                classifier, x, y, transfer_from=nn.Sequential(nn.Flatten(), nn.Linear(64, 9)), **settings
            )

    def test_fewer_than_ten_classes(self):
        classifier = make_classifier(Normed())
        rng = np.random.default_rng(0)
        x, y = rng.random((6, 2, 6, 6), dtype=np.float32), rng.integers(0, 4, 6)
        report = evaluate_robustness(classifier, x, y, norm="Linf", eps=0.1)
        assert not any("target classes" in message for message in report.warnings)

    def test_the_model_comes_back_as_it_was(self):
        model = Normed().train()
        model.bn2.eval()
        model.conv1.weight.requires_grad_(False)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        generators = (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist())
        evaluate_robustness(model, np.random.default_rng(0).random((4, 2, 6, 6)), [0, 1, 2, 3], norm="Linf", eps=0.1)
        assert [m.training for m in (model, model.bn1, model.bn2)] == [True, True, False]
        assert not model.conv1.weight.requires_grad and model.conv2.weight.requires_grad
        assert all(p.grad is None for p in model.parameters())
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()) == generators

    def test_autoattacks_warnings_reach_the_user(self, caplog):
        class Random(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(72, 10)

            def forward(self, x):
                return self.fc(x.flatten(1)) + torch.randn(len(x), 10)

        x = np.random.default_rng(0).random((4, 2, 6, 6))
        report = evaluate_robustness(Random(), x, [0, 1, 2, 3], norm="Linf", eps=0.1)
        assert any("randomized" in message for message in report.warnings)
        assert any("randomized" in record.message for record in caplog.records)

    def test_a_network_that_changes_at_test_time_is_told_from_the_next_one(self):
        class Dynamic(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(72, 10)

            def forward(self, x):
                with torch.enable_grad():
                    inputs = x.flatten(1).detach().requires_grad_()
                    moved = inputs - torch.autograd.grad(self.fc(inputs).logsumexp(1).sum(), inputs)[0]
                return self.fc(moved.detach())

        def said(model):
            ensemble = Ensemble(
                model, norm="Linf", eps=0.1, version="standard", nb_classes=10, seed=0, device=torch.device("cpu")
            )
            return ensemble.check_dynamic(torch.rand(4, 2, 6, 6))

        def trace(*_):
            return None

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            assert ["gradients in its forward pass" in message for message in said(Dynamic())] == [True]
            assert not said(nn.Sequential(nn.Flatten(), nn.Linear(72, 10)))
            after = sys.gettrace()
        finally:
            sys.settrace(before)
        assert after is trace  # AutoAttack's check sets its own, and none afterwards

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"eps": 8}, "`eps` must be positive, and at most 1 for Linf"),
            ({"eps": 128, "norm": 2}, "at most 4 for L2 on inputs of 64 values"),
            ({"eps": 12 * 255, "norm": 1}, "at most 32 for L1"),
            ({"eps": 0}, "`eps`"),
            ({"eps": None}, "Got None"),
            ({"eps": float("nan")}, "Got nan"),
            ({"pgd_restarts": 0}, "`pgd_restarts`"),
            ({"x": np.zeros((24, 3, 8, 8))}, r"of shape \(3, 8, 8\), `classifier_or_model` takes \(1, 8, 8\)"),
            ({"x": np.zeros((24, 1, 9, 9))}, r"of shape \(1, 9, 9\), `classifier_or_model` takes \(1, 8, 8\)"),
            ({"norm": 3}, "`norm` must be"),
            ({"autoattack_version": "best"}, "`autoattack_version`"),
            ({"pgd_max_iter": 0}, "`pgd_max_iter`"),
            ({"pgd_eps_step": -1.0}, "`pgd_eps_step`"),
            ({"x": np.full((24, 1, 8, 8), 1.5)}, r"`x` must be floating point in \[0, 1\]"),
            ({"x": np.zeros((24, 1, 8, 8), np.uint8)}, "got uint8"),
            ({"x": np.zeros((24, 64))}, "`x` and `y` must be images"),
            ({"y": np.full(24, 10)}, "`y` holds labels from 10 to 10"),
        ],
    )
    def test_what_would_give_a_false_number_is_refused(self, digits, change, match):
        classifier, x, y = digits
        arguments = {"x": x, "y": y, "norm": "Linf", "eps": 0.1, **change}
        with pytest.raises(ValueError, match=match):
            evaluate_robustness(classifier, arguments.pop("x"), arguments.pop("y"), **arguments)

    def test_models_that_would_give_a_false_number_are_refused(self, digits):
        classifier, x, y = digits
        with pytest.raises(ValueError, match="returns probabilities"):
            evaluate_robustness(nn.Sequential(classifier.model, nn.Softmax(1)), x, y, norm="Linf", eps=0.1)
        with pytest.raises(ValueError, match="returns log-probabilities"):
            evaluate_robustness(nn.Sequential(classifier.model, nn.LogSoftmax(1)), x, y, norm="Linf", eps=0.1)
        with pytest.raises(ValueError, match="NaN or infinite"):
            evaluate_robustness(nn.Sequential(classifier.model, Scaled(float("nan"))), x, y, norm="Linf", eps=0.1)
        pixels = PyTorchClassifier(
            classifier.model, nn.CrossEntropyLoss(), (1, 8, 8), 10, clip_values=(0, 255), device_type="cpu"
        )
        with pytest.raises(ValueError, match="clip_values must be"):
            evaluate_robustness(pixels, x, y, norm="Linf", eps=0.1)
        for shape, match in (
            ((24, 3, 8, 8), "3 channels and 8×8 pixels"),
            ((24, 1, 2, 2), "1 channels and 2×2 pixels"),
        ):
            with pytest.raises(ValueError, match=f"does not take images of {match}"):
                evaluate_robustness(classifier.model, np.zeros(shape), y, norm="Linf", eps=0.1)
        with pytest.raises(ValueError, match=r"`transfer_from` takes \(1, 9, 9\)"):
            larger = PyTorchClassifier(
                classifier.model, nn.CrossEntropyLoss(), (1, 9, 9), 10, clip_values=(0, 1), device_type="cpu"
            )
            evaluate_robustness(classifier, x, y, norm="Linf", eps=0.1, transfer_from=larger)
        with pytest.raises(TypeError, match="`classifier_or_model` must be"):
            evaluate_robustness(lambda x: x, x, y, norm="Linf", eps=0.1)
        with pytest.raises(ValueError, match="outputs without a gradient"):
            evaluate_robustness(WithoutGradient(classifier.model), x, y, norm="Linf", eps=0.1)
        with pytest.raises(ValueError, match="depend on the other images of the batch"):
            evaluate_robustness(AlwaysTraining(), x, y, norm="Linf", eps=0.1)
        three = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
        with pytest.raises(ValueError, match="at least 4 classes"):
            evaluate_robustness(three, x, y % 3, norm="Linf", eps=0.1)


class Scaled(nn.Module):
    def __init__(self, factor, shift=0.0):
        super().__init__()
        self.factor, self.shift = factor, shift

    def forward(self, x):
        return x * self.factor + self.shift


class WithoutGradient(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    @torch.no_grad()
    def forward(self, x):
        return self.inner(x)


class AlwaysTraining(nn.Sequential):
    """A network that puts itself back into training mode."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))

    def forward(self, x):
        self.train()
        return super().forward(x)


class Rounding(nn.Module):
    def forward(self, x):
        return (255 * x).round() / 255


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        (lambda model: nn.Sequential(Rounding(), model), "exactly 0 for 100% of the first 24 inputs"),
        (lambda model: nn.Sequential(model, Scaled(1e6)), "exactly 0 for"),
        (lambda model: nn.Sequential(model, nn.Sigmoid()), "as after a sigmoid"),
        (lambda model: model, None),
    ],
)
def test_gradients_that_lead_nowhere_are_warned_of(digits, change, warning):
    classifier, x, y = digits
    report = evaluate_robustness(
        change(classifier.model), x, y, norm="Linf", eps=0.1, autoattack_version=None, pgd_max_iter=1
    )
    assert [text for text in report.warnings if warning and warning in text] == list(report.warnings)
    assert bool(report.warnings) == (warning is not None)


class TestNormalisation:
    """A network trained on inputs of another range than [0, 1]."""

    @pytest.fixture(scope="class")
    @classmethod
    def data(cls):
        data = load_digits()
        return (data.images[:, None] / 16).astype(np.float32), data.target

    @pytest.fixture(scope="class")
    @classmethod
    def trained(cls, data):
        torch.manual_seed(0)
        x, y = map(torch.as_tensor, data)
        before, model = Scaled(1 / 0.375, -0.305 / 0.375), small_network(1)
        optimizer = torch.optim.Adam(model.parameters(), 0.02)
        for batch in torch.randperm(1500).repeat(5).split(100):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(before(x[batch])), y[batch]).backward()
            optimizer.step()
        return before, model.eval()

    @staticmethod
    def evaluate(model, data, **kwargs):
        x, y = (array[-100:] for array in data)
        return evaluate_robustness(
            model, x, y, norm="Linf", eps=0.01, autoattack_version=None, pgd_max_iter=1, **kwargs
        )

    def test_inside_is_fine(self, trained, data):
        assert not self.evaluate(nn.Sequential(*trained), data).warnings

    def test_for_0_to_255(self, trained, data):
        with pytest.raises(ValueError, match="in 0…255; it seems to expect those"):
            self.evaluate(nn.Sequential(Scaled(1 / 255), *trained), data)

    def test_labels_in_another_order_leave_chance(self, trained, data):
        report = self.evaluate(nn.Sequential(*trained), (data[0], (data[1] + 1) % 10))
        assert any("is at chance (10.0%): suspect labels" in message for message in report.warnings)

    def test_dropout_that_is_left_on(self, trained, data):
        class Dropout(nn.Module):
            def forward(self, x):
                return nn.functional.dropout(x, 0.2, training=True)

        report = self.evaluate(nn.Sequential(*trained, Dropout()), data)
        assert any("dropout" in message for message in report.warnings)


class TestReport:
    def test_is_saved_as_the_other_tools_read_it(self, report, tmp_path):
        report.save(tmp_path, command="python x.py", data={"name": "digits"})
        told = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
        assert told["command"] == "python x.py" and told["autoattack_accuracy"] == report.autoattack_accuracy
        with np.load(tmp_path / "verdicts.npz", allow_pickle=False) as verdicts:
            assert set(verdicts) == {"clean", "pgd", *(f"autoattack/{name}" for name in report.attacks)}
            assert all(verdicts[name].dtype == bool for name in verdicts)
            assert told["attacks"] == {name: verdicts[f"autoattack/{name}"].mean() for name in report.attacks}
            assert list(told["attacks"]) == ["apgd-ce", "apgd-t", "fab-t", "square"]
        adversarial = torch.load(tmp_path / "adversarial.pt", weights_only=True)
        assert adversarial.dtype == torch.float32
        np.testing.assert_array_equal(adversarial, report.adversarial)
        assert (tmp_path / "waterfall.png").read_bytes().startswith(b"\x89PNG")

    def test_waterfall_starts_at_clean_and_ends_at_robust_accuracy(self, report):
        bars = report.plot().patches
        tops, heights = [bar.get_y() + bar.get_height() for bar in bars], [bar.get_height() for bar in bars]
        assert heights[0] == pytest.approx(100 * report.clean_accuracy)
        assert heights[-1] == pytest.approx(100 * report.autoattack_accuracy)
        assert heights[0] - sum(heights[1:-1]) == pytest.approx(heights[-1])
        assert tops[1:] == pytest.approx([heights[0], *(100 * v.mean() for v in report.attacks.values())])
        with pytest.raises(ValueError, match="AutoAttack was not run"):
            dataclasses.replace(report, attacks={}).plot()

    def test_table_has_a_line_an_attack(self, report):
        lines = str(report).splitlines()
        assert [line.split()[-2] for line in lines[3:7]] == [f"{100 * v.mean():.2f}" for v in report.attacks.values()]
        assert lines[7].split()[-2] == f"{100 * report.autoattack_accuracy:.2f}"


def test_a_report_is_read_as_it_was_saved(report, digits, tmp_path):
    transferred = dataclasses.replace(report, transfer=report.pgd, warnings=("a doubt",))
    transferred.save(tmp_path, data={"name": "digits"})
    read, about = RobustnessReport.load(tmp_path)
    assert about == {"data": {"name": "digits"}}
    assert read.adversarial is None
    for field in dataclasses.fields(read):
        if field.name != "adversarial":
            np.testing.assert_equal(getattr(read, field.name), getattr(transferred, field.name))
    evaluate_robustness(*digits, norm="Linf", eps=0.04, autoattack_version=None).save(tmp_path)
    assert RobustnessReport.load(tmp_path)[0].autoattack is None


def test_the_layer_over_pyautoattack_is_a_proper_module(digits):
    classifier, x, y = digits
    autoattack()
    assert importlib.util.find_spec("autoattack") is not None  # other libraries may ask
    adversary = autoattack().AutoAttack(
        classifier.model.eval(), eps=0.3, device="cpu", verbose=False, version="custom", attacks_to_run=["apgd-ce"]
    )
    adversary.verbose = False
    assert set(adversary.run_standard_evaluation_individual(torch.tensor(x), torch.tensor(y))) == {"apgd-ce"}


def test_importing_the_package_does_not_import_the_evaluation_or_matplotlib():
    code = (
        "import sys, art_clat; loaded = set(sys.modules) & {'robustbench', 'autoattack', 'pyautoattack', "
        "'matplotlib.figure'}; sys.exit(str(loaded) if loaded else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(not CIFAR10.exists(), reason="no CIFAR-10 at ../shared/data/cifar10")
class TestTrainedNetwork:
    """The CIFAR-10 ResNet-18, naturally trained, that comes with AutoAttack's package."""

    @pytest.fixture(scope="class")
    @classmethod
    def cifar10(cls, tmp_path_factory):
        folder = tmp_path_factory.mktemp("cifar10")
        subprocess.run([sys.executable, str(CIFAR10 / "unpack.py"), str(folder), "test_batch"], check=True)
        return load_data("cifar10", data_dir=folder, nb_examples=80)

    @pytest.fixture(scope="class")
    @classmethod
    def network(cls, cifar10):
        name = "pyautoattack.examples.resnet:ResNet18"
        weights = Path(importlib.util.find_spec("pyautoattack").origin).with_name("examples") / "model_test.pt"
        return load_model(
            name, dataset="cifar10", norm="Linf", nb_classes=10, input_size=(3, 32, 32), checkpoint=weights
        )

    @staticmethod
    def evaluate(network, data, nb_examples, **kwargs):
        settings = {"norm": "Linf", "eps": 1 / 255, "autoattack_version": None, "pgd_max_iter": 10, **kwargs}
        return evaluate_robustness(network, data.x[:nb_examples], data.y[:nb_examples], **settings)

    def test_is_as_accurate_and_as_weak_as_is_known(self, network, cifar10):
        report = self.evaluate(network, cifar10, 40)
        assert report.clean_accuracy > 0.85 and 0.25 < report.pgd_accuracy < 0.6  # 93.7 %, and 41.5 % of more images
        assert self.evaluate(network, cifar10, 4, eps=4 / 255).pgd_accuracy == 0

    def test_normalisation_that_is_missing_or_applied_twice(self, network, cifar10):
        mean, std = cifar10.x.mean((0, 2, 3))[:, None, None], cifar10.x.std((0, 2, 3))[:, None, None]
        mean, std = torch.tensor(mean), torch.tensor(std)
        with pytest.raises(ValueError, match=r"% of the first 80 inputs .* normalisation seems to be missing"):
            self.evaluate(nn.Sequential(Scaled(std, mean), network), cifar10, 80)
        with pytest.raises(ValueError, match="seems to be applied twice"):
            self.evaluate(nn.Sequential(Scaled(1 / std, -mean / std), network), cifar10, 80)


def test_backbone_takes_images_as_robustbench_does():
    """Inputs in [0, 1] and a normalisation inside, so that nothing else is needed before the network."""
    model = create_backbone("resnet10t", num_classes=10, channels=(4, 4, 8, 8), stem_width=4).eval()
    x, y = np.random.default_rng(0).random((4, 3, 32, 32)), np.arange(4)
    assert evaluate_robustness(model, x, y, norm="Linf", eps=8 / 255, autoattack_version=None).nb_examples == 4
