"""What counts as one layer, by name: weighted modules, timm's blocks, or modules that the user names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from timm.models import group_parameters
from torch import nn

from art_clat.config import Granularity


@dataclass(frozen=True, eq=False)
class Group:
    """
    Parameters that are trained, or frozen, as one layer.

    :param name: Name of the module that holds them, or of the first and the last one that do.
    :param modules: The modules that hold these parameters and no others, by name; a module comes before those within
           it.
    :param parameters: The parameters.
    """

    name: str
    modules: dict[str, nn.Module]
    parameters: tuple[nn.Parameter, ...]


def find_groups(model: nn.Module, granularity: Granularity) -> list[Group] | None:
    """
    Group a network's parameters into layers.

    timm's grouping is ``group_matcher``, which its models offer to optimisers for layer-wise learning rates. Nearly all
    models have it, and it covers every parameter. ``forward_intermediates`` was not used: fewer models have it, and it
    leaves out stem and head.

    :param model: The network; it may contain timm's at any depth.
    :param granularity: ``"block"`` for timm's grouping, or module names and regular expressions that match whole names;
           each module that matches is a layer. ``"layer"`` groups nothing.
    :return: The groups, each with at least one parameter; `None` for ``"layer"``.
    :raises ValueError: If timm has no grouping for the network; or if a name or expression matches nothing, only
            modules without parameters, or a module within another one that matches.
    """
    if granularity == "layer":
        return None
    if granularity == "block":
        return _blocks(model)
    return _matching(model, granularity)


def _blocks(model: nn.Module) -> list[Group]:
    announcing = (
        (prefix, module) for prefix, module in model.named_modules() if callable(getattr(module, "group_matcher", None))
    )
    prefix, module = next(announcing, ("", None))
    if module is None:
        raise ValueError(
            f"`granularity='block'` groups a network as timm does, and {type(model).__name__} has no `group_matcher`; "
            "'layer' and a list of module names are accepted."
        )
    within = f"{prefix}." if prefix else ""
    numbers = group_parameters(module, module.group_matcher(coarse=False), reverse=True)
    group_of = {f"{within}{name}": number for name, number in numbers.items()}
    # For every module, the numbers of the groups that its parameters belong to.
    held: dict[str, set[int]] = {}
    for parameter, number in group_of.items():
        name = parameter
        while name := name.rpartition(".")[0]:
            held.setdefault(name, set()).add(number)
    # Under all their names: a wrapper may hold modules of timm's network under other names.
    modules = dict(model.named_modules(remove_duplicate=False))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    groups = []
    for number in sorted(set(group_of.values())):
        whole = {name: module for name, module in modules.items() if held.get(name) == {number} and name != prefix}
        names = outermost(whole) or [name for name, group in group_of.items() if group == number]
        groups.append(
            Group(
                name=names[0] if len(names) == 1 else f"{names[0]}...{names[-1]}",
                modules=whole,
                parameters=tuple(parameters[name] for name, group in group_of.items() if group == number),
            )
        )
    return groups


def _matching(model: nn.Module, patterns: Sequence[str]) -> list[Group]:
    if not patterns:
        raise ValueError("`granularity` is an empty list; name at least one module or regular expression.")
    modules = {name: module for name, module in model.named_modules() if name}
    chosen: dict[str, nn.Module] = {}
    for pattern in patterns:
        matches = [pattern] if pattern in modules else _full_matches(pattern, modules)
        if not matches:
            similar = difflib.get_close_matches(pattern, modules, n=3, cutoff=0.4)
            hint = f" Close to it: {', '.join(map(repr, similar))}." if similar else ""
            raise ValueError(f"`granularity`: {pattern!r} matches no module of the network.{hint}")
        weighted = [name for name in matches if next(modules[name].parameters(), None) is not None]
        if not weighted:
            raise ValueError(
                f"`granularity`: {pattern!r} matches only modules without parameters, such as {matches[0]!r}."
            )
        chosen |= {name: modules[name] for name in weighted}
    for name in chosen:
        outer = next((other for other in chosen if name.startswith(f"{other}.")), None)
        if outer is not None:
            raise ValueError(f"`granularity`: {name!r} is within {outer!r}, and both match. Name only one of them.")
    return [
        Group(
            name=name,
            modules={name: module} | {f"{name}.{inner}": child for inner, child in module.named_modules() if inner},
            parameters=tuple(module.parameters()),
        )
        for name, module in chosen.items()
    ]


def _full_matches(pattern: str, names: dict[str, nn.Module]) -> list[str]:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"`granularity`: {pattern!r} is neither a module name nor a regular expression: {error}."
        ) from error
    return [name for name in names if expression.fullmatch(name)]


def outermost(modules: Mapping[str, object]) -> list[str]:
    """Return the names of the modules that are not within another one of them."""
    return [
        name
        for name in modules
        if not any(name[:end] in modules for end, character in enumerate(name) if character == ".")
    ]
