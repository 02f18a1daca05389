"""What a program gets when it imports chv: what a VM needs, and nothing that only some VMs need."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Modules, and those below them, by who needs them.
HTTP = {
    "http",
    "urllib.request",
    "requests",
    "requests_unixsocket",
    "urllib3",
    "waitress",
    "chv.api",
    "email",
}
NETLINK = {"pyroute2", "chv.net", "chv.virtio.net"}
PLOTTING = {"matplotlib", "numpy", "rich", "PIL"}
UNPACKING = {"zstandard", "lz4", "lzma", "bz2", "elftools", "hashlib", "tempfile", "chv.boot"}
PROGRAM = {"argparse", "json", "chv.cli", "chv.run", "chv.vmm", "chv.remote", "chv.testing", "pytest"}
SLOW = {"logging", "asyncio", "subprocess", "multiprocessing", "ctypes", "socket", "locale", "pathlib"}


def imported(code: str) -> set[str]:
    """The modules that a fresh interpreter has after ``code``, and did not have before."""
    script = f"import sys\nbefore = set(sys.modules)\n{code}\nprint(*sorted(set(sys.modules) - before))"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(ran.stdout.split())


def below(modules: set[str], names: set[str]) -> set[str]:
    """Those of ``modules`` that are one of ``names`` or inside of it."""
    return {module for module in modules for name in names if f"{module}.".startswith(f"{name}.")}


def test_importing_chv_imports_nothing_else() -> None:
    # An editable installation has imported __future__ before.
    assert imported("import chv") - {"__future__"} == {"chv", "chv.version"}


@pytest.mark.parametrize(
    "code", ["import chv; chv.VM", "import chv; chv.VM(kernel='k', cpus=2, memory='1G')"]
)
def test_a_vm_needs_no_http_netlink_plotting_or_program(code: str) -> None:
    modules = imported(code)
    assert "chv.vm" in modules
    assert below(modules, HTTP | NETLINK | PLOTTING | UNPACKING | PROGRAM | SLOW) == set()


def test_devices_are_imported_with_the_first_of_their_kind() -> None:
    modules = imported("import chv; chv.VM")
    assert (
        below(modules, {"chv.virtio.block", "chv.virtio.net", "chv.virtio.rng", "chv.virtio.console"})
        == set()
    )


def test_an_elf_kernel_needs_no_library_that_unpacks() -> None:
    assert below(imported("import chv.boot"), UNPACKING - {"chv.boot"}) == set()


def test_the_configuration_alone_needs_no_machine() -> None:
    modules = imported("import chv; chv.make_config(kernel='k')")
    assert below(modules, {"chv.vm", "chv.machine", "chv._kvm", "chv._bus"}) == set()


def test_the_command_line_without_an_api_socket_needs_no_server() -> None:
    code = "import chv.cli; chv.cli.build_parser(); import chv.run"
    assert below(imported(code), HTTP - {"http"} | NETLINK | PLOTTING) == set()


def test_the_server_answers_without_a_machine() -> None:
    assert below(imported("import chv.api.server"), {"chv.vm", "chv._kvm", "requests", "pyroute2"}) == set()


def test_every_public_name_is_there() -> None:
    assert imported("import chv; [getattr(chv, name) for name in chv.__all__]") >= {"chv.vm", "chv.errors"}
