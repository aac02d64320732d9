"""The layers of a network in execution order, and freezing them.

A layer is a leaf module that holds a weight of two or more dimensions (convolution, linear, ...) together with the
normalisation that consumes its output: the two are trained, or frozen, as one. Or it is a block, or whatever modules
the user names.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from torch.nn.utils import parametrize

from art_clat.granularity import Granularity, Group, find_groups, outermost
from art_clat.uses import ELEMENTWISE, PRODUCTS, WeightUses, tensors_in

logger = logging.getLogger(__name__)

#: Samples in the two forward passes that find the layers: the dimension of an output that grows from one to the other
#: is the batch (a table of attention biases, say, has none, and is no layer).
PROBE_SIZES = (5, 7)


@dataclass(frozen=True, eq=False)
class Site:
    """
    Where a tensor is seen in a forward pass: it enters or leaves a module.

    :param module: The module.
    :param enters: Whether the tensor enters, or leaves.
    :param weight: `None`, or the module's weight where other modules use it without calling the module. The tensors are
           then those that enter and leave the function that takes it.
    :param index: Which tensor it is of those that enter or leave, the first one that has a batch.
    :param calls: How often it is seen in one forward pass (more than once when weights are shared).
    :param shape: Shape for one sample, without the batch dimension.
    :param size: ``N_i``, the number of elements for one sample over all `calls`.
    :param batch_dim: Which dimension is the batch. It may be a multiple of the batch (windows, time steps).
    :param rows: How many entries a sample has along it, call by call.
    :param interleaved: Whether those of a sample are as far apart as there are samples (time steps before the batch),
           not one after the other (windows).
    """

    module: nn.Module
    enters: bool
    weight: nn.Parameter | None
    index: int
    calls: int
    shape: tuple[int, ...]
    size: int
    batch_dim: int
    rows: tuple[int, ...]
    interleaved: bool = False

    def by_sample(self, tensor: torch.Tensor, call: int) -> torch.Tensor:
        """
        Bring a tensor that is seen here into an order that does not depend on the network.

        :param tensor: The tensor, as it enters or leaves.
        :param call: In which of the calls of a forward pass, counted from 0.
        :return: A view of it, shape (batch, ...); where a sample has several entries (batch, rows, ...).
        """
        first, rows = tensor.movedim(self.batch_dim, 0), self.rows[call]
        if rows == 1:
            return first
        shape = first.shape[1:]
        return first.view(rows, -1, *shape).movedim(0, 1) if self.interleaved else first.view(-1, rows, *shape)


@dataclass(frozen=True, eq=False)
class Layer:
    """
    One layer of a network: a weighted module and the norm on its output, or the modules of a block.

    :param name: Name of the weighted module, as in ``model.named_modules()``, or of the block.
    :param modules: The weighted module, then the norms that consume its output; or the modules of the block.
    :param output: Where the layer's feature ``F_i(x)`` is seen.
    :param input: Where the tensor that enters the layer is seen; `None` if nothing with a batch does.
    :param own: Parameters that belong to the layer and to none of `modules`.
    :param is_head: Whether the layer gives the class scores.
    """

    name: str
    modules: tuple[nn.Module, ...]
    output: Site
    input: Site | None = None
    own: tuple[nn.Parameter, ...] = ()
    is_head: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the feature of one sample, without the batch dimension."""
        return self.output.shape

    @property
    def size(self) -> int:
        """``N_i``, the number of elements of one sample's feature, over all calls of the layer."""
        return self.output.size

    def parameters(self) -> list[nn.Parameter]:
        """
        Give the layer's parameters, those of its norm included.

        :return: Each parameter once.
        """
        return list(dict.fromkeys([*(p for module in self.modules for p in module.parameters()), *self.own]))

    @property
    def nb_parameters(self) -> int:
        """Number of scalar parameters."""
        return sum(p.numel() for p in self.parameters())


def find_layers(
    model: nn.Module,
    forward: Callable[[int], torch.Tensor],
    *,
    after_norm: bool = False,
    granularity: Granularity = "layer",
) -> list[Layer]:
    """
    Find the layers that run in a forward pass, in the order in which they first run.

    Hooks are removed again; modules that never run are not layers, nor are those whose weight is only added or a scale.

    :param model: The network.
    :param forward: Runs the network on as many samples as it is told and returns its logits.
    :param after_norm: Take a layer's feature after its norm, not from the weighted module. Only where the norm runs on
           this layer's output, every time, and on nothing else.
    :param granularity: What counts as one layer, see :func:`art_clat.granularity.find_groups`.
    :return: The layers. The last one is marked as the head, and so is what a timm model names as its classifier; of
             larger layers those that hold it.
    :raises ValueError: Where no weighted layer runs, or `granularity` does not fit the network.
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
            logger.info("%s has a weight but its output has no batch dimension: it is no layer.", names[module])
        else:
            layers.append(layer)
    if not layers:
        raise ValueError(
            "`classifier.model` has no weighted layer: no module with a weight of two or more dimensions "
            "(convolution, linear, ...) ran in its forward pass."
        )
    layers = _mark_head(layers, model)
    return layers if groups is None else _larger_layers(groups, layers, small, large, strict=granularity != "block")


def is_weighted_model(model: nn.Module) -> bool:
    """
    Tell whether a network has a module that could be a layer.

    :param model: The network.
    :return: `True` if some module holds a weight of two or more dimensions.
    """
    return any(_is_weighted(module) for module in model.modules())


@dataclass
class _Record:
    """What a module did in a forward pass: the shapes of the tensors that entered and left it, call by call."""

    inputs: list[list[torch.Size]] = field(default_factory=list)
    outputs: list[list[torch.Size]] = field(default_factory=list)
    last: int = 0  # when the last call ended
    weight: nn.Parameter | None = None  # where the module was not called: the weight of it that was used
    own: list[nn.Parameter] = field(default_factory=list)  # biases of the use that belong to no such module

    def add(self, entering: object, leaving: object, time: int) -> None:
        self.inputs.append([tensor.shape for tensor in tensors_in(entering)])
        self.outputs.append([tensor.shape for tensor in tensors_in(leaving)])
        self.last = time


class _Probe:
    """Records, while a network runs, what enters and leaves each module, and the norms that consumed its output."""

    def __init__(self, model: nn.Module) -> None:
        self.weighted = _weighted_modules(model)
        #: What ran, in the order in which it first did.
        self.records: dict[nn.Module, _Record] = {}
        self.norms: dict[nn.Module, list[nn.Module]] = {}
        self._owners: dict[nn.Parameter, list[nn.Module]] = {}
        for module in self.weighted:
            for parameter in module.parameters():
                self._owners.setdefault(parameter, []).append(module)
        # The functions that took a weight, and those modules whose forward method did or did not do it.
        self._functions: dict[nn.Module, set[str]] = {}
        self._called: set[nn.Module] = set()
        self._time = 0
        # By their storage: whose a feature is, the feature, and its version. Holding them keeps their memory from being
        # reused, so that equal storage means the same tensor; an unchanged version, that nothing was written into it.
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
        # A table that is added, or a scale, makes no layer of a module, whatever the shape it is stored in.
        for module, functions in probe._functions.items():
            if functions <= ELEMENTWISE and module in probe.weighted:
                probe.weighted.remove(module)
        return probe

    def _ran(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
        self._time += 1
        if module not in self._called:
            self._called.add(module)
            used = self.records.pop(module, None)  # by its own forward method, up to now
            self.records[module] = _Record()
            if used is not None and len(used.outputs) > 1:
                logger.debug("A weight of %s is used with and without calling it.", type(module).__name__)
        self.records[module].add((args, kwargs), output, self._time)
        if _is_norm(module):
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
                record.own += [p for p in parameters if p not in self._owners]
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
        own=tuple(dict.fromkeys(record.own)),
    )


def _site(module: nn.Module, small: _Probe, large: _Probe, side: str) -> Site | None:
    """Find the first tensor with a batch that enters or leaves a module; `None` unless there is one in every call."""
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
    """Find the dimension that grows with the batch; `None` unless there is one such, and the others stay."""
    if len(small) != len(large) or len(large) < 2:
        return None
    grown = [dim for dim in range(len(large)) if small[dim] != large[dim]]
    if len(grown) != 1 or small[grown[0]] * PROBE_SIZES[1] != large[grown[0]] * PROBE_SIZES[0]:
        return None
    return grown[0]


def _larger_layers(
    groups: list[Group], weighted: list[Layer], small: _Probe, large: _Probe, *, strict: bool
) -> list[Layer]:
    """Make a layer of each group: what enters the first of its modules to run, and leaves the last."""
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
                f"`granularity`: {group.name!r} matches, but nothing in it runs in the network's forward pass and "
                "gives a tensor with a batch."
            )
        if not ran:
            logger.info("%s gives no tensor with a batch: it is no layer.", group.name)
            continue
        first = next(module for module in large.records if any(module is site.module for site in ran))
        layers.append(
            Layer(
                name=group.name,
                modules=tuple(dict.fromkeys(group.modules[name] for name in outermost(group.modules))),
                output=ran[-1],
                input=_site(first, small, large, "inputs"),
                own=group.parameters,
                is_head=any(head in module.modules() for module in group.modules.values() for head in heads),
            )
        )
    if not layers:
        raise ValueError("`granularity`: no block of the network gives a tensor with a batch.")
    return sorted(layers, key=lambda layer: large.records[layer.output.module].last)


def _mark_head(layers: list[Layer], model: nn.Module) -> list[Layer]:
    """Mark the last layer, and of a timm model all that it names as its classifier (a distilled one has two)."""
    named: set[nn.Module] = set()
    for module in model.modules():
        get_classifier = getattr(module, "get_classifier", None)
        if callable(get_classifier):
            classifier = get_classifier()
            named.update(classifier if isinstance(classifier, (tuple, list)) else [classifier])
    last = layers[-1]
    return [
        replace(layer, is_head=layer is last or (layer.modules[0] in named and layer.shape == last.shape))
        for layer in layers
    ]


_TORCH_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm)


def _is_norm(module: nn.Module) -> bool:
    if isinstance(module, _TORCH_NORMS):
        return True
    if type(module).__module__.startswith("torch.nn.utils"):  # spectral and weight norm are norms of a weight
        return False
    # Other libraries' norms, by the names of their classes: RmsNorm, GroupNormAct, but not NormedLinear.
    named = any(re.search(r"Norm(?![a-z])", cls.__name__) for cls in type(module).__mro__)
    return named and all(p.ndim < 2 for p in module.parameters())


def _is_weighted(module: nn.Module) -> bool:
    if isinstance(module, _TORCH_NORMS):
        return False
    if isinstance(module, nn.MultiheadAttention):  # holds its weights itself; its child is never called
        return True
    owned = list(module.parameters(recurse=False))
    parametrized = parametrize.is_parametrized(module)
    if parametrized:
        owned += list(module.get_submodule("parametrizations").parameters())
    children = [child for name, child in module.named_children() if not (parametrized and name == "parametrizations")]
    has_weighted_children = any(next(child.parameters(), None) is not None for child in children)
    return not has_weighted_children and any(p.ndim >= 2 for p in owned)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _weighted_modules(model: nn.Module) -> set[nn.Module]:
    """Give the modules that hold a weight; of modules within one another the outermost."""
    weighted = {module for module in model.modules() if _is_weighted(module)}
    within = {inner for module in weighted for inner in module.modules() if inner is not module}
    return weighted - within


@contextmanager
def only_trainable(model: nn.Module, layers: Sequence[Layer]) -> Iterator[None]:
    """
    Freeze everything outside some layers, and put every ``requires_grad`` flag back on leaving.

    A parameter that was frozen before stays frozen.

    :param model: The network.
    :param layers: The layers whose parameters stay trainable.
    """
    chosen = {p for layer in layers for p in layer.parameters()}
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for parameter, flag in flags:
            parameter.requires_grad_(flag and parameter in chosen)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def train_only(model: nn.Module, layers: Sequence[Layer]) -> None:
    """
    Put the norms of some layers in training mode and the rest of the network in evaluation mode.

    Frozen BatchNorms then run on their stored statistics, which stay as they are, and so does a norm of these layers
    whose parameters its owner has frozen, or that stays in evaluation mode when the network is put in training mode.
    Dropout is off: between a clean and a perturbed pass only the perturbation
    differs, but for the batch statistics of these norms.

    :param model: The network.
    :param layers: The layers that are trained.
    """
    model.train()
    norms = {m for layer in layers for module in layer.modules for m in module.modules() if _is_norm(m)}
    trained = [norm for norm in norms if norm.training and not _is_frozen(norm)]
    model.eval()
    for norm in trained:
        norm.training = True  # what is within it, dropout say, stays as it is


def train_all(model: nn.Module) -> None:
    """
    Put a network in training mode, but for norms whose parameters their owner has frozen.

    :param model: The network.
    """
    model.train()
    for norm in filter(_is_norm, model.modules()):
        if _is_frozen(norm):
            norm.eval()


def _is_frozen(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and not any(p.requires_grad for p in parameters)
