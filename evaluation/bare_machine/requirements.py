"""Which packages travel along, and which the machine must have."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterator
from pathlib import Path

#: Pure Python packages that torch, torchvision and timm do not bring: ART with what it imports, AutoAttack, RobustBench
#: with what its model zoo and loaders import, and pytest. Some machines have some of them; those come first.
CARRIED = (
    *("art", "six", "tqdm", "joblib", "threadpoolctl", "cloudpickle", "packaging"),
    *("pyautoattack", "robustbench", "geotorch", "torchdiffeq", "gdown", "bs4", "soupsieve"),
    *("pytest", "_pytest", "pluggy", "iniconfig", "pygments"),
)

#: Distributions whose versions a result names; their metadata travel too.
NAMED = ("art_clat", "adversarial-robustness-toolbox", "pyautoattack", "robustbench")

#: Parts of them that nothing here imports, and that are large.
LEFT_OUT = (("pyautoattack", "examples"),)

#: Compiled packages, by the names that they are imported by. They cannot travel as Python files.
COMPILED = {
    **{name: name for name in ("torch", "torchvision", "timm", "numpy", "scipy", "safetensors")},
    "sklearn": "scikit-learn",
}


def check_requirements() -> None:
    """
    Refuse a machine that lacks a package.

    :raises SystemExit: With the names of all that are missing.
    """
    lacking = [distribution for name, distribution in COMPILED.items() if importlib.util.find_spec(name) is None]
    if lacking:
        raise SystemExit(f"This machine lacks {', '.join(lacking)}: pip install {' '.join(lacking)}")
    if unpacked := [name for name in ("art", "pytest") if importlib.util.find_spec(name) is None]:
        raise SystemExit(
            f"This machine lacks {', '.join(unpacked)}: unpack all pieces that `python evaluation/gpu.py --pack DIR` "
            "wrote, or install the package with `pip install -e .[test]`."
        )


def python_files(name: str) -> Iterator[tuple[Path, str]]:
    """
    Find the Python files of an installed package.

    :param name: One of :data:`CARRIED`.
    :return: Each file, and its path below the folder that holds the package.
    :raises SystemExit: If the package is not installed.
    """
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise SystemExit(f'`--pack` needs {name}, which is not installed: pip install "art_clat[test]"')
    if not spec.submodule_search_locations:
        assert spec.origin is not None
        yield Path(spec.origin), Path(spec.origin).name
        return
    folder = Path(spec.submodule_search_locations[0])
    for path in sorted(folder.rglob("*.py")):
        inside = (name, *path.relative_to(folder).parts)
        if not any(inside[: len(part)] == part for part in LEFT_OUT):
            yield path, "/".join(inside)


def metadata_files(name: str) -> Iterator[tuple[Path, str]]:
    """
    Find the metadata of a distribution, which say its version.

    :param name: One of :data:`NAMED`.
    :return: The file, and its path below the folder that holds the package; nothing if it is not installed.
    """
    # A checkout's own `.egg-info`, which comes first on the path, has no such file.
    for distribution in importlib.metadata.distributions(name=name):
        for file in distribution.files or ():
            if file.name == "METADATA":
                yield Path(str(file.locate())), file.as_posix()
                return
