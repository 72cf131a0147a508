"""A run on one page: report.html, made from the run's folder alone, with nothing to load from elsewhere.

Charts are SVG by matplotlib, sample grids WebP, both inline; the page follows the reader's light or dark theme.
"""

import json
import math
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from models.data.dataset import printable
from models.data.summary import SPLIT_NAMES, lines
from models.files import replace_file
from models.training.run_folder import RunDir

MAX_FRAMES = 40  # grids in the animation, evenly spread over the run
MAX_FRAME_PIXELS = 448  # a side
MAX_CLASSES = 1000  # in the table of classes
MAX_POINTS = 400  # in a line: as many as a chart has pixels
FLOOR = "_floor"  # `x_floor` in stats.jsonl is what real images score where samples score `x`


@dataclass(frozen=True)
class Chart:
    """What one chart shows: columns of stats.jsonl with their words, on one axis."""

    title: str
    unit: str
    lines: Mapping[str, str]
    logarithmic: bool = False
    note: str = ""


TRAINING = (
    Chart("Losses", "nats", {"d_loss": "D", "g_loss": "G"}),
    Chart(
        "D’s outputs",
        "mean probability",
        {"d_real": "D(x), images", "d_fake": "D(G(z)), samples"},
        note="Both at ½ where D cannot tell. The mean says nothing about a relativistic D.",
    ),
    Chart("Speed", "images/s", {"images_per_s": "real images"}),
)
HEALTH = (
    Chart(
        "Pairs that D ranks rightly",
        "share",
        {"pairs_right": "image over sample", "train_over_validation": "training over validation image"},
        note="The second belongs at ½; at ¾ and over D knows the training images by heart.",
    ),
    Chart("Diversity of samples", "of real images’", {"diversity": "mean distance of two"}),
    Chart("Overfitting of D", "r_v", {"r_v": "r_v"}),
    Chart("Augmentation", "", {"augment_p": "p of each change", "r_t": "r_t, which is held at 0.6"}),
    Chart("Gradients", "norm", {"d_gradient": "D", "g_gradient": "G"}, logarithmic=True),
)
SCORE_NAMES = {
    "validation_log_likelihood": ("Parzen log-likelihood of validation images", "nats"),
    "validation_frechet": ("Fréchet distance to validation images", ""),
}
NO_SCORES = {"step", "seconds", "validation_sigma", "validation_rows", "validation_samples"}

T = TypeVar("T")


def write_report(run: RunDir) -> Path:
    """Write the page of a run as it is now, atomically.

    Raises:
        RunError: The record of the run cannot be read.
        OSError: The disk.
    """
    target = run.path / "report.html"
    replace_file(target, page(run).encode(errors="replace"))  # a folder's name may be no text
    return target


def page(run: RunDir) -> str:
    """The HTML of a run's report."""
    record, rows = run.record() or {}, run.stats()
    scores = [_score_chart(name) for name in _score_names(rows)]
    sections = [
        _summary(run, record, rows),
        _alarms(rows),
        _samples(run, conditional=record.get("options", {}).get("conditional", False)),
        _data_read(run.data()),
        _charts("Training", TRAINING, rows),
        _charts("Scores", scores, rows),
        _charts("Health", HEALTH, rows),
        _picture(run.path / "neighbours.png", "Samples and their nearest training images"),
        _table("Scores of the bundle", _manifest(run.bundle).get("evaluation", {})),
        _table("Options", record.get("options", {})),
        _table("Data", record.get("data", {})),
        _table("Environment", {key: value for key, value in record.items() if key not in {"options", "data"}}),
    ]
    title = escape(printable(run.path.resolve().name))  # the page is UTF-8, and a folder's name may not be
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body><h1>{title}</h1>{''.join(sections)}</body></html>\n"
    )


# --- Sections ----------------------------------------------------------------------------------------------------


def _summary(run: RunDir, record: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    options = record.get("options", {})
    step, seconds = (rows[-1]["step"], rows[-1]["seconds"]) if rows else (0, 0.0)
    steps = options.get("steps", step)
    bundle, preview = _manifest(run.bundle), _manifest(run.preview)
    until_now = f"preview of step {preview.get('training', {}).get('steps', '?')}" if preview else "not yet"
    tiles = {
        "preset": options.get("preset", "?"),
        "data": record.get("data", {}).get("name", "?"),
        **_images(record.get("images", {})),
        "step": f"{step:,} of {steps:,}",
        "time": duration(seconds),
        "bundle": bundle.get("name", until_now) if step >= steps else until_now,
    }
    drawn = "".join(f"<div><dt>{key}</dt><dd>{escape(str(value))}</dd></div>" for key, value in tiles.items())
    return f"<dl class=tiles>{drawn}</dl>"


def _images(images: Mapping[str, Any]) -> dict[str, str]:
    """What is known of the data's images."""
    if not images:
        return {}
    colour = "grey" if images["channels"] == 1 else "RGB"
    return {
        "images to train, validate, test": " · ".join(f"{images[name]:,}" for name in SPLIT_NAMES),
        "image": f"{images['width']}×{images['height']}, {colour}",
        "classes": f"{images['classes'] or 'none'}",
    }


def _alarms(rows: Iterable[Mapping[str, Any]]) -> str:
    """Each alarm once, at the step where it was last raised: by then its text says how long it has lasted."""
    last = {text.partition(":")[0]: (row["step"], text) for row in rows for text in row.get("alarms", ())}
    items = "".join(f"<li><b>Step {step:,}</b> {escape(text)}</li>" for step, text in last.values())
    return f"<section class=alarms><h2>Alarms</h2><ul>{items}</ul></section>" if items else ""


def _data_read(data: Mapping[str, Any]) -> str:
    """What was read of the data, with the images of each class in a table of its own."""
    if not data:
        return ""
    items = "".join(f"<li>{escape(line)}</li>" for line in (*lines(data), *data["notes"]))
    classes = (data["classes"] or ())[:MAX_CLASSES]
    counts = {one["name"]: " / ".join(f"{one[split]:,}" for split in SPLIT_NAMES) for one in classes}
    table = _table("Images of each class, to train / validate / test", counts)
    return f"<section class=data><h2>What was read</h2><ul>{items}</ul>{table}</section>"


def _samples(run: RunDir, *, conditional: bool) -> str:
    """The grids as an animation, beside real images."""
    chosen = _spread(run.samples(), MAX_FRAMES)
    if not chosen:
        return ""
    frames = json.dumps([[step, _data_url(path)] for step, path in chosen])
    last = len(chosen) - 1
    beside = (
        f'<figure class=samples><img alt="A grid of real images" src="{_data_url(run.real)}">'
        f"<figcaption>Real images{' of the same labels' if conditional else ''}</figcaption></figure>"
        if run.real.exists()
        else ""
    )
    return (
        "<section><h2>Samples</h2><p>The same noise every time.</p><div class=beside><figure class=samples>"
        f'<img id=frame alt="A grid of samples" src="{_data_url(chosen[-1][1])}">'
        f"<figcaption><button id=play type=button>Play</button><input id=at type=range min=0 max={last} value={last} "
        f'aria-label="Step"><output id=step></output></figcaption></figure>{beside}</div>'
        f"<script>const frames={frames};{SCRIPT}</script></section>"
    )


def _picture(path: Path, title: str) -> str:
    if not path.exists():
        return ""
    source = f"data:image/png;base64,{b64encode(path.read_bytes()).decode()}"
    return f'<section><h2>{title}</h2><img class=wide alt="{title}" src="{source}"></section>'


def _charts(title: str, charts: Iterable[Chart], rows: Sequence[Mapping[str, Any]]) -> str:
    charts = list(charts)
    steady = {chart.title: value for chart in charts if (value := _constant(chart, rows)) is not None}
    drawn = "".join(_chart(chart, rows) for chart in charts if chart.title not in steady)
    words = "; ".join(f"{escape(title)} {value}" for title, value in steady.items())
    note = f"<p>The same all the time: {words}.</p>" if words else ""
    return f"<section><h2>{title}</h2>{note}<div class=charts>{drawn}</div></section>" if drawn or note else ""


def _table(title: str, values: Mapping[str, Any]) -> str:
    cells = "".join(f"<tr><th>{escape(key)}</th><td>{escape(_shown(value))}</td></tr>" for key, value in _flat(values))
    return f"<details><summary>{title}</summary><table>{cells}</table></details>" if cells else ""


# --- Charts ------------------------------------------------------------------------------------------------------


def _score_names(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The numbers in stats.jsonl that no other chart shows, in the order in which they first appear."""
    known = NO_SCORES.union(*(chart.lines for chart in (*TRAINING, *HEALTH)))
    found = {
        name: None
        for row in rows
        for name, value in row.items()
        if name not in known and not name.endswith(FLOOR) and isinstance(value, int | float)
    }
    return list(found)


def _score_chart(name: str) -> Chart:
    title, unit = SCORE_NAMES.get(name, (name.replace("_", " ").capitalize(), ""))
    return Chart(title, unit, {name: "samples", name + FLOOR: "real images"})


def _chart(chart: Chart, rows: Sequence[Mapping[str, Any]]) -> str:
    """One line for each column, with its latest value in the legend; nothing where there are no numbers."""
    from matplotlib import rc_context  # noqa: PLC0415 — an extra that `inspect` does without
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(5.6, 2.8))
    axes = figure.add_axes((0.14, 0.17, 0.84, 0.7))
    for name, words in chart.lines.items():
        points = [(row["step"], row[name]) for row in rows if _drawable(row.get(name), chart)]
        if points:
            steps, values = zip(*_spread(points, MAX_POINTS), strict=True)
            style = "--" if name.endswith(FLOOR) else "-"
            marker = "." if len(points) < 3 else None  # a line of one point is invisible
            axes.plot(steps, values, style, marker=marker, label=f"{words} {values[-1]:.4g}")
    if not axes.lines:
        return ""
    axes.set(xlabel="step", ylabel=chart.unit, xlim=(0, None), yscale="log" if chart.logarithmic else "linear")
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, fontsize="small", frameon=False, borderpad=0)
    picture = BytesIO()
    with rc_context({"svg.hashsalt": "report", "svg.fonttype": "none"}):  # equal runs give equal bytes
        figure.savefig(picture, format="svg", transparent=True, metadata={"Date": None})
    source = f"data:image/svg+xml;base64,{b64encode(picture.getvalue()).decode()}"
    title, note = escape(chart.title), f"<p>{escape(chart.note)}</p>" if chart.note else ""
    return f'<figure><h3>{title}</h3><img alt="{title} against steps" src="{source}">{note}</figure>'


def _constant(chart: Chart, rows: Sequence[Mapping[str, Any]]) -> str | None:
    """The values of lines that never moved, which no chart is needed for; None where one did, or has one point yet."""
    said = []
    for name, words in chart.lines.items():
        values = [row[name] for row in rows if _drawable(row.get(name), chart)]
        if values and (len(values) == 1 or min(values) != max(values)):
            return None
        if values:
            said.append(f"{escape(words)} {values[0]:.4g}")
    return ", ".join(said) or None


def _drawable(value: object, chart: Chart) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and (value > 0 or not chart.logarithmic)


# --- Words and numbers -------------------------------------------------------------------------------------------


def _spread(items: Sequence[T], most: int) -> list[T]:
    """At most `most` of the items, evenly spaced, always with the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(place * (len(items) - 1) / (most - 1))] for place in range(most)]


def duration(seconds: float) -> str:
    """In the units that a person reads: `182 ms`, `2.3 s`, `12 min`, `5 h 10 min`, `2 days 3 h`."""
    if 0 < seconds < 0.9995:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 59.95:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(seconds / 3600)
    return f"{hours // 24:,} days {hours % 24} h"


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value)


def _manifest(bundle: Path) -> dict[str, Any]:
    """The bundle's manifest; empty where there is no bundle yet."""
    try:
        found = json.loads((bundle / "manifest.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _data_url(path: Path) -> str:
    with Image.open(path) as picture:
        picture.thumbnail((MAX_FRAME_PIXELS, MAX_FRAME_PIXELS))
        buffer = BytesIO()
        picture.save(buffer, "webp", quality=80)
    return f"data:image/webp;base64,{b64encode(buffer.getvalue()).decode()}"


SCRIPT = """
const at=document.getElementById('at'),img=document.getElementById('frame'),out=document.getElementById('step');
const play=document.getElementById('play');let timer=null;
const show=()=>{const [step,src]=frames[at.value];img.src=src;out.textContent='step '+step.toLocaleString('en')};
const pause=()=>{clearInterval(timer);timer=null;play.textContent='Play'};
play.onclick=()=>{if(timer){pause();return}
if(at.value==at.max)at.value=0;show();play.textContent='Pause';
timer=setInterval(()=>{if(at.value==at.max){pause();return}at.value=+at.value+1;show()},250)};
at.oninput=()=>{pause();show()};show();
"""

STYLE = """
:root{color-scheme:light dark;--page:#f6f6f4;--card:#fff;--ink:#1a1a19;--soft:#63625d;--rule:#e2e1dc;
--bad:#b3261e}
@media(prefers-color-scheme:dark){:root{--page:#161615;--card:#1f1f1e;--ink:#ececea;--soft:#a3a29c;--rule:#383835;
--bad:#f2857c}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1240px;padding:24px 20px 60px;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,sans-serif}
h1{font-size:24px;margin:0 0 14px}h2{font-size:18px;margin:32px 0 10px}h3{font-size:15px;margin:0 0 2px}
p{margin:4px 0;color:var(--soft)}
.tiles{display:flex;flex-wrap:wrap;gap:10px;margin:0}.tiles div{background:var(--card);border:1px solid var(--rule);
border-radius:8px;padding:8px 14px}dt{color:var(--soft);font-size:13px}dd{margin:0;font-weight:600}
.alarms ul{margin:0;padding:12px 16px 12px 32px;border:1px solid var(--bad);border-radius:8px;background:var(--card)}
.alarms h2{color:var(--bad)}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,420px),1fr));gap:14px}
figure{margin:0;padding:14px 16px;background:var(--card);border:1px solid var(--rule);border-radius:8px}
.beside{display:flex;flex-wrap:wrap;gap:14px;align-items:flex-start}.samples{max-width:100%}
.samples img{display:block;width:448px;max-width:100%;
image-rendering:pixelated}.wide{max-width:100%}
figcaption{display:flex;gap:12px;align-items:center;margin-top:10px}figcaption input{flex:1}
output{min-width:7em;text-align:right;font-variant-numeric:tabular-nums}
.charts img{display:block;width:100%}
@media(prefers-color-scheme:dark){.charts img{filter:invert(1) hue-rotate(180deg)}}
details{margin-top:10px;background:var(--card);border:1px solid var(--rule);border-radius:8px;padding:8px 14px}
summary{cursor:pointer;font-weight:600}table{border-collapse:collapse;margin-top:8px;width:100%;font-size:13px}
th,td{text-align:left;padding:3px 12px 3px 0;border-top:1px solid var(--rule);overflow-wrap:anywhere;vertical-align:top}
th{font-weight:400;color:var(--soft);width:16em}
"""
