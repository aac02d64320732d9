"""Which class an image folder's folders are."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

#: Ways to number the folders by their names alone.
ORDERS = ("string", "natural")

#: Folders that are parts of a data set, not classes.
_PARTS = {"train", "training", "val", "valid", "validation", "test", "testing"}


def number_folders(
    names: Sequence[str],
    *,
    order: str | None = None,
    class_map: str | os.PathLike[str] | None = None,
) -> dict[str, int]:
    """
    Number the classes of an image folder.

    :param names: The names of the folders.
    :param order: ``"string"``, as torchvision's ``ImageFolder`` sorts; ``"natural"``, as timm sorts, 2 before 10 and
           whatever the case; `None` if both are the same.
    :param class_map: A file that says which class a folder is: a text file with a name a line, as timm's, or JSON, a
           list of names or an object of names and numbers.
    :return: The number of each folder.
    :raises ValueError: If neither is given and the two orders differ, or the map does not fit the folders.
    :raises FileNotFoundError: If there is no such file.
    """
    if order is not None and order not in ORDERS:
        raise ValueError(f"`class_order` must be one of {', '.join(ORDERS)}, got {order!r}.")
    if class_map is not None:
        if order is not None:
            raise ValueError(f"`class_order` is {order!r}, and there is a `class_map`: pass one of them.")
        return _of_map(names, Path(class_map))
    if len(names) > 1 and {name.lower() for name in names} <= _PARTS:
        raise ValueError(
            f"`dataset`: the folders {_shown(sorted(names))} are parts of a data set, not classes. Pass one of them."
        )
    string, natural = sorted(names), sorted(names, key=natural_key)
    if order is None and string != natural:
        raise ValueError(
            f"`dataset`: the folders' numbers are the labels, and they can be sorted in two ways: {_shown(string)} as "
            f"text, as torchvision does, or {_shown(natural)} by their numbers, as timm does. Pass `class_order` "
            "'string' or 'natural' (--class-order), whichever the network was trained with, or a `class_map`."
        )
    return {name: number for number, name in enumerate(natural if order == "natural" else string)}


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Return what timm sorts folders by: numbers within a name as numbers, letters in lower case."""
    parts = [part for part in re.split(r"(\d+)", name.lower()) if part]
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts]


def _of_map(names: Sequence[str], path: Path) -> dict[str, int]:
    """Read a class map, and check it."""
    if not path.is_file():
        raise FileNotFoundError(f"`class_map`: there is no file {path}.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"`class_map`: {path} is no text; write the names one a line, or as JSON.") from error
    try:
        content = (
            json.loads(text, object_pairs_hook=_without_repeats)
            if path.suffix == ".json"
            else [line.strip() for line in text.rstrip().splitlines()]
        )
    except ValueError as error:
        raise ValueError(f"`class_map`: {path} is no JSON of names: {error}.") from error
    if isinstance(content, list):
        if "" in content:  # timm would count it as a class
            raise ValueError(f"`class_map`: entry {content.index('') + 1} of {path} is empty.")
        if repeated := sorted({str(name) for name in content if content.count(name) > 1}):
            raise ValueError(f"`class_map`: {path} names {_shown(repeated)} more than once.")
        content = {name: number for number, name in enumerate(content)}
    if not isinstance(content, Mapping) or not all(type(number) is int for number in content.values()):
        raise ValueError(f"`class_map`: {path} must hold a list of names, or names and whole numbers.")
    if sorted(content.values()) != list(range(len(content))):
        raise ValueError(
            f"`class_map`: {path} must number its {len(content)} classes 0…{len(content) - 1}, each once; it has "
            f"{min(content.values(), default=None)} to {max(content.values(), default=None)}. For a part of a "
            "network's classes name all of them."
        )
    if missing := [name for name in sorted(names) if name not in content]:
        in_other_case = {name.casefold() for name in missing} & {name.casefold() for name in content}
        hint = " Names differ in upper and lower case." if in_other_case else ""
        raise ValueError(f"`class_map`: {path} lacks the folder(s) {_shown(missing)}.{hint}")
    return dict(content)


def _without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Make a JSON object; of a repeated name JSON itself would keep the last."""
    if repeated := sorted({name for name, _ in pairs if [other for other, _ in pairs].count(name) > 1}):
        raise ValueError(f"it has {_shown(repeated)} more than once")
    return dict(pairs)


def _shown(names: Sequence[str]) -> str:
    """List the first names."""
    return ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
