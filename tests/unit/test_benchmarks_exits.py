"""The exit benchmarks without /dev/kvm: the guests' images, what they write, and what becomes of it."""

from __future__ import annotations

import io
import os
import struct
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile

from benchmarks import build, exit_contestants, exits, guests
from benchmarks.exit_contestants import Absent, Contestant, Exits
from benchmarks.guests import Guest
from benchmarks.results import Report


def written(cases: dict[str, list[int]]) -> bytes:
    """What a guest with these samples writes to COM1."""
    numbers = {case.name: number for number, case in enumerate(guests.CASES)}
    blocks = (
        b"CHVX" + struct.pack(f"<II{len(ticks)}I", numbers[name], len(ticks), *ticks)
        for name, ticks in cases.items()
    )
    return b"".join(blocks) + b"CHVE"


class Imitation(Contestant):
    """Every exit takes it ``factor`` times 1000 ticks, and ten times that the first ones."""

    def __init__(self, name: str, factor: int, lacking: str = "", fails: bool = False) -> None:
        self.name = name
        self.factor = factor
        self.lacking = lacking
        self.fails = fails
        self.turns = 0
        self.processors: list[list[int]] = []

    def lacks(self, case: guests.Case) -> str | None:
        return "it has none" if case.name == self.lacking else None

    def run(self, guest: Guest) -> tuple[bytes, Exits | None]:
        self.turns += 1
        self.processors.append(sorted(os.sched_getaffinity(0)))
        if self.fails:
            raise Absent("it fell over")
        cold = [10_000 * self.factor] * exits.WARM_UP
        warm = [1000 * self.factor] * (guest.iterations - exits.WARM_UP)
        return written({case.name: cold + warm for case in guests.cases_of(guest.group)}), None


def floor() -> Imitation:
    return Imitation("floor", 10)


def contestants_of(report: Report, case: str) -> dict[str, dict[str, object]]:
    found = {c["name"]: c["contestants"] for c in report.as_json()["cases"]}
    contestants: dict[str, dict[str, object]] = found[case]
    return contestants


def test_the_issues_cases_are_there() -> None:
    wanted = {
        "outl_to_user", "inl_from_user", "outb_to_user", "outw_to_user", "mmio_write", "mmio_read",
        "ioeventfd_pio", "ioeventfd_mmio", "cpuid", "inl_from_kernel", "wrmsr", "hlt_irqfd_wake", "ipi",
    }  # fmt: skip
    assert wanted <= set(guests.BY_NAME)


@pytest.mark.parametrize("group", guests.GROUPS)
def test_the_images_have_the_same_program(group: str) -> None:
    code = guests.program(guests.cases_of(group), 100)
    rom, elf = guests.rom(code), guests.elf(code)
    assert len(rom) == 0x10000
    assert rom[: len(code)] == code
    segments = list(ELFFile(io.BytesIO(elf)).iter_segments())
    assert [(s["p_type"], s["p_paddr"]) for s in segments] == [("PT_LOAD", guests.ENTRY), ("PT_NOTE", 0)]
    assert segments[0].data() == code
    assert segments[1].data() == struct.pack("<III4sI", 4, 4, 18, b"Xen\0", guests.ENTRY)


def test_the_reset_vector_jumps_to_the_first_instruction() -> None:
    rom = guests.rom(b"\xf4")
    (distance,) = struct.unpack_from("<h", rom, 0xFFF1)
    assert rom[0xFFF0] == 0xE9
    assert rom[0xFFF3 + distance & 0xFFFF] == 0xFA  # cli


def test_a_program_has_one_group() -> None:
    with pytest.raises(ValueError, match="of groups ipi, single"):
        guests.program([guests.BY_NAME["cpuid"], guests.BY_NAME["ipi"]], 10)


def test_too_many_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        guests.program(guests.cases_of("single"), 10_000_000)


def test_samples_are_read_behind_what_others_wrote() -> None:
    output = b"Booting from ROM...\r\n" + written({"cpuid": [1, 2, 0xFFFFFFFF], "stamp": []}) + b"\n"
    assert guests.samples(output) == {"cpuid": [1, 2, 0xFFFFFFFF], "stamp": []}


@pytest.mark.parametrize("missing", [1, 4, 5, 9, 15])
def test_samples_that_end_early_are_refused(missing: int) -> None:
    output = written({"cpuid": [1, 2, 3]})
    assert guests.is_complete(output)
    with pytest.raises(ValueError, match=r"end after \d+ bytes"):
        guests.samples(output[:-missing])


def test_a_round_gives_ratios_and_differences() -> None:
    report = exits.measure(floor(), [Imitation("chv_c", 11), Imitation("qemu", 22)], {}, rounds=3)
    found = contestants_of(report, "outl_to_user")
    assert found["floor"]["n"] == 2 * 3 * (exits.ITERATIONS - exits.WARM_UP)
    assert found["floor"]["p50_ns"] == found["floor"]["max_ns"]
    assert found["chv_c"]["ratio_to_floor"] == pytest.approx(1.1)
    assert found["chv_c"]["ratio_spread"] == pytest.approx(0)
    assert found["chv_c"]["ratio_to_qemu"] == pytest.approx(0.5)
    assert found["qemu"]["over_floor_ns"] == pytest.approx(1.2 * found["floor"]["p50_ns"])  # type: ignore[operator]


def test_each_case_says_whether_it_leaves_the_kernel() -> None:
    report = exits.measure(floor(), [Imitation("qemu", 10)], {}, rounds=1)
    user = {case["name"]: case["userspace_exit"] for case in report.as_json()["cases"]}
    assert user["outl_to_user"] is True
    assert user["cpuid"] is False
    assert set(user) == set(guests.BY_NAME)


def test_what_a_contestant_lacks_is_absent_with_the_reason() -> None:
    absent = {"kvmtool": "lkvm is not a program"}
    report = exits.measure(floor(), [Imitation("qemu", 20, lacking="ipi")], absent, rounds=2)
    assert contestants_of(report, "ipi")["qemu"] == {"absent": "it has none"}
    assert contestants_of(report, "cpuid")["kvmtool"] == {"absent": "lkvm is not a program"}
    assert "p50_ns" in contestants_of(report, "cpuid")["qemu"]


def test_a_contestant_that_fails_is_not_tried_again(capsys: pytest.CaptureFixture[str]) -> None:
    broken = Imitation("qemu", 20, fails=True)
    report = exits.measure(floor(), [broken], {}, rounds=3)
    assert broken.turns == len(guests.GROUPS)
    assert contestants_of(report, "outl_to_user")["qemu"] == {"absent": "it fell over"}
    assert "left out from here: it fell over" in capsys.readouterr().err


def test_contestants_take_turns_at_being_first(tmp_path: Path) -> None:
    order: list[str] = []

    class Noting(Imitation):
        def run(self, guest: Guest) -> tuple[bytes, Exits | None]:
            order.append(self.name)
            return super().run(guest)

    exits.measure(Noting("floor", 1), [Noting("chv_c", 1), Noting("qemu", 1)], {}, rounds=2)
    assert order == ["chv_c", "floor", "qemu", "floor"] * 3 + ["floor", "qemu", "floor", "chv_c"] * 3


def test_a_machine_that_slows_down_does_not_change_ratios() -> None:
    case = exits.ExitCase("cpuid", {})
    for speed in (1, 1, 2, 5, 1):
        case.add_turn("qemu", [200 * speed], [100 * speed])
        case.add_turn("chv_c", [330 * speed], [300 * speed])
    case.compare()
    found = case.as_json("floor")["contestants"]
    assert (found["qemu"]["ratio_to_floor"], found["qemu"]["ratio_spread"]) == (2, 0)
    assert found["chv_c"]["ratio_to_floor"] == pytest.approx(1.1)
    assert found["chv_c"]["ratio_to_qemu"] == pytest.approx(0.55)
    assert found["floor"]["ratio_to_floor"] == 1


def test_a_turn_stays_on_one_processor_if_nothing_computes_beside_it() -> None:
    here = sorted(os.sched_getaffinity(0))
    alone, beside = Imitation("chv_c", 1), Imitation("chv_py_spin", 1)
    exits.measure(floor(), [alone, beside], {}, rounds=2 * len(here))
    single, wake, ipi = (alone.processors[start::3] for start in range(3))
    assert sorted(single) == sorted([number] for number in here for _ in range(2))
    assert all(found == here for found in (*wake, *ipi, *beside.processors))
    assert sorted(os.sched_getaffinity(0)) == here


def test_the_floor_compiles() -> None:
    assert build.floor().stat().st_mode & 0o100


def test_the_c_register_keeps_what_is_written() -> None:
    register = build.device().Register()
    register.write(3, 4, 0x12345678)
    assert register.read(0, 4) == 0x12345678
    assert register.read(0, 2) == 0x5678


def test_the_c_output_stops_when_it_is_full() -> None:
    output = build.device().Output(3)
    for byte in b"chv!":
        output.write(0, 1, byte)
    assert output.take() == b"chv"


def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "floor").mkdir()
    (tmp_path / "floor" / "floor.c").write_text("this is not C")
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    monkeypatch.setattr(build, "BUILT", tmp_path / "built")
    with pytest.raises(build.BuildError, match=r"floor\.c"):
        build.floor()


@pytest.mark.parametrize(
    ("name", "path", "message"),
    [("bhyve", "bhyve", "known are kvmtool"), ("kvmtool", "/nonexistent/lkvm", "is not a program")],
)
def test_peers_that_cannot_take_part(name: str, path: str, message: str) -> None:
    with pytest.raises(Absent, match=message):
        exit_contestants.Peer(name, path)


@pytest.mark.parametrize("name", exit_contestants.PEERS)
def test_a_peer_that_never_runs_the_guest_says_what_it_said(name: str, tmp_path: Path) -> None:
    program = tmp_path / "peer"
    program.write_text('#!/bin/sh\necho "cannot do $1" >&2\n')
    program.chmod(0o755)
    guest = guests.write_guest(tmp_path, "single", 5)
    with pytest.raises(Absent, match="the guest did not end: cannot do"):
        exit_contestants.Peer(name, str(program)).run(guest)


@pytest.mark.parametrize("name", exit_contestants.PEERS)
def test_what_a_peer_writes_is_taken(name: str, tmp_path: Path) -> None:
    expected = written({"cpuid": [7]})
    (tmp_path / "samples").write_bytes(b"a banner\n" + expected)
    program = tmp_path / "peer"
    program.write_text(f"#!/bin/sh\ncat {tmp_path}/samples\nexec sleep 600\n")
    program.chmod(0o755)
    output, _ = exit_contestants.Peer(name, str(program)).run(guests.write_guest(tmp_path, "single", 5))
    assert guests.samples(output) == {"cpuid": [7]}
