"""What leaves the repository: the wheel holds and imports everything; what Ray uploads holds no secret."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("armd", "pipelines", "jobs")

IMPORT_ALL = """
import importlib, sys
site, *names = sys.argv[1:]
for name in names:
    module = importlib.import_module(name)
    assert module.__file__.startswith(site), f"{name} came from {module.__file__}"
print(len(names))
"""

IMPORT_LIBRARY = """
import sys
sys.modules["ray"] = sys.modules["deepspeed"] = None
import armd
for name in ("Tokenizer", "SamplingParams", "Engine", "load", "save", "score", "generate"):
    getattr(armd, name)
"""


def copy_sources(to: Path) -> Path:
    """The files the wheel is built from, apart from whatever an earlier build or run left beside them."""
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, to / package, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, to)
    return to


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def wheel(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(sources)]
    subprocess.run(command, check=True, capture_output=True, timeout=180)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel installed and nothing else."""
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*command, str(wheel)], check=True, capture_output=True, timeout=180)
    return target


def run_python(code: str, *arguments: str, path: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Python with `path` before everything else, in a folder from which the repository cannot be seen."""
    environment = {**os.environ, "PYTHONPATH": str(path), "RAY_AUTH_MODE": "disabled", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_the_wheel_holds_every_file(sources: Path, wheel: Path) -> None:
    present = set(zipfile.ZipFile(wheel).namelist())
    files = [path for package in PACKAGES for path in (sources / package).rglob("*") if path.is_file()]
    wanted = {str(path.relative_to(sources)) for path in files}
    assert wanted - present == set()
    outside = {name for name in present if name.split("/")[0] not in PACKAGES and ".dist-info/" not in name}
    assert outside == set()
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in present)


@pytest.mark.slow
def test_every_module_imports_from_the_wheel(wheel: Path, site: Path, tmp_path: Path) -> None:
    files = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")]
    names = sorted(name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in files)
    assert {"armd", "jobs.cli", "pipelines.report"} <= set(names)
    names.remove("jobs.__main__")  # importing it runs the command line
    done = run_python(IMPORT_ALL, str(site), *names, path=site, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(len(names))], "a module printed something while it was imported"


@pytest.mark.slow
def test_the_library_needs_neither_ray_nor_deepspeed(site: Path, tmp_path: Path) -> None:
    done = run_python(IMPORT_LIBRARY, path=site, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("command", [["bin/armd"], ["-m", "jobs"]], ids=["armd", "python -m jobs"])
def test_the_command_starts_from_the_wheel(site: Path, tmp_path: Path, command: list[str]) -> None:
    if command[0].startswith("bin/"):
        command = [str(site / command[0])]
    environment = {**os.environ, "PYTHONPATH": str(site)}
    arguments = [sys.executable, *command, "--help"]
    done = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "armd run demo" in done.stdout


def test_the_readme_names_every_module() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = text.split("## What is where")[1].split("```")[1]
    modules = {path.name for package in PACKAGES for path in (ROOT / package).glob("*.py")}
    folders = {f"{path.parent.name}/" for package in PACKAGES for path in (ROOT / package).glob("*/__init__.py")}
    assert folders - set(re.findall(r"[a-z_]+/", tree)) == set(), "folders that the README's tree lacks"
    named = set(re.findall(r"[a-z_]+\.py", tree)) - {"oracle.py"}
    assert modules - named == {"__init__.py", "__main__.py"}, "modules that the README's tree lacks"
    assert named - modules == set(), "modules that only the README has"


@pytest.mark.parametrize("with_gitignore", [True, False])
def test_what_ray_uploads_holds_no_secret_and_no_environment(tmp_path: Path, with_gitignore: bool) -> None:
    from ray._private.runtime_env.packaging import create_package

    project = tmp_path / "project"
    project.mkdir()
    copy_sources(project)
    for name in (".rayignore", ".gitignore"):
        shutil.copy(ROOT / name, project)
    secrets = [".env", ".env.local", "cluster/key.pem", "auth_token", "secrets/api.token", ".netrc", "id_ed25519"]
    ballast = [
        ".venv/lib/huge.so",
        "runs/demo/model.safetensors",
        "data/openwebtext/0.jsonl",
        ".git/config",
        "pipelines/__pycache__/x.pyc",
    ]
    for name in [*secrets, *ballast]:
        path = project / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("PLANTED")

    package = tmp_path / "package.zip"
    create_package(str(project), package, include_gitignore=with_gitignore)

    archive = zipfile.ZipFile(package)
    planted = [name for name in archive.namelist() if not name.endswith("/") and b"PLANTED" in archive.read(name)]
    assert planted == []
    modules = {f"{package}/{path.name}" for package in PACKAGES for path in (ROOT / package).glob("*.py")}
    assert modules - set(archive.namelist()) == set(), "the job would miss its own code"
