"""Build the documentation site into build/site, and prove that its links lead somewhere.

The pages keep their places in the repository, so a link that works there works in the site. What is laid out for the
builder is the README, every page and file that it leads to, and nothing else. Every link of the built pages is then
checked, headings too, and that no page loads anything from elsewhere.
"""

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build"
PAGES, SITE = BUILD / "site-pages", BUILD / "site"
LOADING = {"script", "img", "source", "iframe", "video", "audio", "embed", "object"}
LOADING_RELATIONS = {"stylesheet", "icon", "preload", "preconnect", "modulepreload", "dns-prefetch", "manifest"}


class Page(HTMLParser):
    """The names that a built page has for its places, where it links to, and what it loads."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.names, self.links, self.loads = {""}, list[str](), list[str]()
        self.feed(file.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what one tag names, links to or loads."""
        values = {name: value or "" for name, value in attrs}
        self.names |= {values[name] for name in ("id", "name") if name in values}
        loads = tag in LOADING or (tag == "link" and LOADING_RELATIONS & set(values.get("rel", "").split()))
        for target in (values[name] for name in ("href", "src") if name in values):
            self.links.append(target)
            self.loads += [target] if loads else []


def linked(page: Path) -> list[Path]:
    """The files of the repository that a page links to; blocks of code have no links."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", prose) if "://" not in target]
    return [(page.parent / target).resolve() for target in targets if target]


def lay_out() -> None:
    """Copy the README and all that it leads to, page by page."""
    shutil.rmtree(PAGES, ignore_errors=True)
    found, waiting = set[Path](), [ROOT / "README.md", *(ROOT / f"{name}.md" for name in ("CONTRIBUTING", "SECURITY"))]
    while waiting:
        file = waiting.pop()
        if file in found:
            continue
        found.add(file)
        place = PAGES / file.relative_to(ROOT)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place)
        waiting += linked(file) if file.suffix == ".md" else []
    shutil.copy(HERE / "site.css", PAGES)
    shutil.copy(HERE / "zensical.toml", BUILD)


def mistakes() -> list[str]:
    """What is wrong with the built site's links, a line for each."""
    pages = {file: Page(file) for file in sorted(SITE.rglob("*.html"))}
    # Pages that no menu has. The other way round is a dead link.
    menu = (HERE / "zensical.toml").read_text()
    laid_out = [page.relative_to(PAGES).as_posix() for page in sorted(PAGES.rglob("*.md"))]
    found = [f"{page} is missing in zensical.toml" for page in laid_out if f'"{page}"' not in menu]
    for file, page in pages.items():
        where = file.relative_to(SITE)
        found += [f"{where} loads {target} from elsewhere" for target in page.loads if urlsplit(target).netloc]
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            path = unquote(parts.path)
            target = (SITE / path.lstrip("/") if path.startswith("/") else file.parent / path) if path else file
            target = (target / "index.html" if target.is_dir() else target).resolve()
            if not target.exists():
                found.append(f"{where} links to {link}, which is not there")
            elif target in pages and unquote(parts.fragment) not in pages[target].names:
                found.append(f"{where} links to {link}, which has no such heading")
    return found


def main() -> int:
    """Lay out, build, check; the exit code is 0 where nothing is wrong."""
    lay_out()
    shutil.rmtree(SITE, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "zensical", "build", "--strict", "--clean"], cwd=BUILD, check=True)
    found = mistakes()
    print(*found, sep="\n", end="\n" if found else "", file=sys.stderr)
    print(f"{len(list(SITE.rglob('*.html')))} pages in {SITE.relative_to(ROOT)}, {len(found)} mistakes")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
