"""The layers of a network in execution order, and freezing them.

A layer is a leaf module that holds a weight of two or more dimensions (convolution, linear, ...) together with the
normalisation that consumes its output: the two are trained, or frozen, as one.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn.utils import parametrize

logger = logging.getLogger(__name__)

#: Samples in the two forward passes that find the layers: the dimension of an output that grows from one to the other
#: is the batch (a table of attention biases, say, has none, and is no layer).
PROBE_SIZES = (5, 7)


@dataclass(frozen=True, eq=False)
class Layer:
    """
    One layer of a network: a weighted module and the norm on its output.

    :param name: Name of the weighted module, as in ``model.named_modules()``.
    :param modules: The weighted module, then the norms that consume its output.
    :param output: The module of `modules` whose output is the layer's feature ``F_i(x)``.
    :param calls: How often the layer runs in one forward pass (more than once when its weights are shared).
    :param shape: Shape of the feature of one sample, without the batch dimension.
    :param size: ``N_i``, the number of elements of one sample's feature over all `calls`.
    :param batch_dim: Which dimension of the feature is the batch. It may be a multiple of the batch (windows).
    :param is_head: Whether the layer gives the class scores.
    """

    name: str
    modules: tuple[nn.Module, ...]
    output: nn.Module
    calls: int
    shape: tuple[int, ...]
    size: int
    batch_dim: int = 0
    is_head: bool = False

    def parameters(self) -> list[nn.Parameter]:
        """
        Give the layer's parameters, those of its norm included.

        :return: Each parameter once.
        """
        return list(dict.fromkeys(p for module in self.modules for p in module.parameters()))

    @property
    def nb_parameters(self) -> int:
        """Number of scalar parameters."""
        return sum(p.numel() for p in self.parameters())


def feature_tensor(output: object) -> torch.Tensor | None:
    """
    Find the tensor in what a module returned: itself, or the first one of a tuple, list or mapping.

    :param output: What a module's ``forward`` returned.
    :return: The tensor, or `None` where there is none.
    """
    if isinstance(output, torch.Tensor):
        return output
    values: Iterable[object] = ()
    if isinstance(output, dict):
        values = output.values()
    elif isinstance(output, (tuple, list)):
        values = output
    return next((t for t in map(feature_tensor, values) if t is not None), None)


def find_layers(model: nn.Module, forward: Callable[[int], torch.Tensor], *, after_norm: bool = False) -> list[Layer]:
    """
    Find the layers that run in a forward pass, in the order in which they first run.

    Hooks are removed again; modules that never run are not layers.

    :param model: The network.
    :param forward: Runs the network on as many samples as it is told and returns its logits.
    :param after_norm: Take a layer's feature after its norm, not from the weighted module. Only where the norm runs on
           this layer's output, every time, and on nothing else.
    :return: The layers. The last one is marked as the head, and so is what a timm model names as its classifier.
    :raises ValueError: Where no weighted layer runs.
    """
    small, large = (_Probe.run(model, forward, size) for size in PROBE_SIZES)
    names = {module: name for name, module in model.named_modules()}
    layers = []
    for module in large.outputs:
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
    return _mark_head(layers, model)


def is_weighted_model(model: nn.Module) -> bool:
    """
    Tell whether a network has a module that could be a layer.

    :param model: The network.
    :return: `True` if some module holds a weight of two or more dimensions.
    """
    return any(_is_weighted(module) for module in model.modules())


class _Probe:
    """Records, while a network runs, each weighted module's output shapes and the norms that consumed its output."""

    def __init__(self) -> None:
        self.outputs: dict[nn.Module, list[torch.Size]] = {}
        self.norms: dict[nn.Module, list[nn.Module]] = {}
        self.norm_shapes: dict[nn.Module, torch.Size] = {}
        self.norm_calls: dict[nn.Module, int] = {}
        # Whose the latest feature is, the feature, and its version. Holding it keeps its memory from being reused, so
        # that equal storage means the same tensor; an unchanged version means that nothing was written into it since.
        self._latest: tuple[nn.Module, torch.Tensor, int] | None = None

    @classmethod
    def run(cls, model: nn.Module, forward: Callable[[int], torch.Tensor], batch_size: int) -> _Probe:
        probe = cls()
        handles = [
            module.register_forward_hook(probe._norm_ran if _is_norm(module) else probe._weighted_ran)
            for module in model.modules()
            if _is_norm(module) or _is_weighted(module)
        ]
        try:
            with torch.no_grad():
                forward(batch_size)
        finally:
            for handle in handles:
                handle.remove()
        probe._latest = None
        return probe

    def _weighted_ran(self, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        feature = feature_tensor(output)
        if feature is None:
            return
        self.outputs.setdefault(module, []).append(feature.shape)
        self._latest = (module, feature, feature._version)

    def _norm_ran(self, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        self.norm_calls[module] = self.norm_calls.get(module, 0) + 1
        entering, leaving = feature_tensor(args), feature_tensor(output)
        if self._latest is None or entering is None or leaving is None:
            return
        layer, feature, version = self._latest
        untouched = feature._version == version
        if untouched and entering.numel() == feature.numel() and _same_storage(entering, feature):
            self.norms.setdefault(layer, []).append(module)
            self.norm_shapes[module] = leaving.shape
            self._latest = (layer, leaving, leaving._version)


def _make_layer(name: str, module: nn.Module, small: _Probe, large: _Probe, *, after_norm: bool) -> Layer | None:
    outputs = large.outputs[module]
    calls = len(outputs)
    followers = large.norms.get(module, [])
    norms = list(dict.fromkeys(followers))
    always = all(followers.count(norm) == calls == large.norm_calls[norm] for norm in norms)
    if norms and always and after_norm:
        output, shapes, smaller = norms[-1], [large.norm_shapes[norms[-1]]] * calls, small.norm_shapes[norms[-1]]
    else:
        output, shapes, smaller = module, outputs, small.outputs[module][0]
    batch_dim = _batch_dim(smaller, shapes[0])
    if batch_dim is None:
        return None
    repeats = shapes[0][batch_dim] // PROBE_SIZES[1]
    sample = (*shapes[0][:batch_dim], *shapes[0][batch_dim + 1 :])
    return Layer(
        name=name,
        modules=(module, *norms),
        output=output,
        calls=calls,
        shape=sample if repeats == 1 else (repeats, *sample),
        size=sum(shape.numel() // PROBE_SIZES[1] for shape in shapes),
        batch_dim=batch_dim,
    )


def _batch_dim(small: torch.Size, large: torch.Size) -> int | None:
    """Find the dimension that grows with the batch; `None` unless there is one such, and the others stay."""
    if len(small) != len(large) or len(large) < 2:
        return None
    grown = [dim for dim in range(len(large)) if small[dim] != large[dim]]
    if len(grown) != 1 or small[grown[0]] * PROBE_SIZES[1] != large[grown[0]] * PROBE_SIZES[0]:
        return None
    return grown[0]


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


def _same_storage(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


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
    whose parameters its owner has frozen. Dropout is off: between a clean and a perturbed pass only the perturbation
    differs, but for the batch statistics of these norms.

    :param model: The network.
    :param layers: The layers that are trained.
    """
    model.eval()
    for layer in layers:
        for norm in layer.modules[1:]:
            parameters = list(norm.parameters())
            norm.train(not parameters or any(p.requires_grad for p in parameters))
