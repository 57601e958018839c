"""Policies and predictors are found by file name or 'module:Class'; errors are not masked."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_infinity import policies, predictors
from moe_infinity.errors import ConfigError, UnknownNameError
from moe_infinity.policies import find_policy, policy_names
from moe_infinity.predictors import find_predictor, predictor_names

POLICY = """
import numpy as np
from moe_infinity.policies.base import CachePolicy
class Policy(CachePolicy):
    def on_event(self, event): pass
    def keep_scores(self, layer): return np.zeros(self.grid)
"""
PREDICTOR = """
from moe_infinity.predictors.base import ExpertPredictor
class Predictor(ExpertPredictor):
    def observe(self, event): pass
    def predict(self): return None
"""
FAMILIES = [
    pytest.param(policies, find_policy, policy_names, POLICY, id="policy"),
    pytest.param(predictors, find_predictor, predictor_names, PREDICTOR, id="predictor"),
]
Find = Callable[[str], type]


@pytest.mark.parametrize(("package", "find", "names", "source"), FAMILIES)
class TestRegistry:
    def test_a_new_file_is_a_new_member(
        self,
        package: Any,
        find: Find,
        names: Callable[[], list[str]],
        source: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        (tmp_path / "brand_new.py").write_text(source)
        (tmp_path / "_helper.py").write_text("")
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
        assert "brand_new" in names() and "_helper" not in names()
        assert find("brand_new").__name__ in ("Policy", "Predictor")

    def test_a_class_of_any_module(
        self,
        package: Any,
        find: Find,
        names: Callable[[], list[str]],
        source: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        module = f"mine_{find.__name__}"
        (tmp_path / f"{module}.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        kind = find.__name__.removeprefix("find_").capitalize()
        assert find(f"{module}:{kind}").__module__ == module
        with pytest.raises(ConfigError, match="expected a subclass of"):
            find(f"{module}:Nonesuch")
        with pytest.raises(ConfigError, match="expected a subclass of"):
            find("pathlib:Path")

    @pytest.mark.parametrize(
        "name",
        ["nonesuch", "base", "", "no.such.module:Policy", "_private", ":Policy", ".near:Policy"],
    )
    def test_an_unknown_name_lists_the_known(
        self, package: Any, find: Find, names: Callable[[], list[str]], source: str, name: str
    ) -> None:
        with pytest.raises(UnknownNameError) as caught:
            find(name)
        assert repr(name) in str(caught.value)
        for known in names():
            assert known in str(caught.value)

    @pytest.mark.parametrize(
        "broken", ["import no_such_package_at_all", "raise ImportError('x')", "1 / 0"]
    )
    def test_an_error_inside_a_member_is_told_with_its_line(
        self,
        package: Any,
        find: Find,
        names: Callable[[], list[str]],
        source: str,
        broken: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        (tmp_path / "broken_member.py").write_text(broken)
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
        monkeypatch.syspath_prepend(tmp_path)
        for name in ("broken_member", "broken_member:Policy"):
            with pytest.raises(
                ConfigError, match=r"cannot be imported.*broken_member.py:1"
            ) as caught:
                find(name)
            assert not isinstance(caught.value, UnknownNameError)
