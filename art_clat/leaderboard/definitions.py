"""
Networks in RobustBench's format: definitions and weights that its ``load_model`` loads.

What ``robustbench.utils.load_model`` (1.1.1) loads, and so what this module writes:

- A network that timm knows under RobustBench's name for it: the model's identifier in lower case with ``_`` for ``-``,
  the data set and the threat model, e.g. ``gopal2025criticality_r18_cifar10_linf``. It is made by
  ``timm.create_model(name, num_classes=…, pretrained=True, checkpoint_path=custom_checkpoint)``, so `custom_checkpoint`
  is a local file whose keys must be the network's, and ``pretrained`` is for weights that are downloaded. This is the
  way of RobustBench's own transformers, and the one used here.
- Otherwise an entry of its model zoo with a Google Drive id, from ``<model_dir>/<data set>/<threat model>/<id>.pt``;
  `custom_checkpoint` is ignored. It takes ``model.`` off the front of the keys, where the networks of
  :func:`~art_clat.create_backbone` have it, so they cannot be loaded like this.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import keyword
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import timm
import torch
from timm.layers import PatchEmbed
from torch import nn

from art_clat.leaderboard.entries import LEADERBOARDS
from art_clat.utils.randomness import own_randomness
from art_clat.utils.robustbench_import import robustbench_utils


def timm_name(model_id: str, dataset: str, norm: str) -> str:
    """
    Give the name under which RobustBench's ``load_model`` asks timm for a model.

    :param model_id: RobustBench's key of the model.
    :param dataset: ``"cifar10"``, ``"cifar100"`` or ``"imagenet"``.
    :param norm: ``"Linf"`` or ``"L2"``.
    :return: E.g. ``"gopal2025criticality_r18_cifar10_linf"``.
    :raises ValueError: If RobustBench has no such data set, or if the name could not be that of a Python function, of
            which timm's registry is made.
    """
    if dataset not in LEADERBOARDS:
        raise ValueError(f"`dataset`: RobustBench's load_model knows {', '.join(LEADERBOARDS)}, got {dataset!r}.")
    name = f"{model_id.lower().replace('-', '_')}_{dataset.lower()}_{norm.lower()}"
    if not name.isidentifier() or not name.isascii() or keyword.iskeyword(name):
        raise ValueError(
            "`model_id` must be letters, digits, `_` and `-`, beginning with a letter (RobustBench: "
            f"<Name><Year><FirstWordOfTheTitle>), got {model_id!r}."
        )
    return name


def model_definition(
    make: Callable[..., nn.Module],
    arguments: Mapping[str, object],
    *,
    model_id: str,
    dataset: str,
    norm: str,
    checkpoint_url: str | None = None,
    preprocessing: str | None = None,
) -> str:
    """
    Write the Python file that makes a network loadable with RobustBench's ``load_model``.

    Its function is registered with timm under the name that ``load_model`` asks for. For networks of timm and of
    RobustBench, also as :func:`~art_clat.create_backbone` adapts them, it says how they are made with those, and needs
    nothing else. For others it is the source of `make`'s module and a call of `make`, or an import where that is this
    package's. RobustBench keeps such files in ``robustbench/model_zoo/architectures/``.

    :param make: Makes the network, e.g. :func:`~art_clat.create_backbone`; a function or class at the top of a module.
    :param arguments: What to call it with; values whose ``repr`` is Python.
    :param model_id: RobustBench's key of the model.
    :param dataset: ``"cifar10"``, ``"cifar100"`` or ``"imagenet"``.
    :param norm: ``"Linf"`` or ``"L2"``.
    :param checkpoint_url: Where the weights can be downloaded, a ``state_dict`` saved with ``torch.save``; `None` if
           they cannot yet.
    :param preprocessing: RobustBench's name of how ImageNet's images are resized and cropped. RobustBench derives that
           from the network's ``default_cfg``, which then says so, where it can.
    :return: The file's text.
    :raises ValueError: If there is no source of `make`, or as :func:`timm_name`.
    :raises ImportError: If `preprocessing` is given and RobustBench is not installed.
    """
    name = timm_name(model_id, dataset, norm)
    if not make.__qualname__.isidentifier():
        raise ValueError(f"`make` must be at the top of a module, got {make.__qualname__}.")
    lines = _recipe(make, arguments)
    if lines is not None:
        source = _IMPORTS
    else:
        lines = [f"model = {make.__qualname__}({_written(arguments)})"]
        source = f"from {make.__module__} import {make.__qualname__}"
        if not make.__module__.startswith("art_clat."):
            try:
                source = Path(inspect.getsourcefile(make) or "").read_text(encoding="utf-8").rstrip()
            except (TypeError, OSError) as error:
                raise ValueError(f"`make`: the source of {make.__qualname__} is not available: {error}.") from error
    config = None if preprocessing is None else _default_config(preprocessing)
    if config is not None:
        lines += [
            'inner = getattr(model, "model", model)',
            f'inner.default_cfg = {{**(getattr(inner, "default_cfg", None) or {{}}), **{config!r}}}',
        ]
    return _DEFINITION.format(
        source=source, name=name, model_id=model_id, url=checkpoint_url, lines="\n    ".join(lines)
    )


def _default_config(preprocessing: str) -> dict[str, object] | None:
    """Write as timm does how images are resized and cropped; `None` where it cannot."""
    robustbench_utils()
    from robustbench.data import PREPROCESSINGS
    from torchvision.transforms import CenterCrop, Resize

    transforms: list[Any] = PREPROCESSINGS[preprocessing].transforms
    resize, crop = transforms[0], transforms[1]
    if not isinstance(resize, Resize) or not isinstance(crop, CenterCrop) or not isinstance(resize.size, int):
        return None
    size = int(crop.size[0])
    return {
        "input_size": (3, size, size),
        "interpolation": resize.interpolation.value,
        "crop_pct": size / resize.size,
    }


_IMPORTS = """import timm
from torch import nn

from robustbench.model_zoo.architectures.utils_architectures import normalize_model


def replace(model, path, module):
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def set_convolution(conv, **settings):
    for name, value in settings.items():
        setattr(conv, name, value)
    conv.weight = nn.Parameter(conv.weight.new_empty(*conv.weight.shape[:2], *conv.kernel_size))
    conv.reset_parameters()"""

_DEFINITION = '''{source}


import warnings  # noqa: E402

import torch  # noqa: E402
from timm.models import register_model  # noqa: E402

CHECKPOINT_URL = {url!r}


@register_model
def {name}(pretrained=False, **kwargs):
    """Make {model_id}: images in [0, 1] in, logits out."""
    {lines}
    if pretrained and CHECKPOINT_URL:
        model.load_state_dict(torch.hub.load_state_dict_from_url(CHECKPOINT_URL, map_location="cpu", weights_only=True))
    elif pretrained:
        warnings.warn("{model_id}: without CHECKPOINT_URL the weights are those of `custom_checkpoint`, or random.")
    return model
'''


def _recipe(make: Callable[..., nn.Module], arguments: Mapping[str, object]) -> list[str] | None:
    """Write how the network is made of timm's or RobustBench's; `None` where that takes more than this knows."""
    calls: list[tuple[str, dict[str, Any], nn.Module]] = []
    original = timm.create_model

    def recorded(model_name: str, **kwargs: Any) -> nn.Module:
        created: nn.Module = original(model_name, **kwargs)
        calls.append((model_name, kwargs, created))
        return created

    with own_randomness(0, torch.device("cpu")):
        with mock.patch.object(timm, "create_model", recorded):
            made = make(**arguments)
        is_normalized = [name for name, _ in made.named_children()] == ["normalize", "model"]
        target: Any = made.get_submodule("model") if is_normalized else made
        of_timm = (
            (name, kwargs)
            for name, kwargs, created in calls
            if created is target and timm.model_entrypoint(name).__module__.startswith("timm.")
        )
        name, kwargs = next(of_timm, ("", {}))
        if name and _is_literal(kwargs):
            base = original(name, **kwargs)
            lines = [f"model = timm.create_model({name!r}, {_written(kwargs)})", *_adaptations(base, target)]
        elif type(target).__module__.startswith("robustbench."):
            positional, kwargs = _constructor_call(make, arguments, type(target))
            base = type(target)(*positional, **kwargs)
            classes = [type(target), *(value for value in positional if isinstance(value, type))]
            if not _is_literal([*(value for value in positional if not isinstance(value, type)), kwargs]):
                return None
            written = [value.__name__ if isinstance(value, type) else repr(value) for value in positional]
            lines = [f"from {one.__module__} import {one.__name__}" for one in classes]
            lines.append(f"model = {type(target).__name__}({', '.join([*written, _written(kwargs)])})")
        else:
            return None
    shapes, wanted = ({key: value.shape for key, value in net.state_dict().items()} for net in (base, target))
    if repr(base) != repr(target) or shapes != wanted:
        return None
    if is_normalized:
        mean, std = (
            [round(value, 6) for value in made.get_buffer(f"normalize.{which}").flatten().tolist()]
            for which in ("mean", "std")
        )
        lines.append(f"model = normalize_model(model, mean={mean}, std={std})")
    return lines


def _constructor_call(
    make: Callable[..., nn.Module], arguments: Mapping[str, object], made: type[nn.Module]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Give the arguments with which a class is called while the network is made, the first time."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    original = made.__init__

    def recorded(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        calls.append((args, kwargs))
        original(self, *args, **kwargs)

    with mock.patch.object(made, "__init__", recorded):
        make(**arguments)
    return calls[0]


def _adaptations(base: nn.Module, target: nn.Module) -> Iterator[str]:
    """Adapt patches, convolutions and left-out poolings of a network to those of another one, and write how."""
    for path, wanted in target.named_modules():
        try:
            module: Any = base.get_submodule(path)
        except AttributeError:  # it has other modules
            return
        if isinstance(wanted, PatchEmbed):
            sizes = {"img_size": wanted.img_size, "patch_size": wanted.patch_size}
            if sizes != {key: getattr(module, key) for key in sizes}:
                module.set_input_size(**sizes)
                yield f"model.get_submodule({path!r}).set_input_size({_written(sizes)})"
        elif isinstance(wanted, nn.Conv2d) and repr(module) != repr(wanted):
            settings = {key: getattr(wanted, key) for key in ("kernel_size", "stride", "padding")}
            for key, value in settings.items():
                setattr(module, key, value)
            module.weight = nn.Parameter(torch.empty(*module.weight.shape[:2], *wanted.kernel_size))
            yield f"set_convolution(model.get_submodule({path!r}), {_written(settings)})"
        elif type(wanted) is nn.Identity and type(module) is not nn.Identity:
            parent, _, name = path.rpartition(".")
            setattr(base.get_submodule(parent), name, nn.Identity())
            yield f"replace(model, {path!r}, nn.Identity())"


def _is_literal(value: object) -> bool:
    try:
        return bool(ast.literal_eval(repr(value)) == value)
    except (ValueError, SyntaxError):
        return False


def _written(arguments: Mapping[str, object]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in arguments.items())


def zoo_entry(model_id: str, dataset: str, norm: str) -> str:
    """
    Write the entry for ``robustbench/model_zoo/<dataset>.py``, as RobustBench has them for timm's networks.

    :param model_id: RobustBench's key of the model.
    :param dataset: ``"cifar10"``, ``"cifar100"`` or ``"imagenet"``.
    :param norm: ``"Linf"`` or ``"L2"``.
    :return: An item of the list that the dictionary of the threat model is made of.
    :raises ValueError: As :func:`timm_name`.
    """
    name = timm_name(model_id, dataset, norm)
    return (
        f"({model_id!r}, {{\n    'model': lambda: timm.create_model({name!r}, pretrained=True),\n"
        "    'gdrive_id': None,\n}),\n"
    )


def load_from_robustbench(
    definition: str | os.PathLike[str],
    checkpoint: str | os.PathLike[str] | None,
    *,
    model_id: str,
    dataset: str,
    norm: str,
) -> nn.Module:
    """
    Load a network with RobustBench's own ``load_model``, from the file of :func:`model_definition` and local weights.

    The definition is Python and is executed: take it from whom you trust. Its network stays registered with timm.

    :param definition: The file.
    :param checkpoint: The weights, a ``state_dict`` in a ``.safetensors`` or a ``.pt`` file, see
           :func:`write_checkpoint`; `None` for random ones.
    :param model_id: RobustBench's key of the model.
    :param dataset: ``"cifar10"``, ``"cifar100"`` or ``"imagenet"``.
    :param norm: ``"Linf"`` or ``"L2"``.
    :return: The network, in evaluation mode, on the CPU.
    :raises ValueError: If `definition` is no Python file, or as :func:`timm_name`.
    :raises ImportError: If RobustBench is not installed.
    """
    utils = robustbench_utils()
    name = timm_name(model_id, dataset, norm)
    specification = importlib.util.spec_from_file_location(name, definition)
    if specification is None or specification.loader is None:
        raise ValueError(f"`definition` must be a .py file, got {os.fspath(definition)!r}.")
    module: Any = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # where timm's registry looks for it
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=f"Overwriting .* in registry with {name}")
        warnings.filterwarnings("ignore", message=f"{re.escape(model_id)}: without CHECKPOINT_URL")
        specification.loader.exec_module(module)
        module.CHECKPOINT_URL = None  # the local weights are wanted
        path = "" if checkpoint is None else os.fspath(checkpoint)
        model = utils.load_model(model_id, dataset=dataset, threat_model=norm, custom_checkpoint=path)
    return model  # type: ignore[no-any-return]


def write_checkpoint(
    network: nn.Module,
    path: str | os.PathLike[str],
    definition: str | os.PathLike[str],
    *,
    model_id: str,
    dataset: str,
    norm: str,
) -> None:
    """
    Write the weights of a network as those of its definition: RobustBench's normalisation has another shape.

    :param network: The network.
    :param path: The file, for ``torch.load``.
    :param definition: The file of :func:`model_definition`, which is executed.
    :param model_id: RobustBench's key of the model.
    :param dataset: ``"cifar10"``, ``"cifar100"`` or ``"imagenet"``.
    :param norm: ``"Linf"`` or ``"L2"``.
    :raises ValueError: If the definition is of another network.
    """
    defined = load_from_robustbench(definition, None, model_id=model_id, dataset=dataset, norm=norm).state_dict()
    tensors = network.state_dict()
    different = sorted(
        name for name in defined.keys() | tensors.keys()
        if name not in defined or name not in tensors or defined[name].numel() != tensors[name].numel()
    )  # fmt: skip
    if different:
        raise ValueError(f"`definition` is of another network: {', '.join(different[:3])} differ.")
    torch.save({name: tensors[name].cpu().reshape(value.shape).clone() for name, value in defined.items()}, path)
