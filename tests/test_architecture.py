"""The directions of the house: who may import whom, and that importing does nothing."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("proxy", "memory")
RUN_S = 60

STORE_FILES = {
    "memory/backup.py",
    "memory/changes.py",
    "memory/database.py",
    "memory/erasure.py",
    "memory/integrity.py",
    "memory/listing.py",
    "memory/migrations.py",
    "memory/queries.py",
    "memory/rewrites.py",
    "memory/search.py",
    "memory/store.py",
    "memory/store_errors.py",
    "memory/writer.py",
}

LLAMA_FILES = {
    "proxy/engines/embedded/embedding.py",
    "proxy/engines/embedded/llama.py",
    "proxy/engines/embedded/loading.py",
    "proxy/engines/embedded/sampling.py",
}

ONE_DOOR = {
    "llama_cpp": LLAMA_FILES,
    "httpcore": {"proxy/engines/remote_http.py"},
    "httpx": {"proxy/hub_http.py", "proxy/inspecting/client.py"},
    "tiktoken": {"memory/tokens.py"},
    "sqlite3": STORE_FILES,
    "sqlite_utils": STORE_FILES,
    "datasette": {"proxy/inspecting/browse.py"},
    "rich": {
        f"proxy/inspecting/{name}.py"
        for name in ("asking", "command", "pictures", "rewrite_pictures", "terminal")
    },
}
"""Only these files may import the package."""

FORBIDDEN_IN_MEMORY = {
    "proxy",
    "starlette",
    "httpx",
    "httpcore",
    "llama_cpp",
    "uvicorn",
    "h11",
    "openai",
}


def files() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def name_of(path: Path) -> str:
    """As in an import statement: proxy.engines.base, or proxy.engines for its __init__."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in files()}


def imports(path: Path, *, lazy: bool = True) -> Iterator[str]:
    """The modules that a file imports, in full; without `lazy` those that it imports at once."""
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree) if lazy else _at_import(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from _from(path, node)


def _at_import(node: ast.AST) -> Iterator[ast.AST]:
    """All that runs when the module is imported: not what stands in a function, nor what only a
    type checker reads."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        yield child
        yield from _at_import(child)


def _from(path: Path, node: ast.ImportFrom) -> Iterator[str]:
    assert node.level == 0, f"{path.name}: imports are absolute"
    base = node.module or ""
    for alias in node.names:
        whole = f"{base}.{alias.name}"
        yield whole if whole in MODULES else base


def package_of(module: str) -> str:
    return module.partition(".")[0]


@pytest.mark.parametrize("module", sorted(m for m in MODULES if package_of(m) == "memory"))
def test_memory_knows_neither_http_nor_a_model_nor_the_proxy(module: str) -> None:
    known = {package_of(name) for name in imports(MODULES[module])}
    assert not known & FORBIDDEN_IN_MEMORY


@pytest.mark.parametrize("package", ONE_DOOR)
def test_each_dependency_has_one_door(package: str) -> None:
    users = {
        str(path.relative_to(ROOT))
        for path in files()
        if package in {package_of(name) for name in imports(path)}
    }
    assert users <= ONE_DOOR[package]


def test_no_module_imports_itself_by_a_detour() -> None:
    graph = {name: _own_imports(path) for name, path in MODULES.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for target in sorted(graph[name]):
                visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def _own_imports(path: Path) -> set[str]:
    return {name for name in imports(path, lazy=False) if name in MODULES}


IMPORT_ALL = """
import importlib, os, socket, subprocess, sys, threading

def forbidden(event, arguments):
    name = event.partition(".")[0]
    writes = event == "open" and (arguments[1] or "r") != "r" and set(arguments[1]) & set("wax+")
    made = event in ("os.mkdir", "os.remove", "os.rename", "subprocess.Popen", "sqlite3.connect")
    if writes or made or event in ("socket.connect", "socket.bind", "socket.getaddrinfo"):
        raise AssertionError(f"importing {module} did {event} {arguments}")

before = dict(os.environ)
# Not ours to judge: what these do when they are imported.
for module in {THIRD_PARTY}:
    importlib.import_module(module)
sys.addaudithook(forbidden)
for module in {MODULES}:
    importlib.import_module(module)
module = "all of them"
assert dict(os.environ) == before, "the environment was changed"
assert threading.active_count() == 1, threading.enumerate()
"""


def test_importing_every_module_does_nothing_visible(tmp_path: Path) -> None:
    """No file written, no socket, no process, no thread, nothing printed."""
    ours = sorted(name for name in MODULES if not name.endswith("__main__"))
    others = {package_of(name) for path in files() for name in imports(path)}
    third_party = sorted(others - set(PACKAGES) - set(sys.stdlib_module_names))
    program = IMPORT_ALL.replace("{THIRD_PARTY}", repr(third_party))
    done = subprocess.run(
        [sys.executable, "-B", "-c", program.replace("{MODULES}", repr(ours))],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=RUN_S,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())
