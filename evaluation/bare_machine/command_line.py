"""The command ``evaluation/gpu.py``."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from bare_machine.requirements import check_requirements

ROOT = Path(__file__).parents[2]


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Pack, or run a part.

    :raises SystemExit: With 1 if something failed, 0 otherwise, also if something is left to do.
    """
    started = time.monotonic()
    parser = make_parser()
    args = parser.parse_args(arguments)
    if (args.pack is None) == (args.part is None):
        parser.error("pass one of --pack and --part")
    if args.pack is not None:
        from bare_machine.packing import instructions, pack

        print(instructions(pack(args.pack, args.data)))
        return
    if args.minutes <= 0:
        parser.error(f"--minutes must be above 0, got {args.minutes}")
    check_requirements()
    run(parser, args, until=started + 60 * args.minutes)


def make_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(prog="gpu.py", description="Run a part on a machine that has a GPU for minutes.")
    parser.add_argument("--part", choices=("tests", "speed", "train"))
    parser.add_argument("--pack", type=Path, metavar="DIR", help="collect in DIR what must travel to the machine")
    parser.add_argument("--minutes", type=float, default=9.0, help="end before so many minutes have passed")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="cpu: a small form, to see it run")
    parser.add_argument("--data", type=Path, help="folder of torchvision's CIFAR-10; default: data, if it is there")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"), help="folder of the results")
    return parser


def run(parser: argparse.ArgumentParser, args: argparse.Namespace, *, until: float) -> None:
    """Run a part and report."""
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU; --device cpu runs a small form of the part")
    data = args.data or (ROOT / "data" if (ROOT / "data").is_dir() else None)
    if args.part == "train" and args.device == "cuda" and data is None:
        parser.error("--part train needs the folder of CIFAR-10: --data DIR")
    from art_clat.utils.environment import describe_environment  # takes seconds
    from bare_machine.outputs import PartResult, join_large_files, split_large_files
    from bare_machine.parts import run_part, steps_of

    started = time.monotonic()
    folder = (args.output / args.part).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    result = PartResult.resume(folder, args.part, device, describe_environment(args.device))
    join_large_files(folder)
    steps = steps_of(args.part, device=args.device, data=data and data.absolute(), folder=folder)
    try:
        run_part(steps, result, folder, until=until)
    finally:
        result.seconds += time.monotonic() - started
        result.write(folder)
        split_large_files(folder)
    print(result.summary())
    if result.failed:
        raise SystemExit(1)
