"""What a run was made with, for its checkpoint and its history."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from art.attacks import EvasionAttack
from art.estimators.classification import PyTorchClassifier
from torch import nn

from art_clat.config import TrainerOptions
from art_clat.models.description import describe_inputs
from art_clat.training.schedule import initial_rates, state_of
from art_clat.utils.descriptions import settings_of, text_of
from art_clat.utils.environment import describe_environment
from art_clat.utils.weights import named_tensors


def describe(
    classifier: PyTorchClassifier,
    scheduler: object,
    attacks: Sequence[EvasionAttack],
) -> dict[str, object]:
    """
    Describe what a run works with: names, and values that JSON can hold. A checkpoint of another run is refused by it.

    What changes during a run is left out: the weights, and what a scheduler sets.
    """
    tensors = named_tensors(classifier.model)
    facts: dict[str, object] = {name: f"{tensor.dtype}, {tuple(tensor.shape)}" for name, tensor in tensors.items()}
    facts["the architecture"] = hashlib.sha256(text_of(classifier.model).encode()).hexdigest()[:16]
    facts["the frozen parameters"] = [n for n, p in classifier.model.named_parameters() if not p.requires_grad]
    buffers = classifier.loss.named_buffers() if isinstance(classifier.loss, nn.Module) else ()
    facts["the loss"] = settings_of(classifier.loss, vars(classifier.loss)) | {
        name: text_of(buffer.cpu().numpy()) for name, buffer in buffers
    }
    facts |= describe_inputs(classifier)
    for number, attack in enumerate(attacks, start=1):
        ignored = ("verbose", "batch_size", "summary_writer", "tensor_board")
        # ProjectedGradientDescent lacks some of its settings; the attack that it wraps has them.
        holders = [attack, getattr(attack, "_attack", attack)]
        settings = {
            name: next((getattr(holder, name) for holder in holders if hasattr(holder, name)), None)
            for name in attack.attack_params
            if name not in ignored
        }
        facts[f"attack {number}"] = settings_of(attack, settings)
    schedule = {} if scheduler is None else _still(state_of(scheduler))
    facts["the scheduler"] = {"class": type(scheduler).__name__, **{k: text_of(v) for k, v in schedule.items()}}
    optimizer: Any = classifier.optimizer
    facts["the optimizer"] = type(optimizer).__name__
    facts |= {f"optimizer.{key}": text_of(value) for key, value in optimizer.defaults.items() if key != "lr"}
    left_out = ["params", "lr", "initial_lr"]
    if "'cycle_momentum': True" in repr(schedule):
        left_out += ["momentum", "betas"]
    names = {parameter: name for name, parameter in classifier.model.named_parameters()}
    rates = initial_rates(scheduler, optimizer)
    for number, (group, rate) in enumerate(zip(optimizer.param_groups, rates, strict=True), start=1):
        held = [names.get(parameter, "one that is not the network's") for parameter in group["params"]]
        facts[f"optimizer group {number}"] = {
            "parameters": len(held),
            "in the order": hashlib.sha256(" ".join(held).encode()).hexdigest()[:16],
            "lr": text_of(rate),
            **{key: text_of(value) for key, value in group.items() if key not in left_out},
        }
    return facts


def _still(state: object) -> Any:
    """Remove from a scheduler's state, and from those of nested schedulers, what changes from epoch to epoch."""
    if isinstance(state, list):
        return [_still(item) for item in state]
    if type(state) is not dict:
        return state
    moving = ["last_epoch", "T_cur", "T_i", "verbose", "_last_lr", "_step_count"]
    moving += ["_is_initial", "_get_lr_called_within_step"]
    moving += ["best", "num_bad_epochs", "cooldown_counter", "metric", "restore_lr"]  # of those that wait for a plateau
    return {key: _still(value) for key, value in state.items() if key not in moving}


def configuration(
    classifier: PyTorchClassifier,
    options: TrainerOptions,
    attacks: Sequence[EvasionAttack],
    scheduler: object,
    fit: Mapping[str, object],
) -> dict[str, Any]:
    """Describe a run for its history; `fit` holds the arguments of ``fit`` and the shape of the data."""
    facts = describe(classifier, scheduler, attacks)
    kept = ("attack ", "optimizer", "the ", "clip_values")
    model = classifier.model
    return {
        "trainer": options.describe(),
        "fit": dict(fit),
        "network": f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters",
        **{name.removeprefix("the "): value for name, value in facts.items() if name.startswith(kept)},
        **describe_environment(classifier.device),
    }
