"""The engine's words are the model's own: to the last bit among its own settings, and stock's."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from moe_infinity import MoE, bundled_model_path
from moe_infinity.config import learned_path
from moe_infinity.errors import PlanExceededError
from moe_infinity.policies import policy_names
from moe_infinity.predictors import find_predictor, predictor_names
from moe_infinity.training import learned, sequence
from support.checkpoints import tiny_checkpoint

BUDGET = "8GiB"
POLICIES = tuple(policy_names())
PREDICTORS = [n for n in predictor_names() if not find_predictor(n).needs_future]


def some_always(names: list[str], always: tuple[str, ...]) -> list[Any]:
    """All of them, but only these where nobody asks for what is slow."""
    assert set(always) <= set(names)
    return [pytest.param(n, marks=[] if n in always else pytest.mark.slow) for n in names]


CAPACITIES = (4, 8, 13, 64, 256)  # of 256; 4 is the minimum
# In the checkpoint's dtype every policy at a few slots, the default one at all capacities; in
# another dtype each capacity once.
SETTINGS = [("bfloat16", policy, 13) for policy in POLICIES if policy != "next_use"]
SETTINGS += [("bfloat16", "next_use", slots) for slots in CAPACITIES]
SETTINGS += [("float32", *pair) for pair in zip(POLICIES, CAPACITIES, strict=False)]
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
DTYPES = ("bfloat16", "float32")
NUM_DECODE_STEPS = 4
CHUNK_TOLERANCE = 2e-4  # float32 logits of about 20, another order of sums


def prompt(length: int = 40, seed: int = 0) -> torch.Tensor:
    """[1, length] ids of ordinary tokens."""
    return torch.randint(
        1, 4000, (1, length), generator=torch.Generator().manual_seed(seed)
    )  # [1, S] int64


def steps(model: Any, new_cache: Any) -> list[torch.Tensor]:
    """Logits of a prefill and of teacher-forced decode steps with a cache."""
    ids = prompt(40 + NUM_DECODE_STEPS)
    cache = new_cache()
    with torch.inference_mode():
        logits = [model(ids[:, :40], past_key_values=cache, use_cache=True).logits]
        logits += [
            model(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits
            for i in range(40, 40 + NUM_DECODE_STEPS)
        ]
    return logits


@pytest.fixture(scope="module")
def references() -> dict[str, list[torch.Tensor]]:
    """By dtype, the engine's logits with every expert in memory."""
    found = {}
    for dtype in DTYPES:
        with MoE(bundled_model_path(), ram=BUDGET, dtype=dtype) as moe:
            found[dtype] = steps(moe, moe.new_cache)
    return found


def stock(path: Path, dtype: str, implementation: str = "eager") -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    model.set_experts_implementation(implementation)
    return model.eval()


@pytest.fixture(scope="module")
def in_float32() -> Iterator[MoE]:
    with MoE(bundled_model_path(), ram=BUDGET, dtype="float32", ram_slots=40, max_batch=4) as moe:
        yield moe


@pytest.fixture(scope="module")
def stock_in_float32() -> Any:
    return stock(bundled_model_path(), "float32")


@pytest.fixture(scope="module")
def _taught(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A state folder in which whatever can be fitted has been fitted to the bundled model."""
    folder = tmp_path_factory.mktemp("taught")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOE_INFINITY_STATE_DIR", str(folder))
        with MoE(bundled_model_path(), ram=BUDGET) as moe, moe.recording(hidden=True) as recorder:
            for seed in range(3):
                moe.generate(prompt(40, seed), max_new_tokens=8)
            trace, identity = recorder.trace(), moe.checkpoint.identity
        for name, training in (("learned", learned), ("sequence", sequence)):
            training.train(trace, learned_path(identity, name))
        yield


@pytest.mark.usefixtures("_taught")
@pytest.mark.parametrize("prefetch", some_always(PREDICTORS, ("none", "eamc", "gate_lookahead")))
def test_bit_identical_whatever_is_loaded_ahead(
    references: dict[str, list[torch.Tensor]], prefetch: str
) -> None:
    with MoE(bundled_model_path(), ram=BUDGET, ram_slots=48, prefetch=prefetch) as moe:
        for _ in range(3):  # then it has learned something
            moe.generate(prompt(8), max_new_tokens=4)
            got = steps(moe, moe.new_cache)
            pairs = zip(got, references["bfloat16"], strict=True)
            assert all(torch.equal(one, other) for one, other in pairs)
        stats = moe.stats(total=True)
        assert not stats.faults
        assert (stats.decode.prefetch_bytes > 0) is (prefetch != "none")


@pytest.mark.parametrize(("dtype", "policy", "num_slots"), SETTINGS)
def test_bit_identical_at_every_setting(
    references: dict[str, list[torch.Tensor]], dtype: str, policy: str, num_slots: int
) -> None:
    expected = references[dtype]
    # The kernel's own reads and both numbers of threads meet many policies and capacities.
    num_threads = (None, 1, 8)[(POLICIES.index(policy) + CAPACITIES.index(num_slots)) % 3]
    with MoE(
        bundled_model_path(),
        ram=BUDGET,
        dtype=dtype,
        policy=policy,
        ram_slots=num_slots,
        num_read_threads=num_threads,
    ) as moe:
        assert moe.plan.num_slots == num_slots
        found = steps(moe, moe.new_cache)
        moe.check_integrity()
    for number, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(mine, theirs), f"step {number}"


def test_a_warm_cache_changes_nothing(references: dict[str, list[torch.Tensor]]) -> None:
    with MoE(bundled_model_path(), ram=BUDGET, ram_slots=20) as moe:
        for seed in range(3):
            moe.generate(prompt(9, seed), max_new_tokens=3)
        assert all(map(torch.equal, steps(moe, moe.new_cache), references["bfloat16"]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_within_the_spread_of_stock(references: dict[str, list[torch.Tensor]], dtype: str) -> None:
    mine = references[dtype]
    theirs = []
    for implementation in IMPLEMENTATIONS:
        model = stock(bundled_model_path(), dtype, implementation)
        theirs.append(steps(model, lambda m=model: transformers.DynamicCache(config=m.config)))
    eager = theirs[0]
    spread = max(_difference(eager, other) for other in theirs[1:])
    assert spread > 0
    assert _difference(eager, mine) <= 2 * spread


def _difference(first: list[torch.Tensor], second: list[torch.Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(first, second, strict=True))


def test_generated_tokens_are_stocks(in_float32: MoE, stock_in_float32: Any) -> None:
    ids = in_float32.tokenizer("def main():\n    for name in", return_tensors="pt").input_ids
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    expected = stock_in_float32.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=None, **options
    )
    assert in_float32.generate(ids, **options).tolist() == expected.tolist()


def test_generated_logits_are_the_same_at_every_capacity() -> None:
    def scores(num_slots: int) -> tuple[torch.Tensor, ...]:
        with MoE(bundled_model_path(), ram=BUDGET, ram_slots=num_slots) as moe:
            return moe.generate(
                prompt(), max_new_tokens=5, output_logits=True, return_dict_in_generate=True
            ).logits

    assert all(map(torch.equal, scores(4), scores(256)))


@pytest.mark.parametrize(
    "options",
    [{"use_cache": False}, {"prompt_lookup_num_tokens": 3}, {"cache_implementation": "static"}],
)
def test_other_ways_to_the_same_tokens(
    in_float32: MoE, stock_in_float32: Any, options: dict[str, Any]
) -> None:
    ids = in_float32.tokenizer("1, 2, 3, 4, 1, 2, 3,", return_tensors="pt").input_ids
    common = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    expected = stock_in_float32.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=None, **common
    )
    assert in_float32.generate(ids, **common, **options).tolist() == expected.tolist()
    in_float32.check_integrity()


def test_beam_search_is_stocks(in_float32: MoE, stock_in_float32: Any) -> None:
    ids = prompt(12)
    options = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    expected = stock_in_float32.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert in_float32.generate(ids, **options).tolist() == expected.tolist()
    in_float32.check_integrity()


def test_sampling_follows_the_seed(in_float32: MoE) -> None:
    def sample(seed: int) -> list[int]:
        torch.manual_seed(seed)
        out = in_float32.generate(
            prompt(10), max_new_tokens=12, do_sample=True, temperature=1.0, top_k=0
        )
        return out[0].tolist()

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


class TestLeftPaddedBatch:
    """Rows of different lengths, padded on the left, are what each is alone."""

    LENGTHS = (5, 17, 11)

    @pytest.fixture(scope="class")
    def batch(self) -> dict[str, torch.Tensor]:
        rows = [prompt(length, seed) for seed, length in enumerate(self.LENGTHS)]
        width = max(self.LENGTHS)
        pads = [torch.zeros(1, width - row.shape[1], dtype=torch.long) for row in rows]
        ones = [torch.ones_like(row) for row in rows]
        pairs = list(zip(pads, rows, ones, strict=True))
        return {
            "input_ids": torch.cat([torch.cat([pad, row], 1) for pad, row, _ in pairs]),
            "attention_mask": torch.cat([torch.cat([pad, one], 1) for pad, _, one in pairs]),
        }

    def test_logits(self, in_float32: MoE, batch: dict[str, torch.Tensor]) -> None:
        options: dict[str, Any] = {
            "max_new_tokens": 4,
            "do_sample": False,
            "eos_token_id": None,
            "output_logits": True,
            "return_dict_in_generate": True,
        }
        together = in_float32.generate(**batch, **options)
        for number, length in enumerate(self.LENGTHS):
            row = batch["input_ids"][number : number + 1, -length:]
            alone = in_float32.generate(row, **options)
            assert together.sequences[number, -4:].tolist() == alone.sequences[0, -4:].tolist()
            for mine, theirs in zip(together.logits, alone.logits, strict=True):
                torch.testing.assert_close(mine[number], theirs[0], atol=2e-4, rtol=0)

    def test_pads_cause_no_loads(self, batch: dict[str, torch.Tensor]) -> None:
        options: dict[str, Any] = {"ram": BUDGET, "dtype": "float32"}
        with MoE(bundled_model_path(), **options, max_batch=3) as moe:
            moe.generate(**batch, max_new_tokens=1)
            together = moe.residency()
        with MoE(bundled_model_path(), **options) as moe:
            for number, length in enumerate(self.LENGTHS):
                moe.generate(batch["input_ids"][number, -length:], max_new_tokens=1)
            assert moe.residency() == together
        assert any(tiers["disk"] for tiers in together)


class TestChunkedPrefill:
    @pytest.fixture(scope="class")
    def words(self, in_float32: MoE) -> torch.Tensor:
        """The answer to the prompt in one piece."""
        return in_float32.generate(prompt(41), max_new_tokens=6)

    @pytest.fixture(scope="class")
    def whole(self, in_float32: MoE) -> torch.Tensor:
        return in_float32(prompt(41)).logits

    @pytest.fixture(autouse=True)
    def _small_chunks(
        self, monkeypatch: pytest.MonkeyPatch, words: torch.Tensor, whole: torch.Tensor
    ) -> None:
        for module in ("engine", "model.experts"):
            monkeypatch.setattr(f"moe_infinity.{module}.PREFILL_CHUNK_TOKENS", 10)

    def test_generate(self, in_float32: MoE, words: torch.Tensor) -> None:
        assert in_float32.generate(prompt(41), max_new_tokens=6).tolist() == words.tolist()

    def test_forward(self, in_float32: MoE, whole: torch.Tensor) -> None:
        chunked = in_float32(prompt(41)).logits
        torch.testing.assert_close(chunked, whole, atol=CHUNK_TOLERANCE, rtol=0)

    def test_a_last_chunk_of_one_token_is_prefill(self, in_float32: MoE) -> None:
        in_float32.generate(prompt(41), max_new_tokens=6)
        report = in_float32.stats()
        assert (report.prefill.num_tokens, report.decode.num_tokens) == (41, 5)

    def test_left_padding(self, in_float32: MoE, words: torch.Tensor) -> None:
        pads = torch.zeros(1, 5, dtype=torch.long)
        padded = torch.cat([torch.cat([pads, prompt(41)], 1), prompt(46, 1)])
        mask = torch.ones_like(padded)
        mask[0, :5] = 0
        out = in_float32.generate(padded, attention_mask=mask, max_new_tokens=6)
        assert out[0, -6:].tolist() == words[0, -6:].tolist()


class TestContext:
    """The plan's context holds to the token, and its cache is written in place."""

    @pytest.fixture(scope="class")
    def moe(self) -> Iterator[MoE]:
        with MoE(bundled_model_path(), ram=BUDGET, max_context=24) as moe:
            yield moe

    def test_all_of_it_can_be_used(self, moe: MoE) -> None:
        assert moe.generate(prompt(16), max_new_tokens=8, eos_token_id=None).shape == (1, 24)
        assert moe(prompt(24)).logits.shape[:2] == (1, 24)

    def test_one_token_more_is_refused(self, moe: MoE) -> None:
        with pytest.raises(PlanExceededError, match=r"got 25 tokens.*at most.*24.*max_context=25"):
            moe.generate(prompt(16), max_new_tokens=9)
        with pytest.raises(PlanExceededError, match="got 25 tokens"):
            moe(prompt(25))

    def test_steps_by_hand_are_refused_too(self, moe: MoE) -> None:
        cache = moe.new_cache()
        moe(prompt(24), past_key_values=cache)
        with pytest.raises(PlanExceededError, match="got 25 tokens"):
            moe(prompt(1), past_key_values=cache)
        assert moe.generate(prompt(4), max_new_tokens=2, eos_token_id=None).shape == (1, 6)

    def test_keys_and_values_stay_where_they_are(self, moe: MoE) -> None:
        cache = moe.new_cache()
        moe(prompt(8), past_key_values=cache)
        places = [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers]
        for seed in range(3):
            moe(prompt(1, seed), past_key_values=cache)
        assert cache.get_seq_length() == 11
        now = [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers]
        assert now == places


@pytest.mark.parametrize("tied", [True, False])
def test_head_tied_or_not(tmp_path: Path, tied: bool) -> None:
    path = tiny_checkpoint(tmp_path / "tiny", tie_word_embeddings=tied)
    ids = torch.arange(1, 13)[None]
    with torch.no_grad():
        expected = stock(path, "float32")(ids).logits
    with MoE(path, ram=BUDGET, ram_slots=5) as moe:
        is_tied = moe.model.lm_head.weight is moe.model.model.embed_tokens.weight
        assert is_tied == tied
        torch.testing.assert_close(moe(ids).logits, expected, atol=1e-5, rtol=1e-5)
