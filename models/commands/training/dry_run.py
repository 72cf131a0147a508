"""What a run would be, without one: its data, nets, and what they cost on this machine; for a person or as JSON."""

import json
from collections.abc import Mapping
from typing import Any

from models.data.summary import Summary, left_out_by_suffix, lines
from models.training.cost import Cost, count_numbers, measure_step
from models.training.report import duration
from models.training.trainer import State


def dry_run(state: State, data: Summary, *, as_json: bool) -> None:
    """Train a few steps, and print what a run would be."""
    counts = {name: count_numbers(net) for name, net in (("G", state.generator), ("D", state.discriminator))}
    cost = measure_step(state)
    if as_json:
        print(json.dumps(_facts(state, data, counts, cost)))
    else:
        print("\n".join(f"{name:<12}{words}" for name, words in _table(state, data, counts, cost)))


def _facts(state: State, data: Summary, counts: Mapping[str, int], cost: Cost) -> dict[str, Any]:
    classes = data["classes"]
    return {
        "image": data["image"],
        "images": data["images"],
        "labels": None if classes is None else [one["name"] for one in classes],
        "left_out": left_out_by_suffix(data),
        "parameters": sum(counts.values()),
        "step_ms": cost.step_s * 1000,
        "memory_bytes": cost.memory_bytes,
        "hours": state.options.steps * cost.step_s / 3600,
    }


def _table(state: State, data: Summary, counts: Mapping[str, int], cost: Cost) -> list[tuple[str, str]]:
    options, ranks = state.options, state.ranks.size
    by = f", {ranks} processes together" if ranks > 1 else ""
    nets = ", ".join(f"{name} with {count:,} parameters" for name, count in counts.items())
    labels = "class-conditional" if options.conditional else "unconditional"
    first, *more = lines(data)
    return [
        ("data", first),
        *(("", line) for line in more),
        ("nets", f"{options.preset}, {labels}: {nets}"),
        ("step", f"{options.batch_size} images, {duration(cost.step_s)}: {cost.images_per_s:,.0f} images/s{by}"),
        ("memory", "unknown" if cost.memory_bytes is None else f"{cost.memory_bytes / 2**20:,.0f} MiB"),
        ("time", f"{duration(options.steps * cost.step_s)} for {options.steps:,} steps, and that of the scores"),
    ]
