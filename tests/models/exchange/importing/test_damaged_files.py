"""Damaged ONNX files are refused with one line, in bounded time and memory, and open no other file."""

import random
from pathlib import Path

import pytest
from onnx import TensorProto, defs, helper

from benchmarks.faults.foreign_files import OPTIONS, damaged, opened_files, sound_files, try_files
from models.__main__ import main
from models.exchange.importing.conversion import read_onnx
from models.exchange.importing.parsing import Refused
from models.networks.operators import OPERATORS

pytestmark = pytest.mark.usefixtures("one_thread")
# What the reader writes as rows of the table, or computes shapes with.
REWRITTEN = {
    "Constant", "ConstantOfShape", "Dropout", "Flatten", "GlobalAveragePool", "GlobalMaxPool", "GroupNormalization",
    "Identity", "Mish", "Range", "ReduceL2", "ReduceSumSquare", "Shape", "Size", "Split", "Squeeze", "Sum", "Unsqueeze",
    "And", "Ceil", "Floor", "GreaterOrEqual", "LessOrEqual", "Mod", "Not", "Or", "Sign",
}  # fmt: skip
FILES = 300  # `python -m benchmarks.faults.foreign_files` tries as many as are wanted


def test_damaged_files_are_refused_in_one_line() -> None:
    """What they are made of is read; of them some still are nets, and of the others each has its reason."""
    for content in sound_files():
        read_onnx(content, OPTIONS)
    opened = opened_files()
    outcome = try_files(range(FILES))
    assert not outcome.wrong
    assert outcome.nets + outcome.refused.total() == FILES
    assert not opened


def test_of_onnx_only_the_tables_operators_are_read() -> None:
    """And all of them are."""
    latent = helper.make_tensor_value_info("z", TensorProto.FLOAT, ["n", 4])
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, None)
    unread = ("not in the table", "control flow", "draws random numbers")
    read = set()
    for name in {schema.name for schema in defs.get_all_schemas() if not schema.domain}:
        graph = helper.make_graph([helper.make_node(name, ["z"], ["image"])], "net", [latent], [image])
        opset = helper.make_opsetid("", defs.onnx_opset_version())
        with pytest.raises(Refused) as caught:
            read_onnx(helper.make_model(graph, opset_imports=[opset]).SerializeToString(), OPTIONS)
        if not any(reason in str(caught.value) for reason in unread):
            read.add(name)
    assert read == OPERATORS.keys() - {"ExpandRows"} | REWRITTEN


@pytest.mark.slow
def test_the_command_refuses_them_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With exit code 2, one line on stderr and nothing written, or it writes the bundle."""
    for seed in range(3):
        rng = random.Random(seed)  # noqa: S311 - no secret
        (tmp_path / "net.onnx").write_bytes(damaged(rng.choice(sound_files()), rng))
        code = main(["import", str(tmp_path / "net.onnx"), "--name", "x", "--out", str(tmp_path / "x"), "--force"])
        said = capsys.readouterr().err
        assert code == 0 or (code, said.count("\n"), (tmp_path / "x").exists()) == (2, 1, False), said
