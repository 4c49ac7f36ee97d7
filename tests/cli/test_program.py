"""What surrounds a task: any text can be printed, and every end has its exit code."""

import io
import os
import signal

import pytest

from nat_jax.cli import program


@pytest.mark.parametrize(
    ("encoding", "printed"),
    [("ascii", "0.5 +- 0.1 - ? -> ?"), ("latin-1", "0.5 \xb1 0.1 - \xe9 -> ?"), ("utf-8", "")],
)
def test_output_takes_signs_that_its_encoding_lacks(encoding: str, printed: str) -> None:
    text = "0.5 ± 0.1 – é → \udcff"  # at last, what Python makes of a name that is not UTF-8
    strict = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
    with pytest.raises(UnicodeEncodeError):
        strict.write(text)
    file = io.BytesIO()
    stream = io.TextIOWrapper(file, encoding=encoding, write_through=True)
    program.take_any_text(stream)
    stream.write(text)
    assert file.getvalue().decode(encoding) == (printed or "0.5 ± 0.1 – é → ?")
    program.take_any_text(io.StringIO())  # has no encoding


@pytest.mark.parametrize(("arguments", "code"), [((), 130), ((signal.SIGTERM,), 143)])
def test_a_stop_unwinds_and_has_the_code_of_its_signal(monkeypatch, capsys, arguments, code):
    done = []
    monkeypatch.setattr(os, "_exit", done.append)

    def task() -> None:
        try:
            raise KeyboardInterrupt(*arguments)
        finally:
            done.append("released")

    program.guarded(task)()
    assert done == ["released", code]
    assert capsys.readouterr().err == "nat_jax: stopped; run the same command line again\n"
    with pytest.raises(KeyboardInterrupt):
        program._terminate(signal.SIGTERM, None)
