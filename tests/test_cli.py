"""What all commands share: ranges of arguments, errors to one line, output that nobody reads, texts
on a terminal."""

import argparse
import errno
import io
import os
import sys

import pytest
from safetensors import SafetensorError

from plumbing import cli, hub, shapes
from plumbing.cli import guarded
from tools import bench

HUGE = str(10**30), "9" * 5000, str(2**64)
NO_NUMBERS = "", " ", "x", "nan", "-nan", "inf", "-inf", "1e308", "1e-300", "1e999", "-1", "-0.5"


@pytest.mark.parametrize(
    "kind, good, bad",
    [
        (
            cli.whole,
            {"0": 0, "7": 7, "007": 7},
            ("-1", "1.5", "1e3", "", "x", "²", "١", "1_000", "+1", " 1", *HUGE),
        ),
        (cli.natural, {"1": 1, str(10**9): 10**9}, ("0", "-1", str(10**9 + 1), *HUGE)),
        (cli.seed, {"0": 0, str(2**63 - 1): 2**63 - 1}, ("-1", str(2**63), *HUGE)),
        (cli.positive, {"1e-6": 1e-6, "3": 3.0, "1e30": 1e30}, ("0", *NO_NUMBERS)),
        (cli.amount, {"0": 0.0, "0.28": 0.28, "-0": 0.0}, NO_NUMBERS),
        (cli.share, {"0": 0.0, "1": 1.0, ".5": 0.5}, ("1.01", *NO_NUMBERS)),
        (cli.given, {"a b": "a b"}, ("", " ", "\t\n")),
    ],
)
def test_types_of_arguments_know_their_range(kind, good, bad):
    for text, value in good.items():
        assert kind(text) == value
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError) as e:
            kind(text)
        assert len(str(e.value)) < 120 and "\n" not in str(e.value)


def test_a_wrong_argument_is_one_line(capsys):
    p = cli.Parser(prog="x.py")
    p.add_argument("--share", type=cli.share)
    with pytest.raises(SystemExit) as e:
        p.parse_args(["--share", "2"])
    assert e.value.code == 2
    assert (
        capsys.readouterr().err
        == "x.py: argument --share: '2' is not a number from 0 to 1; x.py --help lists the flags\n"
    )


@pytest.mark.parametrize(
    "text, shown",
    [
        ("a é 日本 \\frac{1}{2} 😀", None),
        ("two\nlines\tand a tab", None),
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("a\rb\x08c\x00\x7f", r"a\rb\x08c\x00\x7f"),
        ("\x9b31m", r"\x9b31m"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("\u2066x\u2069 \u200b \ufeff", r"\u2066x\u2069 \u200b \ufeff"),
        ("\ud800 \U000e0041", r"\ud800 \U000e0041"),
        ("\u2028", r"\u2028"),
    ],
)
def test_what_a_terminal_would_obey_is_shown(text, shown):
    assert cli.printable(text) == (text if shown is None else shown)


FULL = OSError(errno.ENOSPC, "No space left on device", "/some/file")
THEIRS = SafetensorError(
    "Error while serializing: I/O error: No space left on device (os error 28)"
)


@pytest.mark.parametrize(
    "error, code, says",
    [
        (FULL, 8, "No space left"),
        (THEIRS, 8, "os error 28"),
        (SafetensorError("HeaderTooSmall"), 2, "HeaderTooSmall"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 8, "quota"),
        (OSError(errno.EFBIG, "File too large"), 8, "too large"),
        (PermissionError(errno.EACCES, "no"), 2, "no"),
        (ValueError("\x1b[2J\u202e of\nlayer"), 2, r"\x1b[2J\u202e of layer"),
    ],
)
def test_errors_end_in_one_line_and_an_exit_code(capsys, error, code, says):
    def main(argv):
        raise error

    with pytest.raises(SystemExit) as e:
        guarded(main)
    said = capsys.readouterr().err
    assert e.value.code == code and says in said and len(said.splitlines()) == 1


class Gone(io.StringIO):
    """A stream whose every write fails."""

    def write(self, text):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


def test_output_that_nobody_takes_is_no_error(monkeypatch):
    closed = io.StringIO()
    closed.close()
    for lost in (Gone(), closed, None):
        done = []
        monkeypatch.setattr(sys, "stdout", lost)
        monkeypatch.setattr(sys, "stderr", lost)

        def main(argv, done=done):
            for _ in range(3):
                print("x", flush=True)
                print("x", file=sys.stderr)
            assert not sys.stderr.isatty()
            done.append(1)

        guarded(main)
        assert done == [1] and sys.stdout is lost and sys.stderr is lost


def test_letters_that_a_terminal_lacks_are_shown_as_escapes(monkeypatch):
    taken = io.BytesIO()
    monkeypatch.setattr(
        sys, "stdout", io.TextIOWrapper(taken, encoding="ascii", write_through=True)
    )
    guarded(lambda argv: print("1 é 日 2"))
    assert taken.getvalue() == rb"1 \xe9 \u65e5 2" + b"\n"


def test_a_file_never_takes_the_place_of_a_closed_stream(tmp_path):
    """With stderr closed the next file would get its number, and what libraries print would stand
    in it."""
    pid = os.fork()
    if pid == 0:
        os.close(2)
        sys.stderr = None

        def main(argv):
            with open(tmp_path / "log", "w") as f:
                os._exit(f.fileno())

        guarded(main)
        os._exit(99)
    assert 2 < os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) < 99


@pytest.mark.parametrize("name", ["meta", "gpu9", "", "cuda:99999999999999999999"])
def test_a_device_that_cannot_compute_is_refused(name):
    with pytest.raises(ValueError, match="not usable here"):
        cli.pick_device(name)


def test_bench_overwrites_no_model(tmp_path, monkeypatch, capsys):
    from model import Config

    monkeypatch.setattr(
        shapes, "SHAPES", {"toy": Config("qwen3", 300, 32, 2, 4, 2, 8, 48, tied=True)}
    )
    (tmp_path / "there").mkdir()
    (tmp_path / "there/weights").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("there", "file"):
        with pytest.raises(SystemExit) as e:
            guarded(bench.main, ["init", "--like", "toy", "--out", str(tmp_path / name)])
        assert e.value.code == 2 and f"{name} is there already" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "there").iterdir()] == ["weights"]
    (tmp_path / "empty").mkdir()
    guarded(bench.main, ["init", "--like", "toy", "--out", str(tmp_path / "empty")])
    assert (tmp_path / "empty/model.safetensors").exists()


def test_bench_leaves_no_half_model_on_a_full_disk(tmp_path, monkeypatch, capsys):
    from model import Config

    def save_file(tensors, path, metadata=None):
        path.write_bytes(b"half")
        raise THEIRS

    monkeypatch.setattr(
        shapes, "SHAPES", {"toy": Config("qwen3", 300, 32, 2, 4, 2, 8, 48, tied=True)}
    )
    monkeypatch.setattr(hub, "save_file", save_file)
    with pytest.raises(SystemExit) as e:
        guarded(bench.main, ["init", "--like", "toy", "--out", str(tmp_path / "m")])
    said = capsys.readouterr().err
    assert e.value.code == 8 and len(said.splitlines()) == 1 and not (tmp_path / "m").exists()


def test_bench_knows_how_many_layers_there_are(capsys):
    with pytest.raises(SystemExit) as e:
        guarded(bench.main, "bupo --layer 29 --width 16 --tokens 256 --device cpu".split())
    said = capsys.readouterr().err
    assert e.value.code == 2 and "--layer 29" in said and len(said.splitlines()) == 1
