"""Results and progress on a terminal, by rich."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich import progress as bars
from rich.console import Console
from rich.table import Table


class Progress:
    """A bar for a known number of steps, shown only where the output is a terminal."""

    def __init__(self, total: int, text: str) -> None:
        self._bar = bars.Progress(
            bars.TextColumn("{task.description}"),
            bars.BarColumn(),
            bars.MofNCompleteColumn(),
            bars.TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._bar.add_task(text, total=total)
        self._plain = None if self._bar.console.is_terminal else self._bar.console

    def __enter__(self) -> Progress:
        if self._plain is None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._plain is None:
            self._bar.stop()

    def advance(self, text: str | None = None) -> None:
        """One step done; the text says what comes now."""
        self._bar.advance(self._task)
        if text is not None:
            self._bar.update(self._task, description=text)


def print_report(report: dict[str, Any]) -> None:
    """A table of times and, where there are any, one of other gauges."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(console.width, 140))
    machine = report["machine"]
    console.print(
        f"[bold]{report['benchmark']}[/]  {machine['cpu']}, {machine['cores']} cores, "
        f"Linux {machine['kernel']}, KVM {machine['kvm']}, "
        f"Python {machine['python']}, QEMU {machine['qemu'] or 'absent'}"
    )
    for table in (times(report), gauges(report)):
        if table.row_count:
            console.print(table)
    for case in report["cases"]:
        for name, who in case["contestants"].items():
            if "absent" in who:
                console.print(f"[dim]{case['name']}: {name} is absent: {who['absent']}[/]")


def times(report: dict[str, Any]) -> Table:
    """Quantiles, and the ratio to the reference."""
    reference = report["reference"]
    table = Table()
    for head in ("case", "contestant"):
        table.add_column(head)
    for head in ("p50", "p90", "p99", "p99.9", "max", "n", f"/ {reference}", "±"):
        table.add_column(head, justify="right")
    for case in report["cases"]:
        present = {name: who for name, who in case["contestants"].items() if "p50_ns" in who}
        for number, (name, who) in enumerate(present.items()):
            table.add_row(
                case["name"] if number == 0 else "",
                name,
                *(duration(who[key]) for key in ("p50_ns", "p90_ns", "p99_ns", "p999_ns", "max_ns")),
                str(who["n"]),
                *(
                    f"{who[key]:.3f}" if key in who else ""
                    for key in (f"ratio_to_{reference}", "ratio_spread")
                ),
            )
    return table


def gauges(report: dict[str, Any]) -> Table:
    """What is not a time."""
    table = Table()
    for head in ("case", "contestant", "what"):
        table.add_column(head)
    table.add_column("value", justify="right")
    for case in report["cases"]:
        for name, who in case["contestants"].items():
            for gauge_name, gauge in who.get("values", {}).items():
                table.add_row(case["name"], name, gauge_name, f"{gauge['value']:,.6g} {gauge['unit']}")
    return table


def duration(nanoseconds: float) -> str:
    """A time in the unit that leaves one to three digits before the point."""
    for unit, size in (("s", 1e9), ("ms", 1e6), ("us", 1e3)):
        if nanoseconds >= size:
            return (
                f"{nanoseconds / size:.3g} {unit}"
                if nanoseconds < 100 * size
                else f"{nanoseconds / size:.0f} {unit}"
            )
    return f"{nanoseconds:.3g} ns"
