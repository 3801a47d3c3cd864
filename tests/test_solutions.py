"""Every solution applies to a copy of the code, and its check passes there.

Run as a script, this file is the process in which the checks run: `test_solutions.py FOLDER...`.
"""

import multiprocessing
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOLUTIONS = ROOT / "docs" / "solutions"
NAMES = sorted(path.stem for path in SOLUTIONS.glob("*.patch"))


def patched(name, folder):
    """A copy of the code in `folder`, with a solution applied."""
    folder.mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    shutil.copytree(ROOT / "plumbing", folder / "plumbing")
    # git looks for a repository above the folder, and inside one it would skip the patch silently
    env = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}
    apply = ["git", "apply", str(SOLUTIONS / f"{name}.patch")]
    return subprocess.run(apply, cwd=folder, env=env, capture_output=True, text=True)


def check(folder):
    """Run the check of a patched copy as `python -m` in it would; what it says goes to said.txt."""
    os.chdir(folder)
    with open("said.txt", "w") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    sys.path[0] = ""  # in place of tests/: our modules are those of the copy
    del sys.argv[1:]
    name = os.path.basename(folder)
    runpy.run_module(f"docs.solutions.check_{name}", run_name="__main__")


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """{solution: (its patched copy, what git said if it does not apply)}."""
    root, made = tmp_path_factory.mktemp("solutions"), {}
    for name in NAMES:
        applied = patched(name, root / name)
        made[name] = root / name, applied.stderr if applied.returncode else ""
    return made


@pytest.fixture(scope="module")
def codes(copies):
    """{solution: exit code of its check}, of those that apply."""
    folders = {name: str(folder) for name, (folder, refused) in copies.items() if not refused}
    run = [sys.executable, "-B", __file__, *folders.values()]
    ran = subprocess.run(run, stdout=subprocess.PIPE, text=True, check=True)
    return dict(zip(folders, ran.stdout.split(), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_solution_applies_and_its_check_passes(copies, codes, name):
    folder, refused = copies[name]
    assert not refused, refused
    assert codes[name] == "0", (folder / "said.txt").read_text()


def test_the_patched_code_is_clean(copies):
    """Format and lint, as `make test` wants them of the code without a patch."""
    folders = [folder for folder, _ in copies.values()]
    for command in (["format", "--check"], ["check"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--no-cache"]
        run = [*ruff, "--config", ROOT / "pyproject.toml", *folders]
        ran = subprocess.run(run, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stdout + ran.stderr


def test_every_solution_is_described_and_listed():
    described = re.findall(r"^## `(\w+)`", (SOLUTIONS / "README.md").read_text(), re.M)
    assert sorted(described) == NAMES and len(NAMES) >= 20
    listed = re.findall(r"solutions/README\.md#(\w+)", (ROOT / "docs/exercises.md").read_text())
    assert sorted(listed) == NAMES


if __name__ == "__main__":
    # Twenty interpreters would spend a minute on these imports alone, so they are made once and
    # every check runs in a fork. Nothing of ours is imported here: each copy has its own.
    import pyarrow.parquet  # noqa: F401
    import safetensors.torch  # noqa: F401
    import tiktoken  # noqa: F401
    import torch._dynamo  # of every optimizer
    import torch.distributed.fsdp
    import torch.distributed.tensor  # noqa: F401

    torch.set_num_threads(1)
    for folder in sys.argv[1:]:
        process = multiprocessing.get_context("fork").Process(target=check, args=(folder,))
        process.start()
        process.join()
        print(process.exitcode, flush=True)  # or the next fork would have it in its buffer too
