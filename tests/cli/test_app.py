"""What all commands have in common: the list, the version, errors, streams."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys
import warnings

import pytest

from loramix import __version__
from loramix.cli import app, terminal
from loramix.errors import ConfigurationError

ERROR = ConfigurationError("A rule holds.", received="something [else]", remedy="do it")


def test_the_version(loramix) -> None:
    done = loramix("--version")
    assert (done.code, done.out) == (0, f"loramix {__version__}\n")


def test_help_lists_every_command_and_each_has_examples(loramix) -> None:
    overview = loramix("--help").out
    for name in app.COMMANDS:
        assert re.search(rf"^│ {name} ", overview, re.MULTILINE)
        assert f"loramix {name} " in loramix(name, "--help").out


def test_an_error_in_a_pipe_is_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.show_error(ERROR)
    expected = "ConfigurationError: A rule holds.\n  received: something [else]\n  remedy: do it\n"
    assert tuple(capsys.readouterr()) == ("", expected)


def test_an_error_in_a_terminal_is_a_panel(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "30")
    terminal.show_error(ERROR)
    lines = capsys.readouterr().err.splitlines()
    assert "ConfigurationError" in lines[0]
    assert any("received: something [else]" in line for line in lines)


def test_an_error_of_the_library_is_exit_code_1(loramix, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        """Fail."""
        raise ERROR

    monkeypatch.setitem(app.COMMANDS, "fail", fail)
    done = loramix("fail")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("ConfigurationError: ")


def test_other_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        """Fail."""
        raise ZeroDivisionError

    monkeypatch.setitem(app.COMMANDS, "fail", fail)
    with pytest.raises(ZeroDivisionError):
        app.main(["fail"])


def test_stdout_is_kept_for_json(capsys: pytest.CaptureFixture[str]) -> None:
    with terminal.stdout_kept_for_json(True):
        print("progress")
    terminal.print_json({"é": 1})
    assert tuple(capsys.readouterr()) == ('{\n  "é": 1\n}\n', "progress\n")


def test_without_json_stdout_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with terminal.stdout_kept_for_json(False):
        print("text")
    assert tuple(capsys.readouterr()) == ("text\n", "")


def written_to_a_terminal(**variables: str) -> bytes:
    """What an error looks like on a real terminal."""
    code = (
        "from loramix.cli.terminal import show_error; from loramix.errors import ConfigurationError\n"
        "show_error(ConfigurationError('rule', received='received', remedy='remedy'))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    leader, follower = pty.openpty()
    subprocess.run(
        [sys.executable, "-c", code],
        stderr=follower,
        env=environment | {"TERM": "xterm-256color"} | variables,
        check=True,
    )
    os.close(follower)
    written = os.read(leader, 65536)
    os.close(leader)
    return written


def test_terminals_get_colour_unless_no_color_is_set() -> None:
    assert b"\x1b[31m" in written_to_a_terminal()
    assert b"\x1b[31m" not in written_to_a_terminal(NO_COLOR="1")


def run(*words: str, stdout: int = subprocess.PIPE, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """The command line in a process of its own."""
    code = "from loramix.cli import main; main()"
    command = [sys.executable, "-c", code, *words]
    return subprocess.run(
        command, stdout=stdout, stderr=subprocess.PIPE, env=os.environ | environment, check=False, timeout=60
    )


def test_a_reader_that_has_gone_ends_it_quietly() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = run("--help", stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a device that Linux has")  # noqa: PTH110
def test_a_full_disk_under_stdout_is_one_line() -> None:
    with open("/dev/full", "wb") as full:  # noqa: PTH123
        done = run("--help", stdout=full.fileno())
    assert done.returncode == 1
    assert done.stderr.startswith(b"error: [Errno 28]")
    assert done.stderr.count(b"\n") == 1


def test_a_warning_is_one_line_and_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    with terminal.warnings_as_lines():
        for _ in range(2):
            warnings.warn("mind [this]", stacklevel=1)
    assert tuple(capsys.readouterr()) == ("", "warning: mind [this]\n")


def test_what_the_encoding_of_stdout_lacks_is_replaced_and_not_an_error() -> None:
    done = run("--help", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"loramix" in done.stdout


@pytest.mark.parametrize(("encoding", "written"), [("utf-8", "é"), ("ascii", "\\u00e9")])
def test_json_is_readable_in_every_encoding(encoding: str, written: str, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr("sys.stdout", out)
    terminal.print_json({"text": "é"})
    out.seek(0)
    text = out.read()
    assert written in text
    assert json.loads(text) == {"text": "é"}


@pytest.mark.parametrize("content", [b"caf\xe9", b"\xff\xfe"])
@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_a_text_of_broken_bytes_is_told(content: bytes, errors: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8", errors=errors))
    with pytest.raises(ConfigurationError, match="valid in its encoding") as caught:
        terminal.read_text("-")
    assert "stdin" in caught.value.received


def test_a_text_is_itself_or_what_stdin_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("é\n"))
    assert (terminal.read_text("x"), terminal.read_text("-")) == ("x", "é\n")
