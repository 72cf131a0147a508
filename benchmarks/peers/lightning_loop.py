"""The tiny game under Lightning: what its loop costs beside the arithmetic. Prints one line of JSON.

    .bench/lightning/bin/python -m benchmarks.peers.lightning_loop ROUNDS STEPS

It uses manual optimisation and `barebones`, Lightning's own mode for measuring, without logger, progress bar,
checkpoints and checks. Batches come from a plain iterator, which costs less than a data loader. After each round as
many steps are taken without Lightning, by another game of the same size. Figures are milliseconds of processor time for
a step.
"""

import json
import logging
import sys
import time
import warnings
from collections.abc import Iterator

import lightning
import torch

from benchmarks.training.eager import TINY, Eager, tiny_images

CPU = torch.device("cpu")


class Game(lightning.LightningModule):
    """The plain loop's nets and its step, with Lightning's optimisers and backward."""

    def __init__(self, plain):
        super().__init__()
        self.automatic_optimization = False
        self.plain = plain
        self.generator, self.discriminator = plain.generator, plain.discriminator
        self.raw = plain.g_optimiser, plain.d_optimiser

    def configure_optimizers(self):
        """G's and D's."""
        return self.raw

    def training_step(self, batch, _):
        """A step down D's loss, then one down G's with fresh noise."""
        self.plain.g_optimiser, self.plain.d_optimiser = self.optimizers()
        self.plain.backward = self.manual_backward
        self.plain.alternate(batch, None)


class Rounds:
    """Batches for Lightning; times a round of them, and the bare arithmetic after it. The first round warms."""

    def __init__(self, game: Eager, other: Eager, rounds: int, steps: int) -> None:
        self.game, self.other, self.rounds, self.steps = game, other, rounds, steps
        self.loop, self.bare = [], []

    def __iter__(self) -> Iterator[torch.Tensor]:
        """All batches of all rounds."""
        for turn in range(self.rounds + 1):
            started = time.process_time()
            for _ in range(self.steps):
                yield self.game.batch()[0]
            between = time.process_time()
            self.other.bare(self.steps)
            if turn:
                self.loop.append(1000 * (between - started) / self.steps)
                self.bare.append(1000 * (time.process_time() - between) / self.steps)


def main() -> int:
    """Read the arguments and measure."""
    rounds, steps = (int(argument) for argument in sys.argv[1:])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    game, other = Eager(TINY, tiny_images(), CPU), Eager(TINY, tiny_images(), CPU)
    batches = Rounds(game, other, rounds, steps)
    trainer = lightning.Trainer(accelerator="cpu", devices=1, max_epochs=1, barebones=True)
    trainer.fit(Game(game), batches)
    print(json.dumps({"loop_ms": batches.loop, "bare_ms": batches.bare}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
