"""The keyboard controller's reset line."""

from __future__ import annotations

import pytest

from chv.devices.i8042 import I8042


@pytest.fixture
def resets() -> list[int]:
    return []


@pytest.fixture
def device(resets: list[int]) -> I8042:
    return I8042(lambda: resets.append(1))


def test_command_0xfe_resets(device: I8042, resets: list[int]) -> None:
    device.write(3, 1, 0xFE)
    assert resets == [1]


def test_a_wider_write_reaches_the_command_port(device: I8042, resets: list[int]) -> None:
    device.write(2, 2, 0xFE00)
    device.write(0, 4, 0xFE000000)
    assert resets == [1, 1]


@pytest.mark.parametrize(
    ("offset", "size", "value"), [(3, 1, 0xF0), (0, 1, 0xFE), (2, 1, 0xFE), (2, 2, 0x00FE)]
)
def test_other_writes_do_nothing(
    device: I8042, resets: list[int], offset: int, size: int, value: int
) -> None:
    device.write(offset, size, value)
    assert resets == []


def test_status_says_that_nothing_waits(device: I8042) -> None:
    assert device.read(3, 1) == 0
    assert device.read(2, 2) == 0


def test_timer_2_has_always_run_out(device: I8042) -> None:
    assert device.read(0, 1) == 0x20


def test_there_is_no_state(device: I8042, resets: list[int]) -> None:
    device.load(device.save())
    device.reset()
    assert resets == []
