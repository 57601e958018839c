"""Makes large checkpoints to benchmark with: the bundled model widened, or random weights of a
known shape. It knows nothing about how they are run.

    python benchmarks/make_checkpoint.py --widen 16 OUT           # 7.3 GB, real text and routing
    python benchmarks/make_checkpoint.py --shape olmoe-1b-7b OUT  # 13.8 GB, random weights

Legend of letters: H hidden size, E experts, F widening factor, R rows and C columns of a matrix.
"""

import argparse
import itertools
import json
import math
import re
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

BUNDLED = Path(__file__).resolve().parent.parent / "src" / "moe_infinity" / "bundled"
SHARD_BYTES = 2_000_000_000
FORMAT_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FORMAT_NAMES}
ROUTINGS = ("skewed", "uniform")
COPIED_FILES = ("generation_config.json", "tokenizer.json", "tokenizer_config.json")

# Noise between the copies of a weight, as a share of the weights' standard deviation.
NOISE_SHARE = 0.5
# How the side lengths (rows, columns) grow, by the end of a tensor's name.
WIDENING_RULES: tuple[tuple[str, str], ...] = (
    (r"self_attn\.[qk]_norm\.weight", "keep"),
    (r"(embed_tokens|layernorm|model\.norm)\.weight", "tile"),
    (r"self_attn\.[qkv]_proj\.weight|mlp\.gate\.weight|lm_head\.weight", "split"),
    (r"self_attn\.o_proj\.weight", "repeat"),
    (r"mlp\..*(down|gate|up)_proj\.weight", "repeat+split"),
)
# A quarter of the experts then takes 85% of the uses of 128 tokens at 6 of 128; the recorded
# routing of Qwen3-30B-A3B on one prompt (github.com/Helldez/BigMoeOnEdge) has 86%.
ZIPF_EXPONENT = 0.9
GUMBEL_STD = math.pi / math.sqrt(6)
BLOCK_WEIGHTS = 1 << 21  # drawn at a time: 8 MiB of float32 stay in the processor's cache

# Configurations as published with each model; add one here and it is a choice of --shape.
SHAPES: dict[str, dict[str, Any]] = {
    "olmoe-1b-7b": {"model_type": "olmoe", "intermediate_size": 1024},
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 48,
        "num_experts": 128,
        "head_dim": 128,
        "norm_topk_prob": True,
        "max_position_embeddings": 40960,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "bos_token_id": 151643,
        "eos_token_id": 151645,
    },
    "deepseek-v2-lite": {
        "model_type": "deepseek_v2",
        "num_hidden_layers": 27,
        "hidden_size": 2048,
        "num_attention_heads": 16,
        "q_lora_rank": None,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "first_k_dense_replace": 1,
        "num_experts_per_tok": 6,
        "max_position_embeddings": 4096,
        "bos_token_id": 100000,
        "eos_token_id": 100001,
    },
}

Fill = Callable[[torch.Generator], torch.Tensor]


class CheckpointRefused(ValueError):
    """What was asked for cannot be written; nothing has been."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A tensor to come: `fill` makes it, in its final dtype, when its turn to be written comes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    fill: Fill

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


# --- Writing ---------------------------------------------------------------------------------


def natural_key(name: str) -> list[tuple[int, str]]:
    """Orders layer 2 before layer 10, and leaves the matrices of one expert side by side."""
    return [(int(p), "") if p.isdigit() else (-1, p) for p in name.split(".")]


def plan_shards(entries: Iterable[Entry], shard_bytes: int) -> list[list[Entry]]:
    """Cut into files of at most `shard_bytes`, where no expert is divided between two files."""

    def unit(entry: Entry) -> str:
        expert = re.match(r".*\.experts\.\d+\.", entry.name)
        return expert.group() if expert else entry.name

    ordered = sorted(entries, key=lambda entry: natural_key(entry.name))
    shards: list[list[Entry]] = [[]]
    room_bytes = shard_bytes
    for _, group in itertools.groupby(ordered, key=unit):
        members = list(group)
        num_bytes = sum(entry.num_bytes for entry in members)
        if shards[-1] and num_bytes > room_bytes:
            shards.append([])
            room_bytes = shard_bytes
        shards[-1].extend(members)
        room_bytes -= num_bytes
    return shards


def safetensors_header(entries: Sequence[Entry]) -> bytes:
    """Length (8 bytes, little endian) and JSON, padded with spaces so that data starts aligned."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": FORMAT_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset := offset + entry.num_bytes],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_shard(path: Path, entries: Sequence[Entry], seed: int, device: str = "cpu") -> None:
    with path.open("wb") as file:
        file.write(safetensors_header(entries))
        for entry in entries:
            tensor = entry.fill(named_generator(entry.name, seed, device)).contiguous().cpu()
            got, expected = (tensor.dtype, tuple(tensor.shape)), (entry.dtype, entry.shape)
            assert got == expected, f"{entry.name}: filled {got}, planned {expected}"
            file.write(tensor.view(torch.uint8).numpy().data)


def write_checkpoint(
    entries: Iterable[Entry],
    out: Path,
    *,
    seed: int,
    shard_bytes: int = SHARD_BYTES,
    num_threads: int = 1,
    device: str = "cpu",
) -> int:
    """Write weights and index below `out`, one tensor of a thread in memory at a time; returns
    their bytes. device: where they are drawn; other numbers on another, alike in distribution.

    Raises CheckpointRefused if `out` holds something already or the disk has too little room.
    """
    shards = plan_shards(entries, shard_bytes)
    total_bytes = sum(entry.num_bytes for shard in shards for entry in shard)
    check_room(out, total_bytes)
    out.mkdir(parents=True, exist_ok=True)
    names = [f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors" for n in range(len(shards))]
    with ThreadPoolExecutor(num_threads) as pool:
        list(
            pool.map(
                lambda name, shard: write_shard(out / name, shard, seed, device), names, shards
            )
        )
    weight_map = {e.name: name for name, shard in zip(names, shards, strict=True) for e in shard}
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    return total_bytes


def check_room(out: Path, need_bytes: int) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointRefused(f"{out}: exists and is not an empty folder; name a new one")
    existing = next(path for path in (out, *out.absolute().parents) if path.exists())
    free_bytes = shutil.disk_usage(existing).free
    if need_bytes > free_bytes:
        raise CheckpointRefused(
            f"{out}: needs {need_bytes / 1e9:.1f} GB, the disk has {free_bytes / 1e9:.1f} GB free;"
            " free some room, or take a smaller --widen or fewer --layers"
        )


def named_generator(name: str, seed: int, device: str = "cpu") -> torch.Generator:
    """A generator of its own per tensor, so that no tensor depends on the order of writing."""
    return torch.Generator(device).manual_seed(zlib.crc32(f"{seed}:{name}".encode()))


# --- Widening --------------------------------------------------------------------------------


def split_columns(
    weight: torch.Tensor, factor: int, dtype: torch.dtype, generator: torch.Generator
) -> torch.Tensor:
    """Share [R, C] out over F equal inputs, [R, F * C], with noise that sums to 0 over them."""
    rows, columns = weight.shape
    noise = torch.empty(rows, factor, columns, device=weight.device).normal_(generator=generator)
    noise -= noise.mean(dim=1, keepdim=True)
    # Taking the mean away costs 1/F of the variance.
    std = NOISE_SHARE * weight.std() / factor / math.sqrt(1 - 1 / factor)
    copies = noise.mul_(std).add_(weight.unsqueeze(1), alpha=1 / factor)
    return copies.view(rows, factor * columns).to(dtype)


def widened(
    weight: torch.Tensor, rule: str, factor: int, dtype: torch.dtype, generator: torch.Generator
) -> torch.Tensor:
    weight = weight.to(generator.device).float()
    if rule == "tile":
        weight = weight.repeat(*[1] * (weight.dim() - 1), factor)
    if rule.startswith("repeat"):
        weight = weight.repeat(factor, 1)
    if rule.endswith("split"):
        return split_columns(weight, factor, dtype, generator)
    return weight.to(dtype)


def widened_shape(shape: Sequence[int], rule: str, factor: int) -> tuple[int, ...]:
    rows = shape[0] * factor if rule.startswith("repeat") else shape[0]
    columns = shape[-1] * factor if rule == "tile" or rule.endswith("split") else shape[-1]
    return (columns,) if len(shape) == 1 else (rows, columns)


def widening_rule(name: str) -> str:
    for pattern, rule in WIDENING_RULES:
        if re.search(f"({pattern})$", name):
            return rule
    raise CheckpointRefused(f"{name}: no rule says how to widen it; add one to WIDENING_RULES")


def widened_entries(source: Path, factor: int, dtype: torch.dtype) -> list[Entry]:
    """Net2Net widening (Chen et al., 2016) of hidden and intermediate units, F copies of each."""
    weights = safe_open(source / "model.safetensors", "pt")
    origin = {name: name for name in weights.keys()}  # noqa: SIM118, not a mapping
    # Tied, the head would sum F equal products: it has to be divided by F, the embedding not.
    origin.setdefault("lm_head.weight", "model.embed_tokens.weight")

    def entry(name: str) -> Entry:
        rule = widening_rule(name)
        return Entry(
            name=name,
            shape=widened_shape(weights.get_slice(origin[name]).get_shape(), rule, factor),
            dtype=dtype,
            fill=lambda g: widened(weights.get_tensor(origin[name]), rule, factor, dtype, g),
        )

    return [entry(name) for name in origin]


def write_widened(
    source: Path,
    out: Path,
    factor: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    device: str = "cpu",
) -> int:
    """Write `source` (a Qwen3-MoE in one file) with F times its width and the same outputs.

    Copies in the embedding, the norms and the rows of attention's output projection are exact:
    they have no replicated input to hide noise in. Returns bytes of weights.
    """
    if not (source / "model.safetensors").exists():
        raise CheckpointRefused(f"{source}: no model.safetensors here; expected an unsharded model")
    config = json.loads((source / "config.json").read_text())
    if factor < 2 or config["model_type"] != "qwen3_moe":
        raise CheckpointRefused(
            f"{source}: cannot widen model type {config['model_type']!r} {factor} times;"
            " expected a qwen3_moe and a factor of at least 2"
        )
    entries = widened_entries(source, factor, dtype)
    total_bytes = write_checkpoint(entries, out, seed=seed, device=device)
    for size in ("hidden_size", "intermediate_size", "moe_intermediate_size"):
        config[size] *= factor
    config |= {"tie_word_embeddings": False, "dtype": str(dtype).removeprefix("torch.")}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in COPIED_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, out / name)
    return total_bytes


# --- Random weights of a known shape ---------------------------------------------------------


def shape_config(shape: str, num_layers: int | None = None, num_experts: int | None = None) -> Any:
    """The transformers configuration of one of SHAPES, cut to fewer layers or experts if given."""
    from transformers import CONFIG_MAPPING

    options = dict(SHAPES[shape])
    if num_layers is not None:
        options["num_hidden_layers"] = num_layers
    if num_experts is not None:
        options["num_experts"] = num_experts
    return CONFIG_MAPPING[options.pop("model_type")](**options)


def checkpoint_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes as `save_pretrained` would write them, from a model without memory."""
    from transformers import AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    state = revert_weight_conversion(model, model.state_dict())
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def normal(
    shape: Sequence[int], std: float, dtype: torch.dtype, g: torch.Generator
) -> torch.Tensor:
    weight = torch.empty(*shape, dtype=dtype, device=g.device)
    if g.device.type != "cpu":
        return weight.normal_(0, std, generator=g)
    block = torch.empty(min(BLOCK_WEIGHTS, weight.numel()))
    for part in weight.view(-1).split(BLOCK_WEIGHTS):
        part.copy_(block[: part.numel()].normal_(0, std, generator=g))
    return weight


@dataclass(frozen=True, kw_only=True)
class RandomWeights:
    """How each tensor of a random model is drawn; activations keep a size of about 1.

    Routing `uniform`: all experts are alike. Routing `skewed`: every embedding shares the vector
    `common`, and each router row has a part along it that adds -a * log(rank) to the expert's
    logit. With the other part's spread that of a Gumbel variable, top-k then draws experts with
    odds of about rank ** -a (Gumbel top-k; Kool et al., 2019). Ranks differ by layer. A popular
    expert stays so whatever the text: real routing drifts with it, this does not.
    """

    dtype: torch.dtype
    num_layers: int
    common: torch.Tensor  # [H], of +-1, or 0 for uniform routing

    def draw(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        if len(shape) == 1:
            return torch.full(shape, float(name.endswith("norm.weight")), dtype=self.dtype)
        if re.search(r"\.(gate|router)\.weight$", name):
            on_cpu = torch.Generator().manual_seed(generator.initial_seed())
            return self.router(shape, on_cpu).to(self.dtype)
        if name.endswith("embed_tokens.weight"):
            weight = normal(shape, 1, self.dtype, generator)
            return weight.add_(self.common.to(weight))
        std = 1 / math.sqrt(shape[-1])
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std /= math.sqrt(2 * self.num_layers)  # keeps the residual stream level, as in GPT-2
        return normal(shape, std, self.dtype, generator)

    def router(self, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        num_experts, hidden_size = shape
        common = self.common
        rows = torch.empty(shape).normal_(
            0, GUMBEL_STD / math.sqrt(hidden_size), generator=generator
        )
        rows -= torch.outer(rows @ common, common) / hidden_size
        rank = torch.randperm(num_experts, generator=generator) + 1
        rows -= torch.outer(ZIPF_EXPONENT * rank.log(), common) / hidden_size
        # The norm before the router scales the embedding, of variance 1 + common ** 2, to 1.
        return rows * (1 + common.square().mean()).sqrt()


def write_random(
    config: Any,
    out: Path,
    *,
    routing: str,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    **writing: Any,
) -> int:
    """Write random weights for `config`, without a tokenizer; returns bytes of weights. writing:
    options of `write_checkpoint`."""
    from transformers import GenerationConfig

    entries = random_entries(config, routing, dtype, seed)
    total_bytes = write_checkpoint(entries, out, seed=seed, **writing)
    config.dtype = dtype
    config.save_pretrained(out)
    GenerationConfig.from_model_config(config).save_pretrained(out)
    return total_bytes


def random_entries(config: Any, routing: str, dtype: torch.dtype, seed: int) -> list[Entry]:
    common = torch.zeros(config.hidden_size)
    if routing == "skewed":
        common = torch.randint(0, 2, common.shape, generator=named_generator("", seed)) * 2.0 - 1
    weights = RandomWeights(dtype=dtype, num_layers=config.num_hidden_layers, common=common)

    def entry(name: str, shape: tuple[int, ...]) -> Entry:
        fill: Fill = lambda generator: weights.draw(name, shape, generator)  # noqa: E731
        return Entry(name=name, shape=shape, dtype=dtype, fill=fill)

    return [entry(name, shape) for name, shape in checkpoint_shapes(config).items()]


# --- Command line ----------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Write a large checkpoint to benchmark with.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--widen", type=int, metavar="F", help="the bundled model, F times as wide")
    kind.add_argument("--shape", choices=SHAPES, help="random weights of this model's shape")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write, new or empty")
    parser.add_argument("--source", type=Path, default=BUNDLED, help="--widen: model to widen")
    parser.add_argument(
        "--layers", type=int, metavar="N", help="--shape: number of layers, None for all"
    )
    parser.add_argument(
        "--experts", type=int, metavar="N", help="--shape: experts of a layer, None for all"
    )
    parser.add_argument("--routing", choices=ROUTINGS, default="skewed", help="--shape: popularity")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the weights")
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.widen is not None and (args.layers, args.experts) != (None, None):
        parser.error("--layers and --experts go with --shape; the widened model keeps all it has")
    options: dict[str, Any] = {"dtype": DTYPES[args.dtype], "seed": args.seed}
    start = time.perf_counter()
    try:
        if args.widen is not None:
            total_bytes = write_widened(args.source, args.out, args.widen, **options)
        else:
            config = shape_config(args.shape, args.layers, args.experts)
            total_bytes = write_random(config, args.out, routing=args.routing, **options)
    except CheckpointRefused as refusal:
        print(f"make_checkpoint: {refusal}", file=sys.stderr)
        return 2
    seconds = time.perf_counter() - start
    print(f"wrote {total_bytes:,} bytes of weights in {seconds:.1f} s to {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
