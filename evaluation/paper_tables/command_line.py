"""The commands ``run``, ``stability``, ``collect`` and ``aggregate``."""

from __future__ import annotations

import argparse
import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import paper_tables
from paper_tables.configuration import CONFIGURATION, Study, load_configuration
from paper_tables.experiment import Experiment
from paper_tables.jobs import measure_all, run_all
from paper_tables.page import aggregate
from paper_tables.results import RefusedError, Results

RESULTS = Path(__file__).parents[1] / "results" / "paper_tables"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; a refused result ends it with a message."""
    parser = make_parser()
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("paper_tables").setLevel(logging.INFO)
    if args.minutes is not None:  # Like a kill: every saved file is whole.
        timer = threading.Timer(60 * args.minutes, os._exit, [0])
        timer.daemon = True
        timer.start()
    try:
        study = Study.of(load_configuration(args.config), args.preset)
        arms = chosen_arms(study, args.tables, args.arms)
    except ValueError as error:
        parser.error(str(error))
    results = Results(study, results=args.results, work=args.work)
    experiment = Experiment(study, work=results.work, data=args.data, device=args.device)
    seeds = args.seeds or study.seeds
    try:
        if args.command == "run":
            run_all(experiment, results, arms, seeds, retry=args.retry)
        elif args.command == "stability":
            measure_all(experiment, results, seeds)
        else:
            results.collect()
        if args.command == "aggregate":
            print(aggregate(results), end="")
    except RefusedError as error:
        raise SystemExit(str(error)) from error


def make_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(prog="paper_tables", description=(paper_tables.__doc__ or "").split("\n\n")[0])
    parser.add_argument("command", choices=("run", "stability", "collect", "aggregate"))
    parser.add_argument("--preset", required=True)
    parser.add_argument("--config", type=Path, default=CONFIGURATION, help="presets, arms and tables")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of torchvision's CIFAR-10")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the committed files")
    parser.add_argument("--work", type=Path, default=Path("runs/paper_tables"), help="folder of jobs and checkpoints")
    parser.add_argument("--tables", nargs="+", default=None, help="run the arms of these tables (default: all)")
    parser.add_argument("--arms", nargs="+", default=None, help="run these arms instead of whole tables")
    parser.add_argument("--seeds", nargs="+", type=int, default=None, help="run these seeds (default: the preset's)")
    parser.add_argument("--retry", action="store_true", help="run failed runs again")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--minutes", type=float, default=None, help="stop after this time; the next call continues")
    return parser


def chosen_arms(study: Study, tables: Sequence[str] | None, arms: Sequence[str] | None) -> list[str]:
    """Return the arms that `--tables` and `--arms` name, all of the study by default."""
    unknown = [name for name in tables or () if name not in study.tables]
    unknown += [name for name in arms or () if name not in study.arms]
    if unknown:
        raise ValueError(
            f"no such table or arm: {', '.join(unknown)}; tables: {', '.join(study.tables)}; "
            f"arms: {', '.join(study.arms)}"
        )
    letters = tables or ([] if arms else list(study.tables))
    return list(dict.fromkeys([*(arms or []), *(arm for letter in letters for arm in study.tables[letter]["arms"])]))
