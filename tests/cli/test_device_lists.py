"""``--device`` and ``--vram`` lists: several devices, each with a budget of its own."""

import json

import pytest

from support.command_line import refused, run

BOTH = ("--device", "simulated:24,simulated:12")
FEW = ("--max-new-tokens", 3, "--max-context", 512)


def test_each_device_has_its_own_budget_and_the_words_are_the_same() -> None:
    result = run("run", "def main():", *FEW, *BOTH, "--vram", "16MiB,8MiB")
    assert result.code == 0, result.both
    for budget in ("16.00 MiB of simulated, 24 GB/s", "8.00 MiB of simulated, 12 GB/s"):
        assert budget in result.err
    assert "of 256 experts fit on simulated, 24 GB/s + simulated, 12 GB/s" in result.err
    assert "bit-exact" in result.err
    assert result.out == run("run", "def main():", *FEW, "--device", "cpu").out


def test_a_plan_shows_what_lies_on_each() -> None:
    options = ("--max-context", 512, *BOTH, "--vram", "16MiB,8MiB", "--disk-gbps", 1, "--json")
    report = json.loads(run("plan", *options).out)
    first, (second,) = report["device"], report["others"]
    assert (first["budget_bytes"], second["budget_bytes"]) == (16 * 1024**2, 8 * 1024**2)
    assert first["dense_bytes"] > second["dense_bytes"] == 0
    assert sum(first["slots_per_class"]) > 0 < sum(second["slots_per_class"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--device", "simulated:24,cpu"), "expected several of one kind"),
        (("--device", "simulated:24,"), "or several such as cuda:0,cuda:1"),
        (("--device", "simulated:24,simulated:0"), "got simulated:0, expected GB/s above 0"),
        ((*BOTH, "--vram", "16MiB,8MiB,4MiB"), "vram: got 3 sizes"),
        ((*BOTH, "--vram", "16MiB,8KiB"), "the smallest budget that works is"),
        (("--device", "cpu", "--vram", "8MiB,8MiB"), "vram: got 2 sizes"),
    ],
    ids=str,
)
def test_a_bad_list_is_refused(options: tuple[str, ...], words: str) -> None:
    for command in (("run", "def main():"), ("plan",)):
        assert words in refused(*command, *options)


def test_help_says_how_lists_are_written() -> None:
    words = " ".join(run("plan", "--help").out.replace("│", " ").split())
    assert "cuda:0,cuda:1: the model on the first" in words
    assert "'24GiB,pcie4;12GiB,pcie3'" in words  # a shell ends its command at a bare semicolon
