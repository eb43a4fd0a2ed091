"""What a reader, an installer and a packager rely on: versions, pins, imports, size of files, what git leaves out."""

import ast
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "seriatim"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
RUNTIME = [Requirement(r) for r in PROJECT["dependencies"]]
EXTRAS = [Requirement(r) for group in PROJECT["optional-dependencies"].values() for r in group]

needs_git = pytest.mark.skipif(
    shutil.which("git") is None or not (ROOT / ".git").exists(), reason="not a git checkout: an unpacked source archive"
)


def pins() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    requirements = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    return {canonicalize_name(r.name): r for r in requirements}


def python(code: str) -> str:
    """Standard output of a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def files() -> list[Path]:
    """Everything that is, or would be, committed."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, capture_output=True, text=True, cwd=ROOT, check=True).stdout.split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


# ---- versions --------------------------------------------------------------------------------------------------------


def test_one_version_and_reading_it_imports_no_torch():
    shown, torch = python("import sys, seriatim; print(seriatim.__version__, 'torch' in sys.modules)").split()
    assert shown == PROJECT["version"] == importlib.metadata.version("seriatim")
    assert torch == "False", "import seriatim loads torch, and so would every call of the command line"


def test_every_pin_is_exact():
    loose = [str(r) for r in pins().values() if not re.fullmatch(r"==[0-9][0-9a-z.]*", str(r.specifier))]
    assert not loose, f"constraints.txt holds tested versions, name==version: {loose}"


@pytest.mark.parametrize("requirement", [r for r in RUNTIME + EXTRAS if r.name != "seriatim"], ids=str)
def test_tested_version_is_within_its_range(requirement):
    pin = pins().get(canonicalize_name(requirement.name))
    assert pin is not None, f"{requirement.name} has no tested version in constraints.txt"
    (exact,) = pin.specifier
    assert requirement.specifier.contains(Version(exact.version)), f"{pin} is outside {requirement}"


def test_everything_that_is_installed_with_us_is_pinned():
    pinned, seen, queue = set(pins()), set(), [(r.name, r.extras) for r in RUNTIME + EXTRAS]
    while queue:
        name, extras = queue.pop()
        if (canonicalize_name(name), *sorted(extras)) in seen:
            continue
        seen.add((canonicalize_name(name), *sorted(extras)))
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # of an extra that is not installed here
        for requirement in map(Requirement, requires):
            environments = [{"extra": extra} for extra in (extras or {""})]
            if requirement.marker is None or any(requirement.marker.evaluate(e) for e in environments):
                queue.append((requirement.name, requirement.extras))
    # PyTorch's builds for NVIDIA name their libraries, and their versions, themselves.
    theirs = ("nvidia-", "cuda-", "triton")
    missing = {n for n, *_ in seen if n not in ("pip", "seriatim") and not n.startswith(theirs)} - pinned
    assert not missing, f"installed without a tested version in constraints.txt: {sorted(missing)}"


# ---- what is installed -----------------------------------------------------------------------------------------------


def test_package_is_typed():
    assert (SOURCE / "py.typed").is_file()


def test_command_line_is_installed_and_its_help_imports_no_torch():
    (script,) = [e for e in importlib.metadata.entry_points(group="console_scripts") if e.name == "seriatim"]
    assert script.value == PROJECT["scripts"]["seriatim"]
    module, function = script.value.split(":")
    shown = python(
        f"import sys; sys.argv = ['seriatim', '--help']; from {module} import {function}\n"
        f"try: {function}()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "print('torch' in sys.modules)"
    )
    assert "seriatim" in shown.lower()
    assert shown.split()[-1] == "False", "seriatim --help loads torch: import it in the command that needs it"


# ---- the source ------------------------------------------------------------------------------------------------------


def test_no_source_file_is_over_500_lines():
    lengths = {p.relative_to(ROOT): p.read_text(encoding="utf-8").count("\n") for p in SOURCE.rglob("*.py")}
    assert lengths, "no source found"
    long = {str(p): n for p, n in lengths.items() if n > 500}
    assert not long, f"files hold one thing, in 100 to 400 lines: {long}"


CORE = {"layout", "canvas", "view", "plan", "reach", "scan", "slots", "random"}
ABOVE_SYSTEMS = {"systems", "studies", "laws", "verbs", "serving", "cli", "__main__"}


def imports(path: Path) -> set[str]:
    """First names under `seriatim` that a file imports, inside functions too."""
    package = ("seriatim", *path.relative_to(SOURCE).parts[:-1])
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *filter(None, [node.module])])
            found += [f"{module}.{alias.name}" for alias in node.names]
    return {name.split(".")[1] for name in found if name.startswith("seriatim.")}


def test_dependencies_point_from_systems_to_parts_to_core():
    wrong = []
    for path in SOURCE.rglob("*.py"):
        part = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        used = imports(path) & {p.name.removesuffix(".py") for p in SOURCE.iterdir()}
        forbidden = set()
        if part in CORE:
            forbidden |= used - CORE
        if part not in ABOVE_SYSTEMS:
            forbidden |= used & {"systems", "studies"}
        if part == "decoding":
            forbidden |= used & {"tokenizers"}
        if part not in {"cli", "__main__"}:
            forbidden |= used & {"cli"}
        wrong += [f"{path.relative_to(SOURCE)} imports {name}" for name in sorted(forbidden)]
    assert not wrong, "systems -> parts -> core, and nothing imports the command line:\n" + "\n".join(wrong)


# ---- the repository --------------------------------------------------------------------------------------------------

SOMEBODYS_MACHINE = re.compile(r"(?:file://|(?<![\w./~$}-]))/(?:home|root|Users|opt|mnt|work)/[\w.]")


@needs_git
def test_no_text_names_a_path_on_somebodys_machine():
    found = []
    for path in files():
        content = path.read_bytes()
        if b"\0" in content[:8192]:
            continue
        for number, line in enumerate(content.decode("utf-8", "replace").splitlines(), 1):
            if SOMEBODYS_MACHINE.search(line) or str(ROOT) in line:
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}")
    assert not found, "write paths relative to the repository:\n" + "\n".join(found)


@needs_git
def test_git_leaves_out_what_runs_and_tools_write_and_nothing_else():
    written = [".venv/bin/python", "runs/a/model.safetensors", "site/index.html", "dist/seriatim.whl", ".mypy_cache/a"]
    written += ["src/seriatim/__pycache__/view.pyc", ".pytest_cache/a", ".ruff_cache/a", ".hypothesis/a", "a/b.tmp"]
    kept = ["src/seriatim/data/digits.py", "src/seriatim/training/runs.py", "results/a.json", "docs/decisions/a.md"]
    kept += ["tests/data/a.json", "zoo/a.safetensors", "constraints.txt", ".ci/run"]
    asked = subprocess.run(
        ["git", "check-ignore", "--no-index", *written, *kept], capture_output=True, text=True, cwd=ROOT
    )
    assert sorted(asked.stdout.split()) == sorted(written)


@needs_git
def test_continuous_integration_script_runs():
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111, ".ci/run is not executable"
