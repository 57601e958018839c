"""The arithmetic of a budget adds up, is honoured to the byte, and is refused by name."""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moe_infinity import MoE, bundled_model_path, needs
from moe_infinity.assembly import open_checkpoint
from moe_infinity.checkpoint.packing import pack
from moe_infinity.config import EngineConfig, format_bytes
from moe_infinity.device_plan import DeviceFacts
from moe_infinity.errors import BudgetError, PlanExceededError
from moe_infinity.forecast import (
    decode_s,
    expected_hit_rate,
    forecast,
    forms,
    recommended,
    shrunk,
    verdict,
)
from moe_infinity.machine import Bandwidths
from moe_infinity.model.loading import Anatomy, examine
from moe_infinity.plan import Plan
from moe_infinity.planning import make_plan
from moe_infinity.preparation import opened_source, packing_job
from support.checkpoints import tiny_checkpoint

SPEEDS = Bandwidths(disk_gbps=2.0, memory_gbps=20.0, matvec_gbps=10.0)
MIB = 2**20


def anatomy_of(path: Path, dtype: str | None = None) -> Anatomy:
    checkpoint = open_checkpoint(path)
    try:
        return examine(checkpoint, dtype)
    finally:
        checkpoint.close()


@pytest.fixture(scope="module", autouse=True)
def _measured_once() -> Iterator[None]:
    """What a row of context costs is found by running the model on the meta device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(needs.KvShape, "of", functools.cache(needs.KvShape.of))
        yield


@pytest.fixture(scope="module")
def bundled() -> Anatomy:
    return anatomy_of(bundled_model_path())


@pytest.fixture(scope="module")
def smallest(bundled: Anatomy) -> int:
    return make_plan(bundled, EngineConfig(ram="8GiB")).smallest_budget_bytes


def plan(anatomy: Anatomy, **options: Any) -> Plan:
    return make_plan(anatomy, EngineConfig(**{"ram": "8GiB", **options}))


class TestArithmetic:
    def test_it_adds_up(self, bundled: Anatomy) -> None:
        made = plan(bundled)
        parts = [made.dense_bytes, made.kv_bytes, made.workspace_bytes, made.kept_bytes]
        parts += [made.staging_bytes, made.runtime_bytes, made.cache_bytes]
        assert made.used_bytes == sum(parts)
        assert made.used_bytes <= made.budget_bytes == 8 * 2**30
        assert made.cache_bytes == made.num_slots * made.slot_bytes[0]
        for size in (*parts, made.used_bytes):
            assert format_bytes(size) in made.arithmetic()

    def test_the_bundled_model(self, bundled: Anatomy) -> None:
        made = plan(bundled)
        assert (made.experts_total, made.num_slots, made.working_set) == (256, 256, 32)
        assert made.expert_bytes_total == 256 * 3 * 192 * 96 * 2
        assert made.bytes_per_token == 32 * 3 * 192 * 96 * 2
        assert made.kv_bytes == 2048 * 8 * 2 * 2 * 32 * 2
        assert made.max_context == 2048

    def test_another_dtype_widens_what_is_computed_not_what_is_stored(
        self, bundled: Anatomy
    ) -> None:
        wide = plan(anatomy_of(bundled_model_path(), "float32"))
        made = plan(bundled)
        assert wide.dense_bytes == 2 * made.dense_bytes
        assert wide.kv_bytes == 2 * made.kv_bytes
        assert wide.slot_bytes == made.slot_bytes

    @pytest.mark.parametrize("options", [{"max_context": 64}, {"max_context": 64, "max_batch": 3}])
    def test_kv_is_rows_times_context(self, bundled: Anatomy, options: dict[str, int]) -> None:
        made = plan(bundled, **options)
        assert made.kv_bytes == 64 * options.get("max_batch", 1) * 8 * 2 * 2 * 32 * 2

    def test_slots_grow_with_memory(self, bundled: Anatomy, smallest: int) -> None:
        plans = [
            plan(bundled, ram=smallest + number * 4 * MIB, max_context=512) for number in range(9)
        ]
        slots = [made.num_slots for made in plans]
        assert slots == sorted(slots) and slots[0] < 100 and slots[-1] == 256
        assert all(made.used_bytes <= made.budget_bytes for made in plans)

    def test_the_smallest_budget_beside_a_device_is_one_that_works(
        self, bundled: Anatomy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(needs, "dense_bytes", lambda anatomy: 3 * 2**30)
        monkeypatch.setattr(needs, "resident_bytes", lambda: 2**29)
        facts = DeviceFacts("a device", 24 * 2**30, 24 * 2**30)
        smallest = make_plan(bundled, EngineConfig(ram="16GiB"), facts).smallest_budget_bytes
        assert smallest > 3 * 2**30, "dense weights pass through RAM"
        assert make_plan(bundled, EngineConfig(ram=smallest), facts).num_slots >= 4
        with pytest.raises(BudgetError, match=format_bytes(smallest)):
            make_plan(bundled, EngineConfig(ram=smallest - 16 * MIB), facts)

    def test_a_tokenizer_takes_memory_where_there_is_one(
        self, bundled: Anatomy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(needs, "resident_bytes", lambda: 2**29)

        def runtime_bytes(anatomy: Anatomy, **options: bool) -> int:
            return make_plan(anatomy, EngineConfig(ram="8GiB", **options)).runtime_bytes

        known = bundled.config.vocab_size
        without = dataclasses.replace(bundled, has_tokenizer=False)
        assert bundled.has_tokenizer
        found = [runtime_bytes(without), runtime_bytes(without, grammars=True),
                 runtime_bytes(bundled), runtime_bytes(bundled, grammars=True)]  # fmt: skip
        more = [each - found[0] for each in found]
        assert more == [0, 0, 1600 * known, 3000 * known]

    def test_passes_may_not_take_what_the_allocator_keeps(self, bundled: Anatomy) -> None:
        made = plan(bundled, max_batch=8)
        full = dataclasses.replace(made, budget_bytes=made.used_bytes)
        full.require_room(full.workspace_bytes, "a pass")
        with pytest.raises(PlanExceededError):
            full.require_room(full.workspace_bytes + 1, "a pass")

    def test_contexts_grow_with_memory(
        self, bundled: Anatomy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(needs, "resident_bytes", lambda: 2**29)
        smallest = plan(bundled, max_batch=8).smallest_budget_bytes
        budgets = [smallest + number * 50 * MIB for number in range(12)]
        contexts = [plan(bundled, ram=budget, max_batch=8).max_context for budget in budgets]
        assert contexts == sorted(contexts) and contexts[0] < contexts[-1] == 2048

    @pytest.mark.parametrize("num_slots", [4, 5, 77, 256])
    def test_ram_slots_bind_to_the_slot(self, bundled: Anatomy, num_slots: int) -> None:
        assert plan(bundled, ram_slots=num_slots).num_slots == num_slots
        assert plan(bundled, ram_slots=num_slots + 1000).num_slots == 256

    def test_both_bounds_bind(self, bundled: Anatomy, smallest: int) -> None:
        tight = {"ram": smallest, "max_context": 512}
        by_bytes = plan(bundled, **tight).num_slots
        assert plan(bundled, **tight, ram_slots=256).num_slots == by_bytes
        assert plan(bundled, **tight, ram_slots=by_bytes - 1).num_slots == by_bytes - 1

    def test_slots_to_read_into_early_are_paid_for(self, bundled: Anatomy, smallest: int) -> None:
        """Where not everything fits, and there are enough."""
        for ram in range(smallest, smallest + 40 * MIB, 2 * MIB):
            made = plan(bundled, ram=ram, max_context=512)
            assert made.used_bytes <= made.budget_bytes
            assert made.cache_bytes == (made.num_slots + made.num_early) * made.slot_bytes[0]
            assert made.num_early == (2 if 62 <= made.num_slots < 256 else 0)
            assert (" and 2 spare)" in made.arithmetic()) == (made.num_early == 2)
        assert made.num_slots == 256

    def test_slots_by_number_have_them_beside(self, bundled: Anatomy) -> None:
        made = plan(bundled, ram_slots=10)
        assert (made.num_slots, made.num_early) == (10, 2)
        assert plan(bundled, ram_slots=256).num_early == 0
        assert plan(bundled, ram_slots=10, num_read_threads=2).num_early == 0

    def test_auto_leaves_something_to_the_machine(self, bundled: Anatomy) -> None:
        from moe_infinity.machine import available_bytes, resident_bytes

        made = make_plan(bundled, EngineConfig())
        assert resident_bytes() < made.budget_bytes < available_bytes() + resident_bytes()

    def test_long_contexts_are_shortened_to_a_quarter_of_the_budget(self, tmp_path: Path) -> None:
        long = anatomy_of(tiny_checkpoint(tmp_path / "long", max_position_embeddings=10**6))
        made = plan(long, ram="8GiB")
        assert made.max_context == 32_768
        assert plan(long, ram="8GiB", max_context=40_000).max_context == 40_000
        small = plan(long, ram=made.smallest_budget_bytes + 4 * MIB)
        assert small.kv_bytes <= small.budget_bytes / 4
        assert 512 <= small.max_context < 32_768


class TestSizeClasses:
    """Experts of different sizes: every class gets its minimum first."""

    @pytest.fixture(scope="class")
    def anatomy(self, bundled: Anatomy) -> Anatomy:
        """The bundled model as if the experts of half of its layers were five times as large."""
        specs = {
            key: dataclasses.replace(
                spec,
                weight_bytes=spec.weight_bytes * 5,
                ranges=tuple(r._replace(num_bytes=r.num_bytes * 5) for r in spec.ranges),
            )
            if key.layer % 2
            else spec
            for key, spec in bundled.specs.items()
        }
        return dataclasses.replace(bundled, specs=specs)

    def test_there_are_two(self, anatomy: Anatomy) -> None:
        made = plan(anatomy)
        assert made.class_of_layer == (0, 1) * 4
        assert made.slots_per_class == (128, 128)
        assert made.slot_bytes[1] == 5 * made.slot_bytes[0]

    def test_the_smallest_budget_works(self, anatomy: Anatomy) -> None:
        least = plan(anatomy).smallest_budget_bytes
        made = plan(anatomy, ram=least)
        assert min(made.slots_per_class) >= 4

    @pytest.mark.parametrize("num_slots", [8, 9, 33, 255])
    def test_ram_slots(self, anatomy: Anatomy, num_slots: int) -> None:
        made = plan(anatomy, ram_slots=num_slots)
        assert num_slots - 1 <= made.num_slots <= num_slots
        assert min(made.slots_per_class) >= 4

    def test_too_few_slots_say_how_many(self, anatomy: Anatomy) -> None:
        with pytest.raises(BudgetError, match="ram_slots: got 7, expected at least 8"):
            plan(anatomy, ram_slots=7)

    def test_slots_grow_with_memory(self, anatomy: Anatomy) -> None:
        least = plan(anatomy).smallest_budget_bytes
        options = {"max_context": 512}
        plans = [plan(anatomy, ram=least + n * 12 * MIB, **options) for n in range(9)]
        assert [p.num_slots for p in plans] == sorted(p.num_slots for p in plans)
        assert all(p.used_bytes <= p.budget_bytes for p in plans)
        assert plans[-1].num_slots == 256


class TestTooSmall:
    def test_the_message_has_the_arithmetic_and_a_way_out(self, bundled: Anatomy) -> None:
        with pytest.raises(BudgetError) as caught:
            plan(bundled, ram="100MiB")
        message = str(caught.value)
        assert "will not fit into ram=100.00 MiB" in message
        for term in ("dense weights", "KV cache", "logits", "staging", "runtime", "expert slots"):
            assert term in message
        assert "at least 4 expert slots are needed" in message
        assert "the smallest budget that works is" in message

    def test_a_context_that_was_asked_for_is_blamed(self, bundled: Anatomy, smallest: int) -> None:
        with pytest.raises(BudgetError, match="a smaller max_context needs less"):
            plan(bundled, ram=smallest, max_context=200_000)

    def test_the_smallest_budget_opens_and_runs(self, smallest: int) -> None:
        with MoE(bundled_model_path(), ram=smallest) as moe:
            assert moe.plan.num_slots >= 4
            assert moe.generate([[5, 6, 7]], max_new_tokens=3).shape[0] == 1
            moe.check_integrity()


class TestForecast:
    def test_typical_hit_rates_grow_from_nothing_to_all(self) -> None:
        rates = [expected_hit_rate(share / 100) for share in range(101)]
        assert rates[0] == 0 and rates[-1] == 1 and rates == sorted(rates)
        assert all(rate >= share / 100 for share, rate in enumerate(rates))
        assert expected_hit_rate(7.0) == 1.0

    def test_by_hand(self, bundled: Anatomy) -> None:
        made = dataclasses.replace(
            plan(bundled), read_bytes_per_token=10**9, bytes_per_token=10**9, dense_read_bytes=0
        )
        without_layers = decode_s(made, 0, 0.5, SPEEDS)
        read_s = 0.5 / 2.0 / 0.6  # few at once
        assert without_layers == pytest.approx(read_s + 1.0 / 10.0 - 0.5 * 0.1)  # overlapped
        assert decode_s(made, 10, 0.5, SPEEDS) > without_layers

    @pytest.mark.parametrize("num_slots", [4, 20, 64, 256])
    def test_the_band_is_in_order(self, bundled: Anatomy, num_slots: int) -> None:
        band = forecast(plan(bundled, ram_slots=num_slots), 0.01, SPEEDS)
        assert 0 < band.tokens_per_s_low <= band.tokens_per_s <= band.tokens_per_s_high
        assert band.hit_rate_low == num_slots / 256 <= band.hit_rate

    def test_a_known_hit_rate_is_believed(self, bundled: Anatomy) -> None:
        made = plan(bundled, ram_slots=64)
        assert forecast(made, 0.01, SPEEDS, hit_rate=0.3).hit_rate == 0.3
        band = forecast(made, 0.01, SPEEDS, hit_rate=0.1)
        assert band.tokens_per_s_low <= band.tokens_per_s

    @pytest.mark.parametrize(
        ("num_slots", "words"),
        [
            (256, "every expert stays in memory"),
            (10, "will be slow, because one token uses 32 experts and only 10 fit"),
            (40, "limited by the disk"),
            (200, "fits well"),
        ],
    )
    def test_the_verdict_is_plain(self, bundled: Anatomy, num_slots: int, words: str) -> None:
        made = plan(bundled, ram_slots=num_slots)
        assert words in verdict(made, forecast(made, 0.01, SPEEDS))


class TestForms:
    def made(self, bundled: Anatomy) -> Plan:
        """A tenth of the experts fit."""
        made = plan(bundled, ram_slots=26, max_context=256)
        return dataclasses.replace(made, budget_bytes=made.used_bytes)

    def test_smaller_forms_keep_more(self, bundled: Anatomy) -> None:
        made = self.made(bundled)
        found = forms(made, 16, 0.01, SPEEDS)
        assert [form.experts for form in found] == ["exact12", "int8", "int4"]
        shares = [made.share_resident, *(form.share_resident for form in found)]
        rates = [forecast(made, 0.01, SPEEDS).tokens_per_s, *(form.tokens_per_s for form in found)]
        assert shares == sorted(shares) and rates == sorted(rates)
        assert shares[1] == pytest.approx(shares[0] * 16 / 12, rel=0.05)
        assert [form.experts for form in forms(made, 32, 0.01, SPEEDS)] == ["int8", "int4"]

    def test_they_are_what_packing_brings(self, bundled: Anatomy, tmp_path: Path) -> None:
        made = self.made(bundled)
        with opened_source(bundled_model_path()) as source:
            pack(packing_job(source, tmp_path / "packed", "int4", "int4"))
        real, guess = plan(anatomy_of(tmp_path / "packed")), shrunk(made, 4.5 / 16, 4.5 / 16)
        assert guess.bytes_per_token == pytest.approx(real.bytes_per_token, rel=0.02)
        assert guess.slot_bytes[0] == pytest.approx(real.slot_bytes[0], rel=0.1)  # whole pages
        assert guess.dense_bytes < real.dense_bytes < made.dense_bytes  # 8 bits at the end

    def test_the_most_exact_that_fits_well_is_recommended(self, bundled: Anatomy) -> None:
        def choice(num_slots: int) -> str | None:
            made = plan(bundled, ram_slots=num_slots)
            made = dataclasses.replace(made, budget_bytes=made.used_bytes)
            found = recommended(forecast(made, 0.01, SPEEDS), forms(made, 16, 0.01, SPEEDS))
            return found.experts if found else None

        assert [choice(n) for n in (256, 55, 40, 5)] == [None, "exact12", "int8", "int4"]
