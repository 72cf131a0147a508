"""Devices by the names that people give them."""

import torch


def find_device(name: str) -> torch.device:
    """The device of a name: auto, cpu, cuda or cuda:N; auto is the first GPU where there is one, else the CPU.

    Raises:
        ValueError: There is no such device here, or none is called so.
    """
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    kind, colon, number = name.partition(":")
    if kind != "cuda" or not (number if colon else "0").isdecimal():
        raise ValueError("choose auto, cpu, cuda or cuda:N")
    index, there = int(number or 0), torch.cuda.device_count() if torch.cuda.is_available() else 0
    if index >= there:
        raise ValueError(f"there is no device {name} here ({there} CUDA devices)")
    return torch.device("cuda", index)
