"""
Every family of timm's models under CLAT: the smallest model of each, at the smallest input it takes.

    python evaluation/timm_sweep.py                          # all families, about half an hour on one CPU core
    python evaluation/timm_sweep.py --families beit coat     # some of them

A family is a module of ``timm.models``. Its smallest model, with random weights and BatchNorm statistics of random
images, is measured and trained for two steps of CLAT, and what must hold is checked; see ``CHECKS``. Each family runs
in a process of its own. Results are kept as JSON, family by family: the same command skips what is done, and writes the
support matrix anew.
"""

import argparse
import datetime
import importlib.metadata
import json
import logging
import math
import multiprocessing
import os
import platform
import random
import shlex
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import timm
import torch
from art.attacks.evasion import ProjectedGradientDescent
from art.estimators.classification import PyTorchClassifier
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.overrides import TorchFunctionMode

from art_clat import AdversarialTrainerCLATPyTorch, LayerOptions, create_backbone, measure_criticality
from art_clat.layers.features import Features
from art_clat.layers.freezing import only_trainable
from art_clat.models.tensor_classifier import TensorClassifier
from art_clat.selection.choice import eligible_layers
from art_clat.utils.modes import evaluation_mode

NB_CLASSES, NB_IMAGES, EPS = 10, 4, 8 / 255
SIDES = (32, 64, 96, 128, 160, 192, 224, 256)
#: The modules of ``timm.models``; others may have registered models too.
FAMILIES = [name for name in timm.list_modules() if hasattr(timm.models, name)]

CHECKS = """\
- `measure_criticality` gives every layer a weakness, finite and above zero for at least one layer, and a chosen one.
- A layer's distances, sample by sample, are those that each sample has in a batch of its own.
- Features, distances and input gradients of a pass that stops after a layer (the first, the middle one, the most
  critical) are those of the whole pass, bit for bit.
- `AdversarialTrainerCLATPyTorch` makes two steps (a batch each); every chosen layer moves, and no other parameter and
  no buffer but those of the chosen layers' norms changes by a single bit.
- After measuring and after training, parameters' flags, modules' modes, hooks, gradients and the random generators are
  as they were; after measuring every parameter and buffer too."""


class OnTheProcessor(TorchFunctionMode):
    """Lets a model be made without memory: drop path rates are read from a ``linspace`` that must be real."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        return func(*args, **({**kwargs, "device": "cpu"} if func is torch.linspace else kwargs))


def smallest_model(family):
    """Give the name of a family's model with the fewest parameters, and how many models it has."""
    sizes = {}
    for name in timm.list_models(module=family):
        try:
            with torch.device("meta"), OnTheProcessor():
                model = timm.create_model(name, num_classes=NB_CLASSES)
        except Exception:  # something else in it must be real
            model = timm.create_model(name, num_classes=NB_CLASSES)
        sizes[name] = sum(p.numel() for p in model.parameters())
    return min(sizes, key=sizes.get), len(sizes)


def smallest_input(name):
    """Make a model for the smallest images that it can be trained on."""
    config = timm.get_pretrained_cfg(name)
    own = config.input_size[-1]
    reasons = {}
    for side in sorted({*(side for side in SIDES if side < own), own}):
        kwargs = {"img_size": side} if config.fixed_input_size and side != own else {}
        try:
            torch.manual_seed(0)
            model = timm.create_model(name, num_classes=NB_CLASSES, **kwargs)
            with torch.no_grad():
                logits = model.eval()(torch.rand(1, 3, side, side))
            if logits.shape != (1, NB_CLASSES) or not logits.isfinite().all():
                raise ValueError(f"it gives logits of shape {tuple(logits.shape)}, or not finite ones")
            model.train()(torch.rand(2, 3, side, side)).sum().backward()
            model.zero_grad()
            return model, side
        except Exception as error:
            reasons[side] = f"{type(error).__name__}: {error}"
    raise RuntimeError(f"no input size works; {own}: {reasons[own]}")


def tensors_of(model):
    """Copy every parameter and buffer."""
    return {name: t.detach().clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}


def state_of(model):
    """Tell what of a model and of the global random generators is not a tensor's value."""
    return {
        "flags": [p.requires_grad for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()],
        "gradients": [p.grad is not None for p in model.parameters()],
        "generators": [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()],
    }


def check_same_state(before, model, when):
    """Check that a model is handed back as it was."""
    after = state_of(model)
    changed = [what for what in before if before[what] != after[what]]
    if changed:
        raise AssertionError(f"after {when} not as before: {', '.join(changed)}")


def changed_tensors(before, model):
    """Give the names of the tensors that are not the same bits."""
    after = tensors_of(model)
    return {name for name in before if not torch.equal(before[name].view(-1), after[name].view(-1))}


def check_early_stop(network, layer, x, x_adv):
    """Check that a pass that stops after a layer gives what the whole pass gives."""
    results = []
    with evaluation_mode(network.model), only_trainable(network.model, []):
        for stop in (False, True):
            features, z = Features([layer]), x_adv.clone().requires_grad_()
            with torch.no_grad(), features.keep(stop=stop):
                network.logits(x)
            with features.compare(stop=stop):
                network.logits(z)
            distance = features.total_distance()
            results.append((distance, *torch.autograd.grad(distance.sum(), z), *features._kept[layer.output]))
    if not all(torch.equal(a, b) for a, b in zip(*results, strict=True)):
        raise AssertionError(f"early stop after {layer.name} differs from the whole pass")


def check_samples_apart(network, layers, x, x_adv):
    """Check that distances of a batch are those of its samples alone, that is, that the batch is where it is sought."""
    features, alone = Features(layers), []
    with evaluation_mode(network.model), torch.no_grad():
        with features.compare_halves(stop=True):
            network.logits(torch.cat([x, x_adv]))
        together = torch.stack([features.distance(layer) for layer in layers])
        for one, other in zip(x, x_adv, strict=True):
            with features.compare_halves(stop=True):
                network.logits(torch.stack([one, other]))
            alone.append(torch.cat([features.distance(layer) for layer in layers]))
    close = torch.isclose(together, torch.stack(alone, dim=1), rtol=0.02, atol=1e-5).all(dim=1)
    if not close.all():
        names = [layer.name for layer, same in zip(layers, close, strict=True) if not same]
        raise AssertionError(f"samples are not apart in {len(names)} layers, {names[0]} the first")


def try_model(model, side, seed):
    """Measure and train a model, and check what must hold; gives what the matrix shows."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(EPS, 1 - EPS, (NB_IMAGES, 3, side, side)).astype(np.float32)
    y = rng.integers(0, NB_CLASSES, NB_IMAGES)
    update_bn([torch.tensor(x)], model)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    classifier = PyTorchClassifier(
        model, nn.CrossEntropyLoss(), (3, side, side), NB_CLASSES, optimizer, clip_values=(0, 1), device_type="cpu"
    )
    attack = ProjectedGradientDescent(
        classifier, eps=EPS, eps_step=EPS / 2, max_iter=2, num_random_init=1, verbose=False
    )
    tensors, state = tensors_of(model), state_of(model)

    measured = measure_criticality(classifier, x, y, attack=attack)
    check_same_state(state, model, "measuring")
    if changed := changed_tensors(tensors, model):
        raise AssertionError(f"measuring changed {sorted(changed)}")
    weakness = [layer.weakness for layer in measured]
    if not all(map(math.isfinite, weakness)) or max(weakness) == 0:
        raise AssertionError(f"weakness is not finite, or zero everywhere: {weakness}")

    network = TensorClassifier(classifier)
    inputs = torch.tensor(x)
    noise = torch.tensor(rng.choice([-EPS, EPS], x.shape).astype(np.float32))
    layers = network.find_layers(inputs)
    check_samples_apart(network, layers, inputs, inputs + noise)
    blocks = try_blocks(network, inputs, inputs + noise)
    index = {layer: entry.criticality for layer, entry in zip(layers, measured, strict=True) if entry.criticality > 0}
    critical = max(set(index) & set(eligible_layers(layers, head_eligible=False)), key=lambda layer: index[layer])
    for layer in {layers[0], layers[len(layers) // 2], critical}:
        check_early_stop(network, layer, inputs, inputs + noise)

    trainer = AdversarialTrainerCLATPyTorch(classifier, attack, layers=LayerOptions(freeze_norms=False), seed=seed)
    state = state_of(model)
    trainer.fit(x, y, batch_size=NB_IMAGES // 2, nb_epochs=1, verbose=False)
    check_same_state(state, model, "training")
    chosen = [layer for layer in layers if layer.name in trainer.history.selections[0].chosen]
    names = {id(t): name for name, t in [*model.named_parameters(), *model.named_buffers()]}
    changed = changed_tensors(tensors, model)
    may = {names[id(p)] for layer in chosen for p in layer.parameters()}
    may |= {names[id(b)] for layer in chosen for norm in layer.modules[1:] for b in norm.buffers()}
    if changed - may:
        raise AssertionError(f"training {chosen[0].name} changed {len(changed - may)} others, {min(changed - may)} say")
    still = [layer.name for layer in chosen if not changed & {names[id(p)] for p in layer.parameters()}]
    if still:
        raise AssertionError(f"training did not move {', '.join(still)}")
    return {"layers": len(measured), "chosen": [layer.name for layer in chosen], "blocks": blocks}


def try_blocks(network, x, x_adv):
    """Give the number of timm's blocks, or why they cannot be layers."""
    try:
        blocks = network.find_layers(x, LayerOptions("block"))
        check_samples_apart(network, blocks, x, x_adv)
    except (ValueError, AssertionError) as error:
        return str(error)
    return len(blocks)


def small_images(name):
    """Try the model on CIFAR's images; give what is wrong, or nothing."""
    try:
        model = create_backbone(name, num_classes=NB_CLASSES, input_size=(3, 32, 32))
        model(torch.rand(2, 3, 32, 32)).sum().backward()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def try_family(family, seed, path):
    """Run one family in this process, and write the result."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    result = {"family": family, "verdict": "ok", "reason": ""}
    try:
        result["model"], result["models"] = smallest_model(family)
        model, result["side"] = smallest_input(result["model"])
        result["parameters"] = sum(p.numel() for p in model.parameters())
        start = time.perf_counter()
        result |= try_model(model, result["side"], seed)
    except Exception as error:
        result |= {"verdict": "failed", "reason": f"{type(error).__name__}: {error}"}
    result["seconds"] = time.perf_counter() - start
    if "model" in result:
        result["small"] = small_images(result["model"])
    path.write_text(json.dumps(result, indent=1) + "\n")


def table(results, setting):
    """Write the support matrix as Markdown."""
    worked = sum(result["verdict"] == "ok" for result in results)
    small = sum(result.get("small") == "" for result in results)
    blocks = sum(isinstance(result.get("blocks"), int) for result in results)
    lines = [
        "# timm's families under CLAT",
        "",
        f"{worked} of {len(results)} families work. For each, the model with the fewest parameters, "
        f"{NB_CLASSES} classes, at the smallest input it takes, {NB_IMAGES} random images, PGD with 2 steps. A "
        "family works if all of this holds:",
        "",
        CHECKS,
        "",
        f'"Blocks" is the number of layers with `granularity="block"` ({blocks} families have them). "32×32" says '
        f"whether `create_backbone` adapts the model to images of 3×32×32 ({small} families). Seconds are those of "
        "measuring, training and checking, in one process.",
        "",
        "| family | model | parameters | input | layers | chosen | blocks | 32×32 | seconds | verdict |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    notes = []
    for result in results:
        chosen = result.get("chosen", [])
        shown = ", ".join(f"`{name}`" for name in chosen[:2]) + (f" and {len(chosen) - 2} more" if chosen[2:] else "")
        number = result.get("blocks", "")
        lines.append(
            f"| {result['family']} | {result.get('model', '')} | {result.get('parameters', 0) / 1e6:.1f} M | "
            f"{result.get('side', '')} | {result.get('layers', '')} | {shown} | "
            f"{number if isinstance(number, int) else 'no'} | {'yes' if result.get('small') == '' else 'no'} | "
            f"{result['seconds']:.0f} | {result['verdict']} |"
        )
        reasons = {
            "": result["reason"],
            "blocks": number if isinstance(number, str) else "",
            "32×32": result.get("small", ""),
        }
        notes += [
            f"- {result['family']}{f', {what}' if what else ''}: {' '.join(reason.split())[:300]}"
            for what, reason in reasons.items()
            if reason
        ]
    lines += ["", "What does not work, and what it says:", "", *(notes or ["- nothing"]), ""]
    lines += ["```json", json.dumps(setting, indent=2), "```", ""]
    return "\n".join(lines)


def main():
    """Run what is not done yet, and write the matrix."""
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("--families", nargs="+", choices=FAMILIES, metavar="FAMILY", help="default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=1200, help="seconds that one family may take")
    parser.add_argument("--work", type=Path, default=Path("runs/timm-sweep"), help="folder of the JSON files")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "timm-sweep.md")
    args = parser.parse_args()
    families = args.families or FAMILIES
    args.work.mkdir(parents=True, exist_ok=True)
    results = []
    for family in families:
        path = args.work / f"{family}.json"
        if not path.exists():
            start = time.perf_counter()
            process = multiprocessing.get_context("fork").Process(target=try_family, args=(family, args.seed, path))
            process.start()
            process.join(args.timeout)
            if not path.exists():
                ended = process.exitcode is not None
                reason = f"it ended with {process.exitcode}" if ended else f"it took over {args.timeout:g} seconds"
                lost = {"family": family, "verdict": "failed", "reason": reason, "seconds": time.perf_counter() - start}
                path.write_text(json.dumps(lost, indent=1) + "\n")
            process.kill()
        results.append(json.loads(path.read_text()))
        print(
            *(str(results[-1].get(key, "")) for key in ("family", "model", "side", "layers", "blocks", "verdict")),
            f"{results[-1]['seconds']:.0f} s",
            results[-1]["reason"],
            sep="\t",
            flush=True,
        )
    setting = {
        "command": shlex.join(["python", "evaluation/timm_sweep.py", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, {torch.get_num_threads()} threads",
        "date": datetime.date.today().isoformat(),
        "seed": args.seed,
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("art_clat", "torch", "timm", "adversarial-robustness-toolbox", "numpy")
        },
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(table(results, setting), encoding="utf-8")


if __name__ == "__main__":
    main()
