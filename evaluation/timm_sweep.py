"""
Every family of timm's models under CLAT: the smallest model of each, at the smallest input it takes.

    python evaluation/timm_sweep.py                          # all families, about half an hour on one CPU core
    python evaluation/timm_sweep.py --families beit coat     # some of them

A family is a module of ``timm.models``. Its smallest model, with random weights and BatchNorm statistics of random
images, is measured and trained for two steps of CLAT; ``CHECKS`` lists what must hold. Each family runs in a process of
its own and leaves one JSON file. The same command skips what is done, and writes the support matrix again.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import multiprocessing
import random
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import timm
import torch
from art.attacks.evasion import ProjectedGradientDescent
from art.estimators.classification import PyTorchClassifier
from paper_tables.files import write_json, write_text
from paper_tables.markdown import markdown_table
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.overrides import TorchFunctionMode

from art_clat import AdversarialTrainerCLATPyTorch, LayerOptions, create_backbone, measure_criticality
from art_clat.layers.features import Features, tap
from art_clat.layers.freezing import only_trainable
from art_clat.layers.layer import Layer
from art_clat.models.tensor_classifier import TensorClassifier
from art_clat.selection.choice import eligible_layers
from art_clat.selection.criticality import Criticality
from art_clat.utils.environment import describe_environment
from art_clat.utils.modes import evaluation_mode

Record = dict[str, Any]

NB_CLASSES, NB_IMAGES, EPS = 10, 4, 8 / 255
SIDES = (32, 64, 96, 128, 160, 192, 224, 256)
#: The modules of ``timm.models``; others may have registered models too.
FAMILIES = [name for name in timm.list_modules() if hasattr(timm.models, name)]

CHECKS = """\
- `measure_criticality` returns a finite weakness for every layer, and one above zero for at least one layer.
- A layer's distances in a batch are those that each sample has in a batch of its own.
- Features, distances and input gradients of a pass that stops after a layer (the first, the middle one, the most
  critical) equal those of the whole pass, bit for bit.
- `AdversarialTrainerCLATPyTorch` makes two steps (a batch each); every chosen layer moves, and no other parameter and
  no buffer except those of the chosen layers' norms changes by a single bit.
- Measuring and training leave the parameters' flags, the modules' modes, hooks, gradients and the random generators as
  they were; measuring leaves every parameter and buffer, too."""


class OnTheProcessor(TorchFunctionMode):
    """Makes models without memory: drop path rates are read from a ``linspace``, which must be real."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        return func(*args, **({**kwargs, "device": "cpu"} if func is torch.linspace else kwargs))


def smallest_model(family: str) -> tuple[str, int]:
    """Return the name of a family's model with the fewest parameters, and the number of its models."""
    sizes: dict[str, int] = {}
    for name in timm.list_models(module=family):
        try:
            with torch.device("meta"), OnTheProcessor():
                model = timm.create_model(name, num_classes=NB_CLASSES)
        except Exception:  # Something else in it must be real.
            model = timm.create_model(name, num_classes=NB_CLASSES)
        sizes[name] = sum(p.numel() for p in model.parameters())
    return min(sizes, key=lambda name: sizes[name]), len(sizes)


def smallest_input(name: str) -> tuple[nn.Module, int]:
    """Make a model for the smallest images that it can be trained on; returns it and their side."""
    config = timm.get_pretrained_cfg(name)
    own = config.input_size[-1]
    reasons = {}
    for side in sorted({*(side for side in SIDES if side < own), own}):
        kwargs = {"img_size": side} if config.fixed_input_size and side != own else {}
        try:
            torch.manual_seed(0)
            model: nn.Module = timm.create_model(name, num_classes=NB_CLASSES, **kwargs)
            with torch.no_grad():
                logits = model.eval()(torch.rand(1, 3, side, side))
            if logits.shape != (1, NB_CLASSES) or not logits.isfinite().all():
                raise ValueError(f"its logits have the shape {tuple(logits.shape)}, or are not finite")
            model.train()(torch.rand(2, 3, side, side)).sum().backward()
            model.zero_grad()
            return model, side
        except Exception as error:
            reasons[side] = f"{type(error).__name__}: {error}"
    raise RuntimeError(f"no input size works; {own}: {reasons[own]}")


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copy every parameter and buffer."""
    return {name: t.detach().clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}


def state_of(model: nn.Module) -> dict[str, list[Any]]:
    """Return the state of a model and of the global random generators, tensors' values left out."""
    numpy_generator: Any = np.random.get_state()
    return {
        "flags": [p.requires_grad for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()],
        "gradients": [p.grad is not None for p in model.parameters()],
        "generators": [random.getstate(), numpy_generator[1].tolist(), torch.get_rng_state().tolist()],
    }


def check_same_state(before: dict[str, list[Any]], model: nn.Module, when: str) -> None:
    """Check that a model was handed back as it was."""
    after = state_of(model)
    changed = [what for what in before if before[what] != after[what]]
    if changed:
        raise AssertionError(f"not as before {when}: {', '.join(changed)}")


def changed_tensors(before: dict[str, torch.Tensor], model: nn.Module) -> set[str]:
    """Return the names of the tensors that are not the same bits."""
    after = tensors_of(model)
    return {name for name in before if not torch.equal(before[name].view(-1), after[name].view(-1))}


def check_early_stop(network: TensorClassifier, layer: Layer, x: torch.Tensor, x_adv: torch.Tensor) -> None:
    """Check that a pass that stops after a layer computes what the whole pass computes."""
    results: list[list[torch.Tensor]] = []
    with evaluation_mode(network.model), only_trainable(network.model, []):
        for stop in (False, True):
            seen: list[torch.Tensor] = []
            with torch.no_grad(), tap([layer.output], lambda _, feature: seen.append(feature.clone()), stop=stop):  # noqa: B023
                network.logits(x)
            features, z = Features([layer]), x_adv.clone().requires_grad_()
            with torch.no_grad(), features.keep(stop=stop):
                network.logits(x)
            with features.compare(stop=stop):
                network.logits(z)
            distance = features.total_distance()
            results.append([distance, *torch.autograd.grad(distance.sum(), z), *seen])
    if not all(torch.equal(a, b) for a, b in zip(*results, strict=True)):
        raise AssertionError(f"early stop after {layer.name} differs from the whole pass")


def check_samples_apart(
    network: TensorClassifier, layers: Sequence[Layer], x: torch.Tensor, x_adv: torch.Tensor
) -> None:
    """Check that distances of a batch are those of its samples alone: the batch is in the dimension that is assumed."""
    features = Features(layers)
    alone: list[torch.Tensor] = []
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


def try_model(model: nn.Module, side: int, seed: int) -> Record:
    """Measure and train a model, and check what must hold; returns what the matrix shows."""
    rng = np.random.default_rng(seed)
    x: npt.NDArray[np.float32] = rng.uniform(EPS, 1 - EPS, (NB_IMAGES, 3, side, side)).astype(np.float32)
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
    measured = check_measuring(classifier, attack, x, y)
    network, inputs = TensorClassifier(classifier), torch.tensor(x)
    x_adv = inputs + torch.tensor(rng.choice([-EPS, EPS], x.shape).astype(np.float32))
    layers = network.find_layers(inputs)
    check_samples_apart(network, layers, inputs, x_adv)
    blocks = try_blocks(network, inputs, x_adv)
    index = {layer: entry.criticality for layer, entry in zip(layers, measured, strict=True) if entry.criticality > 0}
    critical = max(set(index) & set(eligible_layers(layers, head_eligible=False)), key=lambda layer: index[layer])
    for layer in {layers[0], layers[len(layers) // 2], critical}:
        check_early_stop(network, layer, inputs, x_adv)
    chosen = check_training(classifier, attack, layers, x, y, seed=seed)
    return {"layers": len(measured), "chosen": chosen, "blocks": blocks}


def check_measuring(
    classifier: PyTorchClassifier,
    attack: ProjectedGradientDescent,
    x: npt.NDArray[np.float32],
    y: npt.NDArray[np.int64],
) -> Criticality:
    """Measure a model, and check the weakness of its layers and that nothing changed."""
    model = classifier.model
    tensors, state = tensors_of(model), state_of(model)
    measured = measure_criticality(classifier, x, y, attack=attack)
    check_same_state(state, model, "after measuring")
    if changed := changed_tensors(tensors, model):
        raise AssertionError(f"measuring changed {sorted(changed)}")
    weakness = [layer.weakness for layer in measured]
    if not all(map(math.isfinite, weakness)) or max(weakness) == 0:
        raise AssertionError(f"weakness is not finite, or zero everywhere: {weakness}")
    return measured


def check_training(
    classifier: PyTorchClassifier,
    attack: ProjectedGradientDescent,
    layers: Iterable[Layer],
    x: npt.NDArray[np.float32],
    y: npt.NDArray[np.int64],
    *,
    seed: int,
) -> list[str]:
    """Train a model for two steps, and check which tensors changed; returns the chosen layers' names."""
    model = classifier.model
    trainer = AdversarialTrainerCLATPyTorch(classifier, attack, layers=LayerOptions(freeze_norms=False), seed=seed)
    tensors, state = tensors_of(model), state_of(model)
    trainer.fit(x, y, batch_size=NB_IMAGES // 2, nb_epochs=1, verbose=False)
    check_same_state(state, model, "after training")
    chosen = [layer for layer in layers if layer.name in trainer.history.selections[0].chosen]
    names = {id(t): name for name, t in [*model.named_parameters(), *model.named_buffers()]}
    changed = changed_tensors(tensors, model)
    may = {names[id(p)] for layer in chosen for p in layer.parameters()}
    may |= {names[id(b)] for layer in chosen for norm in layer.modules[1:] for b in norm.buffers()}
    if others := changed - may:
        raise AssertionError(f"training {chosen[0].name} changed {len(others)} other tensors, {min(others)} first")
    still = [layer.name for layer in chosen if not changed & {names[id(p)] for p in layer.parameters()}]
    if still:
        raise AssertionError(f"training did not move {', '.join(still)}")
    return [layer.name for layer in chosen]


def try_blocks(network: TensorClassifier, x: torch.Tensor, x_adv: torch.Tensor) -> int | str:
    """Return the number of timm's blocks, or the reason why they cannot be layers."""
    try:
        blocks = network.find_layers(x, LayerOptions("block"))
        check_samples_apart(network, blocks, x, x_adv)
    except (ValueError, AssertionError) as error:
        return str(error)
    return len(blocks)


def try_small_images(name: str) -> str:
    """Try the model on CIFAR's images; returns the error, empty if there is none."""
    try:
        model = create_backbone(name, num_classes=NB_CLASSES, input_size=(3, 32, 32))
        model(torch.rand(2, 3, 32, 32)).sum().backward()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def try_family(family: str, seed: int, path: Path) -> None:
    """Run one family in this process, and write the result."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    result: Record = {"family": family, "verdict": "ok", "reason": ""}
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
        result["small"] = try_small_images(result["model"])
    write_json(path, result)


def run_family(family: str, seed: int, path: Path, *, timeout: float) -> Record:
    """Run one family in a process of its own unless it is done; returns the result."""
    if not path.exists():
        start = time.perf_counter()
        process = multiprocessing.get_context("fork").Process(target=try_family, args=(family, seed, path))
        process.start()
        process.join(timeout)
        if not path.exists():
            ended = process.exitcode is not None
            reason = f"it ended with {process.exitcode}" if ended else f"it took over {timeout:g} seconds"
            seconds = time.perf_counter() - start
            write_json(path, {"family": family, "verdict": "failed", "reason": reason, "seconds": seconds})
        process.kill()
    result: Record = json.loads(path.read_text(encoding="utf-8"))
    return result


def page(results: Sequence[Record], setting: Record) -> str:
    """Write the support matrix and how it was made."""
    worked = sum(result["verdict"] == "ok" for result in results)
    small = sum(result.get("small") == "" for result in results)
    blocks = sum(isinstance(result.get("blocks"), int) for result in results)
    header = ["family", "model", "parameters", "input", "layers", "chosen", "blocks", "32×32", "seconds", "verdict"]
    sections = [
        "# timm's families under CLAT",
        f"{worked} of {len(results)} families work. For each, the model with the fewest parameters, "
        f"{NB_CLASSES} classes, at the smallest input it takes, {NB_IMAGES} random images, PGD with 2 steps. A "
        "family works if all of this holds:",
        CHECKS,
        f'"Blocks" is the number of layers with `granularity="block"` ({blocks} families have them). "32×32" says '
        f"whether `create_backbone` adapts the model to images of 3×32×32 ({small} families). Seconds are those of "
        "measuring, training and checking, in one process.",
        markdown_table(header, (matrix_row(result) for result in results)),
        "What does not work, and the error:",
        "\n".join(note for result in results for note in notes_of(result)) or "- nothing",
        f"```json\n{json.dumps(setting, indent=2)}\n```",
    ]
    return "\n\n".join(sections) + "\n"


def matrix_row(result: Record) -> list[str]:
    """Return a family's row of the matrix."""
    chosen, blocks = result.get("chosen", []), result.get("blocks")
    shown = ", ".join(f"`{name}`" for name in chosen[:2]) + (f" and {len(chosen) - 2} more" if chosen[2:] else "")
    return [
        result["family"],
        result.get("model", ""),
        f"{result.get('parameters', 0) / 1e6:.1f} M",
        str(result.get("side", "")),
        str(result.get("layers", "")),
        shown,
        str(blocks) if isinstance(blocks, int) else "no",
        "yes" if result.get("small") == "" else "no",
        f"{result['seconds']:.0f}",
        result["verdict"],
    ]


def notes_of(result: Record) -> list[str]:
    """Return what does not work in a family, and the errors."""
    blocks = result.get("blocks")
    reasons = {
        "": result["reason"],
        "blocks": blocks if isinstance(blocks, str) else "",
        "32×32": result.get("small", ""),
    }
    return [
        f"- {result['family']}{f', {what}' if what else ''}: {' '.join(reason.split())[:300]}"
        for what, reason in reasons.items()
        if reason
    ]


def main() -> None:
    """Run what is not done yet, and write the matrix."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().split("\n\n")[0])
    parser.add_argument("--families", nargs="+", choices=FAMILIES, metavar="FAMILY", help="default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=1200, help="seconds that one family may take")
    parser.add_argument("--work", type=Path, default=Path("runs/timm-sweep"), help="folder of the JSON files")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "timm-sweep.md")
    args = parser.parse_args()
    results: list[Record] = []
    for family in args.families or FAMILIES:
        result = run_family(family, args.seed, args.work / f"{family}.json", timeout=args.timeout)
        shown = [str(result.get(key, "")) for key in ("family", "model", "side", "layers", "blocks", "verdict")]
        print(*shown, f"{result['seconds']:.0f} s", result["reason"], sep="\t", flush=True)
        results.append(result)
    command = shlex.join(["python", "evaluation/timm_sweep.py", *sys.argv[1:]])
    write_text(args.output, page(results, {"command": command, "seed": args.seed, **describe_environment()}))


if __name__ == "__main__":
    main()
