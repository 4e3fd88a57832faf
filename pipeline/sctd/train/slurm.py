"""SLURM's queue, and the times that it reads and writes."""

import subprocess


def squeue(job: str, columns: str) -> str | None:
    """What squeue prints about a job, empty if it is not in the queue; None if there is no answer."""
    command = ["squeue", "-h", "-j", job, "-o", columns]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def seconds_of(time: str) -> int | None:
    """Of minutes, M:S, H:M:S, D-H, D-H:M or D-H:M:S; None for anything else, such as UNLIMITED."""
    days, dash, clock = time.rpartition("-")
    parts = clock.split(":")
    numbers = [days, *parts] if dash else parts
    if len(parts) > 3 or not all(number.isascii() and number.isdecimal() for number in numbers):
        return None
    unit = 3600 if dash or len(parts) == 3 else 60  # of the first part
    return 86400 * int(days or 0) + sum(int(part) * unit // 60**place for place, part in enumerate(parts))
