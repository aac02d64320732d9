"""Collect what must travel to a bare machine, in pieces that fit through."""

from __future__ import annotations

import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from bare_machine.requirements import CARRIED, NAMED, metadata_files, python_files

ROOT = Path(__file__).parents[2]

#: Bytes of a piece at most.
PIECE = 64_000_000

#: What a tar archive adds to a file at most: its header and the filling of its last block.
OVERHEAD = 2048

Files = Sequence[tuple[Path, str]]


def pack(folder: Path, data: Path | None) -> list[Path]:
    """
    Write code and data as archives.

    :param folder: Where to; created if missing. Pieces that an earlier call left there are replaced.
    :param data: Folder of the data, which becomes ``data/``; `None` for none.
    :return: The archives.
    :raises SystemExit: If a package is not installed, `data` is no folder, or one of its files is too large.
    """
    if data is not None and not data.is_dir():
        raise SystemExit(f"`--data` must be a folder, got {data}.")
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("piece-*.tar.gz"):
        old.unlink()
    groups = [own_files(), carried_files(), [] if data is None else data_files(data)]
    written = []
    for number, files in enumerate(piece for group in groups for piece in pieces(group)):
        path = folder / f"piece-{number:02}.tar.gz"
        with tarfile.open(path, "w:gz", compresslevel=3) as archive:
            for source, name in files:
                archive.add(source, name, recursive=False)
        written.append(path)
    return written


def own_files() -> Files:
    """Find this repository's own files."""
    found = [ROOT / "pyproject.toml", *(ROOT / "art_clat").rglob("*")]
    found += [path for place in ("evaluation", "tests") for path in (ROOT / place).rglob("*.py")]
    found += (ROOT / "evaluation").rglob("*.toml")
    return [
        (path, path.relative_to(ROOT).as_posix())
        for path in sorted(found)
        if path.is_file() and "__pycache__" not in path.parts
    ]


def carried_files() -> Files:
    """Find the packages that the machine may lack."""
    found = [file for name in CARRIED for file in python_files(name)]
    found += [file for name in NAMED for file in metadata_files(name)]
    return [(path, f"packages/{inside}") for path, inside in found]


def data_files(folder: Path) -> Files:
    """Find the data; an archive that they were unpacked from stays here."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.endswith(".tar.gz"))
    return [(path, f"data/{path.relative_to(folder).as_posix()}") for path in files]


def pieces(files: Iterable[tuple[Path, str]], limit: int = PIECE) -> Iterator[Files]:
    """Divide files so that no archive of them is larger than the limit, even if nothing can be compressed."""
    piece: list[tuple[Path, str]] = []
    limit -= limit // 100 + 10 * OVERHEAD  # the archive's own end, and what compressing the incompressible adds
    size = 0
    for path, name in files:
        bytes_of_file = path.stat().st_size
        more = bytes_of_file + OVERHEAD
        if more > limit:
            raise SystemExit(f"`--data`: {path} has {bytes_of_file:,} bytes, more than a piece holds.")
        if size + more > limit:
            yield piece
            piece, size = [], 0
        piece.append((path, name))
        size += more
    if piece:
        yield piece


def instructions(written: Sequence[Path]) -> str:
    """Say how to unpack and run the pieces."""
    sizes = "\n".join(f"  {path.name}  {path.stat().st_size / 1e6:.1f} MB" for path in written)
    return (
        f"{len(written)} pieces in {written[0].parent}:\n{sizes}\nOn the machine, in an empty folder:\n"
        f'  for piece in PIECES/piece-*.tar.gz; do tar xzf "$piece"; done\n'
        "  python evaluation/gpu.py --part tests --minutes 9\n"
        "  python evaluation/gpu.py --part speed --minutes 9\n"
        "  python evaluation/gpu.py --part train --minutes 9\n"
        "Each leaves its results in runs/gpu/PART; the same command again does what is left."
    )
