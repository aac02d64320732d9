"""Everything that is measured of one model."""

from __future__ import annotations

import copy
import random
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from art.estimators.classification import PyTorchClassifier
from torch import nn

from art_clat import Batch
from art_clat.attacks.tensor_attack import TensorAttack
from art_clat.layers.features import tap
from art_clat.models.tensor_classifier import TensorClassifier
from art_clat.selection.criticality import measure
from art_clat.utils.batch import CHUNK_ELEMENTS
from art_clat.utils.modes import evaluation_mode
from speed.contenders import Contender, Setting, make_contenders, pgd
from speed.measures import Job, count_flops, peak_memory, quiet, synchronise
from speed.models import BATCHES, MODELS, Whole
from speed.savings import SAVINGS, without

SHAPE = (3, 32, 32)

#: How many of the images a CPU works on at once.
CHUNK = CHUNK_ELEMENTS // (3 * 32 * 32)

#: The trainer's default budget, a share of the layers; and the share of the parameters that early layers may have.
SHARE = 0.05

Result = dict[str, Any]


class Bench:
    """
    Measures one model.

    :param name: One of :data:`speed.models.MODELS`.
    :param setting: How it is measured.
    """

    def __init__(self, name: str, setting: Setting) -> None:
        self.setting = setting
        self.batches = setting.batches or BATCHES.get(name, 1)
        torch.manual_seed(setting.seed)
        self.model = Whole(MODELS[name]())
        rng = np.random.default_rng(setting.seed)
        n = setting.batch_size * self.batches
        self.data = rng.random((n, *SHAPE), dtype=np.float32), rng.integers(0, 10, n)

    def classifier(self) -> PyTorchClassifier:
        """Wrap a copy of the network."""
        model = copy.deepcopy(self.model)
        return PyTorchClassifier(
            model,
            nn.CrossEntropyLoss(),
            SHAPE,
            10,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4),
            clip_values=(0.0, 1.0),
            device_type="gpu" if self.setting.device == "cuda" else "cpu",
        )

    def shares(self) -> dict[str, float]:
        """Return what share of the forward pass's operations is done once a layer is, by its name; the head is last."""
        classifier = TensorClassifier(self.classifier())
        x = torch.rand(4, *SHAPE, device=classifier.device)
        layers, shares = classifier.find_layers(x), {}
        with evaluation_mode(classifier.model), torch.no_grad():
            whole = count_flops(lambda: classifier.model(x))
            for layer in layers:

                def up_to_here(site: Any = layer.output) -> None:
                    with tap([site], lambda *_: None, stop=True):
                        classifier.model(x)

                shares[layer.name] = count_flops(up_to_here) / whole
        return shares

    def contenders(self, positions: Mapping[str, str]) -> dict[str, Contender]:
        """Make every contender that is measured, by its name."""
        made = make_contenders(self.classifier, positions, self.groups(), self.data, self.setting)
        parts = self.setting.only
        return {name: contender for name, contender in made.items() if not parts or any(p in name for p in parts)}

    def groups(self) -> dict[str, list[str]]:
        """Return what the default rule and budget choose, and the first layers, up to eight within the budget."""
        estimator = self.classifier()
        classifier, attack = TensorClassifier(estimator), TensorAttack(pgd(estimator), TensorClassifier(estimator))
        x, y = (torch.tensor(array[:64], device=classifier.device) for array in self.data)
        layers = classifier.find_layers(x)
        measured = measure(classifier, layers, [Batch.whole(x, y)], attack)
        body = sorted((layer for layer in measured if not layer.is_head), key=lambda layer: -layer.criticality)
        most, early = SHARE * sum(p.numel() for p in estimator.model.parameters()), list[str]()
        for layer in layers[:8]:
            most -= sum(p.numel() for p in layer.parameters())
            if most > 0:
                early.append(layer.name)
        default = [layer.name for layer in body[: max(1, round(SHARE * len(layers)))]]
        return {"default rule and budget": default, f"first {len(early)} layers": early}

    def run(self) -> Result:
        """Time everything, in turn, then count operations and memory."""
        shares = self.shares()
        positions = layers_at(shares)
        made = self.contenders(positions)
        jobs: dict[str, Job] = {name: contender.epoch for name, contender in made.items()}
        seconds, failed = self.in_turn(jobs | self.forward_and_criticality(positions), made)
        counted, peak = {}, {}
        for name, contender in made.items():
            if name in failed or "=True" in name:
                continue
            with quiet():
                counted[name] = contender.count_flops()
                if contender.is_ours:
                    peak[name] = peak_memory(contender.epoch, self.setting.device)
        classifier = TensorClassifier(self.classifier())
        x = torch.tensor(self.data[0][: self.setting.batch_size], device=classifier.device)
        with evaluation_mode(classifier.model), torch.no_grad():
            counted["forward"] = count_flops(lambda: classifier.model(x)) * self.batches
        return {
            "layers": {position: [name, shares[name]] for position, name in positions.items()},
            "number of layers": len(shares),
            "batches": self.batches,
            "seconds": seconds,
            "flops": counted,
            "peak memory": peak,
            "failed": failed,
        }

    def run_savings(self) -> Result:
        """Time the epochs of this package with all that saves time, and without each in turn."""
        positions = layers_at(self.shares())
        contenders = self.contenders(positions)
        jobs: dict[str, Job] = {}
        made: dict[str, Contender] = {}
        for name in ("PGD-AT", "CLAT clean, first half"):
            for saving in (None, *SAVINGS):

                def job(epoch: Job = contenders[name].epoch, saving: str | None = saving) -> None:
                    with without(saving):
                        epoch()

                jobs[f"{name} / {saving}"], made[f"{name} / {saving}"] = job, contenders[name]
        seconds, _ = self.in_turn(jobs, made)
        return {"layers": positions, "batches": self.batches, "seconds": seconds}

    def in_turn(
        self, jobs: Mapping[str, Job], made: Mapping[str, Contender]
    ) -> tuple[dict[str, list[float]], dict[str, str]]:
        """
        Time jobs, in turn.

        :param jobs: What to time, by name.
        :param made: The contenders among them.
        :return: By name the seconds of every repeat; and why those failed that may: ART's trainers and the compiler.
        """
        seconds: dict[str, list[float]] = {name: [] for name in jobs}
        failed: dict[str, str] = {}
        order = random.Random(self.setting.seed)  # another one in each repeat: none always runs after the same other
        for repeat in range(-1, self.setting.repeats):  # the first one warms up
            for name in order.sample(list(jobs), len(jobs)):
                if name in failed:
                    continue
                try:
                    spent = self._time(jobs[name])
                except Exception as error:
                    if not name.startswith("ART") and "compile" not in name:
                        raise
                    failed[name] = f"{type(error).__name__}: {str(error)[:200]}"
                    continue
                if repeat >= 0:
                    seconds[name].append(made[name].seconds(spent) if name in made else spent)
            print(f"  repeat {repeat + 1} of {self.setting.repeats}", file=sys.stderr)
        return seconds, failed

    def _time(self, job: Job) -> float:
        started = time.perf_counter()
        with quiet():
            job()
            synchronise(self.setting.device)
        return time.perf_counter() - started

    def forward_and_criticality(self, positions: Mapping[str, str]) -> dict[str, Job]:
        """Return the forward pass, whole and cut short, the criticality of all layers, and the attack in that."""
        estimator, batch_size = self.classifier(), self.setting.batch_size
        classifier = TensorClassifier(estimator)
        attack = TensorAttack(pgd(estimator), classifier)
        x, y = (torch.tensor(array, device=classifier.device) for array in self.data)
        layers = classifier.find_layers(x)
        batches = [Batch.whole(*pair) for pair in zip(x.split(batch_size), y.split(batch_size), strict=True)]

        def forward(size: int, last: str | None = None) -> None:
            sites = [layer.output for layer in layers if layer.name == last]
            with evaluation_mode(classifier.model), torch.no_grad():
                for part in x.split(size):
                    with tap(sites, lambda *_: None, stop=True) if last else nullcontext():
                        classifier.model(part)

        jobs: dict[str, Job] = {
            f"forward, {batch_size} at once": lambda: forward(batch_size),
            f"forward, {CHUNK} at once": lambda: forward(CHUNK),
            "criticality": lambda: measure(classifier, layers, batches, attack),
            "its attack": lambda: [attack(batch) for batch in batches],
        }
        return jobs | {f"up to {where}": lambda last=last: forward(CHUNK, last) for where, last in positions.items()}


def layers_at(shares: Mapping[str, float]) -> dict[str, str]:
    """Return the layers at the end of the first third and of the first half of the operations, and the head."""
    *body, head = shares
    found = {
        where: max((name for name in body if shares[name] <= limit), key=shares.__getitem__)
        for where, limit in (("first third", 1 / 3), ("first half", 1 / 2))
    }
    return {**found, "head": head}
