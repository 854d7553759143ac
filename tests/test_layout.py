"""The house rules that no linter knows."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastdpo

ROOT = Path(__file__).parent.parent

# A folder, or a module at the package's top, may import what stands on lower floors only.
FLOORS = [
    {"untrusted"},
    {"kernels", "settings", "checks", "sharding"},
    {"head", "data"},
    {"loss", "model"},
    {"report", "reference", "config"},
    {"compat", "run", "scoring", "checkpoint"},
    {"plan"},
    {"trainer"},
    {"commands"},
    {"benchmarks"},
    {"cli", "__init__"},
    {"__main__"},
]
SOURCES = [p for p in sorted((ROOT / "fastdpo").rglob("*.py")) if "kernels" not in p.parts]
BENCHMARKS = ROOT / "fastdpo" / "benchmarks"  # behind a link
SOURCES = sorted({*SOURCES, *BENCHMARKS.glob("*.py"), *(BENCHMARKS / "head").glob("*.py")})
MAX_LINES, MAX_FILES = 400, 8


def place_of(module: str) -> str:
    """The folder or top-level module that a module of the package belongs to."""
    return module.split(".")[1]


def fastdpo_imports(path: Path) -> set[str]:
    """Names of the modules of fastdpo that a file imports, at any depth of its code."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "fastdpo":
            names |= {f"fastdpo.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.startswith("fastdpo.")}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    place = path.relative_to(ROOT / "fastdpo").with_suffix("").parts[0]
    floor = next(i for i, floor in enumerate(FLOORS) if place in floor)
    allowed = {below for lower in FLOORS[:floor] for below in lower} | {place}
    if place == "benchmarks":  # which call fastdpo as its users do
        allowed |= {*fastdpo.__all__, "__version__"}
    above = {name for name in fastdpo_imports(path) if place_of(name) not in allowed}
    assert not above, f"{path.relative_to(ROOT)} may not import {sorted(above)}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    imported = {".".join(p.relative_to(ROOT).with_suffix("").parts): fastdpo_imports(p) for p in SOURCES}
    imports = {
        name: {other for other in imported for i in found if f"{i}.".startswith(f"{other}.")} - {name}
        for name, found in imported.items()
    }
    while leaves := {name for name, wanted in imports.items() if not wanted & imports.keys()}:
        imports = {name: wanted for name, wanted in imports.items() if name not in leaves}
    assert not imports


def test_files_and_folders_stay_small() -> None:
    """So that a file has one subject, and a folder can be taken in at a glance."""
    long = [path.name for path in SOURCES if len(path.read_text().splitlines()) > MAX_LINES]
    assert not long, f"above {MAX_LINES} lines: {long}"
    for folder in {path.parent for path in SOURCES}:
        files = [p.name for p in folder.glob("*.py") if p.name != "__init__.py" or folder == ROOT / "fastdpo"]
        assert len(files) <= MAX_FILES, f"{folder.name} has {len(files)} modules: {sorted(files)}"


PEFT_KNOWN_BY = {f"model/{name}.py" for name in ("adapters", "adapted_layers", "policy")}
PEFT_KNOWN_BY.add("commands/merge/merged_model.py")  # merging an adapter is its subject
PEFT_NAMES = {  # of its models, its configs and its layers
    *("active_adapter", "active_adapters", "active_peft_config", "add_adapter", "delete_adapter", "disable_adapter"),
    *("disable_adapters", "get_base_model", "get_nb_trainable_parameters", "load_adapter", "merge_and_unload"),
    *("peft_type", "set_adapter", "is_prompt_learning"),
    *("base_layer", "get_base_layer", "lora_A", "lora_B", "lora_variant", "modules_to_save", "original_module"),
    *("token_adapter", "trainable_tokens_delta", "adapter_layer_names", "other_param_names"),
    *("get_peft_model", "is_peft_available", "PeftModel", "PeftConfig", "LoraConfig"),
}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_few_modules_know_peft(path: Path) -> None:
    """The others ask `fastdpo.model.adapters`; `peft_config` and `use_peft` are names of our own arguments."""
    if str(path.relative_to(ROOT / "fastdpo")) in PEFT_KNOWN_BY:
        return
    used: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Import():
                used |= {alias.name.split(".")[0] for alias in node.names}
            case ast.ImportFrom() if not (node.module or "").startswith("fastdpo."):
                used |= {str(node.module).split(".")[0], *(alias.name for alias in node.names)}
            case ast.Attribute(value=owner) if not (isinstance(owner, ast.Name) and owner.id == "adapters"):
                used.add(node.attr)
            case ast.Call(func=ast.Name(id="getattr" | "hasattr"), args=[_, ast.Constant(value=name), *_]):
                used.add(str(name))
    of_peft = used & (PEFT_NAMES | {"peft"})
    assert not of_peft


def test_no_test_is_imported_by_another() -> None:
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tests."):
                assert ".test_" not in str(node.module), f"{path.name} imports {node.module}; use tests/helpers"


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda p: p.name)
def test_kernels_stand_on_torch_and_triton_alone(path: Path) -> None:
    assert {place_of(name) for name in fastdpo_imports(path)} <= {"kernels"}
    tree = ast.parse(path.read_text())
    roots = {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
    roots |= {alias.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    assert roots - set(sys.stdlib_module_names) <= {"torch", "triton", "fastdpo"}


def test_kernels_is_never_a_top_level_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()  # it would shadow Hugging Face's
    link = ROOT / "fastdpo" / "kernels"
    assert link.is_symlink()
    assert link.resolve() == ROOT / "kernels"


def test_a_benchmark_has_one_name() -> None:
    """Of the folder's modules in a clone, only the studies are imported as `benchmarks`, and by that name alone."""
    assert (ROOT / "fastdpo" / "benchmarks").resolve() == ROOT / "benchmarks"
    importlib.import_module("benchmarks.studies.balance")
    importlib.import_module("fastdpo.benchmarks.lengths")
    for other in ("benchmarks.lengths", "fastdpo.benchmarks.studies.balance"):
        with pytest.raises(ImportError, match=re.escape(other.removesuffix(".balance"))):
            importlib.import_module(other)


IMPORTS = "import fastdpo, fastdpo.trainer, transformers.integrations.hub_kernels, transformers.models.llama"


@pytest.mark.slow
def test_lives_with_transformers_and_hugging_face_kernels_from_the_repository_root() -> None:
    code = f"{IMPORTS}; import kernels; assert kernels.__file__, 'our folder was taken for the package'"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.slow
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
    assert [name for name in dir(fastdpo) if not name.startswith("__")] == sorted(fastdpo.__all__)


def test_everything_public_is_documented() -> None:
    for name in fastdpo.__all__:
        assert len(getattr(fastdpo, name).__doc__ or "") > 60, name


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_ci_runs_the_test_command_of_a_page(page: str) -> None:
    """All tests, slow ones too."""
    command = (ROOT / ".ci" / "run").read_text().splitlines()[-1]
    assert command.partition(" -m pytest ")[2] == "-n auto --dist worksteal"
    assert f"```bash\n{command}\n```" in (ROOT / page).read_text()


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/architecture.md"])
def test_the_files_that_a_page_names_exist(page: str) -> None:
    named = set(re.findall(r"`((?:\w+/)*\w+(?:\.py|\.md|/))`", (ROOT / page).read_text()))
    assert named
    missing = [name for name in sorted(named) if not ((ROOT / name).exists() or (ROOT / "fastdpo" / name).exists())]
    assert not missing
