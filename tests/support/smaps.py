"""What the system says of this process's memory, mapping by mapping."""

import re
from pathlib import Path


def mappings() -> list[str]:
    """The text of each: a line of where it lies, and lines of what is known of it."""
    return re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
