"""The paper's CIFAR networks where the `evaluation` extra, or a part of it, is missing."""

import subprocess
import sys

SCRIPT = """
import importlib, pickle, sys
for name in {blocked!r}:
    sys.modules[name] = None
import timm, torch, art_clat
outputs = {{}}
try:
    for name in ("preactresnet18_cifar", "resnet18_cifar", "vgg16_bn_cifar"):
        torch.manual_seed(0)
        outputs[name] = timm.create_model(name).eval()(torch.full((1, 3, 32, 32), 0.5)).tolist()
    wide = timm.create_model("wideresnet28_10_cifar")
    print(type(wide).__module__)
except ImportError as error:
    print(error)
with open(sys.argv[1], "wb") as file:
    pickle.dump(outputs, file)
"""


def run(path, *blocked):
    arguments = [sys.executable, "-W", "ignore", "-c", SCRIPT.format(blocked=blocked), str(path)]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def test_without_autoattack_they_are_the_same(tmp_path):
    """Nor do they need what the rest of RobustBench needs, such as gdown."""
    for blocked in ("nothing", "pyautoattack", "gdown"):
        assert run(tmp_path / blocked, blocked) == "robustbench.model_zoo.architectures.wide_resnet"
    expected = (tmp_path / "nothing").read_bytes()
    assert (tmp_path / "pyautoattack").read_bytes() == (tmp_path / "gdown").read_bytes() == expected


def test_without_robustbench_the_reason_is_named(tmp_path):
    said = run(tmp_path / "out", "robustbench", "pyautoattack")
    assert "RobustBench is not installed" in said and 'pip install "art_clat[evaluation]"' in said
    assert "AutoAttack" not in said
