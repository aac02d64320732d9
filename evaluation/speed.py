"""
What an epoch costs: ART's trainers against this package's, side by side in one run.

    python evaluation/speed.py --batch-size 64              # every model, on the CPU: an hour on two cores
    python evaluation/speed.py --batch-size 64 --savings    # what each way of saving time brings
    python evaluation/speed.py --device cuda --batch-size 128 --batches 8
    python evaluation/speed.py --preset smoke      # a minute; shows that it runs, not how fast

Contenders take turns within every repeat, in random order, so that a machine that is busy for a while is busy for all;
a figure is the median over the repeats, a ratio is one of medians of the same run. Data are random: nothing depends
on accuracy. Results are kept as JSON, model by model: the same command skips what is done, and ``--tables-only`` writes
the Markdown anew from what there is.
"""

import argparse
import contextlib
import copy
import datetime
import importlib.metadata
import io
import json
import logging
import os
import platform
import random
import shlex
import statistics
import sys
import time
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import timm
import torch
from art.attacks.evasion import ProjectedGradientDescent
from art.defences.trainer import (
    AdversarialTrainerAWPPyTorch,
    AdversarialTrainerMadryPGD,
    AdversarialTrainerTRADESPyTorch,
)
from art.estimators.classification import PyTorchClassifier
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from art_clat import AdversarialTrainerCLATPyTorch, create_backbone
from art_clat.attacks.ascent import CHUNK
from art_clat.attacks.tensor_attack import TensorAttack
from art_clat.layers.features import tap
from art_clat.models.backbones import Normalize
from art_clat.models.tensor_classifier import TensorClassifier
from art_clat.selection.criticality import measure
from art_clat.utils.modes import evaluation_mode
from art_clat.utils.processes import Part

ATTACK = {"eps": 8 / 255, "eps_step": 2 / 255, "max_iter": 10, "num_random_init": 1}


def backward(loss, x):
    """Take an input gradient as ART does: with all weight gradients beside it."""
    loss.backward()
    return (x.grad,)


#: What takes each saving away, by its name.
SAVINGS = {
    "the attack computes no weight gradients": (
        mock.patch("art_clat.models.tensor_classifier.only_trainable", lambda *_: contextlib.nullcontext()),
        mock.patch("torch.autograd.grad", backward),
    ),
    "the attack runs in chunks": (mock.patch("art_clat.attacks.ascent.CHUNK_ELEMENTS", 10**12),),
    "a frozen BatchNorm's gradient is one multiplication": (
        mock.patch("art_clat.models.tensor_classifier.BatchNorms", lambda *_: contextlib.nullcontext()),
    ),
    "passes for features end at the deepest": (
        mock.patch("art_clat.layers.features.tap", lambda sites, show, *, stop=False: tap(sites, show)),
    ),
    "the update computes no gradients of frozen layers": (
        mock.patch("art_clat.trainer.only_trainable", lambda *_: contextlib.nullcontext()),
    ),
}


@contextlib.contextmanager
def without(saving):
    """Take a saving away in this context; `None` takes nothing away."""
    with contextlib.ExitStack() as stack:
        for patch in SAVINGS.get(saving, ()):
            stack.enter_context(patch)
        yield


class Whole(nn.Module):
    """A network that is no ``nn.Sequential``: of those, ART's TRADES takes the first module's output for the logits."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        """Give the network's output."""
        return self.network(x)


def small_cnn():
    """Six convolutions with BatchNorm, about 300,000 parameters."""
    layers, channels = [], 3
    for width, stride in ((32, 1), (32, 1), (64, 2), (64, 1), (128, 2), (128, 1)):
        layers += [nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


def convnext():
    """Timm's smallest ConvNeXt, with a stem of stride 1 for small images."""
    model = timm.create_model("convnext_atto", num_classes=10, patch_size=1)
    return nn.Sequential(Normalize((0.5,) * 3, (0.25,) * 3), model)


MODELS = {
    "small CNN": small_cnn,
    "ResNet-18": lambda: create_backbone("resnet18", num_classes=10),
    "ViT-tiny": lambda: create_backbone("vit_tiny_patch16_224", num_classes=10),
    "ConvNeXt-atto": convnext,
}
#: Batches in an epoch unless said otherwise: enough for what an epoch costs whatever its length to count for little.
BATCHES = {"small CNN": 4}


class FixedLayers(AdversarialTrainerCLATPyTorch):
    """CLAT on layers named beforehand, or plain PGD-AT, with what an epoch took besides."""

    fixed = ()
    counter = None

    def _select(self, progress, layers, eligible, sample):
        progress.chosen = list(self.fixed)
        return [layer for layer in layers if layer.name in self.fixed]

    def _train_epoch(self, *args):
        with self.counter or contextlib.nullcontext():
            super()._train_epoch(*args)


class Bench:
    """Everything measured of one model."""

    def __init__(self, name, args):
        self.args = args
        self.batches = args.batches or BATCHES.get(name, 1)
        torch.manual_seed(args.seed)
        self.model = Whole(MODELS[name]())
        rng = np.random.default_rng(args.seed)
        n = args.batch_size * self.batches
        self.x = rng.random((n, 3, 32, 32), dtype=np.float32)
        self.y = rng.integers(0, 10, n)

    def classifier(self):
        """Wrap a copy of the network."""
        model = copy.deepcopy(self.model)
        return PyTorchClassifier(
            model,
            nn.CrossEntropyLoss(),
            (3, 32, 32),
            10,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4),
            clip_values=(0.0, 1.0),
            device_type="gpu" if self.args.device == "cuda" else "cpu",
        )

    def layers_at(self):
        """Give the layer at the end of the first third, the first half, and the head, with the share of F up to it."""
        classifier = self.classifier()
        network = TensorClassifier(classifier)
        x = torch.rand(4, 3, 32, 32, device=network.device)
        layers = network.find_layers(x)
        shares = {}
        with evaluation_mode(classifier.model), torch.no_grad():
            whole = flops(lambda: classifier.model(x))
            for layer in layers:

                def up_to_here(layer=layer):
                    with tap([layer.output], lambda *_: None, stop=True):
                        classifier.model(x)

                shares[layer.name] = flops(up_to_here) / whole
        body = [layer.name for layer in layers if not layer.is_head]
        return {
            "first third": max((n for n in body if shares[n] <= 1 / 3), key=shares.get),
            "first half": max((n for n in body if shares[n] <= 1 / 2), key=shares.get),
            "head": layers[-1].name,
        }, shares

    def contenders(self, positions):
        """Give every contender: its name, a function that trains an epoch, and its trainer."""
        batch_size = self.args.batch_size

        def madry():
            return AdversarialTrainerMadryPGD(self.classifier(), nb_epochs=1, batch_size=batch_size, **ATTACK)

        def trades():
            classifier = self.classifier()
            return AdversarialTrainerTRADESPyTorch(classifier, pgd(classifier), beta=6.0)

        def awp():
            classifier = self.classifier()
            return AdversarialTrainerAWPPyTorch(
                classifier, self.classifier(), pgd(classifier), mode="PGD", gamma=0.01, beta=6.0, warmup=0
            )

        def ours(fixed=None, **settings):
            classifier = self.classifier()
            trainer = FixedLayers(
                classifier,
                pgd(classifier),
                warmup=int(fixed is None),
                seed=self.args.seed,
                head_eligible=True,
                **settings,
            )
            trainer.fixed = (fixed,)
            return trainer

        made = {"ART Madry PGD": madry()}
        if not self.args.smoke:
            made |= {"ART TRADES": trades(), "ART AWP": awp()}
        made["PGD-AT"] = ours()
        for objective in ("adversarial", "clean"):
            for position, layer in positions.items():
                made[f"CLAT {objective}, {position}"] = ours(layer, objective=objective)
        options = {"channels_last": True} | ({} if self.args.smoke else {"amp": True, "compile": True})
        for option in options:
            made[f"PGD-AT, {option}=True"] = ours(**{option: True})
            for objective in ("adversarial",) if option == "compile" else ("adversarial", "clean"):
                made[f"CLAT {objective}, first half, {option}=True"] = ours(
                    positions["first half"], objective=objective, **{option: True}
                )
        if "amp" in options:
            made["PGD-AT, channels_last=True, amp=True"] = ours(channels_last=True, amp=True)
        return made

    def epoch(self, name, trainer):
        """Train one epoch."""
        if name == "ART Madry PGD":
            trainer.fit(self.x, self.y)
        elif name.startswith("ART"):
            trainer.fit(self.x, self.y, batch_size=self.args.batch_size, nb_epochs=1)
        else:
            trainer.fit(self.x, self.y, batch_size=self.args.batch_size, nb_epochs=1, verbose=False)

    def in_turn(self, jobs, made):
        """Time jobs, in turn: by name the seconds of every repeat, and why those failed that may."""
        seconds = {name: [] for name in jobs}
        failed = {}
        order = random.Random(self.args.seed)  # another one in each repeat: none always runs after the same other
        for repeat in range(-1, self.args.repeats):  # the first one warms up
            for name in order.sample(list(jobs), len(jobs)):
                job = jobs[name]
                if name in failed:
                    continue
                started = time.perf_counter()
                try:
                    with quiet():
                        job()
                        synchronise(self.args.device)
                except Exception as error:
                    if not name.startswith("ART") and "compile" not in name:
                        raise
                    failed[name] = f"{type(error).__name__}: {str(error)[:200]}"
                    continue
                spent = time.perf_counter() - started
                if isinstance(made.get(name), FixedLayers):  # finding the layers, once a run, is no part of an epoch
                    spent = made[name].history.epochs[0].seconds
                if repeat >= 0:
                    seconds[name].append(spent)
            print(f"  repeat {repeat + 1} of {self.args.repeats}", file=sys.stderr)
        return seconds, failed

    def run_savings(self):
        """Time the epochs of this package with all that saves time, and without each in turn."""
        positions, _ = self.layers_at()
        contenders = self.contenders(positions)
        jobs, made = {}, {}
        for name in ("PGD-AT", "CLAT clean, first half"):
            for saving in (None, *SAVINGS):

                def job(name=name, saving=saving):
                    with without(saving):
                        self.epoch(name, contenders[name])

                jobs[f"{name} / {saving}"], made[f"{name} / {saving}"] = job, contenders[name]
        seconds, _ = self.in_turn(jobs, made)
        return {"layers": positions, "batches": self.batches, "seconds": seconds}

    def run(self):
        """Time everything, in turn."""
        positions, shares = self.layers_at()
        made = self.contenders(positions)
        jobs = {name: lambda name=name, trainer=trainer: self.epoch(name, trainer) for name, trainer in made.items()}
        jobs |= self.forward_and_criticality(positions)
        seconds, failed = self.in_turn(jobs, made)
        counted, peak = {}, {}
        for name, trainer in made.items():
            if name in failed or "=True" in name:
                continue
            if isinstance(trainer, FixedLayers):
                trainer.counter = FlopCounterMode(display=False)
                with quiet():
                    self.epoch(name, trainer)
                counted[name] = trainer.counter.get_total_flops()
                trainer.counter = None
                with quiet():
                    peak[name] = peak_memory(lambda name=name, trainer=trainer: self.epoch(name, trainer), self.args)
            else:
                with quiet():
                    counted[name] = flops(lambda name=name, trainer=trainer: self.epoch(name, trainer))
        network = TensorClassifier(self.classifier())
        x = torch.tensor(self.x[: self.args.batch_size], device=network.device)
        with evaluation_mode(network.model), torch.no_grad():
            counted["forward"] = flops(lambda: network.model(x)) * self.batches
        return {
            "layers": {position: [name, shares[name]] for position, name in positions.items()},
            "number of layers": len(shares),
            "batches": self.batches,
            "seconds": seconds,
            "flops": counted,
            "peak memory": peak,
            "failed": failed,
        }

    def forward_and_criticality(self, positions):
        """Give the plain forward pass, whole and cut short, criticality of all layers, and the attack it contains."""
        classifier = self.classifier()
        network = TensorClassifier(classifier)
        attack = TensorAttack(pgd(classifier), network)
        x, y = torch.tensor(self.x, device=network.device), torch.tensor(self.y, device=network.device)
        layers = network.find_layers(x)
        batches = [(a, b, Part(len(a))) for a, b in zip(*(t.split(self.args.batch_size) for t in (x, y)), strict=True)]

        def forward(size, last=None):
            sites = [layer.output for layer in layers if layer.name == last]
            with evaluation_mode(network.model), torch.no_grad():
                for part in x.split(size):
                    with tap(sites, lambda *_: None, stop=True) if last else contextlib.nullcontext():
                        network.model(part)

        return {
            f"forward, {self.args.batch_size} at once": lambda: forward(self.args.batch_size),
            f"forward, {CHUNK} at once": lambda: forward(CHUNK),
            **{f"up to {where}": lambda last=last: forward(CHUNK, last) for where, last in positions.items()},
            "criticality": lambda: measure(network, layers, batches, attack),
            "its attack": lambda: [attack(a, b) for a, b, _ in batches],
        }


def pgd(classifier):
    """Make the attack of every contender."""
    return ProjectedGradientDescent(classifier, verbose=False, **ATTACK)


def flops(job):
    """Count the floating point operations of a job, as PyTorch counts them: matrix products and convolutions."""
    with FlopCounterMode(display=False) as counter:
        job()
    return counter.get_total_flops()


def peak_memory(job, args):
    """Give the most bytes of tensors that a job has at once, beyond those there before."""
    if args.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        job()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        job()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def synchronise(device):
    """Wait until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


@contextlib.contextmanager
def quiet():
    """Keep progress bars and warnings of others off the screen."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


def circumstances(setting):
    """Say where and how it was measured."""
    return (
        f"{setting['machine']}, {setting['device']}; {setting['date']}; batches of {setting['batch size']} images of "
        f"3×32×32, PGD with {ATTACK['max_iter']} steps; medians of {setting['repeats']} repeats, contenders taking "
        "turns in random order."
    )


def tables(results, setting):
    """Write what was measured as Markdown."""
    lines = ["# What an epoch costs", ""]
    lines += [
        f"{circumstances(setting)} `F` is the time of the plain forward pass (no gradients, evaluation mode, "
        f"the faster of {setting['batch size']} and {CHUNK} images at once) over the same images. `FLOPs` are counted "
        "by `torch.utils.flop_counter` (too many for the weight gradients of depth-wise convolutions), in forward "
        "passes; the column after it is measured time over the time that they would take at the plain forward pass's "
        "rate. Peak memory is that of all tensors of the run that were not there before it.",
        "",
    ]
    for model, result in results.items():
        median = {name: statistics.median(times) for name, times in result["seconds"].items() if times}
        forward = min(value for name, value in median.items() if name.startswith("forward"))
        where = "; ".join(f"{k}: `{n}` ({100 * share:.0f} % of F)" for k, (n, share) in result["layers"].items())
        lines += [f"## {model}", ""]
        lines += [
            f"{result['number of layers']} layers; chosen, in turn: {where}. Batches in an epoch: {result['batches']}.",
            "",
        ]
        lines += [
            "| epoch of | seconds | in F | spread | ART Madry / this | this / our PGD-AT | FLOPs, in F | "
            "time / FLOP time | peak memory / our PGD-AT |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for name, value in median.items():
            if name.startswith(("forward", "up to", "criticality", "its attack")):
                continue
            times = result["seconds"][name]
            counted = result["flops"].get(name)
            share = counted / result["flops"]["forward"] if counted else None
            memory = result["peak memory"].get(name)
            lines.append(
                f"| {name} | {value:.2f} | {value / forward:.1f} | {(max(times) - min(times)) / value:.0%} | "
                f"{median['ART Madry PGD'] / value:.2f} | {value / median['PGD-AT']:.2f} | "
                + " | ".join(
                    "" if number is None else f"{number:.2f}"
                    for number in (
                        share,
                        value / forward / share if share else None,
                        memory / result["peak memory"]["PGD-AT"] if memory else None,
                    )
                )
                + " |"
            )
        for name, message in result["failed"].items():
            lines.append(f"| {name} | failed: {message} |  |  |  |  |  |  |  |")
        own = {
            where: median[f"up to {where}"] / forward / share
            for where, (_, share) in result["layers"].items()
            if share < 1
        }
        lines += [
            "",
            "What the early layers cost beyond their FLOPs whoever runs them, time / FLOP time of the plain forward "
            "pass cut short after the layer of the "
            + " and of the ".join(f"{where}: {ratio:.2f}" for where, ratio in own.items())
            + ".",
            "",
            f"Criticality of all {result['number of layers']} layers / the attack it contains: "
            f"{median['criticality'] / median['its attack']:.3f}.",
            "",
        ]
    lines += ["```json", json.dumps(setting, indent=2), "```", ""]
    return "\n".join(lines)


def savings_tables(results, setting):
    """Write as Markdown what each way of saving time brings."""
    lines = ["# What each saving brings", ""]
    lines += [
        f"{circumstances(setting)} Seconds of an epoch, and how many times as many it takes with one "
        "saving taken away, all others in place. "
        "CLAT's chosen layer is the last in the first half of the network's FLOPs.",
        "",
    ]
    for model, result in results.items():
        median = {name: statistics.median(times) for name, times in result["seconds"].items()}
        epochs = list(dict.fromkeys(name.split(" / ")[0] for name in median))
        lines += [f"## {model}", "", f"| without | {' | '.join(epochs)} |", "| --- |" + " --- |" * len(epochs)]
        lines.append(
            "| (nothing taken away, seconds) | " + " | ".join(f"{median[f'{e} / None']:.2f}" for e in epochs) + " |"
        )
        for saving in SAVINGS:
            ratios = " | ".join(f"{median[f'{e} / {saving}'] / median[f'{e} / None']:.2f}" for e in epochs)
            lines.append(f"| {saving} | {ratios} |")
        lines.append("")
    lines += ["```json", json.dumps(setting, indent=2), "```", ""]
    return "\n".join(lines)


def main():
    """Run what is not done yet, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--preset", choices=("full", "smoke"), default="full")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--batches", type=int, help="batches in an epoch; default: 4 for the small CNN, 1 for others")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--savings", action="store_true", help="take what saves time away, one thing at a time")
    parser.add_argument("--output", type=Path, help="Markdown; default: evaluation/results/speed[-savings]-DEVICE.md")
    parser.add_argument("--tables-only", action="store_true", help="write the Markdown from the JSON beside it")
    args = parser.parse_args()
    args.smoke = args.preset == "smoke"
    if args.smoke:
        args.models, args.batch_size, args.repeats = ["small CNN"], 16, 1
    name = f"speed{'-savings' * args.savings}-{args.device}.md"
    args.output = args.output or Path(__file__).parent / "results" / name
    args.output.parent.mkdir(parents=True, exist_ok=True)
    logging.disable(logging.WARNING)
    raw = args.output.with_suffix(".json")
    content = json.loads(raw.read_text()) if raw.exists() else {"results": {}}
    versions = {
        name: importlib.metadata.version(name)
        for name in ("art_clat", "torch", "adversarial-robustness-toolbox", "timm", "numpy")
    }
    setting = {
        "command": shlex.join(["python", "evaluation/speed.py", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, {torch.get_num_threads()} threads",
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "CPU",
        "batch size": args.batch_size,
        "batches": args.batches,
        "repeats": args.repeats,
        "seed": args.seed,
        "versions": versions,
    }
    kept = {key: value for key, value in content.get("setting", {}).items() if key not in ("date", "command")}
    if content["results"] and not args.tables_only and kept != {k: v for k, v in setting.items() if k != "command"}:
        parser.error(f"{raw} holds results of another setting: {kept}. Move it away, or give another --output.")
    if not args.tables_only:
        content["setting"] = {**setting, "date": datetime.date.today().isoformat()}
        for model in args.models:
            if model in content["results"]:
                continue
            print(model, file=sys.stderr)
            bench = Bench(model, args)
            content["results"][model] = bench.run_savings() if args.savings else bench.run()
            raw.write_text(json.dumps(content, indent=1) + "\n")
    text = (savings_tables if args.savings else tables)(content["results"], content["setting"])
    args.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
