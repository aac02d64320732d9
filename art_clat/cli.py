"""The command line, `art-clat`: parsers, and which function does the work."""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import art_clat
from art_clat.models.class_order import ORDERS
from art_clat.models.datasets import DATASETS
from art_clat.models.weight_files import WEIGHTS
from art_clat.robustness.autoattack import VERSIONS

EVALUATE = """
Measure clean accuracy and accuracy under PGD and AutoAttack, after each of AutoAttack's attacks.

    art-clat evaluate --model resnet18 --checkpoint best.safetensors --dataset cifar10 --eps 8/255 --output runs/a
    art-clat evaluate --model Carmon2019Unlabeled --dataset cifar10 --eps 8/255 --n-examples 1000 --output runs/b
    torchrun --nproc-per-node 4 -m art_clat evaluate --model mine.py:make --dataset test.npz --norm L2 --eps 0.5 \\
        --output runs/c

Every batch is saved under --output when an attack has finished it. A killed evaluation continues with the same command,
on any number of processes, and ends with the same verdicts and adversarial examples. Processes share whole batches.
At the end the folder holds report.json, verdicts.npz, adversarial.pt, autoattack.log and waterfall.png.
"""

SUBMIT = """
Pack an evaluation as RobustBench's "New Model(s)" form asks.

    art-clat submit runs/evaluation --output runs/submission --model-id Someone2026Title_R18 --title "..." \\
        --authors "..." --link https://... --architecture ResNet-18

The folder holds the filled form (ISSUE.md), the model_info entry, the network's definition and its entry for the model
zoo, the weights, the leaderboard's row, and the evaluation. Before it is written, RobustBench's own load_model loads
the network from it. The network must repeat the evaluation's verdicts on the adversarial examples, which must lie
within ε. What keeps the result from being a claim to the leaderboard stands on top of the form, in the entry and below
the row.
"""

REPORT = """
Write one self-contained HTML page about evaluations and trainings.

    art-clat report runs/quickstart runs/evaluation --output report.html

A run is a folder with any of: report.json and verdicts.npz of an evaluation, also in its subfolder evaluation/ as in a
submission; a training's history, any .json file that History.to_json wrote, or last.safetensors; run.json, with the
command; model_info/<data set>/<threat model>/<model>.json of RobustBench. The page loads nothing and runs no script.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Run a subcommand. Errors of use end the process with one line.

    :param arguments: Without the program's name; `None` for those of the process.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    args = vars(parser().parse_args(given))
    name, run = args.pop("subcommand"), args.pop("run_subcommand")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)  # where the user's own modules are
    try:
        run(args, recorded(given))
    except KeyboardInterrupt:
        more = f"; the same command continues where {args['output']} was left" if name == "evaluate" else ""
        sys.exit(f"art-clat {name}: interrupted{more}.")
    except (ValueError, TypeError, OSError, ImportError) as error:
        sys.exit(f"art-clat {name}: {error}")


def parser() -> argparse.ArgumentParser:
    """
    Make the parser of all subcommands.

    :return: The parser; it sets ``subcommand`` and ``run_subcommand``, a function of the other values and the command.
    """
    top = argparse.ArgumentParser(prog="art-clat", description="Evaluate robustness, submit and report the results.")
    top.add_argument("--version", action="version", version=f"art_clat {art_clat.__version__}")
    subparsers = top.add_subparsers(dest="subcommand", required=True, metavar="evaluate | submit | report")
    for name, description, add_arguments, run in (
        ("evaluate", EVALUATE, _add_evaluate, _evaluate),
        ("submit", SUBMIT, _add_submit, _submit),
        ("report", REPORT, _add_report, _report),
    ):
        sub = subparsers.add_parser(
            name,
            help=description.strip().split("\n")[0],
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add_arguments(sub)
        sub.set_defaults(run_subcommand=run)
    return top


def fraction(text: str) -> float:
    """
    Read a number, or a quotient of two.

    :param text: E.g. ``"8/255"`` or ``"0.5"``.
    :return: The number.
    :raises argparse.ArgumentTypeError: If it is neither.
    """
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"a number such as 8/255 or 0.5, got {text!r}") from None


def recorded(arguments: Sequence[str]) -> str:
    """
    Write the command line that repeats a run.

    :param arguments: The program's arguments.
    :return: ``art-clat …``, or ``torchrun … -m art_clat …`` in one of several processes.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    launcher = ["art-clat"] if size == "1" else ["torchrun", "--nproc-per-node", size, "-m", "art_clat"]
    return shlex.join([*launcher, *arguments])


def _add_evaluate(sub: argparse.ArgumentParser) -> None:
    add = sub.add_argument
    add("--model", required=True, help="a timm name, a RobustBench model id, module:function or file.py:function")
    add("--checkpoint", type=Path, help="weights: .safetensors, a state_dict of torch.save, or the folder of a run")
    add("--weights", choices=WEIGHTS, help="which weights of a checkpoint that has both; the average by default")
    add("--model-dir", type=Path, default=Path("models"), help="where RobustBench keeps its models' weights")
    add("--dataset", required=True, help=f"{', '.join(DATASETS)}, an image folder, or an .npz file with x and y")
    add("--data-dir", type=Path, default=Path("data"), help="where CIFAR or ImageNet is")
    add(
        "--preprocessing",
        help="how to resize the images of ImageNet or of a folder, by RobustBench's name; the default for ImageNet is "
        "RobustBench's own choice for its models, and Res256Crop224 for others",
    )
    add("--class-order", choices=ORDERS, help="how an image folder's folders are sorted: torchvision's way, or timm's")
    add("--class-map", type=Path, help="which class a folder is: a name a line, or JSON")
    add("--num-classes", type=int, help="if the data do not say")
    add("--n-examples", type=int, help="number of examples; all by default")
    add("--norm", choices=("Linf", "L2", "L1"), default="Linf")
    add("--eps", type=fraction, required=True, help="for images in [0, 1]: 8/255, 0.5")
    add(
        "--version",
        choices=(*VERSIONS, "none"),
        default="standard",
        help="AutoAttack's; few-classes for 2 or 3 classes; none leaves it out",
    )
    add("--pgd-steps", type=int, default=20)
    add("--pgd-restarts", type=int, default=1)
    add("--transfer-from", help="another model; its adversarial examples are tried on this one")
    add("--transfer-checkpoint", type=Path, help="the other model's weights")
    add("--batch-size", type=int, default=128)
    add("--seed", type=int, default=0)
    add("--device", help="cuda if there is one, otherwise cpu, by default")
    add("--output", type=Path, required=True, help="folder for the results, and for what a killed run has done")


def _evaluate(values: dict[str, object], command: str) -> None:
    from art_clat.robustness.by_name import READING, NamedEvaluation, evaluate_by_name

    logging.basicConfig(format="%(message)s")  # the console, for the evaluation's log
    logging.getLogger(READING).setLevel(logging.INFO)
    if values["version"] == "none":
        values["version"] = None
    report = evaluate_by_name(NamedEvaluation(**values), command=command)  # type: ignore[arg-type]
    if os.environ.get("RANK", "0") == "0":
        print(f"{report}\nEverything else is in {values['output']}.")


def _add_submit(sub: argparse.ArgumentParser) -> None:
    add = sub.add_argument
    add("run", type=Path, help="folder that `art-clat evaluate` wrote")
    add("--output", type=Path, required=True, help="the folder to write; new or empty")
    add("--model-id", required=True, help="<Name><Year><FirstWordOfTheTitle>, and what tells a paper's models apart")
    add("--title", required=True, help="of the paper")
    add("--authors", required=True, help="of the paper, separated by commas")
    add("--link", required=True, help="to the paper")
    add("--venue", default="Unpublished", help="and year, e.g. ICML 2025")
    add("--architecture", required=True, help="as RobustBench writes it, e.g. ResNet-18")
    add("--additional-data", action="store_true", help="training used other data than the data set's")
    add("--footnote", help="what else readers should know")
    add("--checkpoint", type=Path, help="the weights, if they have moved since the evaluation")
    add("--checkpoint-url", help="where the packed checkpoint can be downloaded")
    add("--code-url", help="where the code is")
    add("--license", help="MIT, or the address of another licence that the model is released under")
    add("--data-dir", type=Path, default=Path("data"), help="where the data set is")
    add("--benchmark", action="store_true", help="repeat the evaluation with RobustBench's own benchmark")
    add("--device", default="cpu", help="for --benchmark")


def _submit(values: dict[str, object], command: str) -> None:
    from art_clat.leaderboard.submission import TODO, Submission, write_submission

    doubts = write_submission(Submission(**values))  # type: ignore[arg-type]
    for doubt in doubts:
        print(f"! {doubt}")
    print(f"{values['output']}/ISSUE.md is the filled form; search the folder for {TODO}.")


def _add_report(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of an evaluation or a training")
    sub.add_argument("--output", type=Path, default=Path("report.html"), help="the page")


def _report(values: dict[str, object], command: str) -> None:
    from art_clat.report.page import write_page

    output = write_page(values["runs"], values["output"])  # type: ignore[arg-type]
    print(f"{output}: {output.stat().st_size / 1e6:.2f} MB")
