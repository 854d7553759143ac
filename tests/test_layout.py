"""The house rules that no linter knows."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A module may import modules on lower floors only; a name covers all modules of its folder.
FLOORS = [
    {"fields", "log_output"},
    {"config_file"},
    {"failures", "dataset_files", "flags", "facts"},
    {"kernels", "eager"},
    {"impl"},
    {"choice", "vocab_parallel", "attention_paths"},
    {"op", "attention_backends"},
    {"logprobs", "objectives"},
    {"settings", "step"},
    {"loss", "messages", "columns"},
    {"attention", "heads", "hybrid", "plots", "formats"},
    {"router"},
    {"model", "packing", "metrics", "report", "checks", "console", "data_summary"},
    {"config", "data", "reference", "sampler", "samples"},
    {"compat", "liger", "loading", "selfcheck", "parallel", "precomputed", "memory_parts"},
    {"memory_model", "token_stats", "run"},
    {"plan", "scoring"},
    {"trainer"},
    {"cli", "__init__"},
    {"__main__"},
]


def floor_of(module: str) -> int:
    return next(i for i, floor in enumerate(FLOORS) if module in floor)


def fastdpo_imports(path: Path) -> set[str]:
    """Names of the fastdpo modules that a file imports, at any depth of its code."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "fastdpo":
            names |= {f"fastdpo.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return {n.split(".")[1] for n in names if n.startswith("fastdpo.")}


def module_of(path: Path) -> str:
    return path.relative_to(ROOT / "fastdpo").with_suffix("").parts[0]


SOURCES = [p for p in sorted((ROOT / "fastdpo").rglob("*.py")) if "kernels" not in p.parts]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    module = module_of(path)
    allowed = {m for floor in FLOORS[: floor_of(module)] for m in floor}
    above = fastdpo_imports(path) - allowed - ({module} if path.parent != ROOT / "fastdpo" else set())
    assert not above, f"{path.name} may not import {sorted(above)}"


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda p: p.name)
def test_kernels_stand_on_torch_and_triton_alone(path: Path) -> None:
    assert fastdpo_imports(path) <= {"kernels"}
    tree = ast.parse(path.read_text())
    roots = {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
    roots |= {alias.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    assert roots - set(sys.stdlib_module_names) <= {"torch", "triton", "fastdpo"}


def test_kernels_is_never_a_top_level_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()  # it would shadow Hugging Face's
    link = ROOT / "fastdpo" / "kernels"
    assert link.is_symlink()
    assert link.resolve() == ROOT / "kernels"


IMPORTS = "import fastdpo, fastdpo.trainer, transformers.integrations.hub_kernels, transformers.models.llama"


def test_lives_with_transformers_and_hugging_face_kernels_from_the_repository_root() -> None:
    code = f"{IMPORTS}; import kernels; assert kernels.__file__, 'our folder was taken for the package'"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_lives_with_transformers_without_hugging_face_kernels(tmp_path: Path) -> None:
    sites = [Path(path) for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    for entry in (entry for site in reversed(sites) for entry in site.iterdir()):
        if not entry.name.startswith(("kernels", "__editable__")):  # the same environment but for one package
            (tmp_path / entry.name).unlink(missing_ok=True)
            (tmp_path / entry.name).symlink_to(entry)
    code = (
        f"import sys; sys.path = ['{ROOT}', '{tmp_path}', *[p for p in sys.path if p and 'site-packages' not in p]]; "
    )
    code += f"{IMPORTS}; import kernels; assert kernels.__file__ is None, 'hiding it failed'"
    subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, check=True)


def test_the_op_and_the_loss_need_neither_transformers_nor_triton() -> None:
    code = "import sys, fastdpo; fastdpo.linear_logprobs, fastdpo.dpo_loss, fastdpo.shared_prefix_batch; "
    code += "assert not {'transformers', 'triton', 'datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_dir_shows_the_public_names() -> None:
    import fastdpo

    assert [name for name in dir(fastdpo) if not name.startswith("__")] == sorted(fastdpo.__all__)


def test_everything_public_is_documented() -> None:
    import fastdpo

    for name in fastdpo.__all__:
        assert len(getattr(fastdpo, name).__doc__ or "") > 60, name


def test_the_test_command_is_the_one_in_the_readme() -> None:
    command = (ROOT / ".ci" / "run").read_text().splitlines()[-1]
    assert command in (ROOT / "README.md").read_text().splitlines()
