"""All but the description for the package index stands in pyproject.toml."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent


def for_index(readme: str, source: str | None) -> str:
    """The README for a package index, where relative links lead nowhere.

    Relative links and pictures become absolute, below the repository ``source``. Without one, paragraphs that begin with
    a picture are left out, and of links the text stays.
    """
    picture, link = r"!\[([^\]]*)\]\((?!https?:)([^)]+)\)", r"(?<!!)\[([^\]]*)\]\((?!https?:|#)([^)]+)\)"
    if source:
        readme = re.sub(picture, rf"![\1]({source}/raw/HEAD/\2)", readme)
        return re.sub(link, rf"[\1]({source}/blob/HEAD/\2)", readme)
    readme = re.sub(rf"^{picture}\n(?:.+\n)*\n", "", readme, flags=re.MULTILINE)
    return re.sub(link, r"\1", readme)


if __name__ == "__main__":
    url = re.search(r'^Source = "([^"]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    setup(
        long_description=for_index((ROOT / "README.md").read_text(encoding="utf-8"), url and url[1]),
        long_description_content_type="text/markdown",
    )
