"""Write the table of docs/configuration.md from the settings: `make docs`.

Names, order and defaults come from the code. The words are the page's, which may hold links; a setting that is new has
those of `--help` until somebody writes better ones, and one that is gone takes its line along.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from service.__main__ import shown  # noqa: E402 - found by the line above
from service.settings import Settings, variable  # noqa: E402

PAGE = ROOT / "docs" / "configuration.md"
_ROW = re.compile(r"^\| `(GAN_\w+)` \| (.*?) \| (.*) \|\n", re.MULTILINE)


def with_table(page: str) -> str:
    """The page with its table as the settings are."""
    rows = list(_ROW.finditer(page))
    words = {row[1]: row[3] for row in rows}
    lines = []
    for name, field in Settings.model_fields.items():
        # Where the embedded bundles lie differs from machine to machine.
        default = "the embedded `bundles/`" if name == "bundles" else shown(field.default)
        text = str(field.description).removesuffix(".")
        text = words.get(variable(name), text)
        lines.append(f"| `{variable(name)}` | {default} | {text} |\n")
    return page[: rows[0].start()] + "".join(lines) + page[rows[-1].end() :]


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
