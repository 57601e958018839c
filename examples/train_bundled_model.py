"""Trains the bundled model from scratch: tokenizer, data, Qwen3-MoE, AdamW, checkpoint. It knows
nothing of moe_infinity: what comes out is a plain transformers checkpoint.

    python examples/train_bundled_model.py --corpus CORPUS_DIR --out OUT_DIR

CORPUS_DIR holds NAME.train.jsonl.xz and NAME.valid.jsonl.xz for each of DOMAINS, with one
document per line: {"text": ..., "domain": ...}. The whole run takes 90 to 100 minutes on two cores.
Legend of letters: B rows of a batch, S tokens of a row.
"""

import argparse
import json
import logging
import lzma
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

DOMAINS = (
    "docs_python",
    "code_python",
    "lang_de",
    "lang_fr",
    "math_gsm8k",
    "literature",
    "dict_wordnet",
    "code_rust",
)
END_OF_TEXT = "<|endoftext|>"  # token 0: between documents, and for beginning, end and padding
VOCAB_SIZE = 4096
SEQUENCE_LENGTH = 256
BATCH_SIZE = 16
PEAK_LR = 3e-3
# Warm-up and floor as read off the learning rates in the bundled model's training log.
FINAL_LR_SHARE = 0.02
WARMUP_STEPS = 100
DECAY_SHARE = 0.4
BALANCING_COEFFICIENT = 0.003
# The log does not name these; with them the loss follows its first lines (train_bundled_start).
ADAM_BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
MAX_GRADIENT_NORM = 1.0
NUM_EVAL_ROWS = 16

Tokens = NDArray[np.uint16]
logger = logging.getLogger("train_bundled_model")


# --- Data ------------------------------------------------------------------------------------


def read_texts(corpus: Path, domain: str, split: str) -> Iterator[str]:
    path = corpus / f"{domain}.{split}.jsonl.xz"
    if not path.exists():
        raise SystemExit(f"{path}: no such file; --corpus must hold this file for all of {DOMAINS}")
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def train_tokenizer(corpus: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the training texts of all domains."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B:1")
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (text for domain in DOMAINS for text in read_texts(corpus, domain, "train"))
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=model_config().max_position_embeddings,
    )


def encode_domain(tokenizer: PreTrainedTokenizerFast, texts: Iterator[str]) -> Tokens:
    """One stream of tokens, documents parted by END_OF_TEXT."""
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(list(texts))
    return np.concatenate([np.array([*e.ids, end], dtype=np.uint16) for e in encodings])


def draw_batch(streams: Sequence[Tokens], rng: np.random.Generator) -> torch.Tensor:
    """Windows at random places, rows taking turns among the domains: [B, S] int64."""
    rows = []
    for row in range(BATCH_SIZE):
        stream = streams[row % len(streams)]
        start = rng.integers(len(stream) - SEQUENCE_LENGTH)
        rows.append(stream[start : start + SEQUENCE_LENGTH])
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def eval_batch(stream: Tokens) -> torch.Tensor:
    """Windows spread evenly over a held-out stream: [B, S] int64."""
    starts = np.linspace(0, len(stream) - SEQUENCE_LENGTH, NUM_EVAL_ROWS).astype(int)
    rows = [stream[start : start + SEQUENCE_LENGTH] for start in starts]
    return torch.from_numpy(np.stack(rows).astype(np.int64))


# --- Model and schedule ----------------------------------------------------------------------


def model_config() -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=32,
        num_experts_per_tok=4,
        moe_intermediate_size=96,
        norm_topk_prob=True,
        output_router_logits=True,
        router_aux_loss_coef=BALANCING_COEFFICIENT,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


def learning_rate(step: int, num_steps: int) -> float:
    """Linear warm-up, flat, then linear decay over the last DECAY_SHARE of the steps (from 1)."""
    left = (num_steps - step) / (DECAY_SHARE * num_steps)
    return PEAK_LR * min(1.0, step / WARMUP_STEPS, max(left, FINAL_LR_SHARE))


@dataclass(frozen=True, kw_only=True)
class StepLosses:
    """Of one batch: cross-entropy in nats per token, and balancing (top_k if even)."""

    loss: float
    aux: float


class Trainer:
    """Holds model and optimizer; one call of `step` is one update."""

    def __init__(self, model: Qwen3MoeForCausalLM, num_steps: int) -> None:
        self.model = model
        self.num_steps = num_steps
        self.num_done = 0
        matrices = [p for p in model.parameters() if p.dim() > 1]
        vectors = [p for p in model.parameters() if p.dim() == 1]
        groups: list[dict[str, Any]] = [
            {"params": matrices},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups, lr=PEAK_LR, betas=ADAM_BETAS, weight_decay=WEIGHT_DECAY, fused=True
        )

    @property
    def lr(self) -> float:
        return learning_rate(self.num_done, self.num_steps)

    def step(self, input_ids: torch.Tensor) -> StepLosses:
        self.num_done += 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        with torch.autocast("cpu", torch.bfloat16):
            output = self.model(input_ids, labels=input_ids, use_cache=False)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRADIENT_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        aux = output.aux_loss.item()
        return StepLosses(loss=output.loss.item() - BALANCING_COEFFICIENT * aux, aux=aux)

    @torch.no_grad()
    def perplexity(self, input_ids: torch.Tensor) -> float:
        self.model.eval()
        with torch.autocast("cpu", torch.bfloat16):
            output = self.model(input_ids, labels=input_ids, use_cache=False)
        self.model.train()
        return math.exp(output.loss.item() - BALANCING_COEFFICIENT * output.aux_loss.item())


# --- The run ---------------------------------------------------------------------------------


def log_step(trainer: Trainer, losses: StepLosses, start_s: float) -> None:
    num_tokens = trainer.num_done * BATCH_SIZE * SEQUENCE_LENGTH
    rate = num_tokens / (time.perf_counter() - start_s)
    logger.info(
        f"step {trainer.num_done} tok {num_tokens / 1e6:.2f}M loss {losses.loss:.3f}"
        f" aux {losses.aux:.3f} {rate:.0f} tok/s lr {trainer.lr:.2e}"
    )


def log_perplexity(trainer: Trainer, held_out: dict[str, torch.Tensor]) -> None:
    scores = {domain: trainer.perplexity(rows) for domain, rows in held_out.items()}
    text = " ".join(f"{domain} {score:.1f}" for domain, score in scores.items())
    logger.info(f"perplexity at step {trainer.num_done}: {text}")


def train(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> Qwen3MoeForCausalLM:
    streams = [encode_domain(tokenizer, read_texts(args.corpus, d, "train")) for d in DOMAINS]
    held_out = {
        domain: eval_batch(encode_domain(tokenizer, read_texts(args.corpus, domain, "valid")))
        for domain in DOMAINS
    }
    model = Qwen3MoeForCausalLM(model_config()).train()
    model.set_experts_implementation("grouped_mm")
    logger.info(f"params {model.num_parameters() / 1e6:.1f}M")
    trainer = Trainer(model, args.steps)
    rng = np.random.default_rng(args.seed)
    start_s = time.perf_counter()
    for step in range(1, min(args.steps, args.stop_after or args.steps) + 1):
        losses = trainer.step(draw_batch(streams, rng))
        if step in (5, 20) or step % args.log_every == 0:
            log_step(trainer, losses, start_s)
        if step % args.eval_every == 0:
            log_perplexity(trainer, held_out)
    log_perplexity(trainer, held_out)
    return model


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Train the bundled model from scratch.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--corpus", type=Path, required=True, help="folder of NAME.SPLIT.jsonl.xz")
    parser.add_argument("--out", type=Path, required=True, help="folder for model and log")
    parser.add_argument("--tokenizer", type=Path, help="reuse this one, None to train one")
    parser.add_argument("--steps", type=int, default=4350, help="length of the schedule")
    parser.add_argument("--stop-after", type=int, help="end the schedule early, at this step")
    parser.add_argument("--log-every", type=int, default=100, help="steps between log lines")
    parser.add_argument("--eval-every", type=int, default=1000, help="steps between perplexities")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order of data")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    log_file = logging.FileHandler(args.out / "training_log.txt", mode="w")
    handlers: list[logging.Handler] = [logging.StreamHandler(), log_file]
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=handlers)
    torch.manual_seed(args.seed)
    if args.tokenizer:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.tokenizer)
    else:
        tokenizer = train_tokenizer(args.corpus)
    tokenizer.save_pretrained(args.out)
    model = train(args, tokenizer)
    model.to(torch.bfloat16).save_pretrained(args.out)
    logger.info(f"saved to {args.out}")


if __name__ == "__main__":
    main()
