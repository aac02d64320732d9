"""How one run is made: first stage, second stage, evaluation. Returns records; :mod:`results` keeps them."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import torch
from art.attacks.evasion import AutoProjectedGradientDescent, FastGradientMethod
from safetensors.torch import load_file, save
from torch import nn

from art_clat import AdversarialTrainerCLATPyTorch, RobustnessReport, evaluate_robustness, measure_criticality
from art_clat.training.history import History
from paper_tables.configuration import Settings, Study, run_settings
from paper_tables.files import Record, write_whole
from paper_tables.networks import ART_TRAINERS, NB_CLASSES, Examples, cosine, load_data, make_model, make_trainer

State = dict[str, torch.Tensor]


class Experiment:
    """The runs of one study; checkpoints are kept in `work`, so that a killed run continues."""

    def __init__(self, study: Study, *, work: Path, data: Path | None, device: str = "cpu") -> None:
        self.study, self.preset, self.data, self.device = study, study.preset, data, device
        self.work = work
        self.total_epochs = self.preset["first_stage_epochs"] + self.preset["epochs"]

    def first_stage(self, seed: int, base: str = "pgd_at") -> Path:
        """Train the first stage of a seed unless it is done; returns the file with its weights."""
        done = self.work / "first" / f"{base}-seed{seed}.safetensors"
        if not done.exists():
            train, validation, _ = load_data(self.preset, seed, self.data)
            model = make_model(self.preset, seed)
            if base in ART_TRAINERS:
                self._train_with_art(model, train, seed, base)
            else:
                self._train_first_stage(model, train, validation, seed=seed, base=base)
            write_whole(done, lambda path: path.write_bytes(save(model.state_dict())))
        return done

    def _train_with_art(self, model: nn.Module, train: Examples, seed: int, base: str) -> None:
        """Train a first stage with one of ART's own trainers."""
        trainer = make_trainer(model, self.preset, lr=self.preset["lr"], device=self.device, seed=seed)
        np.random.seed(seed)
        x, y = train
        ART_TRAINERS[base](trainer, self.preset).fit(
            x,
            np.eye(NB_CLASSES, dtype=np.float32)[y],
            batch_size=self.preset["batch_size"],
            nb_epochs=self.preset["first_stage_epochs"],
        )

    def _train_first_stage(
        self, model: nn.Module, train: Examples, validation: Examples, *, seed: int, base: str
    ) -> None:
        """Train a first stage with this package's trainer."""
        epochs = self.preset["first_stage_epochs"]
        trainer = make_trainer(
            model,
            self.preset,
            lr=self.preset["lr"],
            device=self.device,
            seed=seed,
            arm_trainer={"first_stage": base},
            warmup=epochs,
        )
        folder = self.work / "first" / f"{base}-seed{seed}"
        self._fit(trainer, train, validation, epochs=epochs, first=0, folder=folder)
        trainer.history.to_json(self.work / "first" / f"{base}-seed{seed}.json")

    def second_stage(self, name: str, seed: int, tuned: Settings) -> tuple[AdversarialTrainerCLATPyTorch, State]:
        """Continue from the first stage as an arm says; returns the trainer and the best epoch's weights."""
        arm = self.study.arm(name)
        train, validation, _ = load_data(self.preset, seed, self.data)
        model = make_model(self.preset, seed)
        model.load_state_dict(load_file(self.first_stage(seed, arm.get("base", "pgd_at"))))
        options = dict(arm.get("trainer", {}))
        if "criticality_weight" in tuned and "criticality_weight" not in options:
            options["criticality_weight"] = tuned["criticality_weight"] * arm.get("scale_weight", 1.0)
        epochs = arm.get("epochs", self.preset["epochs"])
        trainer = make_trainer(
            model,
            self.preset,
            lr=self.preset["lr"] * tuned.get("lr", arm.get("lr", 1.0)),
            device=self.device,
            seed=seed + 1000,
            arm_trainer=options,
            warmup=epochs if arm.get("whole_network") else 0,
            reselect_every=arm.get("reselect_every", self.preset["reselect_every"]),
        )
        if not epochs:
            return trainer, model.state_dict()
        folder = self.work / f"{name}-{self.study.fingerprint({**run_settings(arm), **tuned})}-seed{seed}"
        first = self.preset["first_stage_epochs"]
        self._fit(trainer, train, validation, epochs=epochs, first=first, folder=folder)
        best = load_file(folder / "best.safetensors")
        return trainer, {key: value for key, value in best.items() if key in model.state_dict()}

    def _fit(
        self,
        trainer: AdversarialTrainerCLATPyTorch,
        train: Examples,
        validation: Examples,
        *,
        epochs: int,
        first: int,
        folder: Path,
    ) -> None:
        """Train, from the checkpoint in a folder if there is one."""
        validated = self.study.validated_images
        x, y = validation
        trainer.fit(
            *train,
            validation_data=(x[:validated], y[:validated]),
            batch_size=self.preset["batch_size"],
            nb_epochs=epochs,
            scheduler=cosine(trainer.classifier.optimizer, first=first, total=self.total_epochs),
            checkpoint=folder,
            verbose=False,
        )

    def tune(self, name: str, seed: int, values: Settings) -> Record:
        """Make one tuning run: the last epoch's robust accuracy on the validation images."""
        try:
            trainer, _ = self.second_stage(name, seed, values)
        except FloatingPointError as error:  # It diverged: these values must not be chosen.
            return {"status": "done", "pgd20": None, "error": str(error)}
        _, validation, _ = load_data(self.preset, seed, self.data)
        report = self._evaluate(trainer.classifier.model, validation, autoattack=None, seed=seed)
        return {
            "status": "done",
            "clean": report.clean_accuracy,
            "pgd20": report.pgd_accuracy,
            **_trained(trainer),
            "chosen": [list(selection.chosen) for selection in trainer.history.selections],
        }

    def run(self, name: str, seed: int, tuned: Settings) -> Record:
        """Make one run of an arm, and evaluate its last and its best epoch."""
        trainer, best = self.second_stage(name, seed, tuned)
        train, _, test = load_data(self.preset, seed, self.data)
        history, model = trainer.history, trainer.classifier.model
        same = all(torch.equal(value.cpu(), best[key].cpu()) for key, value in model.state_dict().items())
        measured = {"last": self._measure_accuracies(model, train, test, seed)}
        if "best" in self.preset.get("evaluated", ("last", "best")):
            model.load_state_dict(best)
            measured["best"] = measured["last"] if same else self._measure_accuracies(model, train, test, seed)
        return {
            "status": "done",
            "results": measured,
            "best_epoch": history.best_epoch,
            **_trained(trainer),
            "seconds_per_epoch": _seconds_per_epoch(history),
            "history": json.loads(history.to_json()),
        }

    def measure(self, seed: int) -> Record:
        """Measure criticality after the first stage with other numbers of samples and other attacks (table E)."""
        (x, y), _, _ = load_data(self.preset, seed, self.data)
        model = make_model(self.preset, seed)
        model.load_state_dict(load_file(self.first_stage(seed)))
        trainer = make_trainer(model, self.preset, lr=self.preset["lr"], device=self.device, seed=seed)
        classifier, pgd, eps = trainer.classifier, trainer.attacks[0], self.preset["eps"]
        largest = min(self.preset["selection_samples"], len(x))
        few = min(64, largest)
        measurements = {f"PGD, {number} samples": (pgd, number) for number in (16, 64, 256) if number < largest}
        measurements[f"PGD, {largest} samples"] = (pgd, largest)
        measurements[f"FGSM, {largest} samples"] = (FastGradientMethod(classifier, eps=eps), largest)
        apgd = AutoProjectedGradientDescent(classifier, eps=eps, eps_step=eps / 4, max_iter=10, verbose=False)
        measurements[f"APGD, {few} samples"] = (apgd, few)
        record: Record = {"status": "done", "measured": {}}
        for title, (attack, number) in measurements.items():
            measured = measure_criticality(classifier, x[:number], y[:number], attack=attack, seed=seed)
            record["layers"] = [layer.name for layer in measured if not layer.is_head]
            record["measured"][title] = [layer.criticality for layer in measured if not layer.is_head]
        return record

    def _measure_accuracies(self, model: nn.Module, train: Examples, test: Examples, seed: int) -> Record:
        """Evaluate one epoch's network on test images and on training images."""
        number = self.preset["autoattack_images"]
        first_test, first_train = ((x[:number], y[:number]) for x, y in (test, train))
        wide = self._evaluate(model, test, autoattack=None, seed=seed)
        strong = self._evaluate(model, first_test, autoattack="standard", seed=seed)
        seen = self._evaluate(model, first_train, autoattack=None, seed=seed)
        return {
            "clean": wide.clean_accuracy,
            "pgd20": wide.pgd_accuracy,
            "autoattack": strong.autoattack_accuracy,
            "pgd20_on_autoattack_images": strong.pgd_accuracy,
            "train_clean": seen.clean_accuracy,
            "train_pgd20": seen.pgd_accuracy,
            "warnings": list(strong.warnings),
        }

    def _evaluate(self, model: nn.Module, examples: Examples, *, autoattack: str | None, seed: int) -> RobustnessReport:
        """Evaluate in the memory format that the preset trains in."""
        if self.preset.get("channels_last"):
            model = copy.deepcopy(model).to(memory_format=torch.channels_last)
        return evaluate_robustness(
            model,
            *examples,
            norm="Linf",
            eps=self.preset["eps"],
            autoattack_version=autoattack,
            batch_size=self.preset.get("evaluation_batch_size", 128),
            seed=seed,
        )


def _trained(trainer: AdversarialTrainerCLATPyTorch) -> Record:
    """Return the shares of the parameters that a trainer trained."""
    total = sum(parameter.numel() for parameter in trainer.classifier.model.parameters())
    history = trainer.history
    trained = [selection.trainable_parameters for selection in history.selections]
    trained = trained or [total if history.epochs else 0]
    return {"trainable_share": float(np.mean(trained)) / total, "largest_trainable_share": max(trained) / total}


def _seconds_per_epoch(history: History) -> float:
    """Return the mean duration of an epoch, selections included."""
    seconds = sum(record.seconds for record in history.epochs) + sum(record.seconds for record in history.selections)
    return seconds / max(1, len(history.epochs))
