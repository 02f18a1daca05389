"""Loggers that import logging late."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from chv.logs import Logger

LOG = Logger("chv.example")


def test_records_are_those_of_logging(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "chv.example"):
        LOG.debug("one %s", 1)
        LOG.info("two")
        LOG.warning("three %d %d", 3, 3)
        LOG.error("four")
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("DEBUG", "one 1"),
        ("INFO", "two"),
        ("WARNING", "three 3 3"),
        ("ERROR", "four"),
    ]
    assert {(r.name, r.funcName) for r in caplog.records} == {
        ("chv.example", "test_records_are_those_of_logging")
    }


def test_exceptions_are_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "chv.example"):
        try:
            raise ValueError("what happened")
        except ValueError as error:
            LOG.exception("it failed")
            LOG.debug("details", exc_info=error)
    assert [r.exc_info and str(r.exc_info[1]) for r in caplog.records] == ["what happened"] * 2


def test_nothing_is_imported_until_there_is_a_warning() -> None:
    script = (
        "import sys; from chv.logs import Logger; log = Logger('x'); log.debug('a'); log.info('b');"
        "print('logging' in sys.modules); log.warning('c')"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (ran.stdout, ran.stderr) == ("False\n", "c\n")
