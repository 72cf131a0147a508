"""The ranks that help the leader of a run: what it tells them, and what they do.

Of their own command line only the data's place and the device count. Everything else is the leader's.
"""

import argparse
import json
from collections.abc import Mapping
from contextlib import redirect_stderr
from io import StringIO
from typing import Any

import torch

from models.commands.arguments import device_of, reading
from models.commands.signals import StopOnSignal
from models.commands.training.loop import reports
from models.data.dataset import relabelled
from models.data.load import Dataset, load_dataset
from models.spec import TrainingOptions
from models.training import trainer
from models.training.cost import measure_step
from models.training.run_folder import RunError, environment
from models.training.torchrun.ranks import Alone, Ended, Ranks

ALIKE = ("device", "instruction_set", "torch")  # what decides an update's last bits: weights would drift apart


def recruit(arguments: argparse.Namespace, state: trainer.State, dataset: Dataset, record: Mapping[str, Any]) -> None:
    """Have the followers, where there are any, read the data and take over the state.

    Raises:
        RanksError: One of them has other data, or another kind of machine.
    """
    brief = {
        "options": record["options"],
        "preparation": record["preparation"],
        "label_names": dataset.label_names,
        "threads": torch.get_num_threads(),
        "report_every": reports(arguments.checkpoint_every, arguments.sample_every),
        "dry_run": arguments.dry_run,
    }
    state.ranks.recruit(brief, _alike(dataset, record), (state.tensors(), state.metadata()), state.device)


def follow(arguments: argparse.Namespace, ranks: Ranks) -> int:
    """Take the leader's steps on this rank's rows, until the leader ends the run; returns its exit code."""
    stop = StopOnSignal()
    try:
        brief = ranks.hear()
        state = _as_told(arguments, ranks, brief)
        if brief["dry_run"]:
            measure_step(state)
        else:
            ranks.watch(stop)
            with stop:
                _take_steps(state, ranks, brief, stop)
        while True:
            ranks.hear()
    except Ended as end:
        return end.code


def _take_steps(state: trainer.State, ranks: Ranks, brief: Mapping[str, Any], stop: StopOnSignal) -> None:
    """All of them, waiting wherever the leader has something to do between two, and at the end."""
    ranks.hear()
    steps = trainer.train(
        *(state, state.options.steps),
        report_every=brief["report_every"],
        stopped=lambda: ranks.any(flag=stop.is_set()),
    )
    for _ in steps:
        ranks.hear()
    ranks.hear()


def _as_told(arguments: argparse.Namespace, ranks: Ranks, brief: Mapping[str, Any]) -> trainer.State:
    """The leader's state, with the data as read on this machine."""
    torch.set_num_threads(brief["threads"])
    options = TrainingOptions.model_validate_json(json.dumps(brief["options"]))
    device = own_device(arguments, ranks)
    ranks.await_first_here()
    with redirect_stderr(StringIO()):  # the leader has said what there is to say
        how = reading(arguments, brief["preparation"] or {})
        dataset = load_dataset(arguments.data, arguments.data_dir, seed=options.seed, **how)
    names = brief["label_names"] or []
    if set(names) == set(dataset.label_names or ()) != set():
        dataset = relabelled(dataset, names)  # as the run was begun
    state = trainer.State(options, dataset, device, ranks)
    state.load(*ranks.enlist(_alike(dataset, environment(device)), device))
    return state


def _alike(dataset: Dataset, record: Mapping[str, Any]) -> dict[str, Any]:
    return {"data": dataset.checksum, **{key: record[key] for key in ALIKE}}


def own_device(arguments: argparse.Namespace, ranks: Alone) -> torch.device:
    """The device that `--device` names; where several ranks share a machine that has GPUs, each gets one of them.

    Raises:
        RunError: There are not enough of them, or one is asked for by its number.
    """
    device = device_of(arguments)
    if device.type == "cpu" or ranks.local_size == 1:
        return device
    here, found = f"{ranks.local_size} processes on this machine", torch.cuda.device_count()
    if ":" in arguments.device:
        raise RunError(f"device {arguments.device}: {here} need one each, and --device cuda gives it to them")
    if found < ranks.local_size:
        raise RunError(f"device {arguments.device}: {here} need one each, and there are {found}; --nproc-per-node "
                       "says how many processes, and --device cpu does without")  # fmt: skip
    return torch.device("cuda", ranks.local_rank)
