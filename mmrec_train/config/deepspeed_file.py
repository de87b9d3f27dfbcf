"""The DeepSpeed JSON file of a run: found and checked.

A file says where things live (ZeRO stage, offload) and how they are moved (buckets, asynchronous I/O). DeepSpeed
ignores a top-level key that it does not know and would let a file contradict the run, so both are refused here.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmrec_train.config.deepspeed_keys import OWNED, SECTIONS, SUPPORTED, UNUSED
from mmrec_train.config.marked_yaml import Mark, Marked, Problem, parse_json
from mmrec_train.config.schema import RunConfig
from mmrec_train.config.suggest import did_you_mean
from mmrec_train.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]

OFFLOADS = ("offload_param", "offload_optimizer")
DEVICES = ("none", "cpu", "nvme")


def resolve(written: str, folder: Path) -> str | None:
    """The DeepSpeed file that a configuration in `folder` means by `written`, or None where there is none.

    A relative path is looked up from `folder`, then from the repository. A file of the repository is given
    relative to it, so that a saved configuration works on another machine too.
    """
    for candidate in (folder / written, REPOSITORY / written):
        if os.path.isfile(candidate):
            found = candidate.resolve()
            return str(found.relative_to(REPOSITORY) if found.is_relative_to(REPOSITORY) else found)
    return None


def shipped() -> list[Path]:
    """The DeepSpeed files that come with the repository."""
    return sorted((REPOSITORY / "ds_configs").glob("*.json"))


def read(config: RunConfig, problems: list[Problem]) -> Marked:
    """The file's content with marks; duplicate keys are appended to `problems`.

    Raises UserError on a file that cannot be read or is not JSON.
    """
    path = REPOSITORY / config.deepspeed.config
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{config.mark('deepspeed.config')}: deepspeed.config: cannot read {path}: {error}") from error
    return parse_json(text, Mark(config.deepspeed.config, 0, path.parent), problems)


def zero_section(config: RunConfig) -> dict[str, Any]:
    """The file's `zero_optimization`, without marks; empty where it has none."""
    return read(config, []).plain().get("zero_optimization") or {}


def offload_device(zero: dict[str, Any], name: str) -> str:
    """Where `name` ("offload_param" or "offload_optimizer") of a `zero_optimization` section puts it."""
    return str((zero.get(name) or {}).get("device", "none"))


def problems(config: RunConfig) -> list[Problem]:
    """What is wrong with the DeepSpeed file by itself and together with the run configuration."""
    found: list[Problem] = []
    document = read(config, found)
    if not isinstance(document.value, dict):
        return [Problem(document.mark, 'the DeepSpeed file must be one JSON object: {"zero_optimization": …}')]
    found += _top_level(document.value)
    for path, valid in SECTIONS.items():
        section = document.get(path)
        if section is not None and section.value is not None:
            found += _section(section, ".".join(map(str, path)), valid)
    return found or list(_zero(document, config))


def _top_level(entries: dict[str, Marked]) -> Iterator[Problem]:
    for key, entry in entries.items():
        if key in OWNED and not _is_auto(entry.plain()):
            yield Problem(entry.mark, f"{key} is set by {OWNED[key]}; remove it from the DeepSpeed file")
        elif key in UNUSED:
            yield Problem(entry.mark, f"{key} has no effect on this trainer; remove it from the DeepSpeed file")
        elif key not in SUPPORTED and key not in OWNED:
            yield Problem(entry.mark, f"unknown DeepSpeed key '{key}'; {did_you_mean(key, SUPPORTED)}")


def _section(section: Marked, name: str, valid: frozenset[str]) -> Iterator[Problem]:
    if not isinstance(section.value, dict):
        yield Problem(section.mark, f"{name} must be a JSON object, got {section.plain()!r}")
        return
    for key, entry in section.value.items():
        if key not in valid:
            yield Problem(entry.mark, f"unknown DeepSpeed key '{name}.{key}'; {did_you_mean(key, valid)}")


def _zero(document: Marked, config: RunConfig) -> Iterator[Problem]:
    """Stage and offload against each other and against the run configuration."""
    zero = document.plain().get("zero_optimization") or {}
    level = zero.get("stage", 0)
    if type(level) is not int or not 0 <= level <= 3:
        yield Problem(document.mark_of(("zero_optimization", "stage")), f"stage must be 0, 1, 2 or 3, got {level!r}")
        return
    if level == 0 and config.train.precision != "fp32":
        # Without ZeRO, DeepSpeed 0.19.8 takes a step of Adam while it starts, divides fp16 gradients by a loss scale
        # that it did not apply, and accumulates in 16 bits.
        yield Problem(
            config.mark("train.precision"),
            f"train.precision {config.train.precision} needs ZeRO, but {document.mark} has stage 0; use fp32, or "
            "ds_configs/zero1.json",
        )
    for name in OFFLOADS:
        mark = document.mark_of(("zero_optimization", name, "device"))
        device = offload_device(zero, name)
        lowest = 3 if name == "offload_param" or device == "nvme" else 1
        if device not in DEVICES:
            yield Problem(mark, f"{name}.device must be one of {', '.join(DEVICES)}, got {device!r}")
        elif device != "none" and level < lowest:
            yield Problem(mark, f"{name} to {device} needs ZeRO stage {lowest} or above, but stage is {level}")
        elif device == "nvme" and config.deepspeed.nvme_path is None:
            yield Problem(
                config.mark("deepspeed.nvme_path"),
                f"deepspeed.nvme_path is not set, but {mark} puts {name} on NVMe; give a writable folder there",
            )
        if not _is_auto((zero.get(name) or {}).get("nvme_path", "auto")):
            place = document.mark_of(("zero_optimization", name, "nvme_path"))
            yield Problem(place, "nvme_path is set by deepspeed.nvme_path; remove it from the DeepSpeed file")


def _is_auto(value: Any) -> bool:
    """Whether a value leaves the decision to the run configuration: "auto", or a section of nothing else."""
    return bool(value) and all(map(_is_auto, value.values())) if isinstance(value, dict) else value == "auto"
