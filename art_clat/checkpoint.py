"""Saving and resuming a run: one file that is whole at any instant, and that no code is read from."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from art.attacks import EvasionAttack
from art.estimators.classification import PyTorchClassifier
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from art_clat.history import EpochRecord, History

if TYPE_CHECKING:
    from art_clat.average import Average

#: Version of the files' format; a file of a larger one is refused.
FORMAT = 1


@dataclass
class Progress:
    """
    Where a run stands, besides its weights.

    :param seed: What everything drawn at random follows from, together with the epoch and the batch.
    :param epoch: The epoch in progress, counted from 0.
    :param batch: Its next batch.
    :param sums: Over the samples of the epoch so far: loss, cross-entropy, criticality loss, correct predictions, one.
    :param seconds: Of training in the epoch so far.
    :param chosen: Names of the layers that are trained, or `None` for the whole network.
    :param history: The record so far.
    """

    seed: int
    epoch: int = 0
    batch: int = 0
    sums: list[float] = field(default_factory=lambda: [0.0] * 5)
    seconds: float = 0.0
    chosen: list[str] | None = None
    history: History = field(default_factory=History)

    def begin_epoch(self, epoch: int) -> None:
        """
        Stand at the beginning of an epoch.

        :param epoch: Which.
        """
        self.epoch, self.batch, self.sums, self.seconds = epoch, 0, [0.0] * 5, 0.0


@dataclass(frozen=True)
class Best:
    """
    The weights of the epoch with the highest robust accuracy on the validation data.

    :param epoch: Which it is.
    :param robust_accuracy: In [0, 1].
    :param weights: As :func:`weights` gives them.
    """

    epoch: int
    robust_accuracy: float
    weights: dict[str, torch.Tensor]


class Checkpoint:
    """
    The folder a run saves itself in: ``last.safetensors`` and, with validation data, ``best.safetensors``.

    Both hold the network's parameters and buffers under their own names, so that
    ``model.load_state_dict(safetensors.torch.load_file(path), strict=False)`` reads them; the last one also what a run
    needs to go on. They are written under another name, flushed to the disk and renamed.

    :param folder: Created if missing.
    :param model: The network.
    :param optimizer: Its optimiser.
    :param scheduler: The scheduler, or `None`.
    :param description: What must be the same for a run to be continued: names, and values that JSON can hold.
    :param average: The average of the weights, or `None`.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler | None,
        description: Mapping[str, object],
        average: Average | None = None,
    ) -> None:
        self._average = average
        self.last, self.best = Path(folder) / "last.safetensors", Path(folder) / "best.safetensors"
        self._model = model
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._description = json.loads(json.dumps(description))

    def prepare(self) -> None:
        """
        Make sure that the folder can be written to, and clear what a kill has left there.

        :raises OSError: If it cannot.
        """
        prepare(self.last.parent)

    def resume(self) -> Progress | None:
        """
        Put network, optimiser and scheduler where the checkpoint has them.

        :return: Where the run stands; `None` where there is no checkpoint.
        :raises ValueError: If the file is damaged, of a newer format, or of a run of another description; nothing is
                changed then.
        """
        if not self.last.exists():
            return None
        tensors, content = read(self.last)
        try:
            check_description(content["description"], self._description, self.last.parent)
            optimizer, scheduler = (_unpacked(content[name], tensors) for name in ("optimizer", "scheduler"))
            record = History.from_json(json.dumps(content["progress"]["history"]))
            progress = Progress(**{**content["progress"], "history": record})
            averages = {n.removeprefix("average:"): t for n, t in tensors.items() if n.startswith("average:")}
            names = {name for name in tensors if not name.startswith(("optimizer:", "average:"))}
            expected = named_tensors(self._model).keys()
            if names != expected or (self._average is not None and averages.keys() != expected):
                raise KeyError("weights")
        except (KeyError, TypeError, AttributeError) as error:  # it has its checksum, but this package never wrote it
            raise ValueError(f"`checkpoint`: {self.last} does not hold a run: {error!r}.") from error
        load_weights(self._model, tensors)
        if self._average is not None:
            self._average.load(averages)
        self._optimizer.load_state_dict(cast(dict[str, Any], optimizer))
        if self._scheduler is not None:
            self._scheduler.load_state_dict(cast(dict[str, Any], scheduler))
        return progress

    def save(self, progress: Progress) -> None:
        """
        Save the run as it stands.

        :param progress: Where it stands.
        :raises OSError: If the folder cannot be written to.
        :raises TypeError: If the optimiser's or the scheduler's state holds what cannot be saved without pickle.
        """
        tensors = weights(self._model)
        if self._average is not None:
            tensors |= {f"average:{name}": tensor for name, tensor in self._average.state().items()}
        content = {
            "description": self._description,
            "optimizer": _packed(self._optimizer.state_dict(), tensors, "optimizer:optimizer"),
            "scheduler": None
            if self._scheduler is None
            else _packed(self._scheduler.state_dict(), tensors, "optimizer:scheduler"),
            "progress": {**asdict(progress), "history": json.loads(progress.history.to_json())},
        }
        write(self.last, tensors, content)

    def save_best(self, best: Best) -> None:
        """
        Save the best weights.

        :param best: The weights, and the epoch they are of.
        :raises OSError: If the folder cannot be written to.
        """
        content = {"description": self._description, "epoch": best.epoch, "robust_accuracy": best.robust_accuracy}
        write(self.best, best.weights, content)

    def load_best(self) -> Best | None:
        """
        Read the best weights back.

        :return: `None` where there are none.
        :raises ValueError: As :meth:`resume`.
        """
        if not self.best.exists():
            return None
        tensors, content = read(self.best)
        try:
            check_description(content["description"], self._description, self.last.parent)
            if tensors.keys() != named_tensors(self._model).keys():
                raise KeyError("weights")
            return Best(content["epoch"], content["robust_accuracy"], tensors)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"`checkpoint`: {self.best} does not hold the best epoch of a run: {error!r}.") from error


class Keeper:
    """
    Saves a run as it goes on, and keeps the weights of its best epoch.

    :param model: The network.
    :param checkpoint: Where to save, or `None`.
    :param every: Save after so many batches of an epoch.
    :param keeps_best: Whether the best epoch's weights are wanted.
    :param writes: Whether this process writes; of several the first one does.
    """

    def __init__(
        self,
        model: nn.Module,
        checkpoint: Checkpoint | None = None,
        *,
        every: int = 0,
        keeps_best: bool = False,
        writes: bool = True,
    ) -> None:
        self._model = model
        self._checkpoint = checkpoint
        self._every = every
        self._keeps_best = keeps_best
        self._writes = writes
        self._best: Best | None = None

    def resume(self) -> Progress | None:
        """
        Put everything where the checkpoint has it.

        :return: Where the run stands; `None` for a run that begins.
        :raises ValueError: As :meth:`Checkpoint.resume`.
        :raises OSError: As :meth:`Checkpoint.prepare`, before anything is changed.
        """
        if self._checkpoint is None:
            return None
        if self._writes:
            self._checkpoint.prepare()
        best = self._checkpoint.load_best()
        progress = self._checkpoint.resume()
        if progress is not None:
            self._best = best
        return progress

    def is_due(self, batch: int) -> bool:
        """
        Tell whether to save within an epoch.

        :param batch: Number of batches done.
        :return: Whether to.
        """
        return self._checkpoint is not None and batch % self._every == 0

    def save(self, progress: Progress) -> None:
        """
        Save the run.

        :param progress: Where it stands.
        """
        if self._checkpoint is not None and self._writes:
            self._checkpoint.save(progress)

    def consider(self, record: EpochRecord) -> None:
        """
        Keep the weights as they are if the epoch is the best so far.

        :param record: The epoch, validated.
        """
        robust = record.robust_accuracy
        if not self._keeps_best or robust is None or (self._best is not None and robust <= self._best.robust_accuracy):
            return
        self._best = Best(record.epoch, robust, weights(self._model))
        if self._checkpoint is not None and self._writes:
            self._checkpoint.save_best(self._best)

    def restore_best(self) -> None:
        """Put the best epoch's weights into the network."""
        if self._best is not None:
            load_weights(self._model, self._best.weights)


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """
    Give a network's parameters and buffers, each once where it has several names.

    :param model: The network.
    :return: By name.
    """
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """
    Copy a network's parameters and buffers.

    :param model: The network.
    :return: By name, on the CPU.
    """
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in named_tensors(model).items()
    }


def load_weights(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """
    Put back what :func:`weights` copied.

    :param model: The network.
    :param tensors: The copies, and possibly more.
    """
    with torch.no_grad():
        for name, tensor in named_tensors(model).items():
            tensor.copy_(tensors[name])


def fingerprint(*tensors: torch.Tensor) -> str:
    """
    Give a short text that is the same for the same data only.

    :param tensors: The data, on the CPU.
    :return: 16 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for tensor in tensors:
        _hash(digest, tensor)
    return digest.hexdigest()[:16]


def fingerprint_of_state(optimizer: torch.optim.Optimizer) -> str:
    """
    Give a short text that is the same for the same momentum.

    :param optimizer: The optimiser.
    :return: 16 hexadecimal digits.
    """
    tensors: dict[str, torch.Tensor] = {}
    packed = _packed(optimizer.state_dict()["state"], tensors, "state")
    return hashlib.sha256(f"{packed}{fingerprint(*tensors.values())}".encode()).hexdigest()[:16]


def prepare(folder: Path) -> None:
    """
    Make sure that a folder can be written to, and clear what a kill has left there.

    :param folder: Created if missing.
    :raises OSError: If it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob("*.safetensors.*.tmp"):
            left.unlink(missing_ok=True)  # another process may be clearing, too
        probe = folder / f"probe.safetensors.{os.getpid()}.tmp"
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise _cannot_write(folder, error) from error


def check_description(there: Mapping[str, object], here: Mapping[str, object], folder: Path) -> None:
    """
    Refuse a folder that another run has saved itself in.

    :param there: The description of the run in the folder.
    :param here: The description of this run.
    :param folder: The folder, for the message.
    :raises ValueError: If they differ; the message says in what.
    """
    names = [*there, *(name for name in here if name not in there)]
    different = [
        f"{name} is {there.get(name)} there, {here.get(name)} here"
        for name in names
        if there.get(name) != here.get(name)
    ]
    if different:
        more = f"; and {len(different) - 5} more" if len(different) > 5 else ""
        raise ValueError(
            f"`checkpoint`: {folder} holds another run: {'; '.join(different[:5])}{more}. Use another "
            "folder, or the same arguments, model and data."
        )


def write(path: Path, tensors: Mapping[str, torch.Tensor], content: Mapping[str, object]) -> None:
    """
    Write tensors and JSON to a file that is either the old one or the new one, whole, whenever the process is killed.

    :param path: The file; its folder is created.
    :param tensors: By name, on the CPU.
    :param content: What JSON can hold; NaN and infinity included.
    :raises OSError: If that fails.
    """
    text = json.dumps(content)
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # of two jobs, neither writes into the other's
    metadata = {"format": str(FORMAT), "content": text, "sha256": _digest(tensors, text, FORMAT)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(dict(tensors), beside, metadata=metadata)
        _flush(beside)
        beside.replace(path)
        _flush(path.parent)
    except (OSError, SafetensorError) as error:
        raise _cannot_write(path.parent, error) from error


def _cannot_write(folder: Path, error: Exception) -> OSError:
    return OSError(
        f"`checkpoint`: cannot write to {folder}: {error}. A folder that can be written to, or that can be created, is "
        "needed."
    )


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """
    Read what :func:`write` wrote. Nothing in the file is ever executed.

    :param path: The file.
    :return: The tensors, on the CPU, and the JSON.
    :raises ValueError: If the file is damaged, or of a newer format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if not metadata.get("format", "").isdecimal():
                raise ValueError("it is no checkpoint of this package")
            if int(metadata["format"]) > FORMAT:
                raise ValueError(
                    f"its format is {metadata['format']}, newer than {FORMAT}, which this version of art_clat reads"
                )
            # Copies, which do not hold on to the file, which is going to be replaced.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a mapping
        if metadata.get("sha256") != _digest(tensors, metadata.get("content", ""), int(metadata["format"])):
            raise ValueError("it is damaged: its content does not have the checksum it should have")
        return tensors, json.loads(metadata.get("content", ""))
    except (SafetensorError, ValueError, OSError, RecursionError) as error:
        raise ValueError(
            f"`checkpoint`: {path} cannot be read: {error}. It stays as it is; move it away to begin anew."
        ) from error


def _digest(tensors: Mapping[str, torch.Tensor], text: str, version: int) -> str:
    digest = hashlib.sha256(f"{version}{text}".encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        _hash(digest, tensors[name])
    return digest.hexdigest()


def _hash(digest: hashlib._Hash, tensor: torch.Tensor) -> None:
    digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _flush(path: Path) -> None:
    """Wait until the disk has a file, or a folder's list of files."""
    if os.name == "nt" and path.is_dir():  # Windows has no such thing
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _packed(value: object, tensors: dict[str, torch.Tensor], name: str) -> object:
    """Turn the state of an optimiser or a scheduler into JSON; its tensors are put aside under names."""
    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        return {"tensor": name}
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        items = [_packed(item, tensors, f"{name}.{index}") for index, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, dict):  # keys may be numbers; MultiStepLR has a Counter
        return {
            "counter" if isinstance(value, Counter) else "items": [
                [_packed(key, tensors, f"{name}.key"), _packed(item, tensors, f"{name}.{key}")]
                for key, item in value.items()
            ]
        }
    raise TypeError(
        f"`checkpoint`: {name.removeprefix('optimizer:')} is a {type(value).__qualname__}, which cannot be saved "
        "without pickle; numbers, texts, tensors, and lists and dictionaries of them can."
    )


def _unpacked(value: object, tensors: Mapping[str, torch.Tensor]) -> object:
    if isinstance(value, list):
        return [_unpacked(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "tuple" in value:
        return tuple(_unpacked(item, tensors) for item in value["tuple"])
    items = value["counter"] if "counter" in value else value["items"]
    unpacked = {_unpacked(key, tensors): _unpacked(item, tensors) for key, item in items}
    return Counter(unpacked) if "counter" in value else unpacked


def describe(
    classifier: PyTorchClassifier,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None,
    attacks: Sequence[EvasionAttack],
) -> dict[str, object]:
    """
    Describe what a run works with, so that a checkpoint of another one is told apart.

    What changes in the course of a run is left out: weights, and what a scheduler sets.

    :param classifier: The classifier.
    :param scheduler: The scheduler, or `None`.
    :param attacks: The attacks.
    :return: Names, and values that JSON can hold.
    """
    tensors = named_tensors(classifier.model)
    facts: dict[str, object] = {name: f"{tensor.dtype}, {tuple(tensor.shape)}" for name, tensor in tensors.items()}
    facts["the architecture"] = hashlib.sha256(text_of(classifier.model).encode()).hexdigest()[:16]
    facts["the frozen parameters"] = [n for n, p in classifier.model.named_parameters() if not p.requires_grad]
    buffers = classifier.loss.named_buffers() if isinstance(classifier.loss, nn.Module) else ()
    facts["the loss"] = _settings(classifier.loss, vars(classifier.loss)) | {
        name: text_of(buffer.cpu().numpy()) for name, buffer in buffers
    }
    facts |= describe_inputs(classifier)
    for number, attack in enumerate(attacks, start=1):
        ignored = ("verbose", "batch_size", "summary_writer", "tensor_board")
        # ART keeps some settings of ProjectedGradientDescent in the attack it wraps only.
        holders = [attack, getattr(attack, "_attack", attack)]
        settings = {
            name: next((getattr(holder, name) for holder in holders if hasattr(holder, name)), None)
            for name in attack.attack_params
            if name not in ignored
        }
        facts[f"attack {number}"] = _settings(attack, settings)
    schedule = {} if scheduler is None else _still(scheduler.state_dict())
    facts["the scheduler"] = {"class": type(scheduler).__name__, **{k: text_of(v) for k, v in schedule.items()}}
    optimizer: Any = classifier.optimizer
    facts["the optimizer"] = type(optimizer).__name__
    facts |= {f"optimizer.{key}": text_of(value) for key, value in optimizer.defaults.items() if key != "lr"}
    left_out = ["params", "lr", "initial_lr"]
    if "'cycle_momentum': True" in repr(schedule):
        left_out += ["momentum", "betas"]
    names = {parameter: name for name, parameter in classifier.model.named_parameters()}
    for number, group in enumerate(optimizer.param_groups, start=1):
        held = [names.get(parameter, "one that is not the network's") for parameter in group["params"]]
        facts[f"optimizer group {number}"] = {
            "parameters": len(held),
            "in the order": hashlib.sha256(" ".join(held).encode()).hexdigest()[:16],
            "lr": text_of(group.get("initial_lr", group["lr"])),
            **{key: text_of(value) for key, value in group.items() if key not in left_out},
        }
    return facts


def _still(state: object) -> Any:
    """Leave out of a scheduler's state, and of those of the schedulers in it, what changes from epoch to epoch."""
    if isinstance(state, list):
        return [_still(item) for item in state]
    if type(state) is not dict:
        return state
    moving = ["last_epoch", "T_cur", "T_i", "verbose", "_last_lr", "_step_count"]
    moving += ["_is_initial", "_get_lr_called_within_step"]
    return {key: _still(value) for key, value in state.items() if key not in moving}


def describe_inputs(classifier: PyTorchClassifier) -> dict[str, object]:
    """
    Describe what an ART classifier does with inputs before the network sees them.

    :param classifier: The classifier.
    :return: Names, and values that JSON can hold.
    """
    return {
        "clip_values": text_of(classifier.clip_values),
        "the preprocessing": [
            _settings(operation, {name: getattr(operation, name, None) for name in operation.params})
            for operation in classifier.preprocessing_operations
        ],
    }


def _settings(thing: object, values: Mapping[str, object]) -> dict[str, object]:
    """Describe an object by its class and its public settings; of settings that are objects, the class alone."""

    def text(value: object) -> str:
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(map(text, value))}]"
        plain = value is None or isinstance(value, (bool, int, float, str, dict, np.ndarray, np.generic))
        return text_of(value) if plain else type(value).__name__

    public = {name: text(value) for name, value in values.items() if not name.startswith("_") and name != "training"}
    return {"class": type(thing).__name__, **public}


def text_of(value: object) -> str:
    """
    Write a setting so that it reads the same in another process.

    :param value: The setting.
    :return: Its ``repr`` without the addresses of objects; for one that has none of its own, its public settings.
    """
    if type(value).__repr__ is object.__repr__ and hasattr(value, "__dict__"):
        return repr(_settings(value, vars(value)))
    if isinstance(value, np.ndarray) and value.ndim:
        return f"array {fingerprint(torch.as_tensor(value))}"
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value.item() if isinstance(value, (np.generic, np.ndarray)) else value))
