"""The rules of the tree, read from its source: who imports whom, who may touch what, how large a file grows.

Nothing of ltx_sp is imported. Each rule is a function of a root folder that returns its violations, so that the same
functions run on the repository and on copies of it with one violation planted.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import pathlib
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator

import pytest

REPOSITORY = pathlib.Path(__file__).parents[2]

# A module imports only from the lines below its own. Modules of one line never import each other; the files of one
# package may.
LAYERS = (
    ("generate", "demo"),
    ("runtime", "arguments"),
    ("prepare",),
    ("encode", "denoise", "upsample", "decode", "write", "read", "components"),
    ("weights", "graph", "start"),
    ("parallel",),
    ("model",),
    ("handoff",),
    ("plan",),
    ("stage",),
    ("cost", "recipes"),
    ("request", "spec", "demo_models"),
    ("observe", "errors", "window"),
)
DEPTH = {name: depth for depth, names in enumerate(LAYERS) for name in names}

WITHOUT_TORCH = ("request", "spec", "cost", "recipes", "stage", "plan", "errors", "arguments")
TORCH = ("torch*", "diffusers*", "transformers*", "safetensors.torch")

# What only some files may name. A star stands for the rest of a word.
OWNERS = {
    ("torch.distributed", "torch._C._distributed_c10d"): ("ltx_sp/parallel/",),
    ("os.environ", "os.environb", "os.getenv", "os.putenv", "os.unsetenv"): ("ltx_sp/parallel/mesh.py",),
    ("safetensors",): ("ltx_sp/weights/", "ltx_sp/write.py", "ltx_sp/demo.py"),
    ("av",): ("ltx_sp/read.py", "ltx_sp/write.py"),
    (
        "torch.cuda.graph",
        "torch.cuda.graphs",
        "torch.cuda.CUDAGraph",
        "torch.cuda.make_graphed_callables",
        "torch.cuda.graph_pool_handle",
    ): ("ltx_sp/graph.py",),
    ("diffusers*", "transformers*"): ("ltx_sp/model/upstream.py",),
}

# Files that a captured step runs through, and what would make the host wait for the device there.
CAPTURED = (
    "ltx_sp/model/attention.py",
    "ltx_sp/model/rope.py",
    "ltx_sp/model/blocks.py",
    "ltx_sp/model/dit.py",
    "ltx_sp/parallel/collectives.py",
    "ltx_sp/parallel/ulysses.py",
)
BLOCKING = frozenset({"item", "cpu", "tolist", "synchronize"})

MAX_LINES = 400
NAMES_THAT_SAY_NOTHING = frozenset({"utils", "helpers", "common", "base", "misc", "manager"})
# Written with bars, or this file would break its own rule.
MACHINE_PATHS = tuple(path.replace("|", "/") for path in ("|work|", "|tmp|", "..|shared"))
NOT_OURS = frozenset({".git", ".venv", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache", "dist"})


@dataclasses.dataclass(frozen=True)
class Use:
    """A dotted name that a module imports or reaches through what it imported.

    Args:
        imported: by an import statement or call, not by attribute access.
        at_once: importing the module is enough for it to happen.
    """

    name: str
    line: int
    imported: bool
    at_once: bool

    def within(self, patterns: Iterable[str]) -> bool:
        """Whether the name is one of ``patterns``, or lies inside one."""
        return any(self._within(pattern) for pattern in patterns)

    def _within(self, pattern: str) -> bool:
        if pattern.endswith("*"):
            return self.name.startswith(pattern[:-1])
        return f"{self.name}.".startswith(f"{pattern}.")


class _Uses(ast.NodeVisitor):
    def __init__(self, module: str) -> None:
        self.uses: list[Use] = []
        self.computes_imports = False
        self._module = module
        self._bound: dict[str, str] = {}  # local name -> what it stands for
        self._deferred = 0

    def _add(self, name: str, node: ast.AST, *, imported: bool) -> None:
        self.uses.append(Use(name, getattr(node, "lineno", 0), imported, not self._deferred))

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._add(alias.name, node, imported=True)
            self._bound[alias.asname or alias.name.partition(".")[0]] = (
                alias.name if alias.asname else alias.name.partition(".")[0]
            )

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        parent = self._module.split(".")[: -node.level] if node.level else []
        origin = ".".join([*parent, *([node.module] if node.module else [])])
        for alias in node.names:
            name = f"{origin}.{alias.name}"
            self._add(name, node, imported=True)
            self._bound[alias.asname or alias.name] = name

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if name := self._dotted(node):
            self._add(name, node, imported=False)
        else:
            self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        called = self._dotted(node.func) or (node.func.id if isinstance(node.func, ast.Name) else "")
        if called in ("importlib.import_module", "__import__") and node.args:
            if name := _leading_text(node.args[0]):
                self._add(name, node, imported=True)
            else:
                self.computes_imports = True
        self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self._deferred += 1
        self.generic_visit(node)
        self._deferred -= 1

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_If(self, node: ast.If) -> None:
        for_types_only = "TYPE_CHECKING" in ast.unparse(node.test)
        self._deferred += for_types_only
        self.generic_visit(node)
        self._deferred -= for_types_only

    def _dotted(self, node: ast.expr) -> str | None:
        if isinstance(node, ast.Name):
            return self._bound.get(node.id)
        if isinstance(node, ast.Attribute) and (origin := self._dotted(node.value)):
            return f"{origin}.{node.attr}"
        return None


def _leading_text(node: ast.expr) -> str:
    """The text that ``node`` certainly begins with."""
    if isinstance(node, ast.JoinedStr) and node.values:
        node = node.values[0]
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


@functools.cache
def _parse(source: str) -> ast.Module:
    return ast.parse(source)


@functools.cache
def _uses(source: str, module: str) -> tuple[Use, ...]:
    visitor = _Uses(module)
    visitor.visit(_parse(source))
    uses = visitor.uses
    if visitor.computes_imports:  # then any name in a string of the file may be what it imports
        uses += [
            Use(node.value, node.lineno, imported=True, at_once=False)
            for node in ast.walk(_parse(source))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
            if all(word.isidentifier() for word in node.value.split("."))
        ]
    return tuple(uses)


@dataclasses.dataclass(frozen=True)
class Module:
    """A file of ltx_sp: ``path`` from the root, ``name`` as imported, ``part`` of the layer table ("" for ltx_sp)."""

    path: str
    source: str

    @property
    def name(self) -> str:
        return self.path.removesuffix(".py").replace("/", ".")

    @property
    def part(self) -> str:
        part = self.name.split(".")[1]
        return "" if part == "__init__" else part

    @property
    def uses(self) -> tuple[Use, ...]:
        return _uses(self.source, self.name)


def modules(root: pathlib.Path) -> list[Module]:
    files = sorted((root / "ltx_sp").rglob("*.py"))
    return [Module(file.relative_to(root).as_posix(), file.read_text(encoding="utf-8")) for file in files]


def repository_files(root: pathlib.Path) -> Iterator[pathlib.Path]:
    """The files that git tracks or would; where there is no git, all but the known caches."""
    listed = None
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, capture_output=True, text=True, check=False)
    if listed and listed.returncode == 0:
        found = sorted(root / name for name in listed.stdout.split("\0") if name)
    else:
        found = sorted(root.rglob("*"))
    for file in found:
        if file.is_file() and NOT_OURS.isdisjoint(file.relative_to(root).parts):
            yield file


def layering(root: pathlib.Path) -> list[str]:
    """Imports point down; siblings never meet."""
    found = []
    for module in modules(root):
        if not module.part:
            continue  # ltx_sp/__init__.py only passes names on
        if module.part not in DEPTH:
            found.append(f"{module.path}: not in the layers; add it to LAYERS in tests/unit/test_structure.py")
            continue
        for use in module.uses:
            if not use.imported or use.name.partition(".")[0] != "ltx_sp":
                continue
            target = [*use.name.split("."), ""][1]
            where = f"{module.path}:{use.line}"
            if target not in DEPTH:
                found.append(f"{where}: imports {use.name}, which no layer has; import from the module that defines it")
            elif target != module.part and DEPTH[target] == DEPTH[module.part]:
                found.append(f"{where}: imports its sibling {target}")
            elif DEPTH[target] < DEPTH[module.part]:
                found.append(f"{where}: imports {target}, which is above it")
    return found


def torch_free(root: pathlib.Path) -> list[str]:
    """What is decided early is decided without torch: neither these modules import it nor what they stand on."""
    by_name = {module.name.removesuffix(".__init__"): module for module in modules(root)}
    by_name.pop("ltx_sp", None)  # runs whichever of its modules is imported; it is free to be lazy
    found = []
    for part in WITHOUT_TORCH:
        waiting, seen = [f"ltx_sp.{part}"], set[str]()
        while waiting:
            name = waiting.pop()
            if name in seen or name not in by_name:
                continue
            seen.add(name)
            module = by_name[name]
            for use in module.uses:
                if use.imported and (use.at_once or module.part == part):
                    words = use.name.split(".")
                    waiting += [".".join(words[:count]) for count in range(1, len(words) + 1)]
                    if use.within(TORCH):
                        found.append(f"{module.path}:{use.line}: imports {use.name}; {part} must do without")
    return found


def hazards(root: pathlib.Path) -> list[str]:
    """Every hazard has one owner."""
    found = []
    for module in modules(root):
        for names, owners in OWNERS.items():
            if not module.path.startswith(owners):
                allowed = " or ".join(owners)
                found += [
                    f"{module.path}:{use.line}: {use.name} belongs to {allowed}"
                    for use in module.uses
                    if use.within(names)
                ]
    return found


def file_sizes(root: pathlib.Path) -> list[str]:
    """A file is read in one sitting."""
    sizes = ((module.path, len(module.source.splitlines())) for module in modules(root))
    return [f"{path}: {lines} lines, at most {MAX_LINES}" for path, lines in sizes if lines > MAX_LINES]


def file_names(root: pathlib.Path) -> list[str]:
    """A name says what is inside."""
    paths = (file.relative_to(root) for file in repository_files(root))
    return [
        f"{path.as_posix()}: {word} says nothing about what is inside"
        for path in paths
        for word in (*path.parts[:-1], path.name.partition(".")[0])
        if word in NAMES_THAT_SAY_NOTHING
    ]


def captured_files(root: pathlib.Path) -> list[str]:
    """Nothing in a step makes the host wait for the device."""
    return [
        f"{module.path}:{node.lineno}: .{node.attr} makes the host wait for the device"
        for module in modules(root)
        if module.path in CAPTURED
        for node in ast.walk(_parse(module.source))
        if isinstance(node, ast.Attribute) and node.attr in BLOCKING
    ]


def docstrings(root: pathlib.Path) -> list[str]:
    """Every module says what it is for; an empty ``__init__.py`` has nothing to say."""
    return [
        f"{module.path}: no docstring"
        for module in modules(root)
        if _parse(module.source).body and not ast.get_docstring(_parse(module.source))
    ]


def machine_paths(root: pathlib.Path) -> list[str]:
    """No text names a path of the machine it was written on."""
    found = []
    for file in repository_files(root):
        with file.open("rb") as stream:
            content = stream.read(4096)
            if b"\0" in content:
                continue  # a tensor, an image, a clip
            content += stream.read()
        for number, line in enumerate(content.decode(errors="replace").splitlines(), 1):
            found += [f"{file.relative_to(root).as_posix()}:{number}: {path}" for path in MACHINE_PATHS if path in line]
    return found


RULES = (layering, torch_free, hazards, file_sizes, file_names, captured_files, docstrings, machine_paths)
Rule = Callable[[pathlib.Path], list[str]]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_repository_keeps(rule: Rule) -> None:
    assert rule(REPOSITORY) == []


def test_the_files_that_the_rules_name_exist() -> None:
    """A file that is renamed must not slip out of its rule."""
    named = [*CAPTURED, *(f"ltx_sp/{part}.py" for part in WITHOUT_TORCH)]
    assert [path for path in named if not (REPOSITORY / path).is_file()] == []


@pytest.fixture
def tree(tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of ltx_sp to plant in, without git."""
    shutil.copytree(REPOSITORY / "ltx_sp", tmp_path / "ltx_sp", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def _plant(root: pathlib.Path, path: str, text: str) -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    before = file.read_text() if file.exists() else '"""Planted."""\n'
    file.write_text(f"{before}\n{text}\n")


def _new(rule: Rule, root: pathlib.Path, path: str, text: str) -> list[str]:
    """The violations that planting ``text`` adds, without their line numbers."""
    before = rule(root)
    _plant(root, path, text)
    return [line for line in rule(root) if line not in before]


GET = "import importlib\nimportlib.import_module"

VIOLATIONS = [
    (layering, "ltx_sp/plan.py", "from ltx_sp.handoff import Latents", "imports handoff, which is above it"),
    (layering, "ltx_sp/plan.py", "from ltx_sp import runtime", "imports runtime, which is above it"),
    (layering, "ltx_sp/errors.py", "import ltx_sp.observe", "imports its sibling observe"),
    (layering, "ltx_sp/request.py", "def f():\n    from ltx_sp.spec import ModelSpec", "imports its sibling spec"),
    (layering, "ltx_sp/encode.py", "if TYPE_CHECKING:\n    from ltx_sp.decode import x", "imports its sibling decode"),
    (layering, "ltx_sp/model/dit.py", "from ltx_sp.parallel.mesh import Mesh", "imports parallel, which is above it"),
    (layering, "ltx_sp/model/dit.py", "from ..parallel import mesh", "imports parallel, which is above it"),
    (layering, "ltx_sp/graph.py", "import ltx_sp.weights.load as load", "imports its sibling weights"),
    (layering, "ltx_sp/plan.py", f"{GET}('ltx_sp.graph')", "imports graph, which is above it"),
    (layering, "ltx_sp/plan.py", "from ltx_sp import Request", "import from the module that defines it"),
    (layering, "ltx_sp/stages.py", "", "ltx_sp/stages.py: not in the layers; add it to LAYERS"),
    (layering, "ltx_sp/kernels/flash.py", "", "ltx_sp/kernels/flash.py: not in the layers; add it to LAYERS"),
    (torch_free, "ltx_sp/spec.py", "import torch", "imports torch; spec must do without"),
    (
        torch_free,
        "ltx_sp/request.py",
        "def f():\n    from torch import nn",
        "imports torch.nn; request must do without",
    ),
    (torch_free, "ltx_sp/errors.py", "import torch.distributed as d", "imports torch.distributed; errors must"),
    (torch_free, "ltx_sp/plan.py", "from safetensors.torch import load", "plan must do without"),
    (hazards, "ltx_sp/denoise.py", "import torch.distributed as dist", "torch.distributed belongs to ltx_sp/parallel/"),
    (hazards, "ltx_sp/denoise.py", "from torch import distributed", "torch.distributed belongs to ltx_sp/parallel/"),
    (hazards, "ltx_sp/denoise.py", "from torch.distributed import barrier", "torch.distributed.barrier belongs to"),
    (hazards, "ltx_sp/denoise.py", "import torch\ntorch.distributed.barrier()", "torch.distributed.barrier belongs to"),
    (
        hazards,
        "ltx_sp/denoise.py",
        "import torch as t\nt.distributed.barrier()",
        "torch.distributed.barrier belongs to",
    ),
    (hazards, "ltx_sp/denoise.py", f"{GET}('torch.distributed')", "torch.distributed belongs to ltx_sp/parallel/"),
    (hazards, "ltx_sp/observe.py", "import os\nos.environ['RANK']", "os.environ belongs to ltx_sp/parallel/mesh.py"),
    (hazards, "ltx_sp/parallel/tiles.py", "import os\nos.getenv('RANK')", "os.getenv belongs to"),
    (hazards, "ltx_sp/generate.py", "from os import environ as e", "os.environ belongs to ltx_sp/parallel/mesh.py"),
    (hazards, "ltx_sp/encode.py", "import safetensors.torch", "safetensors.torch belongs to ltx_sp/weights/"),
    (hazards, "ltx_sp/encode.py", "from safetensors import safe_open", "safetensors.safe_open belongs to"),
    (hazards, "ltx_sp/denoise.py", "import torch\ntorch.cuda.graph(x)", "torch.cuda.graph belongs to ltx_sp/graph.py"),
    (hazards, "ltx_sp/denoise.py", "from torch import cuda\ncuda.CUDAGraph()", "torch.cuda.CUDAGraph belongs to"),
    (hazards, "ltx_sp/denoise.py", "from torch.cuda import CUDAGraph", "torch.cuda.CUDAGraph belongs to"),
    (hazards, "ltx_sp/encode.py", "from av.video import frame", "av.video.frame belongs to ltx_sp/read.py"),
    (hazards, "ltx_sp/encode.py", "import transformers", "transformers belongs to ltx_sp/model/upstream.py"),
    (hazards, "ltx_sp/model/dit.py", "def f():\n    from diffusers import X", "diffusers.X belongs to"),
    (hazards, "ltx_sp/encode.py", f"{GET}('diffusers.models')", "diffusers.models belongs to"),
    (hazards, "ltx_sp/encode.py", f"{GET}(f'transformers.{{x}}')", "transformers. belongs to"),
    (hazards, "ltx_sp/encode.py", "from importlib import import_module as g\ng('diffusers')", "diffusers belongs to"),
    (hazards, "ltx_sp/encode.py", "__import__('transformers_extra')", "transformers_extra belongs to"),
    (hazards, "ltx_sp/encode.py", f"names = ['diffusers.models']\n{GET}(names[0])", "diffusers.models belongs to"),
    (file_sizes, "ltx_sp/weights/keymap.py", "x = 1\n" * MAX_LINES, "ltx_sp/weights/keymap.py: "),
    (file_names, "ltx_sp/utils.py", "", "ltx_sp/utils.py: utils says nothing"),
    (file_names, "tests/support/helpers.py", "", "tests/support/helpers.py: helpers says nothing"),
    (file_names, "profiling/common/clock.py", "", "profiling/common/clock.py: common says nothing"),
    (file_names, "docs/misc.md", "", "docs/misc.md: misc says nothing"),
    (captured_files, "ltx_sp/model/attention.py", "n = x.max().item()", ".item makes the host wait"),
    (captured_files, "ltx_sp/model/rope.py", "y = x.cpu()", ".cpu makes the host wait"),
    (captured_files, "ltx_sp/model/blocks.py", "y = x.tolist()", ".tolist makes the host wait"),
    (
        captured_files,
        "ltx_sp/model/dit.py",
        "import torch\ntorch.cuda.synchronize()",
        ".synchronize makes the host wait",
    ),
    (captured_files, "ltx_sp/parallel/collectives.py", "sizes = counts.tolist()", ".tolist makes the host wait"),
    (captured_files, "ltx_sp/parallel/ulysses.py", "read = x.item", ".item makes the host wait"),
    (machine_paths, "docs/running.md", f"cd {MACHINE_PATHS[0]}clone", f"docs/running.md:3: {MACHINE_PATHS[0]}"),
    (machine_paths, ".ci/run", f"cat {MACHINE_PATHS[1]}log", f".ci/run:3: {MACHINE_PATHS[1]}"),
    (machine_paths, "launch/env.sh", f"ls {MACHINE_PATHS[2]}", f"launch/env.sh:3: {MACHINE_PATHS[2]}"),
]


@pytest.mark.parametrize(("rule", "path", "text", "message"), VIOLATIONS)
def test_planted_violation_is_found(tree: pathlib.Path, rule: Rule, path: str, text: str, message: str) -> None:
    found = _new(rule, tree, path, text)
    assert [line for line in found if line.startswith(path) and message in line], found


LAWFUL = [
    (layering, "ltx_sp/weights/load.py", "from ltx_sp.model.dit import x\nfrom ltx_sp.weights.index import y"),
    (layering, "ltx_sp/parallel/ulysses.py", "from ltx_sp.parallel import mesh\nfrom . import collectives"),
    (layering, "ltx_sp/runtime.py", "from ltx_sp import decode, denoise\nimport ltx_sp.errors"),
    (layering, "ltx_sp/__init__.py", "from ltx_sp.runtime import Runtime"),
    (torch_free, "ltx_sp/plan.py", "text = 'import torch'\nif TYPE_CHECKING:\n    import numpy"),
    (hazards, "ltx_sp/parallel/ulysses.py", "import torch.distributed as dist"),
    (hazards, "ltx_sp/parallel/mesh.py", "import os\nos.environ['RANK']"),
    (hazards, "ltx_sp/weights/index.py", "import safetensors"),
    (hazards, "ltx_sp/graph.py", "import torch\ntorch.cuda.graph(x)"),
    (hazards, "ltx_sp/model/upstream.py", "import diffusers, transformers"),
    (hazards, "ltx_sp/generate.py", "import os\nos.path.join('python -m torch.distributed.run', 'os.environ')"),
    (hazards, "ltx_sp/denoise.py", "environ = {}\nenviron['a'] = distributed.graph"),
    (hazards, "ltx_sp/encode.py", f"names = ['flash_attn', 'The transformers.']\n{GET}(names[0])"),
    (captured_files, "ltx_sp/model/dit.py", "for k, v in x.items(): v.to(k)"),
    (captured_files, "ltx_sp/denoise.py", "x.item()"),
]


@pytest.mark.parametrize(("rule", "path", "text"), LAWFUL)
def test_lawful_code_passes(tree: pathlib.Path, rule: Rule, path: str, text: str) -> None:
    assert _new(rule, tree, path, text) == []


def test_torch_is_found_behind_another_module(tree: pathlib.Path) -> None:
    """A module that plan imports may import torch inside a function, which plan does not call, but not at its top."""
    _plant(tree, "ltx_sp/plan.py", "from ltx_sp.observe import log")
    assert _new(torch_free, tree, "ltx_sp/observe.py", "def f():\n    import torch") == []
    assert "plan must do without" in _new(torch_free, tree, "ltx_sp/observe.py", "import torch")[0]


def test_a_missing_docstring_is_found(tree: pathlib.Path) -> None:
    (tree / "ltx_sp/model/extra.py").write_text("# not a docstring\nx = 1\n")
    (tree / "ltx_sp/model/__init__.py").write_text("")
    assert "ltx_sp/model/extra.py: no docstring" in docstrings(tree)
    assert "ltx_sp/model/__init__.py: no docstring" not in docstrings(tree)


def test_files_that_git_ignores_are_nobodys_business(tmp_path: pathlib.Path) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / ".gitignore").write_text("scratch/\n")
    for path in ("scratch/misc.py", "tests/misc.py"):
        _plant(tmp_path, path, MACHINE_PATHS[0])
    assert file_names(tmp_path) == ["tests/misc.py: misc says nothing about what is inside"]
    assert [line.partition(":")[0] for line in machine_paths(tmp_path)] == ["tests/misc.py"]
