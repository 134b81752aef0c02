"""A thread of a rank that meets an error of the file system leaves no traceback."""

import threading

import pytest

from dmt_convert.cluster import rank_process


@pytest.mark.parametrize(("error", "shown"), [(OSError(28, "full"), False), (ValueError(), True)])
def test_errors_of_threads(
    error: Exception, shown: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(threading, "excepthook", rank_process._hide_os_errors)
    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    assert ("Traceback" in capsys.readouterr().err) == shown


def test_a_file_named_in_bytes_is_shown_as_text() -> None:
    error = rank_process._file_error(OSError(28, "No space left on device", b"/x/events"))
    assert error.found == "/x/events: No space left on device"
