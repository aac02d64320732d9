"""
Networks in RobustBench's format: definitions and weights that its ``load_model`` loads.

``robustbench.utils.load_model`` (1.1.1) loads a network in one of two ways:

- timm knows the network under RobustBench's name for it: the model's identifier in lower case with ``_`` for ``-``, the
  data set and the threat model, e.g. ``gopal2025criticality_r18_cifar10_linf``. RobustBench calls
  ``timm.create_model(name, num_classes=…, pretrained=True, checkpoint_path=custom_checkpoint)``. `custom_checkpoint` is
  a local file with the network's own keys. ``pretrained`` is for weights that are downloaded. RobustBench loads its own
  transformers like this, and this module writes networks for it.
- The model zoo has an entry with a Google Drive id. The weights are in
  ``<model_dir>/<data set>/<threat model>/<id>.pt``, and `custom_checkpoint` is ignored. RobustBench removes ``model.``
  from the front of the keys. The networks of :func:`~art_clat.create_backbone` have it there, so they cannot be loaded
  like this.
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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from art_clat.leaderboard.entries import LEADERBOARDS
from art_clat.models import recipe as recipes
from art_clat.models.backbones import remake
from art_clat.models.recipe import BackboneRecipe, Call
from art_clat.utils.randomness import seeded_randomness
from art_clat.utils.robustbench_import import robustbench_utils

#: Packages that a definition may import from: those that RobustBench needs anyway.
PACKAGES = ("robustbench", "timm", "torch", "torchvision")


def timm_name(model_id: str, dataset: str, norm: str) -> str:
    """
    Return the name under which RobustBench's ``load_model`` asks timm for a model.

    :param model_id: RobustBench's key of the model.
    :param dataset: ``"cifar10"``, ``"cifar100"`` or ``"imagenet"``.
    :param norm: ``"Linf"`` or ``"L2"``.
    :return: E.g. ``"gopal2025criticality_r18_cifar10_linf"``.
    :raises ValueError: If RobustBench has no such data set, or if no Python function can have the name. timm registers
            functions.
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

    The file registers a function with timm, under the name that ``load_model`` asks for. RobustBench keeps such files
    in ``robustbench/model_zoo/architectures/``.

    If the network carries a recipe, as those of :func:`~art_clat.create_backbone` do, or `make` is itself a function or
    class of timm or RobustBench, the file imports timm and RobustBench only. For any other network the file is a copy
    of `make`'s module with a call of `make`.

    :param make: Makes the network, e.g. :func:`~art_clat.create_backbone`; a function or class at the top of a module.
    :param arguments: Keyword arguments for `make`; values whose ``repr`` is Python.
    :param model_id: RobustBench's key of the model.
    :param dataset: ``"cifar10"``, ``"cifar100"`` or ``"imagenet"``.
    :param norm: ``"Linf"`` or ``"L2"``.
    :param checkpoint_url: Where the weights can be downloaded, a ``state_dict`` saved with ``torch.save``; `None` if
           they cannot yet.
    :param preprocessing: RobustBench's name of how ImageNet's images are resized and cropped. RobustBench derives that
           from the network's ``default_cfg``. The file sets the ``default_cfg`` accordingly if timm can express it.
    :return: The file's text.
    :raises ValueError: If there is no source of `make`, or as :func:`timm_name`.
    :raises ImportError: If `preprocessing` is given and RobustBench is not installed.
    """
    name = timm_name(model_id, dataset, norm)
    if not make.__qualname__.isidentifier():
        raise ValueError(f"`make` must be at the top of a module, got {make.__qualname__}.")
    recipe = _recipe_of(make, arguments)
    source, lines = _from_maker(make, arguments) if recipe is None else _from_recipe(recipe)
    config = None if preprocessing is None else _default_config(preprocessing)
    if config is not None:
        lines += [
            'inner = getattr(model, "model", model)',
            f'inner.default_cfg = {{**(getattr(inner, "default_cfg", None) or {{}}), **{config!r}}}',
        ]
    return _DEFINITION.format(
        source=source, name=name, model_id=model_id, url=checkpoint_url, lines="\n    ".join(lines)
    )


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


def _default_config(preprocessing: str) -> dict[str, object] | None:
    """Write as timm does how images are resized and cropped; `None` if timm cannot express it."""
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


def _from_maker(make: Callable[..., nn.Module], arguments: Mapping[str, object]) -> tuple[str, list[str]]:
    """Return the source and the lines that make a network of which only the maker is known."""
    lines = [f"model = {make.__qualname__}({_keywords(arguments)})"]
    if make.__module__.split(".")[0] in ("art_clat", *PACKAGES):
        return f"from {make.__module__} import {make.__qualname__}", lines
    try:
        return Path(inspect.getsourcefile(make) or "").read_text(encoding="utf-8").rstrip(), lines
    except (TypeError, OSError) as error:
        raise ValueError(f"`make`: the source of {make.__qualname__} is not available: {error}.") from error


def _recipe_of(make: Callable[..., nn.Module], arguments: Mapping[str, object]) -> BackboneRecipe | None:
    """Return a recipe that makes the network and that RobustBench can follow; `None` if there is none."""
    if _is_known(create := Call(make, (), arguments)):
        return BackboneRecipe(create)
    with seeded_randomness(0, torch.device("cpu")):
        made = make(**arguments)
        recipe = getattr(made, "recipe", None)
        if not isinstance(recipe, BackboneRecipe) or not all(map(_is_known, (recipe.create, *recipe.adaptations))):
            return None
        again = remake(recipe)
    shapes, wanted = ({key: value.shape for key, value in net.state_dict().items()} for net in (again, made))
    # They differ if the network was changed after it had been made by the recipe.
    return recipe if repr(again) == repr(made) and shapes == wanted else None


def _is_known(value: object) -> bool:
    """Tell whether a definition can contain a value: a literal, or what RobustBench can import, or a call of these."""
    if isinstance(value, Call):
        if value.function is timm.create_model:  # somebody else's network may be registered with timm
            name = value.arguments[0] if value.arguments else value.keywords.get("model_name")
            if not timm.is_model(name) or not timm.model_entrypoint(name).__module__.startswith("timm."):
                return False
        function = value.function
        is_copied = inspect.isfunction(function) and function.__module__ == recipes.__name__
        return (is_copied or _is_importable(function)) and all(
            map(_is_known, (*value.arguments, *value.keywords.values()))
        )
    if _is_importable(value):
        return True
    try:
        return bool(ast.literal_eval(repr(value)) == value)
    except (ValueError, SyntaxError):
        return False


def _is_importable(value: object) -> bool:
    """Tell whether a value is a function or class of the packages that a definition may import from."""
    return (
        (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__.split(".")[0] in PACKAGES
        and value.__qualname__.isidentifier()
    )


def _from_recipe(recipe: BackboneRecipe) -> tuple[str, list[str]]:
    """Return the source and the lines that make a network by its recipe."""
    imports: set[str] = set()
    copied = [adapt.function for adapt in recipe.adaptations]
    lines = [f"model = {_written(recipe.create, imports)}"]
    lines += [_written(adapt, imports, first="model") for adapt in recipe.adaptations]
    if recipe.mean is not None and recipe.std is not None:
        imports.add("from robustbench.model_zoo.architectures.utils_architectures import normalize_model")
        lines.append(f"model = normalize_model(model, mean={list(recipe.mean)}, std={list(recipe.std)})")
    if copied:
        imports |= {"from typing import Any", "from torch import nn"}
    functions = [inspect.getsource(function).rstrip() for function in dict.fromkeys(copied)]
    head = "\n".join(sorted(imports, key=lambda line: (line.startswith("from"), line)))
    return "\n\n\n".join([head, *functions]), lines


def _written(value: Any, imports: set[str], *, first: str | None = None) -> str:
    """Write a value as Python, and note what has to be imported for it."""
    if isinstance(value, Call):
        arguments = [] if first is None else [first]
        arguments += [_written(argument, imports) for argument in value.arguments]
        arguments += [f"{key}={_written(argument, imports)}" for key, argument in value.keywords.items()]
        return f"{_written(value.function, imports)}({', '.join(arguments)})"
    if not inspect.isfunction(value) and not inspect.isclass(value):
        return repr(value)
    name: str = value.__name__
    for module, where, how in ((timm, "timm", "import timm"), (nn, "nn", "from torch import nn")):
        if getattr(module, name, None) is value:
            imports.add(how)
            return f"{where}.{name}"
    if _is_importable(value):
        imports.add(f"from {value.__module__} import {name}")
    return name


def _keywords(arguments: Mapping[str, object]) -> str:
    """Write keyword arguments."""
    return ", ".join(f"{key}={value!r}" for key, value in arguments.items())


def zoo_entry(model_id: str, dataset: str, norm: str) -> str:
    """
    Write the entry for ``robustbench/model_zoo/<dataset>.py``, in the form that RobustBench uses for timm's networks.

    :param model_id: RobustBench's key of the model.
    :param dataset: ``"cifar10"``, ``"cifar100"`` or ``"imagenet"``.
    :param norm: ``"Linf"`` or ``"L2"``.
    :return: An item of the list that RobustBench makes the threat model's dictionary from.
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
    Load a network with RobustBench's own ``load_model``.

    The definition is executed: use one from somebody you trust. Its network stays registered with timm.

    :param definition: The file of :func:`model_definition`.
    :param checkpoint: A ``state_dict`` in a ``.safetensors`` or a ``.pt`` file, see :func:`write_checkpoint`; `None`
           for random weights.
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
    sys.modules[name] = module  # timm's registry looks here
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=f"Overwriting .* in registry with {name}")
        warnings.filterwarnings("ignore", message=f"{re.escape(model_id)}: without CHECKPOINT_URL")
        specification.loader.exec_module(module)
        module.CHECKPOINT_URL = None  # nothing is downloaded
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
    Write the weights of a network so that its definition loads them. RobustBench's normalisation has another shape.

    :param network: A network whose definition exists.
    :param path: The file to write, for ``torch.load``.
    :param definition: The file of :func:`model_definition`. It is executed.
    :param model_id: RobustBench's key of the model.
    :param dataset: ``"cifar10"``, ``"cifar100"`` or ``"imagenet"``.
    :param norm: ``"Linf"`` or ``"L2"``.
    :raises ValueError: If the definition makes another network.
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
