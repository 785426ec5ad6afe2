"""Progress: a bar for someone who watches, nothing for a log file."""

import io

import pytest

from memdec.pipeline.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_label_rate_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with progress(4000, unit="tokens", label="Embedding", done=1000) as advance:
        advance(1500)
        advance(1500)
    shown = screen.getvalue()
    assert "Embedding" in shown
    assert "100%" in shown
    assert "tokens/s" in shown


def test_elsewhere_it_is_silent(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    with progress(None, unit="documents", label="Reading") as advance:
        advance(3)
    assert capfd.readouterr() == ("", "")
