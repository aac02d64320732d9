"""The layers of a network in execution order, and freezing them.

A layer is a leaf module that holds a weight of two or more dimensions (convolution, linear, ...) together with the
normalisation that consumes its output: the two are trained, or frozen, as one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrize

#: Samples in the forward pass that finds the layers. A prime: an output whose first dimension is a multiple of it has
#: the batch there (a table of attention biases, say, has not, and is no layer).
PROBE_SIZE = 7


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
    :param is_head: Whether the layer gives the class scores.
    """

    name: str
    modules: tuple[nn.Module, ...]
    output: nn.Module
    calls: int
    shape: tuple[int, ...]
    size: int
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


def find_layers(model: nn.Module, forward: Callable[[], torch.Tensor], *, after_norm: bool = False) -> list[Layer]:
    """
    Find the layers that run in a forward pass, in the order in which they first run.

    Hooks are removed again; modules that never run are not layers.

    :param model: The network.
    :param forward: Runs the network on `PROBE_SIZE` samples and returns its logits, shape (`PROBE_SIZE`, nb_classes).
    :param after_norm: Take a layer's feature after its norm, not from the weighted module. Only where the norm runs on
           this layer's output, every time, and on nothing else.
    :return: The layers; the last ones whose output is the class scores are marked as the head.
    :raises ValueError: Where no weighted layer runs.
    """
    probe = _Probe()
    handles = [
        module.register_forward_hook(probe.norm_ran if _is_norm(module) else probe.weighted_ran)
        for module in model.modules()
        if _is_norm(module) or _is_weighted(module)
    ]
    try:
        with torch.no_grad():
            logits = forward()
    finally:
        for handle in handles:
            handle.remove()
    names = {module: name for name, module in model.named_modules()}
    layers = [
        _make_layer(names[module], module, outputs, probe, after_norm=after_norm)
        for module, outputs in probe.outputs.items()
        if all(shape[0] % PROBE_SIZE == 0 for shape in outputs)
    ]
    if not layers:
        raise ValueError(
            "`classifier.model` has no weighted layer: no module with a weight of two or more dimensions "
            "(convolution, linear, ...) ran in its forward pass."
        )
    return _mark_head(layers, nb_scores=logits.shape[-1])


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
        # The latest feature and whose it is; holding it keeps its memory from being reused, so that equal storage
        # does mean the same tensor.
        self._latest: tuple[nn.Module, torch.Tensor] | None = None

    def weighted_ran(self, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        feature = feature_tensor(output)
        if feature is None or feature.ndim < 2:
            return
        self.outputs.setdefault(module, []).append(feature.shape)
        self._latest = (module, feature)

    def norm_ran(self, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        self.norm_calls[module] = self.norm_calls.get(module, 0) + 1
        entering, leaving = feature_tensor(args), feature_tensor(output)
        if self._latest is None or entering is None or leaving is None:
            return
        layer, feature = self._latest
        if entering.numel() == feature.numel() and _same_storage(entering, feature):
            self.norms.setdefault(layer, []).append(module)
            self.norm_shapes[module] = leaving.shape
            self._latest = (layer, leaving)


def _make_layer(name: str, module: nn.Module, outputs: list[torch.Size], probe: _Probe, *, after_norm: bool) -> Layer:
    calls = len(outputs)
    followers = probe.norms.get(module, [])
    norms = list(dict.fromkeys(followers))
    last = norms[-1] if norms else module
    always = all(followers.count(norm) == calls == probe.norm_calls[norm] for norm in norms)
    output, shapes = (last, [probe.norm_shapes[last]] * calls) if norms and always and after_norm else (module, outputs)
    first = shapes[0]
    repeats = first[0] // PROBE_SIZE
    return Layer(
        name=name,
        modules=(module, *norms),
        output=output,
        calls=calls,
        shape=tuple(first[1:]) if repeats == 1 else (repeats, *first[1:]),
        size=sum(shape.numel() // PROBE_SIZE for shape in shapes),
    )


def _mark_head(layers: list[Layer], *, nb_scores: int) -> list[Layer]:
    """Mark the last layer, and those right before it that give class scores too (distilled or auxiliary heads)."""
    first = len(layers) - 1
    while first > 0 and layers[first - 1].shape == layers[first].shape == (nb_scores,):
        first -= 1
    return [
        Layer(layer.name, layer.modules, layer.output, layer.calls, layer.shape, layer.size, is_head=i >= first)
        for i, layer in enumerate(layers)
    ]


def _is_norm(module: nn.Module) -> bool:
    if any(_is_weighted(child) for child in module.modules() if child is not module):
        return False
    return any("norm" in cls.__name__.lower() for cls in type(module).__mro__)


def _is_weighted(module: nn.Module) -> bool:
    if any("norm" in cls.__name__.lower() for cls in type(module).__mro__):
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

    A parameter that was frozen before stays frozen. Gradients of frozen parameters are dropped, so that no optimiser
    moves them, whatever its weight decay or momentum.

    :param model: The network.
    :param layers: The layers whose parameters stay trainable.
    """
    chosen = {p for layer in layers for p in layer.parameters()}
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for parameter, flag in flags:
            parameter.requires_grad_(flag and parameter in chosen)
            if not parameter.requires_grad:
                parameter.grad = None
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def train_only(model: nn.Module, layers: Sequence[Layer]) -> None:
    """
    Put some layers in training mode and the rest of the network in evaluation mode.

    Frozen BatchNorms then run on their stored statistics, which stay as they are, and a frozen dropout is off: between
    a clean and a perturbed pass only the perturbation differs.

    :param model: The network.
    :param layers: The layers in training mode.
    """
    model.eval()
    for layer in layers:
        for module in layer.modules:
            module.train()
