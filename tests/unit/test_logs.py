"""Loggers that import logging late."""

from __future__ import annotations

import logging
import re
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


def test_the_commands_log_is_set_up_by_its_first_record() -> None:
    script = (
        "import sys; from functools import partial; from chv.logs import Logger, set_up_later\n"
        "from chv.run import start_logging\n"
        "set_up_later(partial(start_logging, 0, None)); log = Logger('chv.x'); log.info('a')\n"
        "print('logging' in sys.modules); log.warning('b'); log.info('c'); log.error('d')"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout == "False\n"
    lines = [re.sub(r"\d+ ms", "N ms", line) for line in ran.stderr.splitlines()]
    assert lines == [
        "chv: N ms: <MainThread> WARNING: chv.x: b",
        "chv: N ms: <MainThread> ERROR: chv.x: d",
    ]
