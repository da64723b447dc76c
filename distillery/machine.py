"""What can be told of this machine: the processor's name, the cores, where commands are."""

import platform
from pathlib import Path

import psutil


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    process = psutil.Process()
    # macOS does not limit a process to some of the cores, and psutil has no such method there.
    if hasattr(process, "cpu_affinity"):
        return len(process.cpu_affinity())
    return psutil.cpu_count() or 1


def machine_name() -> str:
    """Return the processor's name and the usable cores: speeds compare only where both agree."""
    return f"{processor_name()}, {usable_cores()} cores"


def processor_name() -> str:
    """Return the processor's name: on another one, numbers may differ in their last bits."""
    name = platform.processor() or platform.machine()
    # psutil does not tell the name, and on Linux `platform` tells no more than x86_64.
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return name


def folder_of_commands() -> str:
    """Return what stands before `distillery` and `python` in commands that people copy, so that
    they work where no environment is active: ".venv/bin/", or "" where it is not here."""
    return ".venv/bin/" if Path(".venv/bin/distillery").exists() else ""
