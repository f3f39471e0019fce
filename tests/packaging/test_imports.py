"""Imports point one way: docs/architecture.md's table, enforced on every import of every file."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from jaxsloth.kernels.registry import OP_FOLDERS

ROOT = Path(__file__).parents[2]
TORCH, JAX = {"torch", "triton"}, {"jax", "jaxlib", "flax", "optax"}
FRAMEWORKS = TORCH | JAX
NUMBERS = {"numpy", "ml_dtypes"}
FREE = None  # may import anything
BACKEND_MAY = (
    *(
        "kernels",
        "models",
        "objectives",
        "recipe",
        "options",
        "backend",
        "functional_model",
        "batch",
        "convert",
        "device_choice",
    ),
    *("sampling", "decoded_rows"),
)

# A file matches the first pattern that fits. (third-party packages, parts of jaxsloth, packages allowed inside functions only)
RULES: list[tuple[str, set[str] | None, tuple[str, ...], set[str]]] = [
    ("jaxsloth/models/*.py", {"pydantic"}, ("models", "foreign"), set()),
    ("jaxsloth/transforms.py", {"pydantic"}, ("models", "foreign"), set()),
    ("jaxsloth/foreign.py", {"pydantic", "pydantic_core", "yaml"}, (), set()),
    ("jaxsloth/recipe.py", {"pydantic", "pydantic_core", "yaml"}, ("models", "foreign", "transforms"), set()),
    ("jaxsloth/batch.py", NUMBERS, (), set()),
    ("jaxsloth/options.py", set(), (), set()),
    ("jaxsloth/extras.py", set(), (), set()),
    ("jaxsloth/terminal.py", {"rich"}, (), set()),
    ("jaxsloth/objectives/*.py", NUMBERS, ("objectives", "batch"), set()),
    ("jaxsloth/sampling.py", NUMBERS, (), set()),
    ("jaxsloth/decoded_rows.py", NUMBERS, ("sampling",), set()),
    (
        "jaxsloth/backend.py",
        NUMBERS,
        ("batch", "models", "functional_model", "objectives", "options", "extras", "sampling"),
        set(),
    ),
    ("jaxsloth/functional_model.py", NUMBERS, ("options", "batch"), set()),
    ("jaxsloth/device_choice.py", set(), (), set()),
    ("jaxsloth/generation.py", NUMBERS, ("backend", "batch", "foreign", "sampling"), set()),
    ("kernels/registry.py", set(), (), set()),
    ("kernels/tolerance.py", set(), (), set()),
    ("kernels/*/contract.py", NUMBERS, ("kernels",), set()),
    ("kernels/*/cases.py", NUMBERS, ("kernels",), set()),
    ("kernels/*/reference.py", NUMBERS | TORCH | {"jaxtyping"}, ("kernels",), set()),
    ("kernels/*/torch_ops.py", NUMBERS | {"torch", "jaxtyping"}, ("kernels",), set()),
    ("kernels/*/jax_library_ops.py", NUMBERS | {"jax"}, ("kernels",), set()),
    ("kernels/*/library_ops.py", NUMBERS | {"torch"}, ("kernels",), set()),
    ("kernels/*/extended.py", {"torch"}, ("kernels",), set()),
    ("kernels/torch_matmul.py", {"torch", "jaxtyping"}, ("kernels",), set()),
    ("kernels/*/triton_kernel.py", NUMBERS | TORCH | {"jaxtyping"}, ("kernels",), set()),
    ("kernels/*/flash_triton.py", NUMBERS | TORCH | {"jaxtyping"}, ("kernels",), set()),
    ("kernels/*/flash_kernels.py", {"triton"}, (), set()),
    ("kernels/*/triton_parts.py", {"triton"}, ("kernels",), set()),
    ("kernels/*/ptx.py", NUMBERS, ("kernels",), set()),
    ("kernels/*/matvec_triton.py", NUMBERS | TORCH | {"jaxtyping"}, ("kernels",), set()),
    ("kernels/*/xla_ops.py", NUMBERS | {"jax", "jaxtyping"}, ("kernels",), set()),
    ("kernels/jax_platform.py", {"jax"}, ("kernels",), set()),
    ("kernels/*/pallas_flash.py", NUMBERS | {"jax", "jaxtyping"}, ("kernels",), set()),
    ("kernels/*/pallas_cached.py", NUMBERS | {"jax", "jaxtyping"}, ("kernels",), set()),
    ("kernels/*/xla_cached.py", NUMBERS | {"jax", "jaxtyping"}, ("kernels",), set()),
    ("kernels/*/pallas_matvec.py", NUMBERS | {"jax", "jaxtyping"}, ("kernels",), set()),
    ("kernels/*/pallas_kernel.py", NUMBERS | {"jax", "jaxtyping"}, ("kernels",), set()),
    (
        "convert/run.py",
        NUMBERS,
        ("convert", "models", "backend", "kernels.nf4", "data.tokenizer", "extras"),
        FRAMEWORKS,
    ),
    ("convert/report.py", NUMBERS | {"rich"}, ("convert", "foreign"), set()),
    ("convert/llama_cpp_worker.py", NUMBERS, (), {"xllamacpp"}),
    ("convert/check_readers.py", NUMBERS, ("convert", "foreign"), {"torch", "transformers", "peft"}),
    ("convert/gguf_tokenizer_reader.py", set(), ("convert",), {"tokenizers", "transformers"}),
    ("convert/check.py", NUMBERS, ("convert", "foreign", "extras"), set()),
    ("convert/check_report.py", {"rich"}, ("convert",), set()),
    (
        "convert/*.py",
        NUMBERS | {"safetensors", "pydantic"},
        ("convert", "foreign", "models", "transforms", "backend", "kernels.nf4.contract", "extras"),
        FRAMEWORKS | {"gguf", "libgguf", "huggingface_hub", "orbax", "tensorstore"},
    ),
    (
        "jaxsloth/data/*.py",
        NUMBERS | {"jinja2", "rich"},
        ("data", "recipe", "batch", "convert", "foreign", "terminal"),
        {"datasets", "transformers", "pyarrow", "jinja2"},
    ),
    (
        "jaxsloth/chat_templates/*.py",
        NUMBERS,
        ("chat_templates", "data", "batch"),
        {"transformers", "tokenizers"},
    ),
    ("jaxsloth/evaluation/metrics.py", set(), ("extras",), {"rouge_score", "sacrebleu"}),
    (
        "jaxsloth/evaluation/*.py",
        NUMBERS | {"rich", "pydantic"},
        ("evaluation", "training", "data", "convert", "models", "transforms", "recipe", "batch", "backend", "generation"),
        set(),
    ),
    (
        "jaxsloth/training/*.py",
        NUMBERS | {"rich", "safetensors", "pydantic"},
        ("training", "objectives", "data", "convert", "models", "recipe", "batch", "backend", "foreign", "extras", "terminal"),
        {"matplotlib"},
    ),
    (
        "torch_backend/*.py",
        NUMBERS | TORCH,
        ("torch_backend", *BACKEND_MAY),
        set(),
    ),
    (
        "jaxsloth/jax_backend/*.py",
        NUMBERS | JAX,
        ("jax_backend", *BACKEND_MAY),
        set(),
    ),
    ("jaxsloth/parity/*.py", FREE, (), set()),
    ("jaxsloth/frontend/adapters.py", NUMBERS | {"torch"}, ("*",), set()),
    ("jaxsloth/frontend/shared_weights.py", NUMBERS | {"torch", "transformers"}, ("*",), set()),
    ("jaxsloth/frontend/trainer_surface.py", {"torch", "transformers"}, ("*",), {"huggingface_hub"}),
    ("jaxsloth/frontend/decoding.py", NUMBERS | {"torch", "transformers"}, ("*",), set()),
    ("jaxsloth/frontend/language_model.py", {"torch"}, ("*",), set()),
    ("jaxsloth/frontend/peft_models.py", {"peft", "torch"}, ("*",), set()),
    ("jaxsloth/frontend/as_before.py", {"torch"}, ("*",), set()),
    ("jaxsloth/frontend/family_table.py", {"transformers"}, ("*",), set()),
    ("jaxsloth/frontend/saving.py", NUMBERS | {"torch"}, ("*",), {"huggingface_hub"}),
    ("jaxsloth/frontend/fast_model.py", set(), ("*",), {"torch"}),
    ("jaxsloth/frontend/metrics.py", NUMBERS | {"torch", "transformers"}, ("*",), set()),
    ("jaxsloth/frontend/trainer_config.py", {"transformers"}, ("*",), set()),
    ("jaxsloth/frontend/dpo_trainer.py", NUMBERS | {"torch"}, ("*",), set()),
    ("jaxsloth/frontend/trainer_run.py", NUMBERS | {"torch", "transformers", "safetensors", "pydantic"}, ("*",), set()),
    ("jaxsloth/frontend/optimizer_view.py", {"torch", "transformers"}, ("*",), set()),
    ("jaxsloth/frontend/base_trainer.py", NUMBERS | {"transformers"}, ("*",), set()),
    ("jaxsloth/frontend/*.py", NUMBERS, ("*",), set()),
    ("jaxsloth/frontend/module/cached_rows.py", NUMBERS | {"torch"}, ("frontend.module", "backend", "batch"), set()),
    (
        "jaxsloth/frontend/module/inputs.py",
        NUMBERS | {"torch"},
        ("frontend.module", "frontend.arguments", "backend", "functional_model", "batch", "models"),
        set(),
    ),
    (
        "jaxsloth/frontend/module/*.py",
        {"torch", "transformers"},
        ("frontend.module", "frontend.arguments", "backend", "functional_model", "batch", "models", "transforms"),
        {"peft"},
    ),
    ("jaxsloth/*.py", NUMBERS | {"typer", "rich"}, ("*",), set()),
]


def sources() -> list[Path]:
    folders = ("jaxsloth", "kernels", "torch_backend", "convert")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    return sorted(file for file in files if "__pycache__" not in file.parts and file.resolve() == file)


def rule_of(file: Path):
    relative = file.relative_to(ROOT)
    return next((rule for rule in RULES if relative.match(rule[0]) and len(Path(rule[0]).parts) == len(relative.parts)), None)


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def imports(file: Path) -> list[tuple[str, bool]]:
    """(module, whether it is imported inside a function or for type checking only)."""
    found: list[tuple[str, bool]] = []

    def visit(node: ast.AST, late: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend((alias.name, late) for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.module:
                found.append((child.module, late))
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            visit(child, late or inside)

    visit(tree_of(file), False)
    return found


@pytest.mark.parametrize("file", sources(), ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_one_way(file):
    rule = rule_of(file)
    if file.name == "__init__.py" and rule is None:
        assert not imports(file)
        return
    assert rule is not None, f"no rule for {file.relative_to(ROOT)}; say in RULES what it may import"
    _, packages, parts, late_packages = rule
    if packages is None:
        return
    for module, late in imports(file):
        top, _, rest = module.partition(".")
        if top == "jaxsloth":
            allowed = not rest or "*" in parts or any(rest == part or rest.startswith(f"{part}.") for part in parts)
            crosses = "*" in parts and rest.split(".")[0] in ("torch_backend", "jax_backend")
            assert allowed and not crosses, f"{file.name} imports {module}; allowed: {parts}"
        elif top not in sys.stdlib_module_names:
            assert top in packages or (late and top in late_packages), f"{file.name} imports {module}"


def file_of(module: str) -> Path | None:
    """The project's file of a module, symlinked folders resolved; None where there is none."""
    path = ROOT.joinpath(*module.split("."))
    found = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return found.resolve() if found.is_file() else None


def imported_files(file: Path) -> set[Path]:
    """The project's files that a file names in an import, wherever it stands: in a function or for type checking too."""
    found: set[Path | None] = set()
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Import):
            found |= {file_of(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            # What is imported from a package may be a module of it.
            own = {file_of(f"{node.module}.{alias.name}") or file_of(node.module) for alias in node.names}
            found |= own
    return {one for one in found if one is not None and one.is_relative_to(ROOT)} - {file}


def cycles(graph: dict[Path, set[Path]]) -> list[set[Path]]:
    """The strongly connected components of more than one file: those that reach each other."""
    reached: dict[Path, set[Path]] = {}
    for start in graph:
        seen, waiting = set(), list(graph[start])
        while waiting:
            one = waiting.pop()
            if one not in seen:
                seen.add(one)
                waiting.extend(graph.get(one, ()))
        reached[start] = seen
    rings = {frozenset(b for b in reached[a] if a in reached.get(b, ())) for a in graph if a in reached[a]}
    return sorted((set(ring) for ring in rings), key=lambda ring: sorted(map(str, ring)))


def test_no_import_cycles():
    found = cycles({file: imported_files(file) for file in sources()})
    wrong = [sorted(str(file.relative_to(ROOT)) for file in ring) for ring in found]
    assert not wrong, f"these files import each other: {wrong}"


def test_cycles_are_found_through_symlinks_and_type_checking():
    a, b, c = (Path(name) for name in "abc")
    assert cycles({a: {b}, b: {c}, c: {b}}) == [{b, c}]
    assert cycles({a: {b, c}, b: {c}, c: set()}) == []
    assert file_of("jaxsloth.torch_backend.model") == ROOT / "torch_backend/model.py"
    assert ROOT / "kernels/nf4/contract.py" in imported_files(ROOT / "torch_backend/model.py")


def test_bare_names_of_symlinked_folders_are_never_imported():
    for file in [*sources(), *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        for module, _ in imports(file):
            assert module.partition(".")[0] not in ("kernels", "torch_backend", "convert"), f"{file}: {module}"


@pytest.mark.parametrize("name", ["kernels", "torch_backend", "convert"])
def test_symlinks(name):
    link = ROOT / "jaxsloth" / name
    assert link.is_symlink() and link.resolve() == ROOT / name


@pytest.mark.parametrize(
    "command",
    [["-c", "import jaxsloth"], ["-m", "jaxsloth", "--help"], ["-m", "jaxsloth", "schema"]],
    ids=["import", "help", "schema"],
)
def test_no_framework_is_imported(command):
    program = [sys.executable, "-X", "importtime", *command]
    done = subprocess.run(program, capture_output=True, text=True, cwd=ROOT, check=True, timeout=120)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert "jaxsloth" in imported
    assert not imported & (FRAMEWORKS | {"transformers", "datasets"})


BODY = {
    *("groups", "pad", "out_pad", "written_refusal", "kept_widths", "forward", "forward_keeping", "backward", "step"),
}
# What both backends have under the same names: file -> class -> methods.
ROOMS: dict[str, dict[str, set[str]]] = {
    "linear": {
        "DenseWeight": {"parts", "gather", "matvec"},
        "Nf4Weight": {"parts", "gather", "matvec"},
        "Linear": {"forward"},
        "LinearGroup": {"written_refusal", "forward", "backward_input", "backward_adapters"},
    },
    "weights": {},
    "norm": {"RMSNorm": {"forward", "forward_keeping", "backward"}},
    "embedding": {"Embedding": {"forward"}},
    "head": {"Head": {"forward", "loss"}},
    "attention": {"Attention": BODY},
    "mlp": {"Mlp": BODY},
    "body": {
        "Body": {"groups", "written_refusal", "forward", "step"},
        "DefaultPair": {"kept_widths", "forward_keeping", "backward"},
    },
    "block": {"Branch": set(), "Block": {"passes", "forward", "forward_keeping", "backward", "step"}},
    "run": {"Run": set(), "DropoutKey": set()},
    "ops": {"Ops": {"attention"}},
    "decoder": {"Decoder": set()},
    "state": {"ModelState": set()},
}
# Those that are functions, or whose classes differ.
OTHER_ROOMS = {
    *("autograd_pass", "written_pass", "decode_pass", "offload"),
    *("optimizer", "optimizer_8bit", "step", "generate", "functional_model", "devices", "model"),
}


@pytest.mark.parametrize("folder", ["torch_backend", "jaxsloth/jax_backend"])
def test_both_backends_have_the_same_rooms(folder):
    assert ROOMS.keys() | OTHER_ROOMS <= {file.stem for file in (ROOT / folder).glob("*.py")}
    for room, classes in ROOMS.items():
        found = {node.name: node for node in tree_of(ROOT / folder / f"{room}.py").body if isinstance(node, ast.ClassDef)}
        for name, methods in classes.items():
            assert name in found, f"{folder}/{room}.py lacks the class {name}"
            own = {part.name for part in found[name].body if isinstance(part, ast.FunctionDef)}
            own |= {target.id for part in found[name].body if isinstance(part, ast.Assign) for target in part.targets}
            assert methods <= own, f"{folder}/{room}.py: {name} lacks {sorted(methods - own)}"


@pytest.mark.parametrize("folder", OP_FOLDERS)
def test_every_op_folder_has_the_same_files(folder):
    names = {"contract", "cases", "reference", "torch_ops"}
    if folder != "fp8":  # runs on torch so far
        names.add("xla_ops")
    if folder in ("nf4", "rms_norm", "layer_norm", "adamw_8bit"):
        names |= {"triton_kernel", "pallas_kernel"}
    assert names <= {file.stem for file in (ROOT / "kernels" / folder).glob("*.py")}
