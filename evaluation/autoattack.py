"""
AutoAttack on a model: robust accuracy after each of its attacks, as a table, a plot and files.

    python evaluation/autoattack.py --model resnet18 --checkpoint best.safetensors --dataset cifar10 --eps 8/255
    python evaluation/autoattack.py --model Carmon2019Unlabeled --dataset cifar10 --eps 8/255 --n-examples 1000
    torchrun --nproc-per-node 4 evaluation/autoattack.py --model mine.py:make --dataset test.npz --norm L2 --eps 0.5

Every batch is saved under ``--output`` when an attack is done with it: killed, the same command continues, on any
number of processes, and ends with the same verdicts and adversarial examples. Processes take whole batches. At the end
the folder holds ``report.json``, ``verdicts.npz``, ``adversarial.pt``, ``autoattack.log`` and ``waterfall.png``.
"""

import argparse
import datetime
import importlib.metadata
import logging
import os
import platform
import shlex
import sys
from fractions import Fraction
from pathlib import Path

import torch
from art.estimators.classification import PyTorchClassifier

from art_clat import evaluate_robustness
from art_clat.models.by_name import imagenet_preprocessing, load_model
from art_clat.models.datasets import DATASETS, load_data
from art_clat.robustness.autoattack import VERSIONS
from art_clat.robustness.checks import count_classes
from art_clat.robustness.evaluate import PATIENCE
from art_clat.utils.processes import Ranks

PACKAGES = ("art_clat", "torch", "numpy", "adversarial-robustness-toolbox", "timm", "pyautoattack", "robustbench")


def parse(arguments):
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="a timm name, a RobustBench model id, module:function or file.py:function")
    add("--checkpoint", type=Path, help="weights: .safetensors, or a state_dict of torch.save")
    add("--model-dir", type=Path, default=Path("models"), help="where RobustBench keeps its models' weights")
    add("--dataset", required=True, help=f"{', '.join(DATASETS)}, an image folder, or an .npz file with x and y")
    add("--data-dir", type=Path, default=Path("data"), help="where CIFAR or ImageNet is")
    add(
        "--preprocessing",
        help="RobustBench's name of how ImageNet's or a folder's images are resized; of ImageNet's, unless told, as "
        "RobustBench does it for its models, Res256Crop224 for others",
    )
    add("--num-classes", type=int, help="if the data do not say")
    add("--n-examples", type=int, help="how many; all of them unless told")
    add("--norm", choices=("Linf", "L2", "L1"), default="Linf")
    add("--eps", type=fraction, required=True, help="for images in [0, 1]: 8/255, 0.5")
    add("--version", choices=(*VERSIONS, "none"), default="standard", help="AutoAttack's; none leaves it out")
    add("--pgd-steps", type=int, default=20)
    add("--pgd-restarts", type=int, default=1)
    add("--transfer-from", help="another model, whose adversarial examples are tried on this one")
    add("--transfer-checkpoint", type=Path, help="its weights")
    add("--batch-size", type=int, default=128)
    add("--seed", type=int, default=0)
    add("--device", help="cuda if there is one, otherwise cpu, unless told")
    add("--output", type=Path, required=True, help="folder for the results and for what a killed run has done")
    return parser.parse_args(arguments)


def fraction(text):
    """Read a number, or a quotient of two."""
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"a number such as 8/255 or 0.5, got {text!r}") from None


def choose_device(name):
    """Take the named device; of several processes each its own GPU."""
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def outputs_of(model, x):
    """Count a network's outputs."""
    if isinstance(model, PyTorchClassifier):
        return model.nb_classes
    with torch.no_grad():
        return count_classes(model, torch.as_tensor(x), "model")


def run(args, command):
    """Evaluate, and let the first process write what came out."""
    device = choose_device(args.device)
    preprocessing = args.preprocessing
    if args.dataset == "imagenet" and preprocessing is None:
        preprocessing = imagenet_preprocessing(args.model, args.norm)
    ranks = Ranks.join(device, PATIENCE)
    state = args.output / "state"
    if (args.output / "report.json").exists() and not state.exists():
        raise ValueError(f"`output`: {args.output} holds the results of something else. Name another folder.")
    with ranks.together():
        for turn in (True, False):  # the first one alone, since it may have to download
            if (ranks.rank == 0) == turn:
                data = load_data(
                    args.dataset,
                    data_dir=args.data_dir,
                    nb_examples=args.n_examples,
                    preprocessing=preprocessing,
                    nb_classes=args.num_classes,
                )
                models = [
                    load_model(
                        name,
                        dataset=args.dataset,
                        norm=args.norm,
                        nb_classes=data.nb_classes,
                        input_size=data.x.shape[1:],
                        checkpoint=checkpoint,
                        model_dir=args.model_dir,
                    )
                    for name, checkpoint in (
                        (args.model, args.checkpoint),
                        (args.transfer_from, args.transfer_checkpoint),
                    )
                    if name is not None
                ]
            ranks.gather(None)
    if Path(args.dataset).is_dir():
        nb_outputs = outputs_of(models[0], data.x[:1])
        if nb_outputs != data.nb_classes:
            raise ValueError(
                f"`dataset`: {args.dataset} has {data.nb_classes} folders, the network has {nb_outputs} outputs: "
                "labels are the folders' numbers in alphabetical order, so that every class needs its folder."
            )
    model, source = (m if isinstance(m, PyTorchClassifier) else m.to(device) for m in (models[0], models[-1]))
    log = logging.getLogger("art_clat.robustness.evaluate")
    log.setLevel(logging.INFO)
    handler = logging.FileHandler(args.output / "autoattack.log", mode="w", encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(handler)
    try:
        report = evaluate_robustness(
            model,
            data.x,
            data.y,
            norm=args.norm,
            eps=float(args.eps),
            autoattack_version=None if args.version == "none" else args.version,
            pgd_max_iter=args.pgd_steps,
            pgd_restarts=args.pgd_restarts,
            transfer_from=source if args.transfer_from else None,
            batch_size=args.batch_size,
            seed=args.seed,
            checkpoint=state,
            verbose=True,
        )
    finally:
        log.removeHandler(handler)
        handler.close()
    if ranks.rank > 0:
        return
    report.save(
        args.output,
        model={"name": args.model, "checkpoint": args.checkpoint and str(args.checkpoint)},
        transfer_from={"name": args.transfer_from, "checkpoint": str(args.transfer_checkpoint)}
        if args.transfer_from
        else None,
        data={
            "name": args.dataset,
            "shape": list(data.x.shape),
            "preprocessing": repr(preprocessing) if callable(preprocessing) else preprocessing,
        },
        batch_size=args.batch_size,
        command=command,
        processes=ranks.size,
        date=datetime.date.today().isoformat(),
        machine=f"{platform.machine()}, {os.cpu_count()} CPU cores"
        + (f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""),
        versions={"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}},
    )
    print(f"{report}\nEverything else is in {args.output}.")


def main():
    """Say what is wrong in a line, without a traceback."""
    args = parse(sys.argv[1:])
    sys.path[0] = str(Path.cwd())  # modules of the user's, not the scripts beside this one
    try:
        size = os.environ.get("WORLD_SIZE", "1")
        launcher = ["python"] if size == "1" else ["torchrun", "--nproc-per-node", size]
        run(args, shlex.join([*launcher, "evaluation/autoattack.py", *sys.argv[1:]]))
    except KeyboardInterrupt:
        sys.exit(f"autoattack.py: interrupted; the same command goes on where {args.output} was left.")
    except (ValueError, TypeError, OSError, ImportError) as error:
        sys.exit(f"autoattack.py: {error}")


if __name__ == "__main__":
    main()
