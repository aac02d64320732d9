"""
The evidence: arms × seeds from paper_tables.toml, one JSON a run, then tables and plots of what came out.

    python evaluation/paper_tables.py run --preset cpu --data data --tables A B C
    python evaluation/paper_tables.py stability --preset cpu --data data
    python evaluation/paper_tables.py aggregate --preset cpu

``run`` skips what is done, continues what was killed, and may be started several times at once: every job is taken by
one process. All arms of a seed go on from the same first-stage checkpoint, for as many epochs, with the same data
order, schedule and attack. λ and learning rate are tuned on validation images with seeds of their own; the test images
are looked at once, at the end of a run. What crashes is recorded as failed, and ``aggregate`` says so.
``stability`` measures the criticality of the first stages' layers again and again, for table E.
"""

import argparse
import contextlib
import copy
import datetime
import fcntl
import functools
import hashlib
import importlib.metadata
import itertools
import json
import logging
import os
import platform
import subprocess
import threading
import time
import traceback
from pathlib import Path

import numpy as np
import torch
from art.attacks.evasion import AutoProjectedGradientDescent, FastGradientMethod, ProjectedGradientDescent
from art.defences.trainer import AdversarialTrainerAWPPyTorch, AdversarialTrainerFBFPyTorch
from art.estimators.classification import PyTorchClassifier
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.transforms import v2

from art_clat import (
    AdversarialTrainerCLATPyTorch,
    Budget,
    LayerOptions,
    PerformanceOptions,
    SelectionOptions,
    create_backbone,
    evaluate_robustness,
    measure_criticality,
)

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

HERE = Path(__file__).parent
log = logging.getLogger("paper_tables")

#: Options of the trainer's ``layers=`` that arms name directly.
LAYER_OPTIONS = ("granularity", "predecessor", "after_norm", "freeze_norms", "head_eligible")

AUGMENTATIONS = {
    "none": None,
    "flip": v2.RandomHorizontalFlip(),
    "crop and flip": v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()]),
}


# What is run ---------------------------------------------------------------------------------------------------------


def load_config(path):
    """Read presets, arms and tables."""
    return tomllib.loads(Path(path).read_text(encoding="utf-8"))


def resolve(config, name):
    """Give an arm with what it has from the arm it is like."""
    arm = config["arms"][name]
    if "like" not in arm:
        return {"tuned_by": name, **arm}
    base = resolve(config, arm["like"])
    owner = name if "tune" in arm else base["tuned_by"]
    return {**base, **arm, "tuned_by": owner, "trainer": {**base.get("trainer", {}), **arm.get("trainer", {})}}


def resolve_preset(config, name):
    """Give a preset with what it has from the preset it is like."""
    preset = config["presets"][name]
    base = resolve_preset(config, preset["like"]) if "like" in preset else {}
    return {key: value for key, value in {**base, **preset}.items() if key != "like"}


def grid(arm):
    """Give every combination that an arm's tuning tries."""
    tune = arm.get("tune", {})
    return [dict(zip(tune, values, strict=True)) for values in itertools.product(*tune.values())] if tune else []


def load_data(preset, seed, folder):
    """Draw a seed's own training, validation and test images."""
    if preset["data"] == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        x, y = (digits.images[:, None] / 16).astype(np.float32), digits.target
        (x, y), (x_test, y_test) = (x[:1400], y[:1400]), (x[1400:], y[1400:])
    else:
        from torchvision.datasets import CIFAR10

        arrays = []
        for train in (True, False):
            dataset = CIFAR10(folder, train=train, download=False)
            arrays.append((dataset.data.transpose(0, 3, 1, 2), np.array(dataset.targets)))
        (x, y), (x_test, y_test) = arrays
    rng = np.random.default_rng(seed)
    order, nb_train = rng.permutation(len(x)), preset["train_images"]
    parts = order[:nb_train], order[nb_train : nb_train + preset["validation_images"]]
    tested = rng.permutation(len(x_test))[: preset["test_images"]]

    def taken(x, y, indices):
        images = x[indices]
        return (images if images.dtype == np.float32 else images.astype(np.float32) / 255), y[indices]

    return *(taken(x, y, part) for part in parts), taken(x_test, y_test, tested)


def make_model(preset, seed):
    """Make the network of a preset, normalisation inside."""
    torch.manual_seed(seed)
    size = (1, 8, 8) if preset["data"] == "digits" else (3, 32, 32)
    model = create_backbone(
        preset["backbone"], num_classes=10, input_size=size, **copy.deepcopy(preset.get("backbone_arguments", {}))
    )
    if preset.get("stem_stride", 1) != 1:
        name = model.model.default_cfg["first_conv"]
        model.model.get_submodule(name).stride = (preset["stem_stride"],) * 2
    return model


def make_trainer(model, preset, *, lr, device, seed, **arguments):
    """Make classifier, attack and trainer."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    shape = (1, 8, 8) if preset["data"] == "digits" else (3, 32, 32)
    classifier = PyTorchClassifier(
        model, nn.CrossEntropyLoss(), shape, 10, optimizer=optimizer, clip_values=(0.0, 1.0), device_type=device
    )
    attack = ProjectedGradientDescent(
        classifier,
        norm=np.inf,
        eps=preset["eps"],
        eps_step=preset["eps_step"],
        max_iter=preset["attack_steps"],
        num_random_init=1,
        verbose=False,
    )
    # What an arm does not say is said here, whatever the package's defaults become.
    said = {"objective": "adversarial", "freeze_norms": False, **arguments}
    layers = {name: said.pop(name) for name in LAYER_OPTIONS if name in said}
    return AdversarialTrainerCLATPyTorch(
        classifier,
        attack,
        seed=seed,
        selection=SelectionOptions(said.pop("selection", "criticality"), preset["selection_samples"]),
        layers=LayerOptions(**layers),
        augmentation=AUGMENTATIONS[preset.get("augmentation", "none")],
        performance=PerformanceOptions(amp=preset.get("amp", False), channels_last=preset.get("channels_last", False)),
        **said,
    )


def cosine(optimizer, *, first, total):
    """Go on with a cosine schedule over `total` epochs, of which `first` are done."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda epoch: (1 + np.cos(np.pi * min(1, (first + epoch) / total))) / 2
    )


def awp(trainer, preset):
    """ART's adversarial weight perturbation (Wu et al., 2020), on PGD-AT."""
    classifier = trainer.classifier
    proxy = copy.deepcopy(classifier.model)
    proxy_classifier = PyTorchClassifier(
        proxy,
        nn.CrossEntropyLoss(),
        classifier.input_shape,
        10,
        optimizer=torch.optim.SGD(proxy.parameters(), lr=0.01),
        clip_values=(0.0, 1.0),
        device_type=classifier.device.type,
    )
    return AdversarialTrainerAWPPyTorch(
        classifier, proxy_classifier, trainer.attacks[0], mode="PGD", gamma=0.005, beta=6.0, warmup=0
    )


class OneModule(nn.Module):
    """A network that is no ``nn.Sequential``: ART's FBF trainer takes the first module's output for the logits."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x)


def fbf(trainer, preset):
    """ART's fast adversarial training (Wong et al., 2020); its learning rate has a cycle of its own."""
    classifier = trainer.classifier
    whole = PyTorchClassifier(
        OneModule(classifier.model),
        nn.CrossEntropyLoss(),
        classifier.input_shape,
        10,
        optimizer=classifier.optimizer,
        clip_values=(0.0, 1.0),
        device_type=classifier.device.type,
    )
    return AdversarialTrainerFBFPyTorch(whole, eps=preset["eps"])


#: First stages that ART's trainers do, at a constant learning rate unless they have a schedule of their own.
ART_TRAINERS = {"awp": awp, "fbf": fbf}


class Bench:
    """One preset's runs: where they are kept, and how each is made."""

    def __init__(self, config, name, *, results, work, data, device="cpu"):
        self.name, self.preset = name, resolve_preset(config, name)
        tables = self.preset.get("tables", config["tables"])
        self.config = {**config, "tables": {table: config["tables"][table] for table in tables}}
        self.results, self.data, self.device = Path(results) / name, data, device
        other = self.preset.get("tuned_in")  # the preset whose tuning counts here, too
        self.tuner = self if other is None else Bench(config, other, results=results, work=work, data=data)
        self.work = Path(work) / f"{name}-{self.fingerprint({})}"  # what another preset has begun is not gone on with
        self.total = self.preset["first_stage_epochs"] + self.preset["epochs"]

    def first_stage(self, seed, base="pgd_at"):
        """Train the first stage of a seed, or find it done; gives the file with its weights."""
        done = self.work / "first" / f"{base}-seed{seed}.safetensors"
        if not done.exists() and base in ART_TRAINERS:
            (x, y), _, _ = load_data(self.preset, seed, self.data)
            model = make_model(self.preset, seed)
            clat = make_trainer(model, self.preset, lr=self.preset["lr"], device=self.device, seed=seed)
            np.random.seed(seed)
            ART_TRAINERS[base](clat, self.preset).fit(
                x,
                np.eye(10, dtype=np.float32)[y],
                batch_size=self.preset["batch_size"],
                nb_epochs=self.preset["first_stage_epochs"],
            )
            _write(done, lambda path: save_file(model.state_dict(), path))
        elif not done.exists():
            train, validation, _ = load_data(self.preset, seed, self.data)
            model = make_model(self.preset, seed)
            epochs = self.preset["first_stage_epochs"]
            trainer = make_trainer(
                model, self.preset, lr=self.preset["lr"], device=self.device, seed=seed, warmup=epochs, first_stage=base
            )
            self._fit(trainer, train, validation, epochs, first=0, folder=self.work / "first" / f"{base}-seed{seed}")
            trainer.history.to_json(self.work / "first" / f"{base}-seed{seed}.json")
            _write(done, lambda path: save_file(model.state_dict(), path))
        return done

    def second_stage(self, name, seed, **tuned):
        """Go on from the first stage as an arm says; gives the trainer, and the weights of the best epoch."""
        arm = resolve(self.config, name)
        folder = self.work / f"{name}-{self.fingerprint({**_setting_of(arm), **tuned})}-seed{seed}"
        train, validation, _ = load_data(self.preset, seed, self.data)
        model = make_model(self.preset, seed)
        model.load_state_dict(load_file(self.first_stage(seed, arm.get("base", "pgd_at"))))
        arguments = copy.deepcopy(arm.get("trainer", {}))
        if isinstance(arguments.get("budget"), dict):
            arguments["budget"] = Budget(**arguments["budget"])
        if "criticality_weight" in tuned and "criticality_weight" not in arguments:
            arguments["criticality_weight"] = tuned["criticality_weight"] * arm.get("scale_weight", 1.0)
        epochs = arm.get("epochs", self.preset["epochs"])
        trainer = make_trainer(
            model,
            self.preset,
            lr=self.preset["lr"] * tuned.get("lr", arm.get("lr", 1.0)),
            device=self.device,
            seed=seed + 1000,
            warmup=epochs if arm.get("whole_network") else 0,
            reselect_every=arm.get("reselect_every", self.preset["reselect_every"]),
            **arguments,
        )
        if not epochs:
            return trainer, model.state_dict()
        self._fit(trainer, train, validation, epochs, first=self.preset["first_stage_epochs"], folder=folder)
        best = {k: v for k, v in load_file(folder / "best.safetensors").items() if k in model.state_dict()}
        return trainer, best

    def _fit(self, trainer, train, validation, epochs, *, first, folder):
        scheduler = cosine(trainer.classifier.optimizer, first=first, total=self.total)
        trainer.fit(
            *train,
            validation_data=tuple(part[: self.preset.get("validated_images")] for part in validation),
            batch_size=self.preset["batch_size"],
            nb_epochs=epochs,
            scheduler=scheduler,
            checkpoint=folder,
            verbose=False,
        )

    def tuning_jobs(self, name):
        """Give an arm's tuning runs: one for each value and tuning seed; none where another preset's tuning counts."""
        if self.tuner is not self:
            return []
        arm = self.config["arms"][name]
        return [(values, seed) for values in grid(arm) for seed in self.preset["tuning_seeds"]]

    def tuning_file(self, name, values, seed):
        """Say where a tuning run's result is kept."""
        text = "-".join(f"{key}{value:g}" for key, value in values.items())
        return self.results / "tuning" / f"{name}-{text}-seed{seed}.json"

    def tune(self, name, values, seed):
        """Make one tuning run: robust accuracy on the validation images, of the last epoch."""
        arm = resolve(self.config, name)
        result = {"arm": name, "values": values, "seed": seed, **self._setting(arm)}
        try:
            trainer, _ = self.second_stage(name, seed, **values)
            _, validation, _ = load_data(self.preset, seed, self.data)
            report = self._evaluate(trainer.classifier.model, *validation, autoattack=None, seed=seed)
            result |= {"clean": report.clean_accuracy, "pgd20": report.pgd_accuracy, **_trained(trainer)}
        except FloatingPointError as error:  # it diverged: these values are not to be chosen
            result |= {"pgd20": None, "error": str(error)}
        _write_json(self.tuning_file(name, values, seed), result)

    def tuned(self, name):
        """Give what tuning chose for an arm; `None` while a run is missing."""
        owner = resolve(self.config, name)["tuned_by"]
        if not grid(self.config["arms"][owner]):
            return {}
        found = {
            tuple(values.items()): self.tuning_scores(owner, values) for values in grid(self.config["arms"][owner])
        }
        if any(None in scores for scores in found.values()):
            return None
        return dict(max(found, key=lambda values: np.mean(found[values])))

    def tuning_scores(self, owner, values):
        """Give the validation PGD-20 accuracy of every tuning seed: −∞ if it diverged, `None` for a missing one."""
        found = self._tuning_results(owner, values)
        found = [None if result and result.get("status") == "failed" else result for result in found]
        return [result and (-np.inf if "error" in result else result["pgd20"]) for result in found]

    def failed_tuning(self, name):
        """Give the errors of the tuning runs of an arm that crashed."""
        owner = resolve(self.config, name)["tuned_by"]
        found = [
            result for values in grid(self.config["arms"][owner]) for result in self._tuning_results(owner, values)
        ]
        return [result["error"] for result in found if result and result.get("status") == "failed"]

    def _tuning_results(self, owner, values):
        if self.tuner is not self:
            return self.tuner._tuning_results(owner, values)
        files = [self.tuning_file(owner, values, seed) for seed in self.preset["tuning_seeds"]]
        return [self.read(file, resolve(self.config, owner)) for file in files]

    def run(self, name, seed):
        """Make one run of an arm, evaluate its last and its best epoch, and write the result."""
        arm, tuned = resolve(self.config, name), self.tuned(name)
        result = {"arm": name, "title": arm["title"], "seed": seed, "tuned": tuned, **self._setting(arm)}
        trainer, best = self.second_stage(name, seed, **tuned)
        train, _, test = load_data(self.preset, seed, self.data)
        history, model = trainer.history, trainer.classifier.model
        same = all(torch.equal(value.cpu(), best[key].cpu()) for key, value in model.state_dict().items())
        of_last = self._measure(model, train, test, seed)
        model.load_state_dict(best)
        result |= {
            "status": "done",
            "results": {"last": of_last, "best": of_last if same else self._measure(model, train, test, seed)},
            "best_epoch": history.best_epoch,
            **_trained(trainer),
            "seconds_per_epoch": sum(record.seconds for record in [*history.epochs, *history.selections])
            / max(1, len(history.epochs)),
            "history": json.loads(history.to_json()),
        }
        _write_json(self.run_file(name, seed), result)

    def fail(self, path, name, seed, error):
        """Record that a job crashed."""
        arm = resolve(self.config, name)
        log.error("%s failed:\n%s", path.stem, "".join(traceback.format_exception(error)))
        message = f"{type(error).__name__}: {error}"
        result = {"arm": name, "title": arm["title"], "seed": seed, **self._setting(arm)}
        _write_json(path, {**result, "status": "failed", "error": message})

    def run_file(self, name, seed):
        """Say where a run's result is kept."""
        return self.results / "runs" / f"{name}-seed{seed}.json"

    def measure(self, seed):
        """Measure criticality after the first stage on more and fewer samples and with other attacks (table E)."""
        (x, y), _, _ = load_data(self.preset, seed, self.data)
        model = make_model(self.preset, seed)
        model.load_state_dict(load_file(self.first_stage(seed)))
        trainer = make_trainer(model, self.preset, lr=self.preset["lr"], device=self.device, seed=seed)
        classifier, eps = trainer.classifier, self.preset["eps"]
        largest = min(self.preset["selection_samples"], len(x))
        measurements = {f"PGD, {n} samples": (trainer.attacks[0], n) for n in (16, 64, 256) if n < largest}
        measurements[f"PGD, {largest} samples"] = (trainer.attacks[0], largest)
        measurements[f"FGSM, {largest} samples"] = (FastGradientMethod(classifier, eps=eps), largest)
        apgd = AutoProjectedGradientDescent(classifier, eps=eps, eps_step=eps / 4, max_iter=10, verbose=False)
        few = min(64, largest)
        measurements[f"APGD, {few} samples"] = (apgd, few)
        result = {"seed": seed, "measured": {}, **self._setting({})}
        for title, (attack, number) in measurements.items():
            measured = measure_criticality(classifier, x[:number], y[:number], attack=attack, seed=seed)
            result["layers"] = [layer.name for layer in measured if not layer.is_head]
            result["measured"][title] = [layer.criticality for layer in measured if not layer.is_head]
        _write_json(self.stability_file(seed), result)

    def stability_file(self, seed):
        """Say where a seed's measurements of criticality are kept."""
        return self.results / "stability" / f"seed{seed}.json"

    def _measure(self, model, train, test, seed):
        wide = self._evaluate(model, *test, autoattack=None, seed=seed)
        number = self.preset["autoattack_images"]
        strong = self._evaluate(model, test[0][:number], test[1][:number], autoattack="standard", seed=seed)
        seen = self._evaluate(model, train[0][:number], train[1][:number], autoattack=None, seed=seed)
        return {
            "clean": wide.clean_accuracy,
            "pgd20": wide.pgd_accuracy,
            "autoattack": strong.autoattack_accuracy,
            "pgd20_on_autoattack_images": strong.pgd_accuracy,
            "train_clean": seen.clean_accuracy,
            "train_pgd20": seen.pgd_accuracy,
            "warnings": list(strong.warnings),
        }

    def _evaluate(self, model, x, y, *, autoattack, seed):
        if self.preset.get("channels_last"):
            model = copy.deepcopy(model).to(memory_format=torch.channels_last)
        return evaluate_robustness(
            model, x, y, norm="Linf", eps=self.preset["eps"], autoattack_version=autoattack, seed=seed
        )

    def _setting(self, arm):
        return {
            "preset": self.preset,
            "setting": self.fingerprint(_setting_of(arm)),
            "commit": _commit(),
            "date": datetime.date.today().isoformat(),
            "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, {torch.get_num_threads()} thread(s) a run"
            + (f", {torch.cuda.get_device_name()}" if self.device != "cpu" else ""),
            "versions": {
                name: importlib.metadata.version(name)
                for name in ("art_clat", "torch", "adversarial-robustness-toolbox", "timm", "pyautoattack")
            },
        }

    def fingerprint(self, arm):
        """Give a text that changes with the preset, and with what an arm says."""
        preset = {k: v for k, v in self.preset.items() if k not in ("seeds", "tuning_seeds", "tables")}
        what = {"preset": preset, "arm": arm}
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]

    def is_done(self, path, name, *, retry=False):
        """Tell whether a result is there; one of another configuration is refused."""
        result = self.read(path, resolve(self.config, name))
        return result is not None and (result.get("status") != "failed" or not retry)

    def read(self, path, arm):
        """Read a result, `None` if it is not there; one of another configuration or other tuned values is refused."""
        if not path.exists():
            return None
        result = json.loads(path.read_text())
        if result["setting"] != self.fingerprint(_setting_of(arm)):
            raise SystemExit(f"{path} was made with another configuration: move it away, or restore paper_tables.toml.")
        if "tuned" in result and (tuned := self.tuned(arm["tuned_by"])) not in (None, result["tuned"]):
            raise SystemExit(
                f"{path} was made with {result['tuned']}, tuning now chooses {tuned}: move it away, or restore "
                "paper_tables.toml and the results of tuning."
            )
        return result


def run_all(bench, arms, seeds, *, retry=False):
    """Do every job that is left; those of other processes are waited for only where they are needed."""
    if bench.tuner is not bench and (untuned := [name for name in arms if bench.tuned(name) is None]):
        raise SystemExit(
            f"The preset {bench.tuner.name} has not tuned yet: {', '.join(untuned)}. Run these there first."
        )
    owners = list(dict.fromkeys(resolve(bench.config, name)["tuned_by"] for name in arms))
    jobs = [
        (
            f"tune {owner} {values} seed {seed}",
            bench.tuning_file(owner, values, seed),
            owner,
            bench.tune,
            (values, seed),
        )
        for owner in owners
        for values, seed in bench.tuning_jobs(owner)
    ]
    jobs += [
        (f"run {name} seed {seed}", bench.run_file(name, seed), name, bench.run, (seed,))
        for seed in seeds
        for name in arms
    ]
    while True:
        left = 0
        worked = False
        for job in jobs:
            if not bench.is_done(job[1], job[2], retry=retry):
                if attempt(bench, *job, retry=retry):
                    worked = True
                else:
                    left += 1
        if not left:
            return
        if not worked:
            time.sleep(5)


def attempt(bench, title, path, name, action, arguments, *, retry):
    """Do a job, and record it if it crashes; gives `False` while another process has it, or what it needs."""
    arm, seed = resolve(bench.config, name), arguments[-1]
    base = arm.get("base", "pgd_at")
    try:
        if action == bench.run and bench.tuned(name) is None:
            if errors := bench.failed_tuning(name):
                raise RuntimeError(f"its tuning failed, {errors[0]}")
            return False
        with _taken(bench.work / f"first-{base}-seed{seed}.lock") as mine:
            if not mine:
                return False
            bench.first_stage(seed, base)
        with _taken(bench.work / f"{path.stem}.lock") as mine:
            if not mine:
                return False
            if not bench.is_done(path, name, retry=retry):
                start = time.perf_counter()
                action(name, *arguments)
                log.info("%s: %.0f s", title, time.perf_counter() - start)
    except Exception as error:  # recorded, and shown in every table it belongs to
        bench.fail(path, name, seed, error)
    return True


def _setting_of(arm):
    """Give what an arm's runs depend on, apart from the values that tuning chose."""
    return {key: value for key, value in arm.items() if key not in ("title", "against", "tune", "tuned_by", "like")}


@functools.cache
def _commit():
    """Name the commit of the code, with a plus if it has been changed since; `None` if there is none."""
    try:
        git = ["git", "-C", str(HERE), "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=+"]
        return subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _trained(trainer):
    """Say which layers a trainer chose, and the share of the parameters that it trained."""
    total = sum(p.numel() for p in trainer.classifier.model.parameters())
    selections = trainer.history.selections
    trained = [record.trainable_parameters for record in selections] or [total if trainer.history.epochs else 0]
    return {
        "trainable_share": float(np.mean(trained)) / total,
        "largest_trainable_share": max(trained) / total,
        "chosen": [list(record.chosen) for record in selections],
    }


@contextlib.contextmanager
def _taken(path):
    """Take a job unless another process has it; a killed process has none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def _write(path, action):
    """Have a file written whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    action(beside)
    beside.replace(path)


def _write_json(path, content):
    _write(path, lambda beside: beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8"))


# What came out -------------------------------------------------------------------------------------------------------


def interval(values):
    """Give mean and half the width of the 95 % confidence interval (Student's t) of some values."""
    from scipy import stats

    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return float(values.mean()), float("nan")
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return float(values.mean()), float(half)


def paired(values, reference):
    """Give mean difference, half the width of its 95 % interval and the p-value of the paired t-test; NaN for none."""
    from scipy import stats

    difference = np.asarray(values, dtype=float) - np.asarray(reference, dtype=float)
    mean, half = interval(difference)
    if len(difference) < 2 or np.ptp(difference) < 1e-12:  # no spread to judge by, but for rounding
        return mean, float("nan"), float("nan")
    return mean, half, float(stats.ttest_rel(values, reference).pvalue)


def collect(bench, arms, seeds):
    """Read the results: by arm, those that are there by seed."""
    found = {arm: {} for arm in arms}
    for arm, seed in itertools.product(arms, seeds):
        if result := bench.read(bench.run_file(arm, seed), resolve(bench.config, arm)):
            found[arm][seed] = result
    return found


def done(runs):
    """Give those of an arm's runs that have not failed."""
    return {seed: run for seed, run in runs.items() if run["status"] == "done"}


def references(config, table):
    """Give the arms that a table's arms are compared with: by arm, its own ones or else the table's, none inherited."""
    return {
        arm: [other for other in config["arms"][arm].get("against", table.get("against", [])) if other != arm]
        for arm in table["arms"]
    }


def table(config, name, found, seeds):
    """Write one table in Markdown: mean and 95 % interval over the seeds."""
    lines = [
        "| arm | seeds | clean | PGD-20 | AutoAttack | best epoch: AutoAttack | PGD-20 on AutoAttack's images | "
        "train PGD-20 | trained | s an epoch |",
        "|" + " --- |" * 10,
    ]
    for arm in config["tables"][name]["arms"]:
        runs, failed = done(found[arm]), len(found[arm]) - len(done(found[arm]))
        title = config["arms"][arm]["title"]
        count = f"{len(runs)} of {len(seeds)}" + (f", **{failed} failed**" if failed else "")
        if not runs:
            lines.append(f"| {title} | {count} |" + " |" * 8)
            continue
        cells = [
            _percent(interval([run["results"][when][what] for run in runs.values()]))
            for when, what in (
                ("last", "clean"),
                ("last", "pgd20"),
                ("last", "autoattack"),
                ("best", "autoattack"),
                ("last", "pgd20_on_autoattack_images"),
                ("last", "train_pgd20"),
            )
        ]
        share = np.mean([run["trainable_share"] for run in runs.values()])
        seconds = np.median([run["seconds_per_epoch"] for run in runs.values()])
        lines.append(f"| {title} | {count} | {' | '.join(cells)} | {100 * share:.3g} % | {seconds:.1f} |")
    return "\n".join(lines)


def differences(config, name, found):
    """Write in Markdown how a table's arms differ, seed by seed, from those they are compared with."""
    compared = references(config, config["tables"][name])
    lines = [
        "| arm | against | AutoAttack | p | PGD-20 | p | best epochs: AutoAttack | p | PGD-20 | p | clean | p | "
        "validation | p |",
        "|" + " --- |" * 14,
    ]
    columns = [(when, what) for when in ("last", "best") for what in ("autoattack", "pgd20")] + [("last", "clean")]
    figures = [lambda run, when=when, what=what: run["results"][when][what] for when, what in columns]
    figures.append(_validated)
    for other in dict.fromkeys(other for others in compared.values() for other in others):
        for arm in (arm for arm, others in compared.items() if other in others):
            runs, baseline = done(found[arm]), done(found.get(other, {}))
            common = [seed for seed in runs if seed in baseline]
            if not common:
                continue
            cells = []
            for figure in figures:
                *difference, p = paired(*([figure(group[seed]) for seed in common] for group in (runs, baseline)))
                known = not np.isnan(difference[0])
                cells += [_percent(difference, signed=True) if known else "", "" if np.isnan(p) else f"{p:.3f}"]
            titles = (config["arms"][one]["title"] for one in (arm, other))
            lines.append(f"| {' | '.join(titles)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _validated(run):
    """Give the accuracy on validation images after the last epoch, under the training attack; NaN without an epoch."""
    epochs = run["history"]["epochs"]
    return epochs[-1]["robust_accuracy"] if epochs else float("nan")


def second_stages(config, found):
    """Write in Markdown what validation saw of every arm, and what became of second term and index."""
    lines = [
        "| arm | validation | second term: first epoch | last epoch | index of the layers chosen first: then | at the "
        "last selection | their relative error: then | at the last selection |",
        "|" + " --- |" * 8,
    ]
    for arm, runs in found.items():
        histories = [run["history"] for run in done(runs).values() if run["history"]["epochs"]]
        if not histories:
            continue
        cells = [f"{100 * np.mean([_validated(run) for run in done(runs).values()]):.1f}"]
        terms = np.mean([[h["epochs"][at]["criticality_loss"] for at in (0, -1)] for h in histories], axis=0)
        cells += [f"{term:.3g}" for term in terms] if any(terms) else ["", ""]
        for figure in ("criticality", "relative_error"):
            then_and_last = [
                [
                    np.mean(
                        [layer[figure] for layer in record["measured"]["layers"] if layer["name"] in first["chosen"]]
                    )
                    for record in (first, last)
                ]
                for first, *_, last in (
                    history["selections"] for history in histories if len(history["selections"]) > 1
                )
            ]
            cells += [f"{mean:.3g}" for mean in np.mean(then_and_last, axis=0)] if then_and_last else ["", ""]
        lines.append(f"| {config['arms'][arm]['title']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def stability_table(measurements):
    """Compare measurements of criticality, the head left out: rank correlation, and whether the same layer wins."""
    from scipy import stats

    def compared(pairs):
        correlations = [stats.spearmanr(one, other).statistic for one, other in pairs]
        same = np.mean([np.argmax(one) == np.argmax(other) for one, other in pairs])
        return f"{np.mean(correlations):.2f} ({min(correlations):.2f} to {max(correlations):.2f}) | {100 * same:.0f} %"

    every = [entry["measured"] for entry in measurements]
    reference = max((title for title in every[0] if title.startswith("PGD")), key=lambda title: int(title.split()[1]))
    lines = ["| compared with each other | Spearman's ρ: mean (range) | same first choice |", "| --- | --- | --- |"]
    if len(every) > 1:
        pairs = [(a[reference], b[reference]) for a, b in itertools.combinations(every, 2)]
        lines.append(f"| two seeds, {reference} | {compared(pairs)} |")
    for title in every[0]:
        if title != reference:
            pairs = [(one[title], one[reference]) for one in every]
            lines.append(f"| {title}, and {reference}, the same network | {compared(pairs)} |")
    return "\n".join(lines)


def _percent(mean_and_half, *, signed=False):
    mean, half = mean_and_half
    text = f"{100 * mean:+.1f}" if signed else f"{100 * mean:.1f}"
    return text if np.isnan(half) else f"{text} ± {100 * half:.1f}"


def chosen_values(bench, arms):
    """Say what tuning tried and chose, in Markdown."""
    lines = ["| arm | tried | validation PGD-20 | chosen |", "| --- | --- | --- | --- |"]
    for owner in dict.fromkeys(resolve(bench.config, name)["tuned_by"] for name in arms):
        values = grid(bench.config["arms"][owner])
        tuned = bench.tuned(owner)
        if not values or tuned is None:
            continue
        scores = [np.mean(bench.tuning_scores(owner, value)) for value in values]
        arm = bench.config["arms"][owner]
        tried = [f"{key} {', '.join(f'{value:g}' for value in options)}" for key, options in arm["tune"].items()]
        lines.append(
            f"| {arm['title']} | {'; '.join(tried)} | "
            f"{'diverged' if np.isinf(min(scores)) else f'{100 * min(scores):.1f}'} to {100 * max(scores):.1f} | "
            f"{', '.join(f'{key} {value:g}' for key, value in tuned.items())} |"
        )
    return "\n".join(lines)


def plot_best_against_last(config, arms, found, path):
    """Draw AutoAttack accuracy of the best and the last epoch of every arm, one dot a seed."""
    from art_clat.utils.plots import new_axes, save

    arms = [arm for arm in arms if done(found[arm])]
    ax = new_axes(width=7.5, height=0.42 * len(arms) + 1.4)
    for row, arm in enumerate(arms):
        runs = done(found[arm]).values()
        for when, offset, colour in (("last", -0.13, "C3"), ("best", 0.13, "C0")):
            values = [100 * run["results"][when]["autoattack"] for run in runs]
            ax.plot(values, [row + offset] * len(values), "o", color=colour, alpha=0.45, markersize=4)
            mean, half = interval(values) if len(values) > 2 else (np.mean(values), np.nan)  # no use of two
            label = f"{when} epoch" if row == 0 else None
            ax.errorbar(mean, row + offset, xerr=None if np.isnan(half) else half, fmt="D", color=colour, label=label)
    ax.set_yticks(range(len(arms)), [config["arms"][arm]["title"] for arm in arms], fontsize=8)
    ax.invert_yaxis()
    ax.set_xlabel("AutoAttack accuracy [%]: seeds, mean and 95 % interval")
    ax.legend(fontsize=8)
    save(ax, path)


def trained_share(config, found, seeds):
    """
    Give what robust overfitting is set against: by objective and learning-rate factor the arms' shares of trained
    parameters and their test PGD-20 accuracies after the last epoch, one a seed. Arms that have not all seeds are left
    out, and those of other first stages, without further epochs, with averaged weights or frozen norms.
    """
    groups = {}
    for name in found:
        arm, runs = resolve(config, name), done(found[name]).values()
        trainer = arm.get("trainer", {})
        if (
            len(runs) < len(seeds)
            or "base" in arm
            or arm.get("epochs") == 0
            or trainer.keys() & {"ema_decay", "freeze_norms"}
        ):
            continue
        objective = "pgd_at" if arm.get("whole_network") else trainer.get("objective", "adversarial")
        factor = next(iter(runs))["tuned"].get("lr", arm.get("lr", 1.0))
        share = 100 * np.mean([run["trainable_share"] for run in runs])
        accuracies = [100 * run["results"]["last"]["pgd20"] for run in runs]
        groups.setdefault((objective, factor), []).append((share, accuracies))
    return groups


def plot_trained_share(groups, path):
    """Draw test accuracy against the share of the parameters that is trained; colours are objectives."""
    from art_clat.utils.plots import new_axes, save

    ax = new_axes(width=7.5, height=4.2)
    colours = {objective: f"C{at}" for at, objective in enumerate(dict.fromkeys(objective for objective, _ in groups))}
    markers = dict(zip(sorted({factor for _, factor in groups}), itertools.cycle("osD^v"), strict=False))
    for (objective, factor), arms in groups.items():
        shares, means = zip(*((share, np.mean(accuracies)) for share, accuracies in arms), strict=True)
        halves = [interval(accuracies)[1] if len(accuracies) > 2 else 0 for _, accuracies in arms]
        ax.errorbar(
            shares, means, yerr=halves, fmt=markers[factor], color=colours[objective], alpha=0.75, elinewidth=0.8,
            label=f"{objective}, learning rate × {factor:g}",
        )  # fmt: skip
    ax.set_xscale("log")
    ax.set_xlabel("parameters trained [%]")
    ax.set_ylabel("PGD-20 accuracy [%], last epoch")
    ax.figure.legend(loc="outside upper center", ncols=3, fontsize=8)
    save(ax, path)


def _circumstances(bench):
    preset, model = bench.preset, make_model(bench.preset, 0)
    first, more, parameters = preset["first_stage_epochs"], preset["epochs"], sum(p.numel() for p in model.parameters())
    return (
        f"{preset['data']}, timm's `{preset['backbone']}` with {parameters:,} parameters, augmentation: "
        f"{preset.get('augmentation', 'none')}. {first} epochs of the first stage (PGD-AT but in table D), then "
        f"{more} of each arm, from the one checkpoint of a seed, in batches of {preset['batch_size']}: SGD with "
        f"momentum 0.9 and weight decay 5e-4, learning rate {preset['lr']} falling along a cosine over all "
        f"{first + more} epochs, times the arm's factor. Training attack: PGD, ℓ∞, ε = {255 * preset['eps']:.3g}/255, "
        f"{preset['attack_steps']} steps of {255 * preset['eps_step']:.3g}/255 from a random start. Layers are chosen "
        f"every {preset['reselect_every']} epochs, on {preset['selection_samples']} training images."
    )


def _overfitting(groups, path):
    """Draw accuracy against trained share, and give their rank correlation among arms that differ in nothing else."""
    from scipy import stats

    plot_trained_share(groups, path)
    text = f"![Accuracy against the share of the parameters that is trained]({path.name})"
    alike = {factor: arms for (objective, factor), arms in groups.items() if objective == "pgd_at"}  # it has no λ
    factor, arms = max(alike.items(), key=lambda group: len(group[1]), default=(None, []))
    if len(arms) > 2:
        rho = stats.spearmanr([share for share, _ in arms], [np.mean(accuracies) for _, accuracies in arms]).statistic
        text += (
            f"\n\nTest PGD-20 accuracy after the last epoch and the share of the parameters that is trained, over the "
            f"{len(arms)} arms with PGD-AT's own loss and the learning-rate factor {factor:g}: Spearman's ρ = "
            f"{rho:.2f}."
        )
    return text


def _versions(run):
    versions = {**run["versions"], "art_clat": f"{run['versions']['art_clat']} at {run['commit']}"}
    return ", ".join(f"{key} {value}" for key, value in versions.items())


def aggregate(bench):
    """Write results.md and the plots of a preset."""
    config, seeds = bench.config, bench.preset["seeds"]
    validated = bench.preset.get("validated_images", bench.preset["validation_images"])
    arms = list(dict.fromkeys(arm for content in config["tables"].values() for arm in content["arms"]))
    found = collect(bench, arms, seeds)
    runs = [run for of_arm in found.values() for run in of_arm.values()]
    if not runs:
        raise SystemExit(f"There is no result in {bench.results}: `run` makes them.")
    dates = sorted({run["date"] for run in runs})
    text = [
        f"# Results of the preset `{bench.name}`",
        _circumstances(bench),
        "Accuracies in percent on test images, of the last epoch unless it says otherwise: mean ± half the 95 % "
        f"interval (Student's t) over seeds. Every seed draws its own {bench.preset['train_images']} training, "
        f"{bench.preset['validation_images']} validation and {bench.preset['test_images']} test images; AutoAttack "
        f"(standard) runs on the first {bench.preset['autoattack_images']} of the latter, PGD-20 on all, and on as "
        "many training images as AutoAttack. The best epoch is that of the highest accuracy under the training "
        f"attack on {validated} validation images, of the arm's own: the checkpoint that they begin with is no "
        "candidate. *trained* is the mean share of the parameters over the selections. "
        "The seconds an epoch have the selections in them, and whatever else the machine did.",
        "Differences are paired by seed; p is the paired t-test's, not corrected for the number of comparisons, best "
        f"epochs are compared with best epochs. *validation* is the last epoch's accuracy under the training attack on "
        f"{validated} validation images, by which the package's defaults are to be chosen, not by test images.",
        f"`python evaluation/paper_tables.py run --preset {bench.name} --data DIR` and `… aggregate --preset "
        f"{bench.name}`, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}, "
        f"{'; '.join(sorted({run['machine'] for run in runs}))}.",
        *(
            f"{versions}: {', '.join(dict.fromkeys(run['arm'] for run in runs if _versions(run) == versions))}."
            for versions in dict.fromkeys(_versions(run) for run in runs)
        ),
    ]
    begun, shown = {}, set()
    for name, content in config["tables"].items():  # one that repeats arms of those before it has not begun
        if any(found[arm] for arm in set(content["arms"]) - shown):
            begun[name] = content
            shown |= set(content["arms"])
    for name, content in begun.items():
        text += [f"## {name}. {content['title']}", *([content["note"]] if "note" in content else [])]
        text += [table(config, name, found, seeds), differences(config, name, found)]
        if bench.tuner is not bench:
            earlier = collect(bench.tuner, content["arms"], bench.tuner.preset["seeds"])
            together = {arm: {**earlier[arm], **found[arm]} for arm in content["arms"] if earlier[arm] and found[arm]}
            of_both = {**config, "tables": {name: {**content, "arms": list(together)}}}
            text += [
                f"### Together with the seeds of `{bench.tuner.name}`",
                "The arms that have runs of both. One that was picked for what it reached on those seeds looks better "
                "here than it is.",
                table(of_both, name, together, [*bench.tuner.preset["seeds"], *seeds]),
                differences(of_both, name, together),
            ]
    if missing := [name for name in config["tables"] if name not in begun]:
        text += [f"Not run yet: table {', '.join(missing)}."]
    measurements = [bench.read(bench.stability_file(seed), {}) for seed in seeds]
    if measurements := [entry for entry in measurements if entry]:
        text += ["## E. Stability of the index", stability_table(measurements)]
    text += [
        "## What the second stage did",
        f"Means over the seeds: the last epoch's accuracy under the training attack on {validated} validation images; "
        "the second term of the loss, before its weight (CLAT's feature distance, the divergence of TRADES and MART); "
        "the criticality index of the layers chosen at the first selection, then and at the last selection, and the "
        "relative error of their features under the attack, which no scale of weights changes.",
        second_stages(config, found),
    ]
    images = bench.preset["validation_images"] * len(bench.preset["tuning_seeds"])
    text += [
        "## What tuning chose" + (f" in the preset `{bench.tuner.name}`" if bench.tuner is not bench else ""),
        f"By the last epoch's PGD-20 accuracy on {images} validation images; the first of equals. `lr` is a factor on "
        "the schedule, `criticality_weight` is λ. At 20 % the standard error is "
        f"{100 * np.sqrt(0.2 * 0.8 / images):.1f} points: values that differ by less were as good as drawn.",
        chosen_values(bench, arms),
    ]
    warnings = [
        f"- {run['arm']}, seed {run['seed']}, {when} epoch: {message}"
        for run in runs
        if run["status"] == "done"
        for when, result in run["results"].items()
        for message in result["warnings"]
    ]
    text += ["## What AutoAttack warned of", "\n".join(warnings) or "Nothing."]
    failed = [f"- {run['arm']}, seed {run['seed']}: {run['error']}" for run in runs if run["status"] == "failed"]
    if failed:
        text += ["## Failed", "\n".join(failed)]
    for name, content in begun.items():
        file = f"best-against-last-{name}.png"
        plot_best_against_last(config, content["arms"], found, bench.results / file)
        text += [f"![Best against last epoch, table {name}]({file})"]
    if groups := trained_share(config, found, seeds):
        text += [_overfitting(groups, bench.results / "trained-share.png")]
    _write(bench.results / "results.md", lambda path: path.write_text("\n\n".join(text) + "\n", encoding="utf-8"))
    print("\n\n".join(text))


def main():
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("command", choices=("run", "stability", "aggregate"))
    parser.add_argument("--preset", required=True)
    parser.add_argument("--config", type=Path, default=HERE / "paper_tables.toml")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of torchvision's CIFAR-10")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "paper_tables")
    parser.add_argument("--work", type=Path, default=Path("runs/paper_tables"), help="folder for checkpoints")
    parser.add_argument("--tables", nargs="+", default=None, help="which tables' arms to run; all by default")
    parser.add_argument("--arms", nargs="+", default=None, help="which arms to run, instead of whole tables")
    parser.add_argument("--seeds", nargs="+", type=int, default=None, help="which seeds; the preset's by default")
    parser.add_argument("--retry", action="store_true", help="run failed runs again")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--minutes", type=float, default=None, help="stop after so long; the next call goes on")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO)
    if args.minutes is not None:  # as good as a kill: what is saved is whole
        timer = threading.Timer(60 * args.minutes, os._exit, [0])
        timer.daemon = True
        timer.start()
    config = load_config(args.config)
    if args.preset not in config["presets"]:
        parser.error(f"--preset must be one of {', '.join(config['presets'])}, got {args.preset}")
    bench = Bench(config, args.preset, results=args.results, work=args.work, data=args.data, device=args.device)
    config = bench.config
    if args.command == "aggregate":
        aggregate(bench)
        return
    if args.command == "stability":
        for seed in args.seeds or bench.preset["seeds"]:
            with _taken(bench.work / f"first-pgd_at-seed{seed}.lock") as mine:
                if not mine:
                    log.warning("The first stage of seed %d is being trained; run this again afterwards.", seed)
                elif not bench.read(bench.stability_file(seed), {}):
                    bench.measure(seed)
        return
    unknown = [name for name in args.tables or () if name not in config["tables"]]
    unknown += [name for name in args.arms or () if name not in config["arms"]]
    if unknown:
        parser.error(f"no such table or arm in {args.config}: {', '.join(unknown)}")
    tables = args.tables or ([] if args.arms else list(config["tables"]))
    arms = [*(args.arms or []), *(arm for name in tables for arm in config["tables"][name]["arms"])]
    run_all(bench, list(dict.fromkeys(arms)), args.seeds or bench.preset["seeds"], retry=args.retry)


if __name__ == "__main__":
    main()
