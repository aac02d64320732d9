"""Run what is not done yet, and write the tables."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import speed
from art_clat.utils.environment import describe_environment
from speed.bench import Bench
from speed.contenders import PRECISIONS, Setting, matmul_precision
from speed.models import MODELS
from speed.tables import savings_page, speed_page

RESULTS = Path(__file__).parents[1] / "results"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = make_parser()
    args = parser.parse_args(arguments)
    if args.preset == "smoke":
        args.models, args.batch_size, args.batches, args.repeats = ["small CNN"], 8, 1, 1
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    output: Path = args.output or RESULTS / default_name(args)
    output.parent.mkdir(parents=True, exist_ok=True)
    raw = output.with_suffix(".json")
    content: dict[str, Any] = json.loads(raw.read_text()) if raw.exists() else {"results": {}}
    if args.tables_only and not content["results"]:
        parser.error(f"--tables-only: there are no results in {raw}")
    if not args.tables_only:
        setting = describe_setting(args, sys.argv[1:] if arguments is None else arguments)
        if content["results"] and comparable(content["setting"]) != comparable(setting):
            parser.error(
                f"{raw} holds results of another setting: {comparable(content['setting'])}. Move it away, or pass "
                "another --output."
            )
        content["setting"] = setting
        with matmul_precision(args.precision):
            measure_models(args, content, raw)
    text = (savings_page if args.savings else speed_page)(content["results"], content["setting"])
    output.write_text(text)
    print(text, end="")


def make_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(prog="speed", description=(speed.__doc__ or "").strip().split("\n\n")[0])
    parser.add_argument("--preset", choices=("full", "smoke"), default="full")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--batches", type=int, help="batches in an epoch; default: 4 for the small CNN, 1 for others")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--savings", action="store_true", help="take what saves time away, one thing at a time")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="PART", help="contenders with one of these in the name"
    )
    parser.add_argument("--output", type=Path, help="Markdown; default: evaluation/results/speed[-savings]-DEVICE.md")
    parser.add_argument("--tables-only", action="store_true", help="write the Markdown from the JSON beside it")
    return parser


def default_name(args: argparse.Namespace) -> str:
    """Return the name of the page."""
    precision = "" if args.precision == "float32" else f"-{args.precision}"
    return f"speed{'-savings' * args.savings}-{args.device}{precision}.md"


def describe_setting(args: argparse.Namespace, arguments: Sequence[str]) -> dict[str, Any]:
    """Return what the results say of how they were made."""
    environment = describe_environment("cpu")
    return {
        "command": shlex.join(["python", "evaluation/speed", *arguments]),
        "machine": environment["machine"],
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "CPU",
        "precision": args.precision,
        "batch size": args.batch_size,
        "batches": args.batches,
        "repeats": args.repeats,
        "seed": args.seed,
        "only": args.only,
        "versions": environment["versions"],
        "date": environment["date"],
    }


def comparable(setting: dict[str, Any]) -> dict[str, Any]:
    """Return what must be equal for results to stand in one table."""
    return {key: value for key, value in setting.items() if key not in ("date", "command") and value != []}


def measure_models(args: argparse.Namespace, content: dict[str, Any], raw: Path) -> None:
    """Measure the models that the file lacks, and save after each."""
    setting = Setting(
        device=args.device,
        precision=args.precision,
        batch_size=args.batch_size,
        batches=args.batches,
        repeats=args.repeats,
        seed=args.seed,
        only=args.only,
        smoke=args.preset == "smoke",
    )
    for model in args.models:
        if model in content["results"]:
            continue
        print(model, file=sys.stderr)
        bench = Bench(model, setting)
        content["results"][model] = bench.run_savings() if args.savings else bench.run()
        raw.write_text(json.dumps(content, indent=1) + "\n")
