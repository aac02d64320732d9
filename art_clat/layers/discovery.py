"""Find the layers of a network in execution order."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from art_clat.config import Granularity
from art_clat.layers.groups import Group, find_groups, outermost
from art_clat.layers.heads import find_heads
from art_clat.layers.kinds import is_norm, weighted_modules
from art_clat.layers.layer import Layer, Site
from art_clat.layers.weight_uses import ELEMENTWISE, PRODUCTS, WeightUses, tensors_in

logger = logging.getLogger(__name__)


#: Samples in the two forward passes that find the layers. The dimension of an output that grows from one pass to the
#: other is the batch. A module whose output has none, such as a table of attention biases, is no layer.
PROBE_SIZES = (5, 7)


def find_layers(
    model: nn.Module,
    forward: Callable[[int], torch.Tensor],
    *,
    after_norm: bool = False,
    granularity: Granularity = "layer",
) -> list[Layer]:
    """
    Find the layers of a network, in the order in which they first run.

    A module that never runs is no layer, nor is one whose weight is only added or used as a scale. All hooks are
    removed afterwards.

    :param model: The network.
    :param forward: A function that runs the network on the number of samples it is given and returns the logits.
    :param after_norm: Take a layer's feature after its norm instead of after its weighted module, if in every call the
           norm runs on this layer's output and on nothing else.
    :param granularity: What counts as one layer, see :func:`art_clat.layers.groups.find_groups`.
    :return: The layers. Each whose output reaches the logits through no other is marked as a head, and so is each that
             a timm model names as its classifier. A larger layer that contains a head is a head.
    :raises ValueError: If no weighted layer runs, or `granularity` does not fit the network.
    """
    groups = find_groups(model, granularity)
    small, large = (_Probe.run(model, forward, size) for size in PROBE_SIZES)
    names = {module: name for name, module in model.named_modules()}
    layers = []
    for module in large.records:
        if module not in large.weighted:
            continue
        layer = _make_layer(names[module], module, small, large, after_norm=after_norm)
        if layer is None:
            logger.info("%s has a weight, but its output has no batch dimension: it is not a layer.", names[module])
        else:
            layers.append(layer)
    if not layers:
        raise ValueError(
            "`classifier.model` has no weighted layer: no module with a weight of two or more dimensions "
            "(convolution, linear, ...) ran in its forward pass."
        )
    weights = {layer.modules[0]: large.records[layer.modules[0]].weight for layer in layers}
    layers = _mark_heads(layers, model, find_heads(model, forward, weights))
    return layers if groups is None else _larger_layers(groups, layers, small, large, strict=granularity != "block")


@dataclass
class _Record:
    """The shapes of the tensors that entered and left a module in a forward pass, call by call."""

    inputs: list[list[torch.Size]] = field(default_factory=list)
    outputs: list[list[torch.Size]] = field(default_factory=list)
    last: int = 0  # when the last call ended
    weight: nn.Parameter | None = None  # the weight that a function took, if the module was not called
    extra_parameters: list[nn.Parameter] = field(default_factory=list)  # biases that no weighted module holds

    def add(self, entering: object, leaving: object, time: int) -> None:
        self.inputs.append([tensor.shape for tensor in tensors_in(entering)])
        self.outputs.append([tensor.shape for tensor in tensors_in(leaving)])
        self.last = time


class _Probe:
    """Records what enters and leaves each module while a network runs, and the norms that take its output."""

    def __init__(self, model: nn.Module) -> None:
        self.weighted = weighted_modules(model)
        #: The modules that ran, in the order in which they first did.
        self.records: dict[nn.Module, _Record] = {}
        self.norms: dict[nn.Module, list[nn.Module]] = {}
        self._owners: dict[nn.Parameter, list[nn.Module]] = {}
        for module in self.weighted:
            for parameter in module.parameters():
                self._owners.setdefault(parameter, []).append(module)
        # The functions that took a weight of each module, and the modules that were called.
        self._functions: dict[nn.Module, set[str]] = {}
        self._called: set[nn.Module] = set()
        self._time = 0
        # By storage: the module that made a feature, the feature, and its version. Holding features keeps their memory
        # from being reused, so equal storage means the same tensor. An equal version means nothing was written to it.
        self._features: dict[int, tuple[nn.Module, torch.Tensor, int]] = {}

    @classmethod
    def run(cls, model: nn.Module, forward: Callable[[int], torch.Tensor], batch_size: int) -> _Probe:
        probe = cls(model)
        handles = [module.register_forward_hook(probe._ran, with_kwargs=True) for module in model.modules()]
        try:
            with torch.no_grad(), WeightUses(model.parameters(), probe._used):
                forward(batch_size)
        finally:
            for handle in handles:
                handle.remove()
        probe._features.clear()
        # A table that is added and a scale are no layers, whatever shape they are stored in.
        for module, functions in probe._functions.items():
            if functions <= ELEMENTWISE and module in probe.weighted:
                probe.weighted.remove(module)
        return probe

    def _ran(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
        self._time += 1
        if module not in self._called:
            self._called.add(module)
            used = self.records.pop(module, None)  # recorded so far as used without a call
            self.records[module] = _Record()
            if used is not None and len(used.outputs) > 1:
                logger.debug("A weight of %s is used both with and without calling the module.", type(module).__name__)
        self.records[module].add((args, kwargs), output, self._time)
        if is_norm(module):
            self._norm_ran(module, args, output)
        elif module in self.weighted:
            self._made(module, output)

    def _used(self, name: str, parameters: list[nn.Parameter], data: torch.Tensor | None, output: object) -> None:
        self._time += 1
        weights = {owner: p for p in parameters if p.ndim >= 2 for owner in self._owners.get(p, ())}
        for module, weight in weights.items():
            self._functions.setdefault(module, set()).add(name)
            if name in PRODUCTS and data is not None and module not in self._called:
                record = self.records.setdefault(module, _Record(weight=weight))
                record.add(data, output, self._time)
                record.extra_parameters += [p for p in parameters if p not in self._owners]
                self._made(module, output)

    def _made(self, module: nn.Module, output: object) -> None:
        feature = next(tensors_in(output), None)
        if feature is not None:
            self._features[_storage(feature)] = (module, feature, feature._version)

    def _norm_ran(self, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        entering, leaving = next(tensors_in(args), None), next(tensors_in(output), None)
        if entering is None or leaving is None or _storage(entering) not in self._features:
            return
        layer, feature, version = self._features[_storage(entering)]
        if feature._version == version and entering.numel() == feature.numel():
            self.norms.setdefault(layer, []).append(module)
            del self._features[_storage(entering)]
            self._features[_storage(leaving)] = (layer, leaving, leaving._version)


def _make_layer(name: str, module: nn.Module, small: _Probe, large: _Probe, *, after_norm: bool) -> Layer | None:
    record = large.records[module]
    followers = large.norms.get(module, [])
    norms = list(dict.fromkeys(followers))
    calls = len(record.outputs)
    always = all(followers.count(norm) == calls == len(large.records[norm].outputs) for norm in norms)
    output = _site(norms[-1] if norms and always and after_norm else module, small, large, "outputs")
    if output is None:
        return None
    return Layer(
        name=name,
        modules=(module, *norms),
        output=output,
        input=_site(module, small, large, "inputs"),
        extra_parameters=tuple(dict.fromkeys(record.extra_parameters)),
    )


def _site(module: nn.Module, small: _Probe, large: _Probe, side: str) -> Site | None:
    """Find the first tensor with a batch that enters or leaves a module; `None` if a call has none."""
    if module not in small.records:
        return None
    one, other = getattr(small.records[module], side), getattr(large.records[module], side)
    for index, (smaller, larger) in enumerate(zip(one[0], other[0], strict=False)):
        batch_dim = _batch_dim(smaller, larger)
        if batch_dim is None:
            continue
        same = all(
            len(b) > index and len(a) > index and _batch_dim(a[index], b[index]) == batch_dim
            for a, b in zip(one, other, strict=False)
        )
        if len(one) != len(other) or not same:
            return None
        rows = tuple(shapes[index][batch_dim] // PROBE_SIZES[1] for shapes in other)
        sample = (*larger[:batch_dim], *larger[batch_dim + 1 :])
        return Site(
            module=module,
            enters=side == "inputs",
            weight=large.records[module].weight,
            index=index,
            calls=len(other),
            shape=sample if rows[0] == 1 else (rows[0], *sample),
            size=sum(shapes[index].numel() // PROBE_SIZES[1] for shapes in other),
            batch_dim=batch_dim,
            rows=rows,
        )
    return None


def _batch_dim(small: torch.Size, large: torch.Size) -> int | None:
    """Return the only dimension that differs, if it grows with the batch; otherwise `None`."""
    if len(small) != len(large) or len(large) < 2:
        return None
    grown = [dim for dim in range(len(large)) if small[dim] != large[dim]]
    if len(grown) != 1 or small[grown[0]] * PROBE_SIZES[1] != large[grown[0]] * PROBE_SIZES[0]:
        return None
    return grown[0]


def _larger_layers(
    groups: list[Group], weighted: list[Layer], small: _Probe, large: _Probe, *, strict: bool
) -> list[Layer]:
    """Make a layer of each group: its input enters its first module to run, its feature leaves the last."""
    heads = {layer.modules[0] for layer in weighted if layer.is_head}
    layers = []
    for group in groups:
        sites = {
            name: site
            for name, module in group.modules.items()
            if module in large.records and (site := _site(module, small, large, "outputs")) is not None
        }
        ran = sorted((sites[name] for name in outermost(sites)), key=lambda site: large.records[site.module].last)
        if not ran and strict:
            raise ValueError(
                f"`granularity`: {group.name!r} matches, but none of its modules returns a tensor with a batch in the "
                "network's forward pass. Name another module."
            )
        if not ran:
            logger.info("%s returns no tensor with a batch: it is not a layer.", group.name)
            continue
        first = next(module for module in large.records if any(module is site.module for site in ran))
        layers.append(
            Layer(
                name=group.name,
                modules=tuple(dict.fromkeys(group.modules[name] for name in outermost(group.modules))),
                output=ran[-1],
                input=_site(first, small, large, "inputs"),
                extra_parameters=group.parameters,
                is_head=any(head in module.modules() for module in group.modules.values() for head in heads),
            )
        )
    if not layers:
        raise ValueError("`granularity`: no block of the network returns a tensor with a batch; use 'layer'.")
    return sorted(layers, key=lambda layer: large.records[layer.output.module].last)


def _mark_heads(layers: list[Layer], model: nn.Module, heads: set[nn.Module]) -> list[Layer]:
    """Mark the heads, the last layer if none is known, and all that a timm model names as its classifier."""
    named: set[nn.Module] = set()
    for module in model.modules():
        get_classifier = getattr(module, "get_classifier", None)
        if callable(get_classifier):
            classifier = get_classifier()
            named.update(classifier if isinstance(classifier, (tuple, list)) else [classifier])
    last = layers[-1]
    heads = heads or {last.modules[0]}
    return [
        replace(layer, is_head=layer.modules[0] in heads or (layer.modules[0] in named and layer.shape == last.shape))
        for layer in layers
    ]


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
