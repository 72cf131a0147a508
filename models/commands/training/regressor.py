"""`train --preset latent-regressor --init BUNDLE`: an encoder for a finished bundle; the product is RUN/bundle/."""

import argparse
from dataclasses import replace

from models.bundle import read_bundle
from models.commands.arguments import device_of, load_as_trained
from models.commands.signals import StopOnSignal
from models.evaluation.reconstruction import score_encoder
from models.exchange.model_card import write_card
from models.spec import LATENT_REGRESSOR, RegressionOptions
from models.training.latent_regression import LatentRegression, publish_with_encoder
from models.training.run_folder import RunDir, RunError, environment

INTERRUPTED = 130
SAID_EVERY = 250  # steps
# What the command line may say of the training of G and D, and not of this.
_OF_OTHERS = (
    *("resume", "override", "dry_run", "json", "tensorboard", "algorithm1", "noise", "update", "d_steps"),
    *("generator_loss", "selection", "precision", "score_every", "sample_every", "augment"),
)


def regress(arguments: argparse.Namespace, run: RunDir) -> int:
    """Train E for the bundle, score it on the data's test images, and write the bundle with it."""
    options = _resolve(arguments)
    device = device_of(arguments)
    bundle = read_bundle(arguments.init, device)
    # Divided by the bundle's seed: the command line's is the encoder's.
    dataset = load_as_trained(argparse.Namespace(**{**vars(arguments), "seed": None}), bundle)
    record = {
        "name": arguments.name or bundle.name,
        "preset": options.preset,
        "options": options.model_dump(mode="json"),
        "init": f"{bundle.name}@{bundle.version}",
        "data": {"name": dataset.name, "checksum": dataset.checksum},
        **environment(device),
    }
    training, stop = LatentRegression(bundle, options), StopOnSignal("Stopping; nothing of it is kept.")
    print(f"Training {options.preset} for {record['init']}: {options.steps:,} steps of {options.batch_size} images; "
          f"{device}; {run.path}", flush=True)  # fmt: skip
    with run.held(), stop:
        run.begin(record)
        while training.step < options.steps:
            row = training.train_step()
            if training.step % SAID_EVERY == 0 or training.step == options.steps:
                run.append_stats({"step": training.step, "seconds": round(training.seconds, 1), **row})
                print(f"step {training.step:,}: {', '.join(f'{name} {value:.4f}' for name, value in row.items())}",
                      flush=True)  # fmt: skip
            if stop.is_set():
                return INTERRUPTED
        found = replace(bundle, encoder=training.encoder)
        scores = score_encoder(found, dataset, lambda what: print(what, flush=True))
        record |= {"steps": training.step, "wall_seconds": round(training.seconds, 1)}
        written = publish_with_encoder(training, run.bundle, record["name"], record, scores)
        write_card(written.folder)
    print(
        f"{written.folder}: {written.name}@{written.version}; of {scores['rows']:,} test images the error is "
        f"{scores['error']:.4f}, that of the nearest of {scores['samples']:,} samples {scores['nearest_error']:.4f}."
    )
    return 0


def _resolve(arguments: argparse.Namespace) -> RegressionOptions:
    """The preset's options with the command line's changes.

    Raises:
        RunError: No bundle is named, an option is for other presets, or a number is out of range.
    """
    if arguments.init is None:
        raise RunError(f"--preset {LATENT_REGRESSOR.preset} needs --init BUNDLE, whose generator it is for")
    for name in _OF_OTHERS:
        if getattr(arguments, name) not in (None, False):
            raise RunError(f"--{name.replace('_', '-')} is not for --preset {LATENT_REGRESSOR.preset}")
    if arguments.conditional is not None:
        raise RunError("--conditional and --unconditional are the bundle's to say")
    changes = {name: getattr(arguments, name) for name in ("steps", "batch_size", "seed")}
    given = {name: value for name, value in changes.items() if value is not None}
    for name, value in given.items():
        if not (0 if name == "seed" else 1) <= value < 2**53:
            raise RunError(f"--{name.replace('_', '-')}: {value} is out of range")
    return LATENT_REGRESSOR.model_copy(update=given)
