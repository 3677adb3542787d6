"""Writes the locks of the images: `python deploy/lock.py`, with Python 3.11 on Linux x86_64 and a network.

The versions are those of constraints.txt, which the tests run with. pip resolves them for this platform without
installing anything, and its report has the hash of the one wheel of each package that an image takes.
"""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

DEPLOY = Path(__file__).parent
CUDA = re.compile(r"torch|triton|nvidia-.+|cuda-.+")
"""What an image without GPUs takes in another build, or not at all."""


def main() -> None:
    """Write both locks."""
    project = tomllib.loads((DEPLOY.parent / "pyproject.toml").read_text())["project"]
    stores = project["optional-dependencies"]
    needed = [*project["dependencies"], *stores["gs"], *stores["abfs"]]
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed"]
    command += ["--only-binary=:all:", "--constraint", str(DEPLOY.parent / "constraints.txt"), "--report", "-", *needed]
    report = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    lines: dict[str, list[str]] = {"requirements.lock": [], "cuda.lock": []}
    for package in report["install"]:
        name = re.sub(r"[-_.]+", "-", package["metadata"]["name"]).lower()
        digest = package["download_info"]["archive_info"]["hashes"]["sha256"]
        line = f"{name}=={package['metadata']['version']} --hash=sha256:{digest}\n"
        lines["cuda.lock" if CUDA.fullmatch(name) else "requirements.lock"].append(line)
    for file, found in lines.items():
        (DEPLOY / file).write_text("".join(["# Python 3.11, Linux x86_64; made by lock.py\n", *sorted(found)]))


if __name__ == "__main__":
    main()
