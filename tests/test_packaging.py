"""The installed package: `kernels/` arrives as fastdpo.kernels and never as `kernels`."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted(p.stem for p in (ROOT / "kernels").glob("*.py"))


def run(*command: object, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # which may come first
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree, as git would check it out: building writes beside the sources."""
    copy = tmp_path_factory.mktemp("source")
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("the tree is no git checkout")
    files = run("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT).splitlines()
    run("cp", "-P", "--parents", *files, copy, cwd=ROOT)
    return copy


@pytest.fixture(scope="module")
def sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r})"
    run(sys.executable, "-c", code, cwd=source)
    return next(out.glob("*.tar.gz"))


def build_wheel(tree: Path, out: Path) -> Path:
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", out, tree, cwd=out)
    return next(out.glob("*.whl"))


def check_wheel(wheel: Path, tmp_path: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"fastdpo/kernels/{module}.py" for module in MODULES} <= set(names)
    assert not [name for name in names if name.startswith("kernels/")]
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    imports = "".join(f", fastdpo.kernels.{module}" for module in MODULES)
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r}); import fastdpo, fastdpo.trainer, transformers{imports}; "
        f"assert fastdpo.__file__.startswith({str(site)!r}), fastdpo.__file__"
    )
    run(sys.executable, "-c", code, cwd=tmp_path)


@pytest.mark.slow
def test_wheel_and_the_one_made_of_the_sdist(source: Path, sdist: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (tree,) = (tmp_path / "unpacked").iterdir()
    direct, other = tmp_path / "direct", tmp_path / "other"
    direct.mkdir(), other.mkdir()
    wheel = build_wheel(tree, other)
    files, same = (
        {name: archive.read(name) for name in archive.namelist()}
        for archive in map(zipfile.ZipFile, (wheel, build_wheel(source, direct)))
    )
    assert files == same
    check_wheel(wheel, tmp_path)


@pytest.mark.slow
def test_editable_and_plain_install(source: Path, tmp_path: Path) -> None:
    """In a bare environment that sees this one's packages through a .pth file."""
    for options in (["-e"], []):
        venv = tmp_path / f"venv{len(options)}"
        run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=tmp_path)
        python = venv / "bin" / "python"
        site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
        theirs = [p for p in sys.path if p.endswith(("site-packages", "dist-packages"))]
        # fastdpo's own editable finder of the outer environment must not answer for the inner one
        (site / "outer.pth").write_text("\n".join(theirs))
        run(
            sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-build-isolation",
            *options, source, cwd=tmp_path,
        )  # fmt: skip
        imports = "".join(f", fastdpo.kernels.{module}" for module in MODULES)
        code = f"import fastdpo{imports}; print(fastdpo.__file__)"
        where = run(python, "-c", code, cwd=tmp_path).strip()
        assert where.startswith(str(source if options else venv)), where
