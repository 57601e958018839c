"""What tests of the command line share."""

from pathlib import Path

import pytest

from support.checkpoints import tiny_checkpoint


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A checkpoint of its own for each test, to be spoiled."""
    return tiny_checkpoint(tmp_path / "tiny")
