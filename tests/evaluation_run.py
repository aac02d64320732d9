"""The evaluations of robustness/test_runner.py, for its processes, too."""

import os
import sys
from unittest import mock

import numpy as np
import torch
from conftest import INPUT_SHAPE, Chain, make_data
from torch import nn

from art_clat import evaluate_robustness
from art_clat.robustness.autoattack import Ensemble

SETTINGS = {"norm": "Linf", "eps": 0.1, "batch_size": 5, "pgd_max_iter": 5, "pgd_restarts": 2, "seed": 3}

QUERIES, STEPS = 100, 30


class Noisy(nn.Module):
    """A network whose outputs are random in evaluation mode, too."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) + 0.3 * torch.randn(len(x), 4) + 0.3 * torch.as_tensor(np.random.randn(4)).float()


def trained(seed=0, model=None):
    """A network that has learnt the data, so that some examples withstand and others do not."""
    torch.manual_seed(seed)
    model = model or Chain()
    x, y = map(torch.as_tensor, make_data(200))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


def held_out(n=22):
    x, y = make_data(200 + n)
    y[-1] = (y[-1] + 1) % 4  # so that not all are classified correctly
    return x[-n:].reshape(n, *INPUT_SHAPE), y[-n:]


def evaluate(kind="standard", **kwargs):
    """AutoAttack, or PGD and transfer of and on a network with random outputs."""
    torch.set_num_threads(1)
    settings = dict(SETTINGS)
    model = trained()
    if kind == "noisy":
        model = Noisy(model)
        settings |= {"autoattack_version": None, "transfer_from": Noisy(trained(1))}
    with mock.patch.object(Ensemble, "make_attack", quick):
        return evaluate_robustness(model, *held_out(), **{**settings, **kwargs})


def quick(ensemble, name, make_attack=Ensemble.make_attack):
    """Attacks of fewer steps and queries: the tests are of what goes on around them."""
    attack = make_attack(ensemble, name)
    if name == "square":
        attack.n_queries = QUERIES
    else:
        attack.n_iter = STEPS
    return attack


def outcome(report):
    verdicts = {"clean": report.clean, "pgd": report.pgd, **report.attacks}
    if report.transfer is not None:
        verdicts["transfer"] = report.transfer
    return {**verdicts, "adversarial": report.adversarial}


def write(path, report):
    with open(f"{path}.part", "wb") as file:
        np.savez(file, **outcome(report))
    os.replace(f"{path}.part", path)


def main():
    output, checkpoint = sys.argv[1:3]
    rank = os.environ["RANK"]
    for kind in ("standard", "noisy"):
        report = evaluate(kind, checkpoint=f"{checkpoint}-{kind}" if checkpoint != "none" else None)
        write(f"{output}-{kind}-{rank}.npz", report)


if __name__ == "__main__":
    main()
