"""Small networks whose features can be computed by hand, and other things that most tests need."""

import logging
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from art.attacks.evasion import ProjectedGradientDescent
from art.estimators.classification import PyTorchClassifier
from torch import nn

NB_CLASSES = 4
INPUT_SHAPE = (2, 6, 6)


class Chain(nn.Module):
    """Two convolutions, one of them overwritten by an in-place ReLU, a hidden linear layer and a head."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 3, 3, padding=1)
        self.second = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.hidden = nn.Linear(36, 8)
        self.head = nn.Linear(8, NB_CLASSES)

    def forward(self, x):
        x = nn.functional.relu_(self.first(x))
        x = nn.functional.gelu(self.second(x))
        x = nn.functional.relu_(self.hidden(x.flatten(1)))
        return self.head(x)

    def features(self, x):
        """Compute all features step by step, without hooks and in-place operations."""
        first = nn.functional.conv2d(x, self.first.weight, self.first.bias, padding=1)
        second = nn.functional.conv2d(first.relu(), self.second.weight, self.second.bias, stride=2, padding=1)
        hidden = nn.functional.gelu(second).flatten(1) @ self.hidden.weight.T + self.hidden.bias
        head = hidden.relu() @ self.head.weight.T + self.head.bias
        return {"first": first, "second": second, "hidden": hidden, "head": head}


class Normed(nn.Module):
    """Convolutions with BatchNorm, dropout and a residual connection."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(2, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(6)
        self.conv3 = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(6)
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(6, NB_CLASSES)

    def forward(self, x):
        x = nn.functional.relu_(self.bn1(self.conv1(x)))
        x = x + nn.functional.relu_(self.bn2(self.conv2(x)))
        x = nn.functional.relu_(self.bn3(self.conv3(x)))
        return self.fc(self.dropout(x.mean((2, 3))))


class Recurrent(nn.Module):
    """A convolution, a recurrent layer over its rows, and a head."""

    def __init__(self, layer=nn.LSTM):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1)
        self.recurrent = layer(18, 5, batch_first=True)
        self.head = nn.Linear(5, NB_CLASSES)

    def forward(self, x):
        rows = self.conv(x).relu().transpose(1, 2).flatten(2)
        return self.head(self.recurrent(rows)[0][:, -1])


class ForeignBatchNorm(nn.Module):
    """A BatchNorm of another library: not torch's class, but with the same statistics, and a counter."""

    def __init__(self, width):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        for name, value in (("running_mean", torch.zeros(width)), ("running_var", torch.ones(width))):
            self.register_buffer(name, value)
        self.register_buffer("passes", torch.tensor(0))

    def forward(self, x):
        self.passes += self.training
        return nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.2
        )


class Code:
    """An object whose pickle runs code when it is loaded."""

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def make_classifier(model, *, lr=0.05, loss=None, input_shape=INPUT_SHAPE, **kwargs):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    settings = {"optimizer": optimizer, "clip_values": (0.0, 1.0), "device_type": "cpu", **kwargs}
    return PyTorchClassifier(model, loss or nn.CrossEntropyLoss(), input_shape, NB_CLASSES, **settings)


def make_attack(classifier, **kwargs):
    settings = {"eps": 0.1, "eps_step": 0.03, "max_iter": 4, "num_random_init": 0, "verbose": False, **kwargs}
    return ProjectedGradientDescent(classifier, **settings)


def observe(trainer, **methods):
    """
    Replace methods of a trainer's loop.

    Each replacement is called with the loop, the original method, and the method's arguments.
    """

    def changed(name, function):
        original = getattr(trainer.loop_class, name)
        return lambda self, *args: function(self, partial(original, self), *args)

    steps = {name: changed(name, function) for name, function in methods.items()}
    trainer.loop_class = type("Observed", (trainer.loop_class,), steps)
    return trainer


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    """The device of a test: the CPU, and a GPU if there is one."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU that torch can use")
    return request.param


@pytest.fixture(autouse=True)
def _logging_stays_on():
    """A test that silenced logging for good would hide what later tests look for."""
    yield
    assert logging.root.manager.disable == logging.NOTSET


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(4321)
    np.random.seed(4321)


def make_data(n=48):
    """Make inputs that show their class, so that training can succeed."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, NB_CLASSES, n)
    x = rng.uniform(0, 0.5, (n, *INPUT_SHAPE)).astype(np.float32)
    for image, label in zip(x, y, strict=True):
        image[label % 2, 3 * (label // 2) : 3 * (label // 2) + 3] += 0.4
    return x, y


@pytest.fixture
def data():
    return make_data()


@pytest.fixture
def chain():
    return Chain()


@pytest.fixture
def normed():
    model = Normed()
    for module in model.modules():  # as after some training
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model
