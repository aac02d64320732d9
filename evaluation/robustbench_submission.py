"""
Everything that RobustBench's "New Model(s)" form asks for, in a folder, from an evaluation.

    python evaluation/autoattack.py --model resnet18 --checkpoint best.safetensors --dataset cifar10 --eps 8/255 \
        --output runs/evaluation
    python evaluation/robustbench_submission.py runs/evaluation --output runs/submission \
        --model-id Someone2026Title_R18 --title "..." --authors "..." --link https://... --architecture ResNet-18

The folder has the filled form (``ISSUE.md``), the ``model_info`` entry, the network's definition and its entry for the
model zoo, the checkpoint, the leaderboard's row, and under ``evaluation/`` AutoAttack's log, the adversarial examples
and the verdicts. Before it is written the network is loaded from the definition and the checkpoint by RobustBench's own
``load_model``, and must get the verdicts of the evaluation on the adversarial examples, which must be within ε.
``--benchmark`` repeats the evaluation with RobustBench's own ``benchmark``. What keeps the result from being a claim to
the leaderboard is said on top of the form, in the entry and below the row.
"""

from __future__ import annotations

import argparse
import pickle
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import timm
import torch
from torch import nn

from art_clat import RobustnessReport, create_backbone, write_robustbench_entry
from art_clat.leaderboard.benchmark import run_benchmark
from art_clat.leaderboard.definitions import (
    load_from_robustbench,
    model_definition,
    timm_name,
    write_checkpoint,
    zoo_entry,
)
from art_clat.leaderboard.entries import (
    leaderboard_row,
    leaderboard_shortfalls,
    preprocessing_shortfalls,
)
from art_clat.models.by_name import load_function, load_model
from art_clat.models.datasets import IMAGENET_PREPROCESSING, EvaluationData, load_data
from art_clat.robustness.checks import ORDERS
from art_clat.utils.formatting import format_eps
from art_clat.utils.robustbench_import import robustbench_utils

TODO = "TODO"

#: The share of examples on which another machine may decide otherwise: those at a border between classes.
TOLERATED = 0.005


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run", type=Path, help="folder that evaluation/autoattack.py wrote")
    add("--output", type=Path, required=True, help="the folder to write; new or empty")
    add("--model-id", required=True, help="<Name><Year><FirstWordOfTheTitle>, and what tells models of a paper apart")
    add("--title", required=True, help="of the paper")
    add("--authors", required=True, help="of the paper, separated by commas")
    add("--link", required=True, help="to the paper")
    add("--venue", default="Unpublished", help="and year, e.g. ICML 2025")
    add("--architecture", required=True, help="as RobustBench writes it, e.g. ResNet-18")
    add("--additional-data", action="store_true", help="other training data than the data set's were used")
    add("--footnote", help="what else readers should know")
    add("--checkpoint", type=Path, help="the weights, if they are not where the evaluation had them")
    add("--checkpoint-url", help="where the checkpoint of the folder can be downloaded")
    add("--code-url", help="where the code is")
    add("--license", help="MIT, or the address of another licence that the model is released under")
    add("--data-dir", type=Path, default=Path("data"), help="where the data set is")
    add("--benchmark", action="store_true", help="repeat the evaluation with RobustBench's own benchmark")
    add("--device", default="cpu", help="for --benchmark")
    return parser.parse_args(arguments)


def check_new(model_id: str, *, dataset: str, norm: str) -> None:
    """Refuse the identifier of a model that RobustBench has."""
    robustbench_utils()
    from robustbench.model_zoo import model_dicts
    from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel

    if model_id in model_dicts[BenchmarkDataset(dataset)].get(ThreatModel(norm), {}):
        raise ValueError(f"`--model-id`: RobustBench has a model {model_id} for {dataset} and {norm} already.")


def maker(
    name: str, *, nb_classes: int, input_size: tuple[int, ...]
) -> tuple[Callable[..., nn.Module], dict[str, Any]]:
    """Give what makes the network without its weights, and the arguments of that."""
    if ":" in name:
        return load_function(name), {}
    if timm.is_model(name):
        return create_backbone, {"name": name, "num_classes": nb_classes, "input_size": tuple(input_size)}
    raise ValueError(f"`run`: the evaluation is of {name}, which is one of RobustBench's own models.")


def check_adversarial(report: RobustnessReport, path: Path, data: EvaluationData, network: nn.Module) -> list[str]:
    """Make sure that adversarial examples, verdicts, data and network belong together, and say how far they do."""
    try:
        adversarial = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"`run`: {path} cannot be read: {error}.") from error
    x, y = torch.as_tensor(data.x), torch.as_tensor(data.y)
    if not isinstance(adversarial, torch.Tensor) or adversarial.shape != x.shape:
        raise ValueError(f"`run`: {path} does not hold an adversarial example for each of the {len(x)} examples.")
    size = torch.linalg.vector_norm((adversarial - x).flatten(1), ord=ORDERS[report.norm], dim=1).max().item()
    if size > report.eps * (1 + 1e-4) or adversarial.min() < 0 or adversarial.max() > 1:
        raise ValueError(f"`run`: {path} is not within ε = {report.eps:g} of the data in `--data-dir`: {size:g}.")
    return [
        compare(correct(network, images, y), verdicts, what)
        for images, verdicts, what in (
            (x, report.clean, "on the test images"),
            (adversarial, report.autoattack, "on the adversarial examples"),
        )
    ]


def compare(verdicts: npt.NDArray[np.bool_], evaluated: npt.NDArray[np.bool_] | None, what: str) -> str:
    """Say how far the verdicts are those of the evaluation; another machine may round to another class."""
    different = (verdicts != evaluated).nonzero()[0].tolist()
    if len(different) > TOLERATED * len(verdicts):
        raise ValueError(
            f"`run`: {what} the network decides otherwise than in the evaluation for {len(different)} of "
            f"{len(verdicts)} examples: {', '.join(map(str, different[:5]))} ... Is `--checkpoint` the one that was "
            "evaluated, on these data?"
        )
    return f"{what}: {len(verdicts) - len(different)} of {len(verdicts)} verdicts are those of the evaluation"


@torch.no_grad()
def correct(network: nn.Module, x: torch.Tensor, y: torch.Tensor) -> npt.NDArray[np.bool_]:
    """Tell whether each image is classified correctly."""
    return (torch.cat([network(batch).argmax(1) for batch in x.split(128)]) == y).numpy()


def form(
    args: argparse.Namespace,
    report: RobustnessReport,
    about: dict[str, Any],
    *,
    doubts: list[str],
    checks: list[str],
    definition: str,
) -> str:
    """Fill in RobustBench's "New Model(s)" form."""
    eps = format_eps(report.eps, report.norm)
    dataset, norm = about["data"]["name"], report.norm
    head = f"[New Model] {args.model_id}"
    warning = ""
    if doubts:
        items = "\n".join(f"> - {doubt}" for doubt in doubts)
        warning = f"> **Not a leaderboard claim as it stands:**\n>\n{items}\n\n"
    public = args.checkpoint_url and args.code_url
    places = f"checkpoint: {args.checkpoint_url or TODO}, code: {args.code_url or TODO}"
    mit = args.license == "MIT"
    custom = args.license if args.license and not mit else None
    # RobustBench's own helper for normalisation is no architecture.
    architectures = re.search(r"from robustbench\.model_zoo\.architectures\.(?!utils_architectures)", definition)
    needed = " The definition needs the package art_clat." if "from art_clat" in definition else ""
    checked = "\n".join(f"- {check}" for check in checks)
    packages = ", ".join(f"{name} {version}" for name, version in about.get("versions", {}).items())
    attacks = ", ".join(report.attacks)
    return f"""Title: {head}

{warning}# Paper Information

- **Paper Title**: {args.title}
- **Paper URL**: {args.link}
- **Paper authors**: {args.authors}

# Leaderboard Claim(s)

## Model 1

- **Architecture**: {args.architecture}
- **Threat Model**: {norm}
- **eps**: {eps}
- **Clean accuracy**: {report.clean_accuracy:.2%}
- **Robust accuracy**: {report.autoattack_accuracy:.2%}
- **Additional data**: {str(args.additional_data).lower()}
- **Evaluation method**: AutoAttack, {report.autoattack_version} version ({attacks}), on the first {report.nb_examples}
  test images of {dataset}, seed {report.seed}, batches of {about.get("batch_size", TODO)}; {packages}.
  `{about.get("command", TODO)}`
- **Checkpoint and code**: {places}

# Model Zoo:

- [{"x" if public else " "}] I want to add my models to the Model Zoo (check if true)
- [{" " if architectures else "x"}] I use an architecture that is **not** included among those
  [here](https://github.com/RobustBench/robustbench/tree/master/robustbench/model_zoo/architectures) (check if true).
- [{"x" if mit else " "}] I agree to release my model(s) under MIT license (check if true) **OR**
- [{"x" if custom else " "}] I want my models to be released under a custom license, located here: \
{custom or ("" if mit else TODO)}

# Files

| file | for |
| --- | --- |
| `model_info/{dataset}/{norm}/{args.model_id}.json` | RobustBench's `model_info/` |
| `{definition_of(args)}` | the definition, registered with timm |
| `model_zoo_entry.py` | the entry for `robustbench/model_zoo/{dataset}.py`, in the dictionary of {norm} |
| `models/{dataset}/{norm}/{args.model_id}.pt` | the checkpoint |
| `leaderboard_row.md` | the row, by RobustBench's `list_available_models` |
| `evaluation/` | AutoAttack's log, adversarial examples, and the verdict on each example after each attack |

The network was loaded from these files by RobustBench's `load_model`, and checked:

{checked}

In this folder:{needed}

```python
import sys

sys.path.insert(0, "{Path(definition_of(args)).parent}")
import {Path(definition_of(args)).stem}  # registers it with timm; within RobustBench, its model zoo does
from robustbench.utils import load_model

model = load_model(
    "{args.model_id}",
    dataset="{dataset}",
    threat_model="{norm}",
    custom_checkpoint="models/{dataset}/{norm}/{args.model_id}.pt",
)
```
"""


def definition_of(args: argparse.Namespace) -> str:
    """Name the file of the definition, where RobustBench keeps such."""
    return f"robustbench/model_zoo/architectures/{args.model_id.lower().replace('-', '_')}.py"


def pack(args: argparse.Namespace, folder: Path) -> list[str]:
    """Write everything into an empty folder, and say what keeps it from being a claim."""
    report, about = RobustnessReport.load(args.run)
    model, data = about.get("model"), about.get("data")
    if not isinstance(model, dict) or not isinstance(data, dict) or "name" not in model or "name" not in data:
        raise ValueError(f"`run`: {args.run / 'report.json'} does not say of which model and data it is.")
    if report.autoattack is None:
        raise ValueError(f"`run`: {args.run} has no AutoAttack result, which RobustBench's entries are made of.")
    for name in ("autoattack.log", "adversarial.pt"):
        if not (args.run / name).is_file():
            raise ValueError(f"`run`: {args.run} lacks {name}.")
    dataset, norm = data["name"], report.norm
    setting = {"model_id": args.model_id, "dataset": dataset, "norm": norm}
    timm_name(**setting)  # refuses what RobustBench could not load
    check_new(args.model_id, dataset=dataset, norm=norm)
    preprocessing = (data.get("preprocessing") or IMAGENET_PREPROCESSING) if dataset == "imagenet" else None
    tests = load_data(dataset, data_dir=args.data_dir, nb_examples=report.nb_examples, preprocessing=preprocessing)
    make, arguments = maker(model["name"], nb_classes=tests.nb_classes, input_size=tests.x.shape[1:])
    network = load_model(
        model["name"],
        dataset=dataset,
        norm=norm,
        nb_classes=tests.nb_classes,
        input_size=tests.x.shape[1:],
        checkpoint=args.checkpoint or model.get("checkpoint"),
    )
    if not isinstance(network, nn.Module):
        raise ValueError(f"`run`: {model['name']} gives an ART classifier; RobustBench needs the network alone.")
    definition = folder / definition_of(args)
    checkpoint = folder / "models" / dataset / norm / f"{args.model_id}.pt"
    for path in (definition, checkpoint, folder / "evaluation" / "report.json"):
        path.parent.mkdir(parents=True)
    text = model_definition(make, arguments, **setting, checkpoint_url=args.checkpoint_url, preprocessing=preprocessing)
    definition.write_text(text, encoding="utf-8")
    write_checkpoint(network, checkpoint, definition, **setting)
    loaded = load_from_robustbench(definition, checkpoint, **setting)
    size = f"{sum(parameter.numel() for parameter in loaded.parameters()):,} parameters"
    checks = [f"evaluated as {model['name']}, {size}: is `{args.architecture}` what RobustBench calls it?"]
    checks += check_adversarial(report, args.run / "adversarial.pt", tests, loaded)

    write_robustbench_entry(
        report, model_id=args.model_id, dataset=dataset, directory=folder, link=args.link, name=args.title,
        authors=args.authors, venue=args.venue, architecture=args.architecture, additional_data=args.additional_data,
        footnote=args.footnote,
    )  # fmt: skip
    if args.benchmark:
        with tempfile.TemporaryDirectory() as apart:
            *_, theirs = run_benchmark(
                loaded, **setting, eps=report.eps, nb_examples=report.nb_examples, data_dir=args.data_dir,
                directory=apart, batch_size=about["batch_size"], seed=report.seed, device=args.device,
                preprocessing=preprocessing,
            )  # fmt: skip
        checks.append(compare(theirs, report.autoattack, "by RobustBench's own `benchmark`, with the same seed"))
    doubts = leaderboard_shortfalls(report, dataset) + preprocessing_shortfalls(preprocessing, **setting)
    row = leaderboard_row(args.model_id, dataset=dataset, norm=norm, directory=folder)
    note = f"\nNot a leaderboard claim as it stands: {'; '.join(doubts)}.\n" if doubts else ""
    note += "\nThe rank is that among the entries in this folder.\n"
    (folder / "leaderboard_row.md").write_text(row + note, encoding="utf-8")
    module = definition.stem
    (folder / "model_zoo_entry.py").write_text(
        f"# For robustbench/model_zoo/{dataset}.py: the import, and an item of the dictionary of ThreatModel.{norm}.\n"
        f"import timm\n\nfrom robustbench.model_zoo.architectures import {module}  # noqa: F401, registers it\n\n"
        f"{zoo_entry(**setting)}",
        encoding="utf-8",
    )
    for name in ("report.json", "verdicts.npz", "autoattack.log", "adversarial.pt", "waterfall.png"):
        if (args.run / name).is_file():
            shutil.copyfile(args.run / name, folder / "evaluation" / name)
    if args.additional_data:
        doubts.append("additional training data: not to be compared with models trained without; RobustBench marks it")
    (folder / "ISSUE.md").write_text(
        form(args, report, about, doubts=doubts, checks=checks, definition=text), encoding="utf-8"
    )
    return doubts


def main(arguments: list[str]) -> None:
    """Write the folder, whole or not at all."""
    args = parse(arguments)
    try:
        for name in ("title", "authors", "link"):
            if set(getattr(args, name)) & {"…"} or not getattr(args, name).strip(" ."):
                raise ValueError(f"`--{name}` {getattr(args, name)!r} is a placeholder.")
        if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
            raise ValueError(f"`--output`: {args.output} holds something already. Name a new or empty folder.")
        args.output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=args.output.parent, prefix=".submission-") as apart:
            folder = Path(apart) / "submission"
            folder.mkdir()
            doubts = pack(args, folder)
            folder.replace(args.output)
    except (ValueError, TypeError, OSError, ImportError) as error:
        sys.exit(f"robustbench_submission.py: {error}")
    for doubt in doubts:
        print(f"! {doubt}")
    print(f"{args.output}/ISSUE.md is the filled form; search the folder for {TODO}.")


if __name__ == "__main__":
    main(sys.argv[1:])
