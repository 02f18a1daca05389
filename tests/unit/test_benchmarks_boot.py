"""The benchmarks with Linux guests: what they read from logs and monitors, the shape of what they report."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import boot as benchmark
from benchmarks import io, resize
from benchmarks.linux import boots, qemu
from benchmarks.linux.boots import Boot, BootFailed, Wanted, host_steps
from benchmarks.linux.guest import CPUS_INIT, END, INIT, compiled
from benchmarks.linux.hotplug import Ear, Silent, growth, parse, qemu_request
from benchmarks.linux.io_guest import CommandFailed, chv_command, qemu_command
from benchmarks.linux.kernel_log import breakdown, group, init_us, lines
from benchmarks.linux.traffic import Stream, dd_rate, fio_result
from benchmarks.linux.where import enter, without_json
from benchmarks.results import Report
from tests.support import require

LOG = """<5>[    0.000000] Linux version 6.12
<6>[    0.500000] smp: Bringing up secondary CPUs ...
<6>[    0.700000] smp: Brought up 1 node, 4 CPUs
<7>[    0.900000] initcall acpi_init+0x0/0x4c0 returned 0 after 120000 usecs
<7>[    1.000000] initcall pci_subsys_init+0x0/0x70 returned 0 after 30000 usecs
<7>[    1.100000] initcall cmos_init+0x0/0x90 [rtc_cmos] returned -19 after 2000 usecs
<7>[    1.200000] initcall inet_init+0x0/0x350 returned 0 after 8000 usecs
<6>[    2.000000] Run /init as init process
"""


def test_a_kernel_log_says_where_the_time_went() -> None:
    assert breakdown(LOG) == {
        "early": 500_000,
        "vcpus": 200_000,
        "acpi": 120_000,
        "devices": 32_000,
        "other": 8_000,
        "rest": 1_140_000,
    }
    assert sum(breakdown(LOG).values()) == init_us(lines(LOG)) == 2_000_000


def test_one_vcpu_has_none_to_bring_up() -> None:
    log = "\n".join(line for line in LOG.splitlines() if "Bringing" not in line)
    assert breakdown(log)["early"] == 700_000
    assert breakdown(log)["vcpus"] == 0


def test_a_log_that_was_cut_off_has_no_breakdown() -> None:
    assert breakdown(LOG[:200]) == {}
    assert breakdown("") == {}
    assert Boot(first_run=5, init=10, log="").before_clock is None


@given(st.text())
def test_any_text_can_be_a_log(text: str) -> None:
    assert set(breakdown(text)) in (set(), {"early", "vcpus", "acpi", "devices", "other", "rest"})


def test_initcalls_are_grouped_by_name() -> None:
    assert [group(name) for name in ("acpi_pci_init", "pnpacpi_init", "serial8250_init", "inet_init")] == [
        "acpi",
        "acpi",
        "devices",
        "other",
    ]


def test_the_kernels_clock_starts_after_the_first_run() -> None:
    boot = Boot(start=0, first_run=1_000_000_000, init=4_000_000_000, log=LOG)
    assert boot.before_clock == 1_000_000_000


@pytest.mark.parametrize(
    ("given_", "kept"),
    [
        (["--quick", "--json", "x", "--rounds", "2"], ["--quick", "--rounds", "2"]),
        (["--json=x"], []),
        ([], []),
    ],
)
def test_what_goes_into_the_testbed(given_: list[str], kept: list[str]) -> None:
    assert without_json(given_) == kept


def test_results_come_out_of_the_testbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        seen.append(command)
        Path(command[command.index("--json") + 1]).write_text("{}")
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr("benchmarks.linux.where.needed", lambda: True)
    monkeypatch.setattr("benchmarks.linux.where.compileall.compile_dir", lambda *_, **__: True)
    monkeypatch.setattr("benchmarks.linux.where.subprocess.run", run)
    out = tmp_path / "deep" / "boot.json"
    assert enter("benchmarks.boot", ["--quick", "--json", str(out)], out) == 3
    assert out.read_text() == "{}"
    assert seen[0][:3] == [sys.executable, "-m", "tests.testbed"]
    assert "benchmarks.boot" in seen[0]
    assert str(out) not in seen[0]
    monkeypatch.setattr("benchmarks.linux.where.needed", lambda: False)
    assert enter("benchmarks.boot", [], None) is None


def test_qemus_monitor_says_when_the_guest_began() -> None:
    said = (
        b'{"QMP": {"version": {}}}\r\n{"return": {}}\r\n'
        b'{"timestamp": {"seconds": 12, "microseconds": 34}, "event": "RESUME"}\r\n{"ret'
    )
    assert qemu.event_ns(said, "RESUME") == 12_000_034_000
    assert qemu.event_ns(said, "STOP") is None


def test_host_steps_are_disjoint_and_add_up() -> None:
    seen = {"started": 110, "imported": 150, "configured": 160}
    spans = {
        "memory": (160, 165),
        "unpack": (165, 265),
        "kvm": (270, 280),
        "acpi": (281, 290),
        "load": (280, 300),
        "start": (300, 310),
    }
    steps = host_steps(100, seen, spans)
    assert steps["kernel"] == 100
    assert steps["load"] == 11
    assert steps["other"] == 5
    assert sum(steps.values()) == 200


def test_a_vmm_that_dies_is_a_failure_with_its_last_words() -> None:
    @contextlib.contextmanager
    def dies() -> Iterator[None]:
        mine, theirs = socket.socketpair()
        command = [sys.executable, "-c", "import sys; sys.exit('no such kernel')"]
        with mine, theirs, boots.process(command, theirs) as (vmm, boot):
            boots.watch(mine, vmm, boot)
            yield

    with pytest.raises(BootFailed, match=r"ended before /init: no such kernel"), dies():
        raise AssertionError("the failure is raised before")


def test_the_log_goes_to_its_end_mark_alone() -> None:
    """A piece of the log may end in any letter, and the kernel may say something before /init runs."""
    mine, theirs = socket.socketpair()
    code = "import socket, sys, time; s = socket.socket(fileno=int(sys.argv[1]))\n"
    pieces = (b"[ 0.1] I", b"O error\n", b"\x02", b"[    0.000001] END", b"E", b"\n", b"\x04")
    code += f"for piece in {pieces!r}: s.send(piece); time.sleep(0.02)"
    with (
        mine,
        theirs,
        boots.process([sys.executable, "-c", code, str(theirs.fileno())], theirs) as (vmm, boot),
    ):
        boots.watch(mine, vmm, boot)
    assert boot.log == "[    0.000001] ENDE\n"
    assert boot.start < boot.init
    assert END == b"\x04"


@pytest.mark.parametrize("source", [INIT, CPUS_INIT], ids=lambda path: path.name)
def test_the_guests_programs_compile(source: Path) -> None:
    require(shutil.which("gcc") is not None, "gcc is not installed")
    assert compiled(source).startswith(b"\x7fELF")


def test_the_report_has_two_cases_and_a_breakdown(monkeypatch: pytest.MonkeyPatch) -> None:
    def once(who: str, wanted: Wanted) -> Boot:
        if who == "qemu_q35":
            raise BootFailed("no q35 here")
        slow = 2 if who == "qemu_microvm" else 1
        log = LOG if "initcall_debug" in wanted.cmdline else LOG.splitlines()[-1]
        steps = {"kernel": 700, "kvm": 300}
        return Boot(
            0, 1000 * slow, 3_000_000_000 * slow, log, {"exits": 8000}, steps, {"devices": {"serial": 2}}
        )

    monkeypatch.setattr(benchmark, "once", once)
    monkeypatch.setattr(benchmark, "initramfs", lambda: Path("/initramfs"))
    monkeypatch.setattr(benchmark, "kernel", lambda _: type("K", (), {"bzimage": "/k", "release": "6.12.1"}))
    report = Report("boot", reference=benchmark.REFERENCE)
    bar = type("Bar", (), {"advance": lambda *_: None})()
    benchmark.measure(report, "6.12", 4, 2, bar)
    found = json.loads(json.dumps(report.as_json()))["cases"]
    assert [case["name"] for case in found] == ["first_run_to_init/6.12/4", "start_to_init/6.12/4"]
    chv = found[0]["contestants"]["chv"]
    assert (chv["n"], chv["rounds"]) == (2, 2)
    assert chv["ratio_to_qemu_microvm"] == pytest.approx(0.5)
    assert chv["parts_ms"]["acpi"] == 120
    assert chv["parts_ms"]["host"] == pytest.approx(0.001)
    assert chv["kvm"] == {"exits": 8000}
    assert found[1]["contestants"]["chv"]["host_ns"] == {"kernel": 700, "kvm": 300}
    assert found[1]["contestants"]["qemu_q35"] == {"absent": "no q35 here"}
    assert (found[0]["kernel"], found[0]["vcpus"]) == ("6.12.1", 4)


def test_what_the_guest_says_of_its_cpus() -> None:
    assert [parse(line) for line in (b"I", b"P 12", b"", b"P x", b"\xff 3")] == [
        ("I", -1),
        ("P", 12),
        ("", -1),
        ("P", -1),
        ("\ufffd", 3),
    ]
    mine, theirs = socket.socketpair()
    with mine, theirs:
        ear = Ear(mine)
        theirs.sendall(b"P 1\nP 2\nB")
        assert [line[:2] for line in ear.hear("P", 2)] == [("P", 1), ("P", 2)]
        theirs.sendall(b"\nO 1\nO 2\n")
        assert [line[:2] for line in ear.hear("O", 2)] == [("B", -1), ("O", 1), ("O", 2)]
        with pytest.raises(Silent, match="1 x R did not come"):
            ear.hear("R", 1, timeout=0.01)
        theirs.close()
        with pytest.raises(Silent, match="the VMM ended"):
            ear.hear("R", 1)


def test_the_guests_pause_is_not_part_of_coming_online() -> None:
    heard = [("P", 1, 110), ("P", 2, 130), ("B", -1, 230), ("O", 1, 250), ("O", 2, 270)]
    assert growth(heard, 100, 2) == (30, 70)
    late = [("P", 1, 110), ("B", -1, 210), ("O", 1, 230), ("P", 2, 240), ("B", -1, 340), ("O", 2, 350)]
    assert growth(late, 100, 2) == (140, 50)
    with pytest.raises(Silent, match="1 vCPUs became present, not 2"):
        growth(heard[1:], 100, 2)


def test_qemu_is_asked_in_one_piece() -> None:
    added = [json.loads(line) for line in qemu_request(1, 3).splitlines()]
    assert [command["arguments"]["id"] for command in added] == ["cpu1", "cpu2"]
    assert added[0]["arguments"]["socket-id"] == 1
    removed = [json.loads(line) for line in qemu_request(3, 1).splitlines()]
    assert [(command["execute"], command["arguments"]["id"]) for command in removed] == [
        ("device_del", "cpu2"),
        ("device_del", "cpu1"),
    ]


def test_the_report_on_resizing_has_three_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    class Guest:
        def __init__(self, slow: int) -> None:
            self.slow = slow

        def grow(self, count: int) -> tuple[int, int]:
            return 10 * count * self.slow, 30 * count * self.slow

        def shrink(self, count: int) -> int:
            return 20 * count * self.slow

    @contextlib.contextmanager
    def fast(*_: object) -> Iterator[Any]:
        yield Guest(1)

    @contextlib.contextmanager
    def slow(*_: object) -> Iterator[Any]:
        yield Guest(2)

    monkeypatch.setattr(resize, "CONTESTANTS", {"chv": fast, resize.REFERENCE: slow})
    monkeypatch.setattr(resize, "SETTLE_SECONDS", 0)
    report = Report("resize", reference=resize.REFERENCE)
    bar = type("Bar", (), {"advance": lambda *_: None})()
    resize.measure(report, Wanted("/k", "/i", "", 1), 4, 2, bar)
    found = {case["name"]: case["contestants"]["chv"] for case in report.as_json()["cases"]}
    assert {name: who["p50_ns"] for name, who in found.items()} == {
        "present/4": 40,
        "online/4": 120,
        "removed/4": 80,
    }
    assert all(who["ratio_to_qemu_q35"] == 0.5 for who in found.values())


def test_fios_answer() -> None:
    idle = {"iops": 0.0, "bw_bytes": 0, "clat_ns": {}}
    busy = {"iops": 1000.5, "bw_bytes": 4098048, "clat_ns": {"percentile": {"50.000000": 90112}}}
    answer = json.dumps({"jobs": [{"read": idle, "write": busy}]})
    found = fio_result(f"note: both iodepth >= 1\n{answer}")
    assert (found.iops, found.bytes_per_second, found.p50_ns) == (1000.5, 4098048, 90112)
    for bad in ("", "{", '{"jobs": []}', json.dumps({"jobs": [{"read": idle, "write": idle}]})):
        with pytest.raises(CommandFailed, match="fio's output has no figures"):
            fio_result(bad)


def test_dds_answer() -> None:
    text = "16+0 records in\n16+0 records out\n65536 bytes (66 kB, 64 KiB) copied, 0.5 s, 131 kB/s\n"
    assert dd_rate(text) == 131072
    with pytest.raises(CommandFailed, match="dd's output has no figures"):
        dd_rate("dd: failed to open '/dev/hwrng'")


@pytest.mark.parametrize("sending", [True, False])
def test_a_stream_counts_what_passes(sending: bool) -> None:
    line = Stream("127.0.0.1", sending=sending)
    with socket.create_connection(("127.0.0.1", line.port)) as peer:
        if sending:
            assert peer.recv(1 << 16)
        else:
            peer.sendall(bytes(1 << 20))
    assert line.rate() > 0
    assert line.counted >= (1 if sending else 1 << 20)


def test_contestants_get_the_same_devices() -> None:
    disks = Path("/root.img"), Path("/data")
    wanted = Wanted("/k", "/i", "quiet root=/dev/vda")
    parts = json.loads(chv_command(wanted, *disks, "bench-chv", 7)[-1])
    assert [disk["path"] for disk in parts["disks"]] == ["/root.img", "/data"]
    command = qemu_command(wanted, *disks, "bench-q", "threads")
    drives = [command[i + 1] for i, word in enumerate(command) if word == "-drive"]
    assert [drive.rpartition("file=")[2] for drive in drives] == ["/root.img", "/data"]
    assert all("aio=threads" in drive for drive in drives)
    assert parts["cmdline"] == command[command.index("-append") + 1]


def test_a_job_that_fails_is_said_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Guest:
        who = "chv"
        turns: ClassVar[list[bool]] = []
        used = 0.0

        def turn(self, begin: bool) -> None:
            self.turns.append(begin)

        def cpu_seconds(self) -> float:
            self.used += 0.5
            return self.used

        def run(self, command: str) -> str:
            if "randwrite" in command:
                raise CommandFailed("I/O error")
            side = {"iops": 2000.0, "bw_bytes": 8192000, "clat_ns": {"percentile": {"50.000000": 70000}}}
            return json.dumps({"jobs": [{"read": side, "write": {"iops": 0.0}}]})

    monkeypatch.setattr(io, "stream", lambda *_: 100 * 2**20)
    monkeypatch.setattr(io, "entropy", lambda *_: 2**20)
    report = Report("io", reference=io.REFERENCE)
    jobs = [("randread", "4k", 1), ("randread", "4k", 32), ("randwrite", "4k", 32)]
    cases = io.make_cases(report, jobs)
    io.take_turn(Guest(), cases, jobs, 1)  # type: ignore[arg-type]
    found = {case["name"]: case["contestants"].get("chv") for case in report.as_json()["cases"]}
    assert found["blk/randread/4k/qd1"]["p50_ns"] == 70000
    assert found["blk/randread/4k/qd32"]["p50_ns"] == 500_000
    assert found["blk/randread/4k/qd32"]["values"]["host cpu"] == {"value": 250, "unit": "us per operation"}
    assert found["blk/randwrite/4k/qd32"] is None
    assert found["net/to_guest"]["values"]["bandwidth"] == {"value": 100.0, "unit": "MiB/s"}
    assert "blk/randwrite/4k/qd32: I/O error" in capsys.readouterr().err
    assert Guest.turns == [True, False]
