"""The pytest plugin, in pytest runs of its own; a shell stands in for the VM."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import chv
from tests.support import require

pytest_plugins = ["pytester"]

FAKE_VM = '''
import subprocess
import sys
import types

import pytest


class VM:
    """What chv.testing.Guest needs of chv.VM: a shell on the serial line."""

    made = []

    def __init__(self, *, serial, **parts):
        self.serial, self.parts, self.shell, self.deleted = serial, parts, None, 0
        self.made.append(self)
        if parts["kernel"] == "bad":
            raise ValueError("bad kernel")

    def boot(self):
        self.shell = subprocess.Popen(
            ["busybox", "sh", "-i"], stdin=self.serial, stdout=self.serial, stderr=self.serial,
            env={"PATH": "/bin:/usr/bin", "PS1": "# "},
        )

    def resize(self, desired_vcpus):
        return f"resized to {desired_vcpus}"

    def delete(self):
        self.deleted += 1
        if self.shell:
            self.shell.kill()
            self.shell.wait()


@pytest.fixture(autouse=True)
def fake_vm(monkeypatch):
    module = types.ModuleType("chv.vm")
    module.VM = VM
    monkeypatch.setitem(sys.modules, "chv.vm", module)
    VM.made.clear()
    return VM
'''


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    require(shutil.which("busybox"), "busybox is not installed")
    # Found also where it is built in the checkout and not installed.
    monkeypatch.setenv("PYTHONPATH", str(Path(chv.__file__).parents[1]))
    pytester.makeconftest(FAKE_VM)
    pytester.makeini("[pytest]\naddopts = --strict-markers\n")
    return pytester


def with_plugin(run: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    """A pytest run with the plugin exactly once, whether chv is installed or only built."""
    return run.runpytest_subprocess("-p", "no:chv", "-p", "chv.testing.plugin", *arguments)


def test_a_test_of_a_user(run: pytest.Pytester) -> None:
    run.makepyfile(
        """
        import pytest
        from chv.testing import CommandFailed

        @pytest.mark.chv(cpus="boot=4,max=8", cmdline="quiet")
        def test_guest(vm):
            assert vm.run("echo $((6 * 7))") == "42"
            with pytest.raises(CommandFailed, match="status 3"):
                vm.run("(exit 3)")
            assert vm.run("echo no; false", check=False) == "no"
            assert vm.run_result("printf x; (exit 2)").status == 2
            assert vm.resize(desired_vcpus=8) == "resized to 8"
            assert vm.parts == {
                "kernel": "k", "initramfs": "i", "cpus": "boot=4,max=8", "cmdline": "console=ttyS0 quiet",
            }
            assert vm.timeout == 7
            vm.send("echo li''ne\\n")
            assert vm.wait_for_line("li(ne)$") == "# line"  # there is no terminal that echoes
        """
    )
    result = with_plugin(
        run, "--chv-kernel=k", "--chv-initramfs=i", "--chv-timeout=7", f"--chv-logs={run.path}/logs"
    )
    result.assert_outcomes(passed=1)
    (log,) = Path(run.path, "logs").iterdir()
    assert log.name == "test_a_test_of_a_user.py-test_guest.console"
    assert "# line\n" in log.read_text()


def test_failure_shows_the_console(run: pytest.Pytester) -> None:
    run.makepyfile(
        """
        def test_guest(vm_factory):
            guests = [vm_factory(kernel="own"), vm_factory()]
            for guest in guests:
                guest.boot()
                guest.wait_for_prompt()
                guest.run("echo this is $PS1 of " + guest.parts["kernel"])
            assert False

        def test_all_were_closed(fake_vm):
            import conftest
            assert not conftest.VM.made
        """
    )
    result = with_plugin(run, "--chv-kernel=k")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(
        [
            "*console of guest 0, last lines*",
            "this is # of own",
            "*console of guest 1, last lines*",
            "this is # of k",
        ]
    )


def test_guests_are_deleted_also_when_the_test_fails(run: pytest.Pytester) -> None:
    run.makepyfile(
        """
        import pytest

        made = []

        def test_fails(vm, fake_vm):
            made.extend(fake_vm.made)
            assert False

        def test_cannot_be_made(vm_factory, fake_vm):
            with pytest.raises(ValueError, match="bad kernel"):
                vm_factory(kernel="bad")

        def test_deleted():
            assert [vm.deleted for vm in made] == [1]
            assert made[0].serial.fileno() == -1
        """
    )
    with_plugin(run, "--chv-kernel=k").assert_outcomes(passed=2, failed=1)


def test_without_a_kernel(run: pytest.Pytester) -> None:
    run.makepyfile("def test_guest(vm): pass")
    result = with_plugin(run)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*the vm fixture needs a kernel: give pytest --chv-kernel=FILE*"])


def test_options_from_the_ini_file(run: pytest.Pytester) -> None:
    run.makeini("[pytest]\nchv_kernel = from-ini\nchv_cmdline = panic=1 console=hvc0\n")
    run.makepyfile(
        """
        def test_guest(vm):
            assert vm.parts == {"kernel": "from-ini", "cmdline": "panic=1 console=hvc0"}
        """
    )
    with_plugin(run).assert_outcomes(passed=1)


def test_a_run_without_guests_imports_nothing_of_chv(run: pytest.Pytester) -> None:
    run.makeconftest("")
    run.makepyfile(
        """
        import sys

        def test_modules():
            loaded = {name for name in sys.modules if name.startswith("chv")}
            assert loaded <= {"chv", "chv.version", "chv.testing", "chv.testing.plugin"}
        """
    )
    with_plugin(run).assert_outcomes(passed=1)
