"""The active interpreter where it has what the project needs, else one in .venv. Needs the standard library alone."""

import os
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).absolute().parents[1]


def requirements(kind: str, text: str) -> dict[str, str]:
    """Least versions by package, from the text of pyproject.toml."""
    names = ("dependencies", "plot", "dev") if kind == "dev" else ("dependencies",)
    lists = [re.search(rf"^{name} = \[(.*?)\]", text, re.S | re.M) for name in names]
    return {name: least for found in lists for name, least in re.findall(r'"([\w-]+)>=([\d.]+)"', found[1])}


def lacking(kind: str) -> list[str]:
    """Packages that this interpreter has not, or older than needed; none is imported."""
    absent = []
    for name, least in requirements(kind, (ROOT / "pyproject.toml").read_text(encoding="utf-8")).items():
        with suppress(PackageNotFoundError):
            found, needed = ([int(part) for part in re.findall(r"\d+", text)[:2]] for text in (version(name), least))
            if found >= needed:
                continue
        absent.append(name)
    return absent


def runs(*command: str | Path) -> bool:
    """Whether a command ends with code 0; what it says is dropped."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def use_environment(kind: str) -> str:
    """Path of the interpreter for "run" or "dev"; says which, makes one where none suits, or raises SystemExit."""
    for path in filter(None, map(shutil.which, ("python", "python3"))):
        if runs(path, "-m", "quick_start.environment", kind, "check"):
            print(f"environment: {path}", flush=True)
            return os.path.abspath(path)
    venv, file = ROOT / ".venv", "requirements-dev.txt" if kind == "dev" else "requirements.txt"
    python, marker = venv / "bin" / "python", venv / f"installed-{kind}.txt"
    wanted = (ROOT / "requirements.txt").read_text() + (ROOT / file).read_text()
    finished = marker.is_file() and marker.read_text() == wanted  # of the same files, and to the end
    if finished and runs(python, "-m", "quick_start.environment", kind, "check"):
        print("environment: .venv", flush=True)
        return str(python)
    recent = runs(python, "-c", "import sys; sys.exit(sys.version_info < (3, 10))")
    usable = recent and runs(python, "-m", "pip", "--version")
    if not usable and not runs(sys.executable, "-m", "venv", "--clear", venv):
        install = "install Python's venv module (package python3-venv on Debian and Ubuntu) and run this again"
        sys.exit(f"error: '{sys.executable} -m venv' failed: {install}")
    marker.unlink(missing_ok=True)
    print(f"environment: installing {file} into .venv (once; some minutes) ...", flush=True)
    quiet = ["--quiet", "--quiet", "--disable-pip-version-check"]
    if subprocess.call([python, "-m", "pip", "install", *quiet, "-r", ROOT / file]) != 0:
        sys.exit(f"error: pip could not install {file} (see above); check the network and run this again")
    new = marker.with_name(marker.name + ".new")
    new.write_text(wanted)
    new.replace(marker)
    return str(python)


if __name__ == "__main__":
    if sys.argv[2:] == ["check"]:
        sys.exit(sys.version_info < (3, 10) or bool(lacking(sys.argv[1])))
    try:
        os.write(3, use_environment(sys.argv[1]).encode())  # read by env.sh
    except KeyboardInterrupt:
        sys.exit(130)
