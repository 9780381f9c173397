"""Checks the links of the built pages: `python docs/links.py build/docs/site [--external]`.

Links within the site have to lead to a file and, where they name one, to a place in it. Those that leave it are counted
and, with `--external`, each asked for once.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import html.parser
import pathlib
import sys
import urllib.error
import urllib.parse
import urllib.request


class Page(html.parser.HTMLParser):
    """The links and the places of a page."""

    def __init__(self, path: pathlib.Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.places: set[str] = set()
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """Called for each tag."""
        given = dict(attributes)
        self.places |= {value for name in ("id", "name") if (value := given.get(name))}
        if (link := given.get("href") or given.get("src")) and tag != "base":
            self.links.append(link)


def find_broken(site: pathlib.Path) -> tuple[list[str], dict[str, list[str]]]:
    """Follows every link of a site.

    Args:
      site: the folder of the built pages.

    Returns:
      A line for each link within the site that leads nowhere, and the pages of each link that leaves it.
    """
    pages = {path: Page(path) for path in sorted(site.rglob("*.html")) if path.name != "404.html"}
    broken, external = [], collections.defaultdict(list)
    for path, page in pages.items():
        for link in page.links:
            parts = urllib.parse.urlsplit(link)
            here = str(path.relative_to(site))
            if parts.scheme in ("http", "https"):
                external[link].append(here)
            elif not parts.scheme:
                target = (path.parent / urllib.parse.unquote(parts.path)).resolve() if parts.path else path.resolve()
                target = target / "index.html" if target.is_dir() else target
                known = pages.get(site.resolve() / target.relative_to(site.resolve())) if target.exists() else None
                if not target.exists():
                    broken.append(f"{here}: {link} leads to no file")
                elif parts.fragment and known and urllib.parse.unquote(parts.fragment) not in known.places:
                    broken.append(f"{here}: {link} names no place of {target.relative_to(site.resolve())}")
    return broken, external


def ask(link: str) -> str:
    """What is wrong with a link that leaves the site; empty where it answers."""
    request = urllib.request.Request(link, headers={"User-Agent": "Mozilla/5.0"})
    try:
        with urllib.request.urlopen(request, timeout=20):
            return ""
    except (urllib.error.URLError, TimeoutError, ValueError) as error:
        return f"{link}: {error}"


def main(arguments: list[str]) -> None:
    """Status 1 with a line for each link that leads nowhere."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("site", type=pathlib.Path)
    parser.add_argument("--external", action="store_true", help="ask for those that leave the site too")
    given = parser.parse_args(arguments)
    site = given.site.resolve()
    broken, external = find_broken(site)
    if given.external:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            broken += filter(None, pool.map(ask, external))
    print("\n".join(broken) or f"every link within {given.site} leads somewhere; {len(external)} leave it")
    sys.exit(bool(broken))


if __name__ == "__main__":
    main(sys.argv[1:])
