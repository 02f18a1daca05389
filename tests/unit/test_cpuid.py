"""CPUID: each vCPU's own identity, and one topology told in the same way by every leaf."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from chv.cpuid import GuestCpuid, Topology
from chv.errors import ConfigError

if TYPE_CHECKING:
    from chv._kvm import CpuidEntry

AMD = (0x68747541, 0x444D4163, 0x69746E65)  # "AuthenticAMD" as EBX, ECX, EDX
INTEL = (0x756E6547, 0x6C65746E, 0x49656E69)  # "GenuineIntel"

THREADS_BIT, HYPERVISOR, X2APIC, TSC_DEADLINE = 1 << 28, 1 << 31, 1 << 21, 1 << 24


def host(vendor: tuple[int, int, int] = AMD, highest: int = 0x10) -> list[CpuidEntry]:
    """What a host's KVM might offer: its own identity in the fields that chv has to replace."""
    return [
        (0, 0, 0, highest, *vendor),
        (1, 0, 0, 0x830F10, 0xAB_CD_08_00, X2APIC, THREADS_BIT | 0x1FF),
        (4, 0, 1, 0xFC000121, 0x01C0003F, 0x3F, 0),  # L1 data
        (4, 1, 1, 0xFC000143, 0x01C0003F, 0x3FF, 0),  # L2
        (4, 2, 1, 0xFC000163, 0x03C0003F, 0x3FFF, 6),  # L3
        (4, 3, 1, 0, 0, 0, 0),
        (0xB, 0, 1, 7, 99, 0x100, 77),
        (0xB, 1, 1, 7, 99, 0x201, 77),
        (0x40000000, 0, 0, 0x40000001, 0x4B4D564B, 0x564B4D56, 0x4D),
        (0x80000000, 0, 0, 0x8000001F, *vendor),
        (0x80000001, 0, 0, 0, 0, 1 << 22 | 2, 0),
        (0x80000008, 0, 0, 0x3030 | 52 << 16, 0x1000, 0x5030 | 0x3F, 0),
        (0x8000001D, 0, 1, 0x03FFC121, 0x01C0003F, 0x3F, 0),
        (0x8000001D, 3, 1, 0x03FFC163, 0x03C0003F, 0x3FFF, 0),
        (0x8000001E, 0, 0, 77, 0x1FF, 0x7, 0),
    ]


TOPOLOGIES = {
    "1": Topology.flat(1),
    "8": Topology.flat(8),
    "254": Topology.flat(254),
    "300": Topology.flat(300),
    "4 cores of 2": Topology(2, 4, 1, 1),
    "2 dies of 4 cores of 2": Topology(2, 4, 2, 1),
    "4 packages": Topology(1, 2, 1, 4),
    "3 packages of 2 dies": Topology(2, 2, 2, 3),
}


def vcpus(t: Topology) -> int:
    return t.threads_per_package * t.packages


def leaf(entries: list[CpuidEntry], function: int, index: int = 0) -> tuple[int, int, int, int]:
    found = [e[3:] for e in entries if e[0] == function and e[1] == index]
    assert len(found) == 1, f"leaf {function:#x}.{index} occurs {len(found)} times"
    return found[0]


def make(t: Topology, vendor: tuple[int, int, int] = AMD, highest: int = 0x10, **kwargs: int) -> GuestCpuid:
    return GuestCpuid(host(vendor, highest), t, tsc_deadline=True, **kwargs)


@pytest.mark.parametrize("name", TOPOLOGIES)
@pytest.mark.parametrize("vendor", [AMD, INTEL], ids=["amd", "intel"])
def test_every_leaf_gives_each_vcpu_its_own_apic_id(name: str, vendor: tuple[int, int, int]) -> None:
    t = TOPOLOGIES[name]
    cpuid = make(t, vendor)
    for apic_id in {0, 1, vcpus(t) - 1} & set(range(vcpus(t))):
        entries = cpuid.entries(apic_id)
        assert leaf(entries, 1)[1] >> 24 == apic_id & 0xFF
        for index in range(3):
            assert leaf(entries, 0xB, index)[3] == apic_id
        assert leaf(entries, 0x8000001E)[0] == apic_id


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_leaf_b_cuts_apic_ids_into_threads_cores_and_packages(name: str) -> None:
    t = TOPOLOGIES[name]
    cpuid = make(t)
    places = set()
    for apic_id in range(vcpus(t)):
        entries = cpuid.entries(apic_id)
        smt, core, end = (leaf(entries, 0xB, index) for index in range(3))
        # Intel SDM vol. 2A, CPUID leaf 0bh: ECX has the sub-leaf and the level's type (1: SMT, 2: core).
        assert [level[2] for level in (smt, core, end)] == [0x100, 0x201, 0x002]
        assert end[:2] == (0, 0)
        assert (smt[1], core[1]) == (t.threads_per_core, t.threads_per_package)
        thread = apic_id & (1 << smt[0]) - 1
        package = apic_id >> core[0]
        assert thread < t.threads_per_core
        assert package < t.packages
        places.add((package, apic_id & (1 << core[0]) - 1))
    assert len(places) == vcpus(t)
    assert len({package for package, _ in places}) == t.packages


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_leaf_1_and_the_amd_leaves_agree_with_leaf_b(name: str) -> None:
    t = TOPOLOGIES[name]
    entries = make(t).entries(0)
    package_bits = leaf(entries, 0xB, 1)[0]
    many = t.threads_per_package > 1
    _, ebx, _, edx = leaf(entries, 1)
    assert bool(edx & THREADS_BIT) == many
    assert ebx >> 16 & 0xFF == min(1 << package_bits, 255)
    assert ebx & 0xFFFF == 0x0800  # the rest is the host's
    assert bool(leaf(entries, 0x80000001)[2] & 2) == many
    count = leaf(entries, 0x80000008)[2]
    # AMD64 APM vol. 3, E.4.7: NC is the number of threads less one, ApicIdSize the bits that they take.
    assert count & 0xFF == min(t.threads_per_package - 1, 255)
    assert count >> 12 & 0xF == package_bits
    assert leaf(entries, 0x8000001E)[1] >> 8 & 0xFF == t.threads_per_core - 1


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_the_amd_core_id_is_that_of_leaf_b(name: str) -> None:
    t = TOPOLOGIES[name]
    cpuid = make(t)
    for apic_id in range(vcpus(t)):
        entries = cpuid.entries(apic_id)
        assert leaf(entries, 0x8000001E)[1] & 0xFF == apic_id >> leaf(entries, 0xB, 0)[0] & 0xFF


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_caches_are_shared_by_a_core_or_by_the_package(name: str) -> None:
    t = TOPOLOGIES[name]
    entries = make(t, INTEL).entries(0)
    smt_bits, package_bits = leaf(entries, 0xB, 0)[0], leaf(entries, 0xB, 1)[0]
    for index, bits in ((0, smt_bits), (1, smt_bits), (2, package_bits)):
        eax = leaf(entries, 4, index)[0]
        assert (eax >> 14 & 0xFFF) + 1 == 1 << bits
        assert eax & 0x3FFF == leaf(host(INTEL), 4, index)[0] & 0x3FFF
        assert eax < 1 << 32
    assert leaf(entries, 4, 3) == (0, 0, 0, 0)
    l1, l3 = leaf(entries, 0x8000001D)[0], leaf(entries, 0x8000001D, 3)[0]
    assert (l1 >> 14 & 0xFFF) + 1 == t.threads_per_core
    assert (l3 >> 14 & 0xFFF) + 1 == t.threads_per_package


def test_dies_are_a_level_of_leaf_1f() -> None:
    t = TOPOLOGIES["2 dies of 4 cores of 2"]
    entries = make(t, INTEL, highest=0x20).entries(13)
    levels = [leaf(entries, 0x1F, index) for index in range(4)]
    assert [(eax, ebx, ecx) for eax, ebx, ecx, _ in levels] == [
        (1, 2, 0x100),
        (3, 8, 0x201),
        (4, 16, 0x502),
        (0, 0, 0x003),
    ]
    assert {edx for *_, edx in levels} == {13}
    # Leaf 0bh knows no dies: its core level reaches to the package.
    assert leaf(entries, 0xB, 1)[:2] == (4, 16)


def test_leaf_1f_is_there_only_where_the_host_counts_so_far() -> None:
    assert any(e[0] == 0x1F for e in make(Topology.flat(2), highest=0x1F).entries(0))
    assert not any(e[0] == 0x1F for e in make(Topology.flat(2), highest=0x1E).entries(0))


def test_the_highest_leaf_reaches_to_the_topology() -> None:
    assert leaf(make(Topology.flat(2), highest=0x7).entries(0), 0)[0] == 0xB
    assert leaf(make(Topology.flat(2), highest=0x20).entries(0), 0)[0] == 0x20


def test_the_guest_knows_that_it_is_one() -> None:
    for deadline in (True, False):
        cpuid = GuestCpuid(host(), Topology.flat(2), tsc_deadline=deadline)
        ecx = leaf(cpuid.entries(0), 1)[2]
        assert ecx & HYPERVISOR
        assert ecx & X2APIC
        assert bool(ecx & TSC_DEADLINE) == deadline


def test_what_names_no_vcpu_stays_the_hosts() -> None:
    entries = make(Topology.flat(4)).entries(2)
    for function in (0x40000000, 0x80000000):
        assert leaf(entries, function) == leaf(host(), function)


def test_entries_do_not_change_the_hosts_list() -> None:
    supported = host()
    GuestCpuid(supported, Topology.flat(4), tsc_deadline=True).entries(3)
    assert supported == host()


@pytest.mark.parametrize(("limit", "expected"), [(46, 46), (36, 36), (52, 48)])
def test_physical_address_bits_are_the_smaller_of_host_and_configuration(limit: int, expected: int) -> None:
    # The host above has 48.
    eax = leaf(make(Topology.flat(2), max_physical_bits=limit).entries(0), 0x80000008)[0]
    assert eax & 0xFF == expected
    assert eax >> 8 == leaf(host(), 0x80000008)[0] >> 8


def test_values_fit_their_registers() -> None:
    for t in TOPOLOGIES.values():
        for vendor in (AMD, INTEL):
            for entry in make(t, vendor, highest=0x20).entries(vcpus(t) - 1):
                assert all(0 <= word < 1 << 32 for word in entry), entry


@pytest.mark.parametrize(
    ("parts", "what"),
    [
        ((3, 2, 1, 1), "3 threads per core"),
        ((2, 3, 2, 1), "3 cores per die"),
        ((1, 5, 1, 2), "5 cores per die"),
        ((1, 2, 3, 2), "3 dies per package"),
    ],
)
def test_an_inner_part_that_is_no_power_of_two_is_refused(
    parts: tuple[int, int, int, int], what: str
) -> None:
    with pytest.raises(ConfigError, match=rf"cpus.topology: {what} is not a power of two"):
        Topology(*parts)


@pytest.mark.parametrize("parts", [(3, 1, 1, 1), (2, 3, 1, 1), (1, 2, 3, 1), (1, 2, 2, 3), (1, 300, 1, 1)])
def test_the_outermost_part_may_be_any_number(parts: tuple[int, int, int, int]) -> None:
    assert Topology(*parts).threads_per_package * parts[3] == parts[0] * parts[1] * parts[2] * parts[3]
