"""Builds a release: sdist and wheel of the last commit, whose package page links to the repository.

    python .ci/release.py https://github.com/OWNER/NAME --output dist

The address is not in the sources, so that every fork's packages link to the fork.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
NO_ADDRESS = "# project_urls: set by .ci/release.py\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", help="of the repository, such as https://github.com/OWNER/NAME")
    parser.add_argument("--output", type=Path, default=Path("dist"), help="folder of the two files")
    args = parser.parse_args()
    address = args.address.rstrip("/")
    if not re.fullmatch(r"https://[^\s/]+/\S+", address):
        parser.error(f"{address!r} is no address of a repository, such as https://github.com/OWNER/NAME")
    with tempfile.TemporaryDirectory() as copy:
        export(Path(copy))
        link(Path(copy), address)
        command = [sys.executable, "-m", "build", "--outdir", str(args.output.resolve()), copy]
        subprocess.run(command, check=True)


def export(folder: Path) -> None:
    """Writes the files of the last commit."""
    archive = folder / "commit.tar"
    subprocess.run(["git", "archive", "--output", str(archive), "HEAD"], check=True, cwd=ROOT)
    with tarfile.open(archive) as files:
        files.extractall(folder, filter="tar")
    archive.unlink()


def link(folder: Path, address: str) -> None:
    """Sets the package's addresses, and makes the README's links absolute: the package page knows no files.

    Args:
        folder: A copy of the sources, which is changed.
        address: See the module.
    """
    (version,) = re.findall('^__version__ = "(.+)"$', (folder / "vlmenv" / "__init__.py").read_text(), re.MULTILINE)
    settings, readme = folder / "setup.cfg", folder / "README.md"
    text = settings.read_text(encoding="utf-8")
    if NO_ADDRESS not in text:
        raise SystemExit(f"setup.cfg has no line {NO_ADDRESS.strip()!r} to replace")
    settings.write_text(text.replace(NO_ADDRESS, project_urls(address, version)), encoding="utf-8")
    readme.write_text(absolute(readme.read_text(encoding="utf-8"), address, version), encoding="utf-8")


def project_urls(address: str, version: str) -> str:
    """The lines of setup.cfg."""
    urls = {
        "Homepage": address,
        "Documentation": f"{address}/blob/v{version}/docs/quickstart.md",
        "Changelog": f"{address}/blob/v{version}/CHANGELOG.md",
        "Issues": f"{address}/issues",
    }
    return "project_urls =\n" + "".join(f"    {name} = {url}\n" for name, url in urls.items())


def absolute(text: str, address: str, version: str) -> str:
    """Markdown whose links to files lead to the repository, and those of images to the images themselves."""

    def replaced(found: re.Match[str]) -> str:
        kind = "raw" if found["image"] else "blob"
        return f"{found['image']}{found['text']}({address}/{kind}/v{version}/{found['file']})"

    return re.sub(r"(?P<image>!?)(?P<text>\[[^\]]*\])\((?P<file>(?!https?:|mailto:|#)[^)\s]+)\)", replaced, text)


if __name__ == "__main__":
    main()
