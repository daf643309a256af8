"""Real weights for tests, out of registry packages, into .cache/weights: `make weights` runs this.

Each file is taken out of its package, never installed or committed, and checked by its SHA-256.
"""

import hashlib
import logging
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

logger = logging.getLogger("weights")

FOLDER = Path(__file__).resolve().parents[1] / ".cache/weights"
NPM = ("npm", "pack", "--silent", "--ignore-scripts")
PIP = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:")
# Command, package, and of each file wanted: our name, its place in the package, its SHA-256.
PACKAGES = (
    (
        NPM,
        "@vladmandic/human@3.3.6",  # MIT
        (
            (
                "centernet.json",
                "package/models/centernet.json",
                "bfb942eaacc5becf738d536663bc4580a0ae9e560722306e6d4dd7fe4a09de05",
            ),
            (
                "centernet.bin",
                "package/models/centernet.bin",
                "1b635a15009071f506f9f2b3519b31c072c534888989f30d269ffd44734ef7ef",
            ),
        ),
    ),
    (
        PIP,
        "stlpips-pytorch==0.0.2",  # BSD-2
        (
            (
                "stlpips_alex.pth",
                "stlpips_pytorch/weights/vST0.0/alex_shift_tolerant.pth",
                "b356b382f96010f77d085ee8343ecd9fd322d0a56e8de2b2d0549fafcad8b9ee",
            ),
            (
                "stlpips_vgg.pth",
                "stlpips_pytorch/weights/vST0.0/vgg_shift_tolerant.pth",
                "44597da68f49c1837c100ff52299050f274d102eb102e5837178c79be6f0e250",
            ),
        ),
    ),
    (
        PIP,
        "lpips==0.1.4",  # BSD-2
        (
            (
                "lpips_alex.pth",
                "lpips/weights/v0.1/alex.pth",
                "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0",
            ),
            (
                "lpips_vgg.pth",
                "lpips/weights/v0.1/vgg.pth",
                "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
            ),
        ),
    ),
)


def weights_file(name: str) -> Path:
    """A fetched file; a FileNotFoundError says how to fetch it."""
    path = FOLDER / name
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: run `make weights`, which needs npm, pip and a network once")
    return path


def fetch() -> None:
    """Fetch what is missing or damaged."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for command, package, files in PACKAGES:
        if all(is_right(FOLDER / name, sha256) for name, _, sha256 in files):
            continue
        logger.info("fetching %s", package)
        with tempfile.TemporaryDirectory() as folder:
            archive = download(command, package, Path(folder))
            for name, place, sha256 in files:
                take(archive, place, FOLDER / name)
                if not is_right(FOLDER / name, sha256):
                    (FOLDER / name).unlink()
                    raise SystemExit(f"{place} of {package} is not the file known by SHA-256 {sha256}; try again")


def download(command: tuple[str, ...], package: str, folder: Path) -> Path:
    """The package's archive, downloaded into the folder."""
    if shutil.which(command[0]) is None:
        raise SystemExit(f"{command[0]} is not on the PATH: install Node.js 18 or later, then run `make weights`")
    finished = subprocess.run([*command, package], cwd=folder, check=False)
    archives = list(folder.iterdir())
    if finished.returncode or len(archives) != 1:
        raise SystemExit(f"`{' '.join([*command, package])}` failed with status {finished.returncode}; see above")
    return archives[0]


def take(archive: Path, place: str, path: Path) -> None:
    """Copy one file out of a .tgz or .whl."""
    if archive.suffix == ".tgz":
        with tarfile.open(archive) as packed, path.open("wb") as file:
            source = packed.extractfile(place)
            if source is None:
                raise SystemExit(f"{place} in {archive.name} is no file")
            shutil.copyfileobj(source, file)
    else:
        with zipfile.ZipFile(archive) as packed, packed.open(place) as source, path.open("wb") as file:
            shutil.copyfileobj(source, file)


def is_right(path: Path, sha256: str) -> bool:
    """Whether the file is there and is the one known by this SHA-256."""
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    fetch()
