"""Every solution applies to a copy of the tree, and its check passes there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOLUTIONS = ROOT / "docs" / "solutions"
NAMES = sorted(path.stem for path in SOLUTIONS.glob("*.patch"))

# Runs the check of every folder it is given. What is not ours is imported once, and forked.
RUN = """
import os, runpy, sys, traceback
import pyarrow.parquet, safetensors.torch, tiktoken, torch
import torch.distributed.fsdp, torch.distributed.tensor

torch.set_num_threads(1)
folders, sys.argv = sys.argv[1:], sys.argv[:1]
for folder in folders:
    child = os.fork()
    if not child:
        os.chdir(folder)
        out = os.open("out.txt", os.O_CREAT | os.O_WRONLY)
        os.dup2(out, 1)
        os.dup2(out, 2)
        code = 0
        try:
            runpy.run_module("docs.solutions.check_" + os.path.basename(folder), None, "__main__")
        except SystemExit as e:
            code = e.code or 0
        except BaseException:
            code = 1
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(code)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status))
"""


def patched(name, folder):
    """A copy of the code in `folder`, with a solution applied."""
    folder.mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    shutil.copytree(ROOT / "plumbing", folder / "plumbing", ignore=lambda *_: {"__pycache__"})
    # whatever repository the folder may stand in is none of git's business
    env = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}
    apply = ["git", "apply", str(SOLUTIONS / f"{name}.patch")]
    return subprocess.run(apply, cwd=folder, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """{solution: (exit code of its check, what went wrong)}."""
    root, found, folders = tmp_path_factory.mktemp("solutions"), {}, []
    for name in NAMES:
        applied = patched(name, root / name)
        if applied.returncode:
            found[name] = applied.returncode, f"does not apply: {applied.stderr}"
        else:
            folders.append(root / name)
    run = [sys.executable, "-B", "-c", RUN, *map(str, folders)]
    ran = subprocess.run(run, stdout=subprocess.PIPE, text=True, check=True)
    for folder, code in zip(folders, ran.stdout.split(), strict=True):
        found[folder.name] = int(code), (folder / "out.txt").read_text()
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_solution_applies_and_its_check_passes(checked, name):
    code, said = checked[name]
    assert code == 0, said


def test_every_solution_is_described_and_listed():
    described = re.findall(r"^## `(\w+)`", (SOLUTIONS / "README.md").read_text(), re.M)
    assert sorted(described) == NAMES and len(NAMES) >= 10
    listed = re.findall(r"solutions/README\.md#(\w+)", (ROOT / "docs/exercises.md").read_text())
    assert sorted(listed) == NAMES
