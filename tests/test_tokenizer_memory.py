"""What tokenizers and grammars over them take is no more than plans leave for them."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from moe_infinity import needs
from moe_infinity.mapped_code import can_let_go

NUM_IDS = 60_000
LOAD = """
import sys
from pathlib import Path
from transformers import AutoTokenizer
from moe_infinity import MoE, bundled_model_path
from moe_infinity.machine import peak_resident_bytes, resident_bytes
from moe_infinity.server.grammars import Grammars

Grammars(AutoTokenizer.from_pretrained(bundled_model_path()), 4096, [1]).prepare()


def peak(make):
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_bytes()
    made = make()
    return made, peak_resident_bytes() - before


tokenizer, loading = peak(lambda: AutoTokenizer.from_pretrained(sys.argv[1]))
grammars = Grammars(tokenizer, len(tokenizer), [1])
print(len(tokenizer), loading, peak(lambda: grammars.tokens)[1])
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of many tokens, as they are saved."""
    generator = random.Random(1)
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges, short = [], list(vocab)
    while len(vocab) < NUM_IDS:
        pair = (generator.choice(short), generator.choice(short))
        if len("".join(pair)) <= 9 and "".join(pair) not in vocab:
            vocab["".join(pair)] = len(vocab)
            merges.append(pair)
            short += ["".join(pair)] if len("".join(pair)) <= 5 else []
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not can_let_go(), reason="Linux forgets the largest size a process had")
@pytest.mark.parametrize("kind", ["PreTrainedTokenizerFast", "Qwen2Tokenizer", "GPTNeoXTokenizer"])
def test_within_what_is_planned(large: Path, kind: str) -> None:
    (large / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    said = subprocess.check_output([sys.executable, "-c", LOAD, str(large)], text=True)
    num_ids, loading, grammars = map(int, said.split())
    assert NUM_IDS <= num_ids < NUM_IDS + 100
    assert NUM_IDS * 200 < loading < NUM_IDS * needs._TOKENIZER_BYTES_PER_ID
    assert NUM_IDS * 200 < grammars < NUM_IDS * needs._GRAMMAR_BYTES_PER_ID
