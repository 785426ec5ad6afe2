"""What the user sees when something goes wrong: one message, the right status, a traceback only under --debug."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest
import typer

from memdec.cli import guard, main
from memdec.cli.app import hoist_global_options, make_app
from memdec.errors import MemdecError


def run(error: BaseException | None, capsys, *, resumable: bool = False, debug: bool = False) -> tuple[int, str]:
    """Run a guarded command that raises ``error``; its status and standard error."""

    @guard.guarded(resumable=resumable)
    def command() -> None:
        if error is not None:
            raise error

    guard.SETTINGS.debug = debug
    try:
        command()
        status = 0
    except typer.Exit as exit_:
        status = exit_.exit_code
    finally:
        guard.SETTINGS.debug = False
    return status, capsys.readouterr().err


def test_an_interrupt_before_any_command_has_begun(monkeypatch, capsys):
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("memdec.cli.app.make_app", interrupted)
    with pytest.raises(SystemExit) as exit_:
        main(["info", "."])
    assert exit_.value.code == 130 and capsys.readouterr() == ("", "")


def test_nothing_wrong_nothing_said(capsys):
    assert run(None, capsys) == (0, "")


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (MemdecError("The corpus is empty."), 1, "The corpus is empty."),
        (OSError(errno.ENOSPC, "No space left on device", "run/x"), 1, "The disk is full: run/x"),
        (OSError(errno.EACCES, "Permission denied", "run/x"), 1, "Permission denied: run/x"),
        (OSError(errno.EROFS, "Read-only file system", "run/x"), 1, "read-only: run/x"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 1, "The disk is full."),
        (MemoryError(), 1, "Not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1, "Not enough memory"),
        (KeyboardInterrupt(), 130, "Interrupted."),
        (ZeroDivisionError("division by zero"), 1, "ZeroDivisionError: division by zero"),
        (RuntimeError("first line\nsecond line"), 1, "RuntimeError: first line"),
    ],
)
def test_each_mishap_has_its_message_and_status(error, status, said, capsys):
    found, text = run(error, capsys)
    assert found == status
    assert said in text
    assert "Traceback" not in text and "second line" not in text
    if status == 1 and not isinstance(error, MemdecError):
        assert len(text.strip().splitlines()) <= 2


def test_the_unknown_points_to_debug_which_shows_the_traceback(capsys):
    assert "--debug" in run(ValueError("odd"), capsys)[1]
    status, text = run(ValueError("odd"), capsys, debug=True)
    assert status == 1 and "Traceback" in text and "raise error" in text


def test_ctrl_c_says_whether_the_command_continues(capsys):
    assert "continues where it stopped" in run(KeyboardInterrupt(), capsys, resumable=True)[1]
    assert "continues" not in run(KeyboardInterrupt(), capsys)[1]


def test_global_options_may_stand_anywhere_before_a_double_dash():
    assert hoist_global_options(["info", "x", "--debug"]) == ["--debug", "info", "x"]
    assert hoist_global_options(["fit", "m", "--threads", "2", "s"]) == ["--threads", "2", "fit", "m", "s"]
    assert hoist_global_options(["--threads=3", "fit"]) == ["--threads=3", "fit"]
    assert hoist_global_options(["generate", "--", "--quiet"]) == ["generate", "--", "--quiet"]


def command_line(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "memdec", *arguments], capture_output=True, text=True, timeout=120, **options
    )


def test_help_needs_neither_torch_nor_transformers():
    code = (
        "import sys\n"
        "from memdec.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as e:\n    assert not e.code, e.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    for arguments in (["--help"], ["fit", "--help"], ["--version"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr


def test_every_command_teaches_by_example():
    from typer.main import get_command

    commands = get_command(make_app()).commands
    assert set(commands) == {
        "fit", "corpus", "datastore", "distributions", "train", "evaluate", "generate",
        "bench-decode", "info", "verify", "demo", "tasks", "transfer",
    }  # fmt: skip
    for name, command in commands.items():
        assert f"memdec {name}" in command.help, name
        assert command.short_help and len(command.short_help) < 62, name
        for parameter in command.params:
            assert getattr(parameter, "help", None) or parameter.name == "help", f"{name}: {parameter.name}"


def test_wrong_usage_is_status_2():
    done = command_line("fit")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    done = command_line("nonsense")
    assert done.returncode == 2 and "nonsense" in done.stderr


def test_a_missing_folder_from_the_shell(tmp_path):
    done = command_line("info", str(tmp_path / "nothing"))
    assert done.returncode == 1
    assert done.stderr.strip() == f"{tmp_path / 'nothing'} does not exist. Check the path."
    done = command_line("info", str(tmp_path / "nothing"), "--debug")
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_a_closed_pipe_is_no_error():
    """The reader is gone before the command writes: no message, the status of a process ended by SIGPIPE."""
    code = (
        "import typer\nfrom memdec.cli.guard import guarded\n"
        "@guarded()\ndef command():\n    print('x' * 100000)\n"
        "app = typer.Typer()\napp.command()(command)\napp()\n"
    )
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(write)
    assert done.returncode == 141 and done.stderr == ""


def test_a_terminal_without_our_characters_or_none_at_all(fitted, tmp_path):
    folder = tmp_path / "Gedächtnis"
    folder.symlink_to(fitted / "memory")
    told = {"PYTHONIOENCODING": "ascii", "COLUMNS": "400"}  # a narrow table would break the path in two
    done = command_line("info", str(folder), env={**os.environ, **told})
    assert done.returncode == 0 and done.stderr == "" and "Ged\\xe4chtnis" in done.stdout
    shell = f'exec "{sys.executable}" -m memdec info "{folder}" >&-'
    done = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
