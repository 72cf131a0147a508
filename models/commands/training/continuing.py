"""Whether a run may go on with what the command line and the data are now, and in which words it may not."""

from collections.abc import Mapping
from typing import Any

from models.data.dataset import Dataset, listed, printable, relabelled
from models.training.run_folder import RunDir, RunError
from models.training.trainer import State

DECIDES_SUMS = ("device", "instruction_set", "torch", "threads")  # beside the options, in the last bits
ADDED = {"init": None, "augment": "none"}  # options that runs of earlier releases don't name, as they had them
WORLD_SIZE = "world_size"  # in the record: how many processes train; their number decides sums too
Changes = dict[str, list[Any]]


def numbered_as_begun(dataset: Dataset, run: RunDir) -> Dataset:
    """The data set with its labels in the order in which the run's nets know them, where it has the same classes."""
    record, now = run.record(), list(dataset.label_names or ())
    if record is None or not now:
        return dataset
    known = known_classes(run) or _earlier_order(dataset, _checksum(record.get("data")))
    return relabelled(dataset, known) if known != now and set(known) == set(now) else dataset


def _earlier_order(dataset: Dataset, checksum: object) -> list[str]:
    """The classes of a run without data.json, which an earlier release began: a folder's stood by code point."""
    names, is_folder = list(dataset.label_names or ()), dataset.files.sizes is not None
    return sorted(names) if is_folder and dataset.checksum != checksum else names


def known_classes(run: RunDir) -> list[str]:
    """The classes of the data that the run was begun with; none where it has no data.json."""
    return [one["name"] for one in run.data().get("classes") or ()]


def changes_since(before: Mapping[str, Any], now: Mapping[str, Any]) -> Changes:
    """What differs from the run before, as [old, new]: name, options, data, and what decides the last bits of sums.

    The same data are the same data, whatever their folder is called.
    """
    if not before:
        return {}
    old, new = (
        {
            **ADDED,
            **record.get("options", {}),
            **{key: record.get(key) for key in ("name", "data", "preparation", *DECIDES_SUMS)},
            WORLD_SIZE: world_size(record),
        }
        for record in (before, now)
    )
    unknown = {"preparation"} if old["preparation"] is None else set()  # of a run that was begun before there was one
    keys = sorted((old.keys() | new.keys()) - {"steps"} - unknown)
    changes = {key: [old.get(key), new.get(key)] for key in keys if old.get(key) != new.get(key)}
    if "data" in changes and _checksum(old["data"]) == _checksum(new["data"]):
        del changes["data"]
    return changes


def world_size(record: Mapping[str, Any]) -> int:
    """How many processes computed the run last; one where the record is older than that there could be more."""
    return int(record.get(WORLD_SIZE, 1))


def needing_a_word(changes: Changes) -> Changes:
    """The changes that are not made unasked. Another number of processes needs no word, nor what threads it brings."""
    unasked = {WORLD_SIZE, "threads"} if WORLD_SIZE in changes else set()
    return {key: values for key, values in changes.items() if key not in unasked}


def require_continuable(run: RunDir, state: State, dataset: Dataset, changes: Changes, *, override: bool) -> None:
    """Refuse to go on with what has changed, unless that is asked for and possible.

    Raises:
        RunError: It names every change, and what to do.
    """
    found = run.newest_checkpoint()
    reason = _other_classes(run, state, dataset, changes)
    if reason is None and found is not None:
        reason = state.misfit(found[0])
    differences = "; ".join(f"{key} was {_words(old)} and is {_words(new)}" for key, (old, new) in changes.items())
    if "data" in changes and dataset.files.by_folders:
        differences += " (divided as its folders are called: --splits none reads it as earlier releases did)"
    if reason is not None:
        raise RunError(f"the run was begun otherwise: {differences}. It cannot go on so, for {reason}: "
                       "begin a new run, with another --out")  # fmt: skip
    if not override:
        raise RunError(f"the run was begun otherwise: {differences}. --override goes on all the same, and records it")


def _other_classes(run: RunDir, state: State, dataset: Dataset, changes: Changes) -> str | None:
    """Which classes the nets don't know, where they see any and the data is other data."""
    known, now = known_classes(run), list(dataset.label_names or ())
    if "data" not in changes or not state.options.conditional or not known or now == known:
        return None
    new, gone = [name for name in now if name not in known], [name for name in known if name not in now]
    parts = [
        f"{words} {listed([printable(name) for name in names])}"
        for words, names in (("there is now", new), ("there is no more", gone))
        if names
    ]
    return f"its nets know {len(known)} classes in their order ({'; '.join(parts)})"


def _checksum(data: object) -> object:
    return data.get("checksum") if isinstance(data, Mapping) else data


def _words(value: object) -> str:
    """A value in a message; a data set as its name and the first digits of its checksum."""
    if isinstance(value, Mapping) and {"name", "checksum"} <= value.keys():
        return f"{value['name']} ({str(value['checksum'])[:12]})"
    return str(value)
