"""What CPUID tells a guest.

The leaves are the host's as KVM offers them; what names a vCPU or its place in the
package is filled in here. Sources: Intel SDM vol. 2A, CPUID; AMD64 APM vol. 3,
appendix E; the kernel's Documentation/virt/kvm/x86/cpuid.rst.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Struct

from .errors import ConfigError

if TYPE_CHECKING:
    from ._kvm import CpuidEntry

_SIGNIFICANT_INDEX = 1  # KVM_CPUID_FLAG_SIGNIFCANT_INDEX

_LEVEL_SMT, _LEVEL_CORE, _LEVEL_DIE = 1, 2, 5
_HYPERVISOR = 1 << 31
_TSC_DEADLINE = 1 << 24
_X2APIC = 1 << 21
_HTT = 1 << 28
_AMD_CMP_LEGACY = 1 << 1
_AMD_TOPOLOGY_EXTENSIONS = 1 << 22


class Topology(Struct, frozen=True):
    """How vCPU numbers divide into threads, cores, dies and packages.

    Cloud Hypervisor's ``topology=threads:cores:dies:packages``. An APIC id is a vCPU number, and CPUID
    cuts it into bit fields; so all but the outermost part that occurs more than once must be powers
    of two (:class:`chv.errors.ConfigError` otherwise).
    """

    threads_per_core: int
    cores_per_die: int
    dies_per_package: int
    packages: int

    def __post_init__(self) -> None:
        parts = [self.threads_per_core, self.cores_per_die, self.dies_per_package, self.packages]
        while len(parts) > 1 and parts[-1] == 1:
            parts.pop()
        for name, count in zip(
            ("threads per core", "cores per die", "dies per package"), parts[:-1], strict=False
        ):
            if count & (count - 1):
                raise ConfigError(
                    f"cpus.topology: {count} {name} is not a power of two; allowed only in the outermost part"
                )

    @classmethod
    def flat(cls, maximum: int) -> Topology:
        """One package of ``maximum`` cores."""
        return cls(1, maximum, 1, 1)

    @property
    def threads_per_package(self) -> int:
        return self.threads_per_core * self.cores_per_die * self.dies_per_package


def _bits(count: int) -> int:
    return (count - 1).bit_length()


class GuestCpuid:
    """CPUID for the vCPUs of one VM, made from what the host offers."""

    def __init__(
        self,
        supported: list[CpuidEntry],
        topology: Topology,
        *,
        tsc_deadline: bool,
        max_physical_bits: int = 46,
    ) -> None:
        self._topology = topology
        self._vendor = next((e[4:7] for e in supported if e[0] == 0), (0, 0, 0))
        self._max_physical_bits = max_physical_bits
        self._tsc_deadline = tsc_deadline
        self._base = [e for e in supported if e[0] not in (0xB, 0x1F)]
        self._highest = max((e[3] for e in supported if e[0] == 0), default=0)

    @property
    def is_amd(self) -> bool:
        # "AuthenticAMD" and "HygonGenuine", by the first word (EBX).
        return self._vendor[0] in (0x68747541, 0x6F677948)

    def entries(self, apic_id: int) -> list[CpuidEntry]:
        """The leaves of the vCPU with this APIC id."""
        result = [self._patched(entry, apic_id) for entry in self._base]
        result.extend(self._topology_leaf(0xB, apic_id))
        if self._highest >= 0x1F:
            result.extend(self._topology_leaf(0x1F, apic_id))
        return result

    def _patched(self, entry: CpuidEntry, apic_id: int) -> CpuidEntry:
        function, index, flags, eax, ebx, ecx, edx = entry
        t = self._topology
        if function == 0:
            eax = max(eax, 0xB)
        elif function == 1:
            logical = min(1 << _bits(t.threads_per_package), 255)
            ebx = (ebx & 0xFFFF) | logical << 16 | (apic_id & 0xFF) << 24
            ecx |= _HYPERVISOR
            if self._tsc_deadline:
                ecx |= _TSC_DEADLINE
            edx = edx | _HTT if t.threads_per_package > 1 else edx & ~_HTT
        elif function == 4:
            eax = self._cache_sharing(eax)
        elif function == 0x80000001 and self.is_amd:
            ecx = ecx | _AMD_CMP_LEGACY if t.threads_per_package > 1 else ecx & ~_AMD_CMP_LEGACY
        elif function == 0x80000008:
            physical = min(eax & 0xFF, self._max_physical_bits)
            eax = (eax & ~0xFF) | physical
            if self.is_amd:
                count = t.threads_per_package
                ecx = (ecx & ~0xF0FF) | _bits(count) << 12 | min(count - 1, 0xFF)
        elif function == 0x8000001D:
            eax = self._cache_sharing_amd(eax)
        elif function == 0x8000001E:
            core = apic_id >> _bits(t.threads_per_core)
            eax, ebx, ecx = apic_id, (core & 0xFF) | (t.threads_per_core - 1) << 8, 0
        return function, index, flags, eax, ebx, ecx, edx

    def _cache_sharing(self, eax: int) -> int:
        """Leaf 4: levels 1 and 2 belong to a core, level 3 to the package."""
        if eax & 0x1F == 0:
            return eax
        t = self._topology
        level = eax >> 5 & 7
        sharing = t.threads_per_core if level < 3 else t.threads_per_package
        cores = t.cores_per_die * t.dies_per_package
        shared_ids = min((1 << _bits(sharing)) - 1, 0xFFF)
        core_ids = min((1 << _bits(cores)) - 1, 0x3F)
        return (eax & 0x3FFF) | shared_ids << 14 | core_ids << 26

    def _cache_sharing_amd(self, eax: int) -> int:
        if eax & 0x1F == 0:
            return eax
        t = self._topology
        sharing = t.threads_per_core if eax >> 5 & 7 < 3 else t.threads_per_package
        return (eax & ~0x03FFC000) | min(sharing - 1, 0xFFF) << 14

    def _topology_leaf(self, function: int, apic_id: int) -> list[CpuidEntry]:
        """Leaf 0xb or 0x1f: a sub-leaf a level, each with the shift to the next one's id."""
        t = self._topology
        smt = _bits(t.threads_per_core)
        core = smt + _bits(t.cores_per_die)
        package = core + _bits(t.dies_per_package)
        if function == 0x1F and t.dies_per_package > 1:
            levels = [
                (_LEVEL_SMT, smt, t.threads_per_core),
                (_LEVEL_CORE, core, t.threads_per_core * t.cores_per_die),
                (_LEVEL_DIE, package, t.threads_per_package),
            ]
        else:
            levels = [
                (_LEVEL_SMT, smt, t.threads_per_core),
                (_LEVEL_CORE, package, t.threads_per_package),
            ]
        result = [
            (function, i, _SIGNIFICANT_INDEX, shift, count & 0xFFFF, kind << 8 | i, apic_id)
            for i, (kind, shift, count) in enumerate(levels)
        ]
        end = len(levels)
        result.append((function, end, _SIGNIFICANT_INDEX, 0, 0, end, apic_id))
        return result
