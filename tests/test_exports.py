"""The public surface is one file: few names, all there, cheap to import."""

import subprocess
import sys

import numpy as np
import pytest

import moe_infinity
from moe_infinity import cli
from moe_infinity.versions import version_of


def test_every_public_name_is_there() -> None:
    for name in moe_infinity.__all__:
        assert getattr(moe_infinity, name).__name__ == name


def test_there_are_few_and_they_are_sorted() -> None:
    assert len(moe_infinity.__all__) < 10
    assert sorted(moe_infinity.__all__) == list(moe_infinity.__all__)
    assert {"MoE", "MoEInfinityError", "Stats", "bundled_model_path"} <= set(moe_infinity.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"moe_infinity.*NoSuchName"):
        _ = moe_infinity.NoSuchName


def test_every_error_is_one_of_the_tree() -> None:
    from moe_infinity import errors

    found = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, Exception)]
    assert len(found) > 10
    assert all(issubclass(e, moe_infinity.MoEInfinityError) for e in found)
    assert all(e.__name__ in (errors.__doc__ or "") for e in found), "drawn in the docstring"


def test_the_commands_are_there_before_torch_is_loaded() -> None:
    """Help, and what is wrong with an option, must not take seconds."""
    program = (
        "import sys; from moe_infinity.cli.app import build_app; build_app()\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'fastapi')))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_importing_the_package_loads_no_torch() -> None:
    program = (
        "import sys, moe_infinity, moe_infinity.policies, moe_infinity.predictors\n"
        "import moe_infinity.residency.residency, moe_infinity.simulator.belady\n"
        "import moe_infinity.errors, moe_infinity.stats\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_the_command_by_its_module_name() -> None:
    command = [sys.executable, "-m", "moe_infinity", "run", "--help"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "Usage: moe-infinity run" in said


def test_versions_of_what_is_here_and_what_is_not() -> None:
    assert version_of("numpy") == np.__version__
    assert version_of("no-such-package") == "not installed"


def test_ctrl_c_while_libraries_are_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(arguments: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", interrupted)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130
