"""One thread: on a shared two-core machine a second one makes steps of a tiny model jump from 1 ms
to 100 ms. No network, ever."""

import os
import pathlib

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

import hypothesis
import pytest
import torch

torch.set_num_threads(1)
# the same examples on every run, and no verdict by the clock
hypothesis.settings.register_profile("nanobupo", derandomize=True, deadline=None)
hypothesis.settings.load_profile("nanobupo")
SHARED = pathlib.Path(__file__).resolve().parents[1].parent / "shared"


@pytest.fixture(scope="session")
def shared():
    """Folder of full-size development inputs (tokenizers/, data/), when the checkout has one beside
    it."""
    if not SHARED.is_dir():
        pytest.skip("no ../shared folder: full-size tokenizers and problem sets are not here")
    return SHARED


@pytest.fixture(autouse=True)
def no_figures(request, monkeypatch):
    """Drawing takes longer than most runs of the tests: those that want figures ask for `draws`."""
    if "draws" not in request.fixturenames and "test_decompose" not in request.node.nodeid:
        monkeypatch.setattr("plumbing.figures.draw", lambda folder: None)


@pytest.fixture
def draws():
    """Of a test that has figures drawn."""
