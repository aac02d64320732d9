"""Which modules hold a weight, and which are norms."""

from __future__ import annotations

import re

from torch import nn
from torch.nn.utils import parametrize


def is_weighted_model(model: nn.Module) -> bool:
    """Return whether some module of a network holds a weight of two or more dimensions."""
    return any(is_weighted(module) for module in model.modules())


_TORCH_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm)


def is_norm(module: nn.Module) -> bool:
    """Return whether a module is a norm of activations, torch's or another library's."""
    if isinstance(module, _TORCH_NORMS):
        return True
    if type(module).__module__.startswith("torch.nn.utils"):  # spectral and weight norm: of a weight
        return False
    # Norms of other libraries are known by the names of their classes: RmsNorm, GroupNormAct, but not NormedLinear.
    named = any(re.search(r"Norm(?![a-z])", cls.__name__) for cls in type(module).__mro__)
    return named and all(p.ndim < 2 for p in module.parameters())


def is_weighted(module: nn.Module) -> bool:
    """Return whether a module holds a weight of two or more dimensions that no child holds."""
    if isinstance(module, _TORCH_NORMS):
        return False
    if isinstance(module, nn.MultiheadAttention):  # its child is never called
        return True
    owned = list(module.parameters(recurse=False))
    parametrized = parametrize.is_parametrized(module)
    if parametrized:
        owned += list(module.get_submodule("parametrizations").parameters())
    children = [child for name, child in module.named_children() if not (parametrized and name == "parametrizations")]
    has_weighted_children = any(next(child.parameters(), None) is not None for child in children)
    return not has_weighted_children and any(p.ndim >= 2 for p in owned)


def weighted_modules(model: nn.Module) -> set[nn.Module]:
    """Return the modules that hold a weight; of nested ones the outermost."""
    weighted = {module for module in model.modules() if is_weighted(module)}
    within = {inner for module in weighted for inner in module.modules() if inner is not module}
    return weighted - within
