"""The program that test_distributed.py runs in every process; it writes its results as JSON."""

import datetime
import json
import os
import sys
import time
from pathlib import Path

import torch
from art.data_generators import NumpyDataGenerator
from conftest import NB_CLASSES, Chain, ForeignBatchNorm, Normed, make_attack, make_classifier, make_data, observe
from torch import nn
from torchvision.transforms import v2

from art_clat import (
    AdversarialTrainerCLATPyTorch,
    Callback,
    CropAndFlip,
    CSVLog,
    LayerOptions,
    PerformanceOptions,
    SelectionOptions,
)
from art_clat.training import checkpoint
from art_clat.utils.processes import Ranks, _leave

#: By name: what the trainer and what `fit` is given. 50 samples in batches of 16 leave a last batch of 2.
CONFIGURATIONS = {
    "adversarial": ({"objective": "adversarial"}, {}),
    "clean, augmented, channels last": (
        {
            "objective": "clean",
            "augmentation": v2.RandomHorizontalFlip(),
            "performance": PerformanceOptions(channels_last=True),
        },
        {},
    ),
    "a share of odd batches, several layers": ({"ratio": 0.6, "budget": 0.5}, {"batch_size": 15, "max_grad_norm": 0.3}),
    "reused perturbations of a share of moved images": (
        {"reuse_perturbations": 1, "ratio": 0.6, "augmentation": CropAndFlip(1)},
        {"batch_size": 15},
    ),
    # Not TRADES: its attack begins where the gradient is near zero, so rounding decides the sign.
    "rivals": (
        {"first_stage": "mart", "objective": "mart", "selection": "module_robustness_highest", "ema_decay": 0.8},
        {},
    ),
    "single steps, watched": ({"first_stage": "fgsm_rs"}, {}),
    "weights perturbed in both stages": ({"first_stage": "awp", "weight_perturbation": 0.05, "ema_decay": 0.8}, {}),
    "two attacks, one through NumPy": ({"numpy": True, "norm": ForeignBatchNorm}, {"drop_last": True}),
}


def make_trainer(*, numpy=False, dropout=0.0, norm=None, **kwargs):
    torch.manual_seed(int(os.environ.get("RANK", 0)))  # other weights in every process; the first one's are used
    model = Normed()
    model.dropout.p = dropout
    model.bn2.momentum = 0.3
    model.bn3 = norm(6) if norm else model.bn3
    classifier = make_classifier(model)
    attacks = [make_attack(classifier, num_random_init=1)]
    if numpy:
        attacks.append(make_attack(classifier, norm=3, eps=0.5, eps_step=0.2))
    selection = SelectionOptions(kwargs.pop("selection", "criticality"), samples=33)
    settings = {"warmup": 2, "reselect_every": 2, "criticality_weight": 0.1, "seed": 0, "selection": selection}
    settings["layers"] = LayerOptions(freeze_norms=False)
    return AdversarialTrainerCLATPyTorch(classifier, attacks, **{**settings, **kwargs})


def fit(trainer, data=None, **kwargs):
    settings = {"batch_size": 16, "nb_epochs": 5, "validation_data": make_data(50), "verbose": False, **kwargs}
    trainer.fit(*(data or make_data(50)), **settings)


def outcome(trainer):
    return {
        "losses": [record.loss for record in trainer.history.epochs],
        "accuracies": [[r.clean_accuracy, r.robust_accuracy] for r in trainer.history.epochs],
        "chosen": [selection.chosen for selection in trainer.history.selections],
        "weakness": [[entry.weakness for entry in s.measured] for s in trainer.history.selections],
        "state": {name: value.tolist() for name, value in trainer.classifier.model.state_dict().items()},
    }


def compare():
    """Run every configuration, or those that the environment names, and return the results."""
    results = {}
    names = os.environ.get("CONFIGURATIONS", "").split(";")
    for name, (arguments, fit_arguments) in CONFIGURATIONS.items():
        if names != [""] and name not in names:
            continue
        trainer = make_trainer(**arguments)
        fit(trainer, **fit_arguments)
        results[name] = outcome(trainer)
    return results


def refuse(output):
    """Try what several processes must refuse; return the messages."""
    rank = int(os.environ["RANK"])
    folder = f"{output}-folder-{rank}"
    if rank == 0:  # a folder that the other process does not see
        fit(lone_trainer(), checkpoint=f"{folder}/y", nb_epochs=2)
    x, y = make_data(50)
    trainer = make_trainer()
    messages = {}
    for name, attempt in {
        "batch smaller than ranks": lambda: fit(trainer, batch_size=1),
        "last batch smaller than ranks": lambda: fit(trainer, batch_size=49),
        "generator": lambda: trainer.fit_generator(NumpyDataGenerator(x, y, batch_size=16)),
        "other data": lambda: fit(trainer, (x[: 50 - 2 * rank], y[: 50 - 2 * rank]), batch_size=10),
        "other arguments": lambda: fit(make_trainer(criticality_weight=0.1 + rank)),
        "summed loss": lambda: fit(make_trainer_with(loss=nn.CrossEntropyLoss(reduction="sum"))),
        "weighted loss": lambda: fit(make_trainer_with(loss=nn.CrossEntropyLoss(weight=torch.ones(NB_CLASSES)))),
        "another model": lambda: fit(make_trainer() if rank else make_trainer_with(model=Chain())),
        "other momentum": lambda: fit(make_trainer_with(momentum=rank)),
        "checkpoint of one only": lambda: fit(trainer, checkpoint=f"{folder}/x" if rank == 0 else None),
        "folder of one only": lambda: fit(make_trainer(seed=None), checkpoint=f"{folder}/y", nb_epochs=2),
        "callbacks of one only": lambda: fit(trainer, callbacks=[StopInOne()] if rank else []),
        "resume of one only": lambda: fit(make_trainer(), resume=rank == 0),
        "ignored class": lambda: fit(make_trainer_with(loss=nn.CrossEntropyLoss(ignore_index=0))),
        "loss with parameters": lambda: fit(make_trainer_with(loss=LearningLoss())),
        "norm without statistics": lambda: fit(make_trainer_with(model=with_norm(nn.BatchNorm2d, False))),
        "norm of samples with statistics": lambda: fit(make_trainer_with(model=with_norm(nn.InstanceNorm2d, True))),
        "a loss that is not finite in one": lambda: fit(make_trainer_with(factor=float("nan") if rank else 1.0)),
    }.items():
        try:
            attempt()
            messages[name] = None
        except (ValueError, FloatingPointError) as error:
            messages[name] = f"{type(error).__name__}: {error}"
    return messages


def lone_trainer():
    """Return a trainer whose `fit` runs in this process alone."""
    trainer, fit_together = make_trainer(seed=None), AdversarialTrainerCLATPyTorch.fit

    def fit_alone(*args, **kwargs):
        join, Ranks.join = Ranks.join, classmethod(lambda cls, device: Ranks())
        try:
            fit_together(trainer, *args, **kwargs)
        finally:
            Ranks.join = join

    trainer.fit = fit_alone
    return trainer


def with_norm(cls, track_running_stats):
    model = Normed()
    model.bn2 = cls(6, track_running_stats=track_running_stats)
    return model


class LearningLoss(nn.CrossEntropyLoss):
    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(()))


def make_trainer_with(*, model=None, loss=None, momentum=0, factor=None):
    model = model or Normed()
    classifier = make_classifier(model, loss=loss)
    if factor is not None:
        classifier.loss.forward = lambda logits, y: factor * nn.functional.cross_entropy(logits, y)
    if momentum:
        for parameter in model.parameters():
            classifier.optimizer.state[parameter]["momentum_buffer"] = torch.ones_like(parameter)
    return AdversarialTrainerCLATPyTorch(
        classifier, make_attack(classifier), warmup=2, layers=LayerOptions(freeze_norms=False), seed=0
    )


def hooks_left(output):
    trainer = make_trainer(dropout=0.3, seed=None)
    before = {name: p.requires_grad for name, p in trainer.classifier.model.named_parameters()}
    seen, left_out, written = [], [], []
    write, dropout = checkpoint.write, trainer.classifier.model.dropout
    observe(
        trainer,
        step=lambda loop, step, batch, *args: seen.append(batch.x.sum((1, 2, 3)).tolist()) or step(batch, *args),
    )
    checkpoint.write = lambda *args: written.append(1) or write(*args)

    def drop(x):
        y = nn.functional.dropout(x, dropout.p, dropout.training)
        if dropout.training:
            left_out.append((y == 0).flatten().tolist())
        return y

    dropout.forward = drop
    fit(trainer, checkpoint=f"{output}-checkpoint")
    modules = trainer.classifier.model.modules()
    return {
        "hooks": sum(len(m._forward_hooks) + len(m._backward_hooks) + len(m._forward_pre_hooks) for m in modules),
        "flags": before == {name: p.requires_grad for name, p in trainer.classifier.model.named_parameters()},
        "state": outcome(trainer)["state"],
        "threads": threads_left(),
        "seen": [value for batch in seen[:4] for value in batch],  # four batches are an epoch
        "left out": left_out[1],  # the first pass in training mode only looks at the output
        "written": len(written),
    }


class BatchStatistics(ForeignBatchNorm):
    """A norm that takes its statistics from the batch in evaluation mode, too."""

    def forward(self, x):
        return nn.functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, True, 0.2)


def unequal_passes():
    """Train with such a norm, and with a selection of which one process has no sample in the last batch."""
    model = Normed()
    model.bn2 = BatchStatistics(6)
    classifier = make_classifier(model)
    selection = SelectionOptions(samples=17)
    trainer = AdversarialTrainerCLATPyTorch(classifier, make_attack(classifier), selection=selection, seed=0)
    fit(trainer, nb_epochs=1)
    return len(trainer.history.epochs)


class StopInOne(Callback):
    """Stops the run within its fourth epoch, in one process only."""

    def on_batch_end(self, event):
        return "stop" if event.rank == 1 and (event.epoch, event.batch) == (3, 1) else None


def stop(output):
    """Stop a run with all that is decided from batch to batch, and go on with it."""
    trainer, log = make_trainer(ema_decay=0.8), CSVLog(f"{output}-log-{os.environ['RANK']}.csv")
    settings = {"scheduler": plateau(trainer), "max_grad_norm": 0.5, "resume": True}
    fit(trainer, callbacks=[StopInOne(), log], **settings)
    stopped = outcome(trainer)
    fit(trainer, callbacks=[Callback(), log], nb_epochs=4, **settings)
    return {"stopped": stopped, "outcome": outcome(trainer), "log": log.path.exists()}


def plateau(trainer):
    return torch.optim.lr_scheduler.ReduceLROnPlateau(trainer.classifier.optimizer, mode="max", patience=0)


def threads_left():
    """Count gloo's threads after the process group was left, while the trainer still exists."""
    _leave()
    names = [task.joinpath("comm").read_text() for task in Path("/proc/self/task").glob("*")]
    return sum("gloo" in name for name in names)


def main():
    task, output = sys.argv[1:3]
    torch.set_num_threads(1)
    rank = int(os.environ.get("RANK", 0))
    if task in ("die", "hang"):  # outside of torchrun, which would end the others
        torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
        if task == "hang":
            join = Ranks.join
            Ranks.join = classmethod(lambda cls, device: join(device, datetime.timedelta(seconds=5)))
        trainer = make_trainer()
        steps = []

        def dying(loop, step, *args):
            steps.append(1)
            if len(steps) == 11 and rank == 1:
                os._exit(9) if task == "die" else time.sleep(600)
            return step(*args)

        observe(trainer, step=dying)
        fit(trainer, checkpoint=output, checkpoint_every=1)
        return
    tasks = {
        "compare": compare,
        "refuse": lambda: refuse(output),
        "hooks": lambda: hooks_left(output),
        "unequal": unequal_passes,
        "stop": lambda: stop(output),
    }
    result = tasks[task]()
    with open(f"{output}-{rank}.json", "w") as file:
        json.dump(result, file)


if __name__ == "__main__":
    main()
