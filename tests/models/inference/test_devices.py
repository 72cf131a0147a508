"""Devices are found by name, and those that are not there are named."""

import pytest
import torch

from models.inference.devices import find_device


@pytest.mark.parametrize(
    ("gpus", "name", "device"),
    [(0, "auto", "cpu"), (2, "auto", "cuda:0"), (2, "cpu", "cpu"), (2, "cuda", "cuda:0"), (2, "cuda:1", "cuda:1")],
)
def test_a_name_stands_for_one_device(monkeypatch: pytest.MonkeyPatch, gpus: int, name: str, device: str) -> None:
    """auto takes a GPU where there is one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert find_device(name) == torch.device(device)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        *((name, rf"there is no device {name} here \(2 CUDA devices\)") for name in ("cuda:2", "cuda:1000000")),
        *((name, "choose auto, cpu, cuda or cuda:N") for name in ("tpu", "cuda:", "cuda:x", "cpu:0", "")),
    ],
)
def test_a_device_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, name: str, reason: str) -> None:
    """The error says what was asked for, and what could be."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=reason):
        find_device(name)
