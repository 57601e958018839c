"""Tiny random models of every transformers family whose experts use the experts interface.

Knows stock transformers only; nothing about this project's engine, caches or checkpoints.
"""

import ast
import dataclasses
import importlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import combinations
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB_SIZE = 128
NUM_LAYERS = 4
# Ids in [FIRST_TEXT_ID, LAST_TEXT_ID) are never special tokens of a tiny model.
FIRST_TEXT_ID, LAST_TEXT_ID = 8, 96

MODELS_DIR = Path(transformers.__file__).parent / "models"
DECORATED_CLASS = re.compile(r"^@use_experts_implementation\b.*\nclass (\w+)", re.MULTILINE)
TEXT_CONFIG = re.compile(r"text_config|thinker_config|talker_config")
SPECIAL_TOKEN = re.compile(r".*_token_(id|index)|codec_.*_id")
MULTIMODAL = "ForConditionalGeneration"
HEAD_CLASS = re.compile(r"\w+For[A-Z]\w+")


@dataclass(frozen=True, kw_only=True)
class Family:
    """One experts class of transformers and the smallest model class that runs it."""

    name: str  # folder of the modelling file; later experts classes of a file get a suffix
    module: str
    experts_class: str
    model_class: str
    config_class: str
    model_type: str


# ---- discovery -------------------------------------------------------------------------------


@cache
def families() -> tuple[Family, ...]:
    """Every family of the installed transformers, found by the decorator on its experts class."""
    found: list[Family] = []
    for path in sorted(MODELS_DIR.glob("*/modeling_*.py")):
        text = path.read_text(encoding="utf-8")
        for position, experts_class in enumerate(DECORATED_CLASS.findall(text)):
            found.append(_family(path, text, experts_class, position))
    return tuple(found)


@cache
def wrapped_families() -> tuple[Family, ...]:
    """Multimodal classes around the text models above: what their hub checkpoints are saved as."""
    found = []
    for item in families():
        text = Path(importlib.import_module(item.module).__file__).read_text(encoding="utf-8")
        heads = [name for name in _heads(text, item.experts_class) if name.endswith(MULTIMODAL)]
        if heads and item.model_class.endswith("ForCausalLM"):
            found.append(_with_head(item, heads[0]))
    return tuple(found)


def family(name: str) -> Family:
    """The family called `name`; raises KeyError with the valid names."""
    by_name = {item.name: item for item in families() + wrapped_families()}
    if name not in by_name:
        raise KeyError(f"no family {name!r}; expected one of {sorted(by_name)}")
    return by_name[name]


def modelling_files() -> set[str]:
    """Modelling modules that mention the decorator, whether or not a family was made of them."""
    paths = MODELS_DIR.glob("*/modeling_*.py")
    return {
        _module_name(path)
        for path in paths
        if "use_experts_implementation" in path.read_text(encoding="utf-8")
    }


def _module_name(path: Path) -> str:
    return f"transformers.models.{path.parent.name}.{path.stem}"


def _family(path: Path, text: str, experts_class: str, position: int) -> Family:
    module = importlib.import_module(_module_name(path))
    model_class = min(_heads(text, experts_class), key=lambda head: _rank(text, head))
    config_class = getattr(module, model_class).config_class
    suffix = f":{experts_class}" if position else ""
    return Family(
        name=path.parent.name + suffix,
        module=module.__name__,
        experts_class=experts_class,
        model_class=model_class,
        config_class=config_class.__name__,
        model_type=config_class.model_type,
    )


def _with_head(item: Family, model_class: str) -> Family:
    config_class = getattr(importlib.import_module(item.module), model_class).config_class
    return dataclasses.replace(
        item,
        name=f"{item.name}:{model_class}",
        model_class=model_class,
        config_class=config_class.__name__,
        model_type=config_class.model_type,
    )


def _heads(text: str, experts_class: str) -> list[str]:
    """Classes with a task head whose source reaches `experts_class` through other classes."""
    graph = _class_graph(text)
    return [
        name
        for name in graph
        # Bases and side decoders of a multimodal model are no language models.
        if HEAD_CLASS.fullmatch(name)
        and not re.search("PreTrainedModel|CodePredictor", name)
        and experts_class in _reachable(graph, name)
    ]


def _rank(text: str, head: str) -> tuple[int, int]:
    """Sort key: the class AutoModelForCausalLM takes, then any causal LM, then the smallest."""
    kinds = (
        head in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() and head.endswith("ForCausalLM"),
        head.endswith("ForCausalLM"),
        head.endswith(MULTIMODAL),
        True,
    )
    return kinds.index(True), len(_reachable(_class_graph(text), head))


@cache
def _class_graph(text: str) -> dict[str, set[str]]:
    """Classes of a module and the classes of it that each one's code names (not its docstring)."""
    classes = {node.name: node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)}
    return {
        name: {part.id for part in ast.walk(node) if isinstance(part, ast.Name)} & classes.keys()
        for name, node in classes.items()
    }


def _reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    queue = [start]
    while queue:
        for name in graph[queue.pop()] - seen:
            seen.add(name)
            queue.append(name)
    return seen


# Why a family cannot be built here, by name.
NOT_INSTANTIABLE: dict[str, str] = {
    "inkling:InklingForConditionalGeneration": "its vision tower imports scipy; no dependency here",
}


# ---- tiny configs ----------------------------------------------------------------------------

# (attribute name, cap): an int attribute becomes min(published default, cap); first match wins.
CAPS: tuple[tuple[str, int], ...] = (
    (r".*vocab_size.*", VOCAB_SIZE),
    (r"moe_intermediate_size|expert_ffn_hidden_size", 24),
    (r".*shared.*intermediate_size", 32),
    (r".*intermediate_size|.*ffn_dim|mlp_dim", 40),
    (r"num_experts|num_local_experts|n_routed_experts|moe_num_experts", 8),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k", 3),
    (r"n_group|num_expert_group", 4),
    (r"topk_group", 2),
    (r"first_k_dense_replace|num_dense_layers", 1),
    (r".*lora_rank|.*_rank", 16),
    (r".*head_dim|.*_d_head|d_rel", 16),
    (r".*num_key_value_heads|linear_num_key_heads", 2),
    (r".*num_attention_heads|.*num_heads|.*_n_heads|.*num_value_heads|.*attention_heads", 4),
    (r".*hidden_sizes?|.*hidden_dim|d_model|decoder_dim|.*_embed_dim|adapter_in.*|.*out_dim", 64),
    (r".*_state_size|mamba_d_state", 16),
    (r"n_groups|mamba_n_groups|o_groups", 2),
)
LAYER_COUNT = r"num_hidden_layers|depth|n_layers|encoder_layers"
NUM_ENCODER_LAYERS = 2

# Published as None, then read as a number.
REQUIRED = {
    "num_experts_per_tok": 3,
    "n_routed_experts": 8,
    "head_dim": 16,
    "n_shared_experts": 1,
}
GEMMA4_MOE = {
    "enable_moe_block": True,
    "num_experts": 8,
    "top_k_experts": 2,
    "moe_intermediate_size": 24,
    "global_head_dim": 32,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
SWIGLU_LIMIT = 0.5  # low enough to bite at these activations; published ones are 7 to 10
SAM_NECK = {"output_channels": 32, "downsample_channels": [32, 64]}
# Attributes that the published defaults leave unusable at this size, by config class name.
OVERRIDES: dict[str, dict[str, object]] = {
    "DeepseekOcr2TextConfig": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    "DiffusionGemmaTextConfig": GEMMA4_MOE,
    "DeepseekOcr2SamVisionConfig": SAM_NECK,
    "UnlimitedOcrSamVisionConfig": SAM_NECK,
    "Dots3NoteTextConfig": {  # its sliding layers have a geometry of their own
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 32,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 16,
    },
    "Dots3NoteVisionConfig": {"pyramid_num_routed": [-1, 4]},  # a dense layer, one of 4 experts
    "Ernie4_5_VLMoeTextConfig": {
        "moe_intermediate_size": [24, 16],  # text experts, vision experts
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]},
    },
    "Gemma4TextConfig": GEMMA4_MOE,
    "Glm4vMoeTextConfig": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    },
    "GraniteMoeHybridConfig": {
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "mamba_n_heads": 8,
    },
    "HunYuanMoEV1Config": {"num_experts": 8, "moe_topk": 2},  # default: one expert
    "JambaConfig": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 8},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"] * 2},
    "MuseSparkAudioConfig": {
        "num_hidden_layers": 2,
        "patch_sizes": (16, 6),
        "hidden_sizes": (32, 64),
        "depths": (1, 1),
    },
    "MuseSparkTextConfig": {"moe_hidden_size": 48},  # experts narrower than the model
    "NemotronHConfig": {
        "moe_latent_size": 48,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
    },
    # Read by the modelling code, absent from the config class.
    "Qwen3OmniMoeThinkerConfig": {"vision_start_token_id": VOCAB_SIZE - 1},
    "Qwen3OmniMoeTalkerConfig": {"spatial_merge_size": 2},
    "Qwen3OmniMoeTalkerTextConfig": {"shared_expert_intermediate_size": 32},
    "Qwen4ExpTextConfig": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
        "ple_layer_ids": [1],
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 64,
        "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 2,
        "eos_token_id": 2,
    },
}


def tiny_config(item: Family) -> PreTrainedConfig:
    """A few small layers of the family, at least two of them sparse, every kind of layer in it."""
    return _shrunk(_class(item).config_class)


def _shrunk(config_class: type[PreTrainedConfig], is_encoder: bool = False) -> PreTrainedConfig:
    full = config_class()
    kwargs = {
        field.name: small
        for field in dataclasses.fields(config_class)
        if (small := _small(field.name, full, is_encoder)) is not None
    }
    for name in config_class.sub_configs:
        if (sub := getattr(full, name)) is not None:
            kwargs[name] = _shrunk(type(sub), is_encoder=not TEXT_CONFIG.fullmatch(name))
    return config_class(**(kwargs | OVERRIDES.get(config_class.__name__, {})))


def _small(name: str, full: PreTrainedConfig, is_encoder: bool) -> object | None:
    """The tiny value of one attribute, or None to leave it to the config class."""
    # Not getattr: heterogeneous configs refuse to name one value for all layers.
    values = vars(full)
    value = values.get(full.attribute_map.get(name, name))
    num_layers = NUM_ENCODER_LAYERS if is_encoder else NUM_LAYERS
    if re.fullmatch(LAYER_COUNT, name):
        return num_layers
    if name == "swiglu_limit" and value is not None:
        return SWIGLU_LIMIT
    if value is None and name in REQUIRED and not is_encoder:
        return REQUIRED[name]
    if SPECIAL_TOKEN.fullmatch(name) and value is not None:
        return _special_token(name, type(full))
    if name == "num_key_value_heads" and value == values.get("num_attention_heads"):
        return _capped("num_attention_heads", value)  # multi-head attention stays multi-head
    if isinstance(value, int) and not isinstance(value, bool):
        return _capped(name, value)
    if isinstance(value, list) and len(value) == values.get("num_hidden_layers"):
        return _few_layers(value, num_layers)
    return None


def _capped(name: str, value: int) -> int | None:
    caps = (cap for pattern, cap in CAPS if re.fullmatch(pattern, name))
    cap = next(caps, None)
    return None if cap is None else min(value, cap)


def _few_layers(values: list, num_layers: int) -> list:
    """One layer of each kind in order of appearance, the rest of the most frequent kind."""
    kinds = list(dict.fromkeys(values))[:num_layers]
    return kinds + [max(kinds, key=values.count)] * (num_layers - len(kinds))


def _special_token(name: str, config_class: type[PreTrainedConfig]) -> int:
    """Ids outside the range that tests draw from: pad, bos, eos below it, the others above."""
    low = ("pad_token_id", "bos_token_id", "eos_token_id")
    if name in low:
        return low.index(name)
    special = [f.name for f in dataclasses.fields(config_class) if SPECIAL_TOKEN.fullmatch(f.name)]
    return LAST_TEXT_ID + special.index(name)


# ---- tiny models -----------------------------------------------------------------------------

WEIGHT_STD = 0.15  # about 1 / sqrt(hidden size): activations neither vanish nor explode
SMALL_STD = 0.05
# Added to router scores before top-k; zero until trained.
CORRECTION_BIAS = re.compile(r".*(e_score_correction_bias|expert_bias)")
# State-space constants have signs and ranges of their own; their stock values stay.
KEPT = re.compile(r".*(A_log|dt_bias|\.D)")


def build_tiny(item: Family, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model in eval mode, its weights large enough that every expert changes logits.

    Parameters that stock keeps in float32 stay float32; equal seeds draw equal numbers
    whatever the dtype, up to rounding.
    """
    config = tiny_config(item)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _class(item)._from_config(config, dtype=dtype)
        _keep_in_float32(model, dtype)
        _redraw(model)
    return model.eval()


def save_tiny(
    item: Family,
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    max_shard_size: str = "5GB",
) -> PreTrainedModel:
    """Write a tiny checkpoint the way stock does, original tensor names included; return it."""
    model = build_tiny(item, seed, dtype)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    return model


def tiny_input_ids(rows: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    """Random ids without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, length)
    return torch.randint(FIRST_TEXT_ID, LAST_TEXT_ID, shape, generator=generator)  # [rows, length]


@torch.no_grad()
def logits(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """Logits of one text-only forward pass, [rows, length, vocabulary or labels]."""
    match type(model).__name__:
        case "DiffusionGemmaForBlockDiffusion":  # would draw a random canvas
            return model(input_ids=input_ids, decoder_input_ids=input_ids).logits
        case "Qwen3OmniMoeTalkerForConditionalGeneration":  # speaks from embeddings only
            return model(inputs_embeds=model.get_input_embeddings()(input_ids)).logits
        case _:
            return model(input_ids=input_ids).logits


def _class(item: Family) -> type[PreTrainedModel]:
    return getattr(importlib.import_module(item.module), item.model_class)


def _keep_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    plan = model._get_dtype_plan(dtype)
    for name, tensor in _state(model):
        if any(re.search(rf"(^|\.){kept}($|\.)", name) for kept in plan):
            tensor.data = tensor.data.float()


def _state(model: PreTrainedModel) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


@torch.no_grad()
def _redraw(model: PreTrainedModel) -> None:
    for name, tensor in _state(model):
        if name.endswith("tid2eid"):  # token id -> experts, zero until a checkpoint fills it
            num_experts = model.config.n_routed_experts
            tensor.copy_(torch.rand(len(tensor), num_experts).argsort(1)[:, : tensor.shape[1]])
        elif name.endswith("balancing_biases"):
            # zaya's; stock resets the last, that of the skip expert, to -1 whenever it loads.
            tensor.copy_(SMALL_STD * torch.randn(tensor.shape) - 1)
            tensor[-1] = -1
        elif CORRECTION_BIAS.fullmatch(name):
            tensor.copy_(SMALL_STD * torch.randn(tensor.shape))
        elif KEPT.fullmatch(name) or not isinstance(tensor, torch.nn.Parameter):
            continue
        elif tensor.ndim >= 2:
            tensor.copy_(WEIGHT_STD * torch.randn(tensor.shape))
        else:  # norms and biases, near what stock starts them with
            tensor.add_(SMALL_STD * torch.randn(tensor.shape))


# ---- routing ---------------------------------------------------------------------------------

# Per experts module, per call: (top_k_index, top_k_weights), each [num_tokens, top_k].
Selection = tuple[torch.Tensor, torch.Tensor]
Routing = dict[str, list[Selection]]
STOCK_IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")


def experts_modules(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Modules of decorated classes by name, told by the flags the decorator sets on them."""
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "has_gate") and hasattr(module, "is_transposed")
    }


@contextmanager
def record_routing(model: torch.nn.Module) -> Iterator[Routing]:
    """Collect the routing every experts module is called with; changes nothing."""
    routing: Routing = {name: [] for name in experts_modules(model)}

    def record(name: str, index: torch.Tensor, weights: torch.Tensor) -> Selection:
        routing[name].append((index.clone(), weights.clone()))
        return index, weights

    with _rerouted(model, record):
        yield routing


@contextmanager
def force_routing(model: torch.nn.Module, routing: Routing) -> Iterator[None]:
    """Call the experts modules with recorded routing, call by call, whatever the routers say.

    Raises AssertionError if the calls made under it are not those recorded.
    """
    pending = {name: iter(calls) for name, calls in routing.items()}

    def replay(name: str, index: torch.Tensor, weights: torch.Tensor) -> Selection:
        recorded = next(pending[name], None)
        assert recorded is not None, f"{name}: more than {len(routing[name])} calls"
        assert recorded[0].shape == index.shape, f"{name}: {recorded[0].shape} vs {index.shape}"
        return recorded

    with _rerouted(model, replay):
        yield
    left = [name for name, calls in pending.items() if next(calls, None) is not None]
    assert not left, f"recorded calls that did not happen: {left}"


@contextmanager
def _rerouted(model: torch.nn.Module, route: Callable[..., Selection]) -> Iterator[None]:
    """Pass the routing arguments of every experts call through `route(name, index, weights)`."""
    modules = experts_modules(model)
    outer = {name: vars(module).get("forward") for name, module in modules.items()}
    for name, module in modules.items():
        module.forward = _wrapped(module.forward, partial(route, name))
    try:
        yield
    finally:
        for name, module in modules.items():
            del module.forward  # the class's own again, or that of a context around this one
            if outer[name] is not None:
                module.forward = outer[name]


def _wrapped(
    forward: Callable[..., torch.Tensor], route: Callable[..., Selection]
) -> Callable[..., torch.Tensor]:
    # Positional on purpose: a family that calls by keyword is one the engine must know about.
    def rerouted_forward(
        hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        return forward(hidden_states, *route(top_k_index, top_k_weights))

    return rerouted_forward


def stock_logits(model: PreTrainedModel, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits of each stock implementation under the routing that eager chose."""
    before = model.get_experts_implementation()
    outputs = {}
    try:
        model.set_experts_implementation("eager")
        with record_routing(model) as routing:
            outputs["eager"] = logits(model, input_ids)
        for implementation in STOCK_IMPLEMENTATIONS[1:]:
            model.set_experts_implementation(implementation)
            with force_routing(model, routing):
                outputs[implementation] = logits(model, input_ids)
    finally:
        model.set_experts_implementation(before)
    return outputs


def stock_spread(model: PreTrainedModel, input_ids: torch.Tensor) -> float:
    """Largest difference of logits among stock's own implementations, routing held equal."""
    outputs = stock_logits(model, input_ids).values()
    return max((a - b).abs().max().item() for a, b in combinations(outputs, 2))


# ---- round trip ------------------------------------------------------------------------------

# Families whose checkpoint stock itself does not read back as it wrote it.
ROUND_TRIP_FAILS: dict[str, str] = {}


@dataclass(frozen=True, kw_only=True)
class Reload:
    """What stock's from_pretrained made of a checkpoint that stock's save_pretrained wrote."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]
    max_abs_diff: float  # of logits, before and after

    @property
    def exact(self) -> bool:
        return not (self.missing or self.unexpected or self.mismatched) and self.max_abs_diff == 0


def reload_check(item: Family, path: str | Path, dtype: torch.dtype = torch.float32) -> Reload:
    """Save a tiny model under `path`, load it back with stock, compare keys and logits."""
    saved = save_tiny(item, path, dtype)
    loaded, info = _class(item).from_pretrained(path, dtype=dtype, output_loading_info=True)
    input_ids = tiny_input_ids()
    _own_memory(loaded)
    before, after = logits(saved, input_ids), logits(loaded.eval(), input_ids)
    return Reload(
        missing=tuple(sorted(info["missing_keys"])),
        unexpected=tuple(sorted(info["unexpected_keys"])),
        mismatched=tuple(sorted(str(key) for key in info["mismatched_keys"])),
        max_abs_diff=(before - after).abs().max().item(),
    )


def _own_memory(model: PreTrainedModel) -> None:
    """Move loaded tensors out of the file mapping: results depend on the address modulo 64."""
    for _, tensor in _state(model):
        tensor.data = tensor.data.clone()
