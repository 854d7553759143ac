"""The installed package: `kernels/` arrives as fastdpo.kernels and never as `kernels`."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import fastdpo

ROOT = Path(__file__).parent.parent
FOLDERS = ("kernels", "benchmarks", "benchmarks/head")
MAPPED = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("[a-z]*.py"))]
MODULES = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in MAPPED]


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
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(out)!r})"
    run(sys.executable, "-W", "error", "-c", code, cwd=tree)  # setuptools warns of folders that it takes for packages
    return next(out.glob("*.whl"))


def check_wheel(wheel: Path, tmp_path: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"fastdpo/{module.replace('.', '/')}.py" for module in MODULES} <= set(names)
    assert not [name for name in names if name.startswith(("kernels/", "benchmarks/", "examples/"))]
    benchmarks = [name for name in names if name.startswith("fastdpo/benchmarks/")]
    assert {name.rpartition("/")[0] for name in benchmarks} == {"fastdpo/benchmarks", "fastdpo/benchmarks/head"}
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    imports = "".join(f", fastdpo.{module}" for module in MODULES)
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r}); import fastdpo, fastdpo.trainer, transformers{imports}; "
        f"assert fastdpo.__file__.startswith({str(site)!r}), fastdpo.__file__"
    )
    code += f"; from fastdpo.commands.demo import demo; demo({str(tmp_path / 'demo')!r}, {{}})"
    run(sys.executable, "-c", code, cwd=tmp_path)
    written = {str(path.relative_to(tmp_path / "demo")) for path in (tmp_path / "demo").rglob("*.json*")}
    assert {"data/train.jsonl", "data/test.jsonl", "model/config.json", "model/tokenizer.json"} <= written


def test_every_package_that_is_imported_is_declared() -> None:
    """An extra's package may be imported by the modules that are for it; all others must come with fastdpo."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [each for name, extra in project["optional-dependencies"].items() if name != "test" for each in extra]
    declared = {canonicalize_name(Requirement(each).name) for each in (*project["dependencies"], *extras)}
    imported = set()
    for path in (*(ROOT / "fastdpo").rglob("*.py"), *MAPPED):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(str(node.module).split(".")[0])
    imported -= {*sys.stdlib_module_names, "fastdpo", "benchmarks"}
    assert "tqdm" in imported
    names = {"yaml": "pyyaml", "huggingface_hub": "huggingface-hub", "PIL": "pillow"}
    assert {canonicalize_name(names.get(name, name)) for name in imported} <= declared


def test_citation_and_changelog_name_this_version_and_one_date() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == fastdpo.__version__
    releases = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert releases[0] == f"{citation['version']} - {citation['date-released']}"


def test_the_workflows_run_what_is_here_and_actions_of_fixed_commits() -> None:
    workflows = [yaml.safe_load(path.read_text()) for path in (ROOT / ".github" / "workflows").glob("*.yml")]
    steps = [step for workflow in workflows for job in workflow["jobs"].values() for step in job["steps"]]
    assert {"run": ".ci/run"} in steps
    for step in steps:
        assert re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", step.get("uses", f"none/none@{40 * '0'}")), step
        for name in re.findall(r"\.ci/[\w.]+", step.get("run", "")):
            assert (ROOT / name).is_file(), name


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
        names = ["fastdpo", *(f"fastdpo.{module}" for module in MODULES)]  # the test of the wheel imports them all
        code = f"from importlib.util import find_spec; print(*(find_spec(name).origin for name in {names}), sep='\\n')"
        for where in run(python, "-c", code, cwd=tmp_path).splitlines():
            assert where.startswith(str(source if options else venv)), where
