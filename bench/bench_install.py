"""How large is an installation, and how long does it take? `python bench/bench_install.py [--source DIR_OR_WHEEL]`.

Builds a wheel, installs it with its run-time dependencies into a fresh virtual environment and prints the seconds of
both, the size of the wheel with and without the bundled miniature, the bytes that the environment holds afterwards
(byte code counted, pip and setuptools not), and what `import deltaic` costs beyond `import numpy`, in fresh
processes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from pathlib import Path
from statistics import median

INSTALLERS = ("pip", "setuptools", "pkg_resources", "_distutils_hack", "distutils-precedence.pth")


def installed_bytes(packages: Path) -> dict[str, int]:
    """Bytes of every top-level entry of a site-packages folder but the installers'."""
    sizes: dict[str, int] = {}
    for path in packages.rglob("*"):
        top = path.relative_to(packages).parts[0]
        if path.is_file() and top not in INSTALLERS and top.split("-")[0] not in INSTALLERS:
            sizes[top] = sizes.get(top, 0) + path.stat().st_size
    return sizes


def import_seconds(python: Path, statement: str) -> float:
    """Seconds of one fresh interpreter that runs `statement` only."""
    start = time.perf_counter()
    subprocess.run([str(python), "-c", statement], check=True)
    return time.perf_counter() - start


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=Path(__file__).parent.parent, help="repository or a wheel")
    parser.add_argument("--repeat", type=int, default=11, help="pairs of imports")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        environment, wheels = Path(folder) / "venv", Path(folder) / "wheels"
        venv.create(environment, with_pip=True)
        python = environment / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
        wheel = args.source
        if wheel.suffix != ".whl":
            start = time.perf_counter()
            command = [str(python), "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(wheels), str(args.source)]
            subprocess.run(command, check=True)
            (wheel,) = wheels.glob("*.whl")
            print(f"building the wheel            {time.perf_counter() - start:8.1f} s")
        with zipfile.ZipFile(wheel) as file:
            miniature = sum(i.compress_size for i in file.infolist() if "/miniature/" in i.filename)
        size = wheel.stat().st_size
        bare = size - miniature
        print(f"wheel                         {size / 1e6:8.2f} MB, {bare / 1e6:.2f} without the miniature")
        start = time.perf_counter()
        subprocess.run([str(python), "-m", "pip", "install", "-q", str(wheel)], check=True)
        print(f"installing it, with all it needs {time.perf_counter() - start:5.1f} s")
        command = [str(python), "-c", "import numpy; print(numpy.__path__[0])"]
        packages = Path(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()).parent
        sizes = installed_bytes(packages)
        print(f"installed                     {sum(sizes.values()) / 1e6:8.1f} MB, of which")
        for name, nbytes in sorted(sizes.items(), key=lambda item: -item[1])[:6]:
            print(f"    {name:25} {nbytes / 1e6:8.1f} MB")
        differences = [
            import_seconds(python, "import numpy, deltaic") - import_seconds(python, "import numpy")
            for _ in range(args.repeat)
        ]
        print(f"import deltaic beyond numpy   {1e3 * median(differences):8.1f} ms")


if __name__ == "__main__":
    main()
