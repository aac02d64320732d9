"""The results as Markdown."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from typing import Any

from paper_tables.markdown import markdown_table

from speed.bench import CHUNK
from speed.contenders import ATTACK
from speed.savings import SAVINGS

Results = Mapping[str, Mapping[str, Any]]

COLUMNS = (
    *("epoch of", "seconds", "in F", "spread", "ART Madry / this", "this / our PGD-AT", "FLOPs, in F"),
    *("time / FLOP time", "peak memory / our PGD-AT"),
)


def speed_page(results: Results, setting: Mapping[str, Any]) -> str:
    """Write what epochs cost."""
    introduction = (
        f"{circumstances(setting)} `F` is the time of the plain forward pass (no gradients, evaluation mode, "
        f"the faster of {setting['batch size']} and {CHUNK} images at once) over the same images. `FLOPs` are counted "
        "by `torch.utils.flop_counter` (too many for the weight gradients of depth-wise convolutions), in forward "
        "passes; the column after it is measured time over the time that they would take at the plain forward pass's "
        "rate. Peak memory is that of all tensors of the run that were not there before it."
    )
    sections = [_model_section(model, result) for model, result in results.items()]
    return _page("What an epoch costs", introduction, sections, setting)


def savings_page(results: Results, setting: Mapping[str, Any]) -> str:
    """Write what each way of saving time brings."""
    introduction = (
        f"{circumstances(setting)} Seconds of an epoch, and how many times as many it takes with one "
        "saving taken away, all others in place. "
        "CLAT's chosen layer is the last in the first half of the network's FLOPs."
    )
    sections = []
    for model, result in results.items():
        median = _medians(result)
        epochs = list(dict.fromkeys(name.split(" / ")[0] for name in median))
        rows = [["(nothing taken away, seconds)", *(f"{median[f'{epoch} / None']:.2f}" for epoch in epochs)]]
        for saving in SAVINGS:
            rows.append([saving, *(f"{median[f'{e} / {saving}'] / median[f'{e} / None']:.2f}" for e in epochs)])
        sections.append(f"## {model}\n\n{markdown_table(['without', *epochs], rows)}")
    return _page("What each saving brings", introduction, sections, setting)


def circumstances(setting: Mapping[str, Any]) -> str:
    """Say where and how it was measured."""
    precision = setting.get("precision", "float32")
    multiplied = {"float32": "", "tf32": " in TF32", "bfloat16": " in bfloat16 (ART's trainers: TF32)"}[precision]
    return (
        f"{setting['machine']}, {setting['device']}{multiplied}; {setting['date']}; batches of "
        f"{setting['batch size']} images of 3×32×32, PGD with {ATTACK['max_iter']} steps; medians of "
        f"{setting['repeats']} repeats, contenders taking turns in random order."
    )


def _page(title: str, introduction: str, sections: list[str], setting: Mapping[str, Any]) -> str:
    record = f"```json\n{json.dumps(setting, indent=2)}\n```"
    return "\n\n".join([f"# {title}", introduction, *sections, record]) + "\n"


def _medians(result: Mapping[str, Any]) -> dict[str, float]:
    return {name: statistics.median(times) for name, times in result["seconds"].items() if times}


def _model_section(model: str, result: Mapping[str, Any]) -> str:
    median = _medians(result)
    forward = min(value for name, value in median.items() if name.startswith("forward"))
    where = "; ".join(f"{k}: `{n}` ({100 * share:.0f} % of F)" for k, (n, share) in result["layers"].items())
    others = ("forward", "up to", "criticality", "its attack")
    rows = [_row(name, result, median, forward) for name in median if not name.startswith(others)]
    rows += [[name, f"failed: {message}"] for name, message in result["failed"].items()]
    cut_short = {
        place: median[f"up to {place}"] / forward / share for place, (_, share) in result["layers"].items() if share < 1
    }
    return "\n\n".join(
        [
            f"## {model}",
            f"{result['number of layers']} layers; chosen, in turn: {where}. Batches in an epoch: {result['batches']}.",
            markdown_table(COLUMNS, rows),
            "What the early layers cost beyond their FLOPs whoever runs them, time / FLOP time of the plain forward "
            "pass cut short after the layer of the "
            + " and of the ".join(f"{place}: {ratio:.2f}" for place, ratio in cut_short.items())
            + ".",
            f"Criticality of all {result['number of layers']} layers / the attack it contains: "
            f"{median['criticality'] / median['its attack']:.3f}.",
        ]
    )


def _row(name: str, result: Mapping[str, Any], median: Mapping[str, float], forward: float) -> list[str]:
    """Return a contender's cells; `forward` is F in seconds."""
    value, times = median[name], result["seconds"][name]
    counted, memory = result["flops"].get(name), result["peak memory"].get(name)
    share = counted / result["flops"]["forward"] if counted else None
    numbers = (
        share,
        value / forward / share if share else None,
        memory / result["peak memory"]["PGD-AT"] if memory else None,
    )
    return [
        name,
        f"{value:.2f}",
        f"{value / forward:.1f}",
        f"{(max(times) - min(times)) / value:.0%}",
        f"{median['ART Madry PGD'] / value:.2f}" if "ART Madry PGD" in median else "",
        f"{value / median['PGD-AT']:.2f}",
        *("" if number is None else f"{number:.2f}" for number in numbers),
    ]
