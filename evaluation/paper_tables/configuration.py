"""What is run: presets, arms and tables, as ``paper_tables.toml`` names them."""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Settings = dict[str, Any]

CONFIGURATION = Path(__file__).with_name("paper_tables.toml")

#: Keys of a preset that say which of its runs are made, not how.
WHICH_RUNS = ("seeds", "tuning_seeds", "tables")

#: Keys of an arm that its runs do not depend on.
NOT_IN_A_RUN = ("title", "against", "tune", "tuned_by", "like")


def load_configuration(path: str | Path = CONFIGURATION) -> Settings:
    """Read presets, arms and tables."""
    configuration: Settings = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    return configuration


def resolve_arm(arms: Mapping[str, Settings], name: str) -> Settings:
    """Return an arm with everything that it takes from the arm it is like."""
    arm = arms[name]
    if "like" not in arm:
        return {"tuned_by": name, **arm}
    base = resolve_arm(arms, arm["like"])
    owner = name if "tune" in arm else base["tuned_by"]
    return {**base, **arm, "tuned_by": owner, "trainer": {**base.get("trainer", {}), **arm.get("trainer", {})}}


def resolve_preset(presets: Mapping[str, Settings], name: str) -> Settings:
    """Return a preset with everything that it takes from the preset it is like."""
    preset = presets[name]
    base = resolve_preset(presets, preset["like"]) if "like" in preset else {}
    return {key: value for key, value in {**base, **preset}.items() if key != "like"}


@dataclass(frozen=True)
class Study:
    """One preset with its arms and tables; `tuned_in` is the study whose tuning counts for this one, if another's."""

    name: str
    preset: Settings
    arms: dict[str, Settings]
    tables: dict[str, Settings]
    tuned_in: Study | None = None

    @classmethod
    def of(cls, configuration: Settings, name: str) -> Study:
        """Select a preset, and the tables that belong to it."""
        if name not in configuration["presets"]:
            raise ValueError(f"`preset` must be one of {', '.join(configuration['presets'])}, got {name!r}.")
        preset, tables = resolve_preset(configuration["presets"], name), configuration["tables"]
        letters: list[str] = preset.get("tables", list(tables))
        tuned_in = preset.get("tuned_in")
        return cls(
            name,
            preset,
            configuration["arms"],
            {letter: tables[letter] for letter in letters},
            None if tuned_in is None else cls.of(configuration, tuned_in),
        )

    @property
    def seeds(self) -> list[int]:
        """The seeds of the runs."""
        return list(self.preset["seeds"])

    @property
    def validated_images(self) -> int:
        """The number of validation images that every epoch is validated on."""
        return int(self.preset["validated_images" if "validated_images" in self.preset else "validation_images"])

    @property
    def table_arms(self) -> list[str]:
        """The arms of all tables, each once."""
        return list(dict.fromkeys(arm for table in self.tables.values() for arm in table["arms"]))

    def arm(self, name: str) -> Settings:
        """Return an arm, resolved."""
        return resolve_arm(self.arms, name)

    def title(self, name: str) -> str:
        """Return what a table calls an arm."""
        return str(self.arms[name]["title"])

    def grid(self, name: str) -> list[Settings]:
        """Return every combination of values that an arm's own tuning tries."""
        tune = self.arms[name].get("tune", {})
        return [dict(zip(tune, values, strict=True)) for values in itertools.product(*tune.values())] if tune else []

    def references(self, table: Settings) -> dict[str, list[str]]:
        """Return the arms that each arm of a table is compared with: its own, or else the table's; never inherited."""
        shared: list[str] = table.get("against", [])
        return {
            arm: [other for other in self.arms[arm].get("against", shared) if other != arm] for arm in table["arms"]
        }

    def setting(self, name: str) -> str:
        """Return the fingerprint of everything that an arm's runs depend on, except the values that tuning chose."""
        return self.fingerprint(run_settings(self.arm(name)))

    def fingerprint(self, settings: Settings) -> str:
        """Return a text that changes with the preset and with the settings of a run."""
        preset = {key: value for key, value in self.preset.items() if key not in WHICH_RUNS}
        content = json.dumps({"preset": preset, "arm": settings}, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def run_settings(arm: Settings) -> Settings:
    """Return what an arm's runs depend on, apart from the values that tuning chose."""
    return {key: value for key, value in arm.items() if key not in NOT_IN_A_RUN}
