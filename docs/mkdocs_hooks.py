"""What the documentation site needs beyond mkdocs.yml; `make site` builds it.

- The project's addresses, from [project.urls] in pyproject.toml and from nowhere else.
- Pages of the repository's root (README.md is the home page), and the files that pages link to.
- One page of the API reference for each package that says in `__all__` what is public: a new package needs no entry.
"""

from __future__ import annotations

import ast
import posixpath
import re
import tomllib
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
PLACEHOLDER = "https://example.org/"
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
FILES = ("LICENSE", "CITATION.cff", "llms.txt")
LINK = re.compile(r"(?<=\]\()(?P<target>[^)#\s:]+)(?=[)#])")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fill in the addresses, unless they are the placeholder, and the navigation of the API reference."""
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
    if not urls["Documentation"].startswith(PLACEHOLDER):
        config.site_url = urls["Documentation"]
    if not urls["Source"].startswith(PLACEHOLDER):
        config.repo_url = urls["Source"]
    assert config.nav is not None
    config.nav.insert(-1, {"API": [{package: f"api/{package}.md"} for package in public_packages()]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what does not lie in docs/."""
    for source, target in PAGES.items():
        files.append(File.generated(config, target, content=(ROOT / source).read_text(encoding="utf-8")))
    for source in (*map(ROOT.joinpath, FILES), *sorted((ROOT / "examples").iterdir())):
        if source.is_file():
            name = source.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, content=rewritten(name, source.read_text(encoding="utf-8"))))
    for package in public_packages():
        files.append(File.generated(config, f"api/{package}.md", content=f"# {package}\n\n::: {package}\n"))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Lead links between files of the repository to where these lie in the site."""
    sources = {target: source for source, target in PAGES.items()}
    target = page.file.src_uri
    return with_site_links(markdown, posixpath.dirname(sources.get(target, f"docs/{target}")))


def rewritten(name: str, content: str) -> str:
    """llms.txt with links to the site's pages; any other file as it is."""
    if name != "llms.txt":
        return content
    return re.sub(r"\.md(?=[)#])", ".html", with_site_links(content, ""))


def with_site_links(markdown: str, folder: str) -> str:
    """A text of the repository's `folder`, as one that lies at the top of the site."""
    return LINK.sub(lambda match: site_path(posixpath.join(folder, match["target"])) or match["target"], markdown)


def site_path(path: str) -> str | None:
    """Where a file of the repository lies in the site; None where it does not."""
    path = posixpath.normpath(path)
    if path in PAGES:
        return PAGES[path]
    if path in FILES or path.startswith("examples/"):
        return path
    return path.removeprefix("docs/") if path.startswith("docs/") else None


def public_packages() -> list[str]:
    """Names of the packages whose `__init__.py` has an `__all__` with something in it."""
    source = ROOT / "src"
    found = [path.parent for path in sorted((source / "loramix").rglob("__init__.py")) if public_names(path)]
    return [".".join(package.relative_to(source).parts) for package in found]


def public_names(path: Path) -> list[str]:
    """The `__all__` of a module, read and not run."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        match node:
            case ast.Assign(targets=[ast.Name(id="__all__")], value=ast.List(elts=names)):
                return [name.value for name in names if isinstance(name, ast.Constant) and isinstance(name.value, str)]
            case _:
                pass
    return []
