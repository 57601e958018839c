"""Writes the tables of README.md and docs/ from the checked-in results."""

from __future__ import annotations

import itertools
import json
import operator
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import render_gpu
import render_policies

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
_GIB, _GB = 1024**3, 1e9


def main() -> None:
    for name in ("README.md", "docs/packed_format.md", "docs/server.md"):
        page = ROOT / name
        page.write_text(fill(page.read_text()))
    (ROOT / "docs" / "families.md").write_text(families_page(load("families")))
    (ROOT / "docs" / "policies.md").write_text(render_policies.page(load, _provenance))
    (ROOT / "docs" / "gpu.md").write_text(render_gpu.page(load, _provenance))


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def fill(text: str) -> str:
    """Replace what stands between ``<!-- table: NAME -->`` and ``<!-- end -->``."""
    pattern = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
    return pattern.sub(lambda m: m[1] + TABLES[m[2]]() + m[3], text)


def budget_table() -> str:
    rows = [
        "| checkpoint | limit | system | tokens/s | hit rate | peak memory | read/token | wrote |",
        "|---|---|---|---|---|---|---|---|",
    ]
    notes = []
    for name in ("widened16", "olmoe_random"):
        result = load(f"budget_{name}")
        for system, s in result["summary"].items():
            rows.append(_budget_row(result, system, s))
        notes.append(_provenance(result))
    return "\n".join(rows) + "\n\n" + "\n".join(dict.fromkeys(notes)) + "\n"


def _budget_row(result: dict, system: str, s: dict) -> str:
    size, limit = result["checkpoint_bytes"] / _GB, result["limit_bytes"] / _GB
    if "tokens_per_s" not in s:
        cells = f"{result['checkpoint']} ({size:.1f} GB) | {limit:.2f} GB | {system}"
        return f"| {cells} | failed | | | | |"
    hits = f"{s['hit_rate']:.0%}" if "hit_rate" in s else "-"
    read = f"{s['read_bytes_per_token'] / _GB:.2f} GB" if "hit_rate" in s else "-"
    peak = s.get("peak_rss_bytes", s["group_peak_bytes"]) / _GB
    wrote = "0" if s["written_bytes"] == 0 else f"{s['written_bytes'] / _GB:.2f} GB"
    return (
        f"| {result['checkpoint']} ({size:.1f} GB) | {limit:.2f} GB | {system} | "
        f"{s['tokens_per_s']:.2f} | {hits} | {peak:.2f} GB | {read} | {wrote} |"
    )


_LIMITED = {
    "peers_widened16_int4": "widened16, 4 bit",
    "peers_widened16_q4_k_m": "widened16, Q4_K_M",
    "peers_widened16_mxfp4": "widened16, MXFP4",
    "peers_widened16_q8_0": "widened16, Q8_0",
    "peers_widened16_f16": "widened16, 16 bit",
    "peers_olmoe_int4": "OLMoE, 4 bit",
    "peers_olmoe_q4_k_m": "OLMoE, Q4_K_M",
    "peers_olmoe_mxfp4": "OLMoE, MXFP4",
    "peers_olmoe_q8_0": "OLMoE, Q8_0",
    "peers_olmoe_f16": "OLMoE, 16 bit",
}
# Without a limit, in turns.
_IN_TURNS = {
    "peers_gguf_olmoe_q8_0": "OLMoE, Q8_0",
    "peers_gguf_olmoe_q4_k_m": "OLMoE, Q4_K_M",
    "peers_gguf_olmoe_mxfp4": "OLMoE, MXFP4",
    "peers_gguf_widened16_q8_0": "widened16, Q8_0",
    "peers_gguf_widened16_q8_0_512": "widened16, Q8_0, prompts of 512",
    "peers_gguf_widened16_q4_k_m": "widened16, Q4_K_M",
    "peers_gguf_widened16_mxfp4": "widened16, MXFP4",
}
_LIMITED_AVX2 = {
    "peers_avx2_olmoe_int4": "OLMoE, 4 bit",
    "peers_avx2_int4_limits": "widened16, 4 bit",
    "peers_avx2_q4_k_m": "widened16, Q4_K_M",
    "peers_avx2_mxfp4": "widened16, MXFP4",
}


def peers_table() -> str:
    """Inside limits; what was measured without one before systems took turns says little."""
    return _limited_table(_LIMITED, is_shown=lambda row: row["share"] is not None)


def avx2_limits_table() -> str:
    """The same where the processor has no AVX-512."""
    return _limited_table(_LIMITED_AVX2)


def in_turns_table() -> str:
    """GGUF files that are wholly in memory: a row a file, and how much pairs differ. Prompts are of
    32 tokens where the name does not say otherwise."""
    header = [
        "| file | pairs | ours, tokens/s | llama.cpp | ours over llama.cpp | "
        "middle half of pairs | their prompts | of memory's speed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    return _files_table(header, _IN_TURNS, lambda file, rows: [_in_turns_row(file, *rows)])


def _files_table(
    header: list[str], files: dict[str, str], rows_of: Callable[[str, list[dict]], list[str]]
) -> str:
    """The rows that result files give, by what they are called, and how they were made."""
    rows, notes = list(header), []
    for name, label in files.items():
        result = load(name)
        rows += rows_of(label, result["rows"])
        notes.append(_provenance(result))
    return "\n".join(rows) + "\n\n" + _folded(notes)


def _in_turns_row(file: str, mine: dict, theirs: dict) -> str:
    cells = [
        f"{len(mine['ratios'])}",
        f"{mine['tokens_per_s']:.1f}",
        f"{theirs['tokens_per_s']:.1f}",
        f"{mine['ratio']:.2f}x",
        _middle_half(mine["ratios"]),
        f"{mine['prompt_ratio']:.2f}x",
        _of_memory(mine, theirs),
    ]
    return f"| {file} | " + " | ".join(cells) + " |"


def _of_memory(mine: dict, theirs: dict) -> str:
    """Bytes multiplied a second, over what plain reading got behind each of our turns."""
    if "memory_gbps" not in mine:
        return ""
    speed = mine["memory_gbps"] * _GB / mine["multiplied_bytes_per_token"]  # tokens a second
    return f"{mine['tokens_per_s'] / speed:.0%}, llama.cpp {theirs['tokens_per_s'] / speed:.0%}"


def _middle_half(ratios: list[float]) -> str:
    low, _, high = statistics.quantiles(ratios, n=4)
    return f"{low:.2f} to {high:.2f}"


def _limited_table(
    files: dict[str, str], is_shown: Callable[[dict], bool] = lambda row: True
) -> str:
    header = [
        "| file | memory limit | system | tokens/s | over llama.cpp | hit rate | read/token | "
        "of the limit |",
        "|---|---|---|---|---|---|---|---|",
    ]
    return _files_table(
        header, files, lambda file, rows: [_peers_row(file, row) for row in rows if is_shown(row)]
    )


def _peers_row(form: str, row: dict) -> str:
    limit = "none" if row["share"] is None else f"{row['share']:.0%} of the file"
    if "tokens_per_s" not in row:
        return f"| {form} | {limit} | {row['system']} | failed | | | | |"
    is_ours = row.get("hit_rate") is not None
    cells = [
        f"{row['tokens_per_s']:.2f}",
        f"{row['ratio']:.2g}x" if is_ours and row["ratio"] else "",
        f"{row['hit_rate']:.0%}" if is_ours else "",
        f"{row['read_bytes_per_token'] / _GB:.2f} GB" if is_ours else "",
        f"{row['limit_fraction']:.0%}" if is_ours and row.get("limit_fraction") else "",
    ]
    return f"| {form} | {limit} | {row['system']} | " + " | ".join(cells) + " |"


_FORMS = {"f16": "16 bit", "q8": "8 bit", "q4": "4 bit"}


def resident_table() -> str:
    """Everything in memory: prompts of some lengths, and decode behind them."""
    return _resident_table("peers_resident", (32, 512, 2000))


def avx2_table() -> str:
    """The same where the processor has no AVX-512."""
    return _resident_table("peers_avx2", (512,))


def _resident_table(prefix: str, lengths: tuple[int, ...]) -> str:
    header = [
        "| file | prompt | system | first token after | over llama.cpp | tokens/s then | "
        "over llama.cpp | middle half of pairs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    files = {
        f"{prefix}_{form}_{length}": f"{name} | {length}"
        for form, name in _FORMS.items()
        for length in lengths
    }
    return _files_table(
        header, files, lambda label, rows: [_resident_row(label, row) for row in rows]
    )


def _resident_row(label: str, row: dict) -> str:
    """label: the form of the weights, and the prompt's length."""
    is_ours = row.get("hit_rate") is not None
    cells = [
        f"{row['ttft_s']:.2f} s",
        f"{row['prompt_ratio']:.1f}x" if is_ours else "",
        f"{row['tokens_per_s']:.0f}",
        f"{row['ratio']:.2f}x" if is_ours else "",
        _middle_half(row["ratios"]) if is_ours and len(row.get("ratios", [])) > 2 else "",
    ]
    return f"| {label} | {row['system']} | " + " | ".join(cells) + " |"


def gguf_text_note() -> str:
    r = load("gguf_text")
    ties = f", {r['near_ties']} up to a near-tie" if r["near_ties"] else ""
    return (
        f"Of {len(r['rows'])} greedy answers of {r['new_tokens']} tokens from the bundled model's "
        f"F16 file {r['equal']} are llama.cpp's, token by token{ties}.\n\n{_provenance(r)}\n"
    )


def gguf_families_note() -> str:
    r = load("gguf_families")
    found = r["families"].values()
    total = sum(sum(each.values()) for each in found)
    equal, ties = (sum(each[n] for each in found) for n in ("equal", "near_ties"))
    return (
        f"Random tiny models of {len(found)} families, {r['new_tokens']} greedy tokens: of {total} "
        f"answers {equal} are llama.cpp's, {ties} up to a near-tie, {total - equal - ties} "
        f"different.\n\n{_provenance(r)}\n"
    )


def prefill_note() -> str:
    r = load("prefill_widened16")
    limited, resident = r["summary"]["limited"], r["summary"]["resident"]
    return (
        f"A prompt of {r['prompt_tokens']} tokens on {r['checkpoint']} within "
        f"{r['limit_bytes'] / _GB:.1f} of its {r['checkpoint_bytes'] / _GB:.1f} GB: first token "
        f"after {limited['ttft_s']:.1f} s, with everything resident after "
        f"{resident['ttft_s']:.1f} s. {r['times_the_model_was_read']:.0%} of the model was read: "
        f"experts stream through a few slots.\n\n{_provenance(r)}\n"
    )


def _folded(notes: list[str]) -> str:
    return "<details><summary>Commands</summary>\n\n" + "  \n".join(notes) + "\n</details>\n"


def batching_table() -> str:
    r = load("batching")
    rows = ["| model | experts in memory | one after another | 2 at once | 4 at once |"]
    rows.append("|---|---|---|---|---|")
    for p in r["points"]:
        batched = " | ".join(f"{b['tokens_per_s']:.0f} ({b['ratio']:.2f}x)" for b in p["batched"])
        share = f"{p['slots'] / p['experts']:.0%}"
        rows.append(f"| {p['model']} | {share} | {p['in_turns_tokens_per_s']:.0f} | {batched} |")
    note = "Tokens/s of four requests together."
    return "\n".join([*rows, "", note, "", _provenance(r), ""])


def serving_table() -> str:
    r = load("serving")
    rows = ["| model | run | served | ratio (middle half) |", "|---|---|---|---|"]
    for p in r["points"]:
        half = p["ratios"][len(p["ratios"]) // 4 : -(len(p["ratios"]) // 4) or None]
        rows.append(
            f"| {p['model']} | {p['direct_ms']:.2f} ms | {p['served_ms']:.2f} ms | "
            f"{p['ratio']:.3f} ({half[0]:.3f} to {half[-1]:.3f}) |"
        )
    return "\n".join([*rows, "", _provenance(r), ""])


def depth_table() -> str:
    result = load("depth")
    rows = ["| tokens of context | ms per token |", "|---|---|"]
    rows += [f"| {p['depth']} | {p['ms_per_token']:.1f} |" for p in result["points"]]
    return "\n".join(rows) + "\n\n" + _provenance(result) + "\n"


def latent_depth_table() -> str:
    r = load("latent_depth")
    rows = ["| tokens of context | ms per token | transformers | |", "|---|---|---|---|"]
    rows += [
        f"| {p['depth']} | {p['ms_per_token']:.0f} | {p['stock_ms_per_token']:.0f} | "
        f"{p['ratio']:.1f}x |"
        for p in r["points"]
    ]
    return "\n".join(rows) + "\n\n" + _provenance(r) + "\n"


def formats_table() -> str:
    rows = ["| model | form | size | perplexity | KL | same likeliest token |"]
    rows.append("|---|---|---|---|---|---|")
    results = [load("formats_bundled"), load("formats")]
    rows += [
        f"| {result['checkpoint']} | {r['form']} | {r['bytes'] / _GB:.3f} GB | "
        f"{r['perplexity']:.3f} | {r['kl']:.5f} | {r['same_top_1']:.1%} |"
        for result in results
        for r in result["rows"]
    ]
    return "\n".join(rows) + "\n\n" + "\n".join(map(_provenance, results)) + "\n"


def kernel_speed_table() -> str:
    result = load("kernel_speed")
    speeds, trials = dict(result["gbps"]), result["trials"]
    del speeds["memory"]
    # Of each trial, for the memory's speed changes from minute to minute.
    shares = {
        name: statistics.median(map(operator.truediv, trials[name], trials["memory"]))
        for name in speeds
    }
    names = {"MXFP4_PLANES": "MXFP4 (safetensors)", "F8_E4M3": "FP8", "GPTQ_V2": "GPTQ v2"}
    half = -(-len(speeds) // 2)
    cells = [
        f"{names.get(name, name)} | {speed:.0f} GB/s | {shares[name]:.0%}"
        for name, speed in speeds.items()
    ]
    pairs = itertools.zip_longest(cells[:half], cells[half:], fillvalue=" | | ")
    rows = ["| one token by | weights | of memory's speed | | | |", "|---|---|---|---|---|---|"]
    rows += [f"| {left} | {right} |" for left, right in pairs]
    return "\n".join(rows) + "\n\n" + _provenance(result) + "\n"


def gguf_formats_note() -> str:
    result = load("gguf_formats")
    rows = result["rows"]
    decoded = sum(not row["tensors_decoded_otherwise"] for row in rows)
    within = sum(row["is_within"] for row in rows)
    forms = ", ".join(row["form"] for row in rows)
    least = min(row["native_same_top_1"] for row in rows)
    text = (
        f"One file of each form ({forms}) by llama.cpp's quantiser: in {decoded} of {len(rows)} "
        f"every tensor is decoded to the gguf package's bits, and the logits of {within} are those "
        f"of stock transformers on these weights up to twice the spread of its own implementations "
        f"(float32). By the kernels of this machine at least {least:.0%} of the likeliest tokens "
        f"are the same."
    )
    return f"{text}\n\n{_provenance(result)}\n"


def plan_table() -> str:
    result = load("plan_accuracy")
    rows = [
        "| model | budget | slots | hit rate assumed / found | tokens/s planned / planned at the "
        "hit rate found / measured | error |",
        "|---|---|---|---|---|---|",
    ]
    for p in result["points"]:
        rows.append(
            f"| {p['model']} | {p['ram']} | {p['slots']} | {p['hit_assumed']:.0%} / "
            f"{p['hit_found']:.0%} | {p['planned']:.2f} / {p['planned_at_hit']:.2f} / "
            f"{p['measured']:.2f} | {p['error']:+.0%} |"
        )
    return "\n".join(rows) + "\n\n" + _provenance(result) + "\n"


def families_page(result: dict) -> str:
    """docs/families.md, whole."""
    good = [r for r in result["families"] if r["runs"] and all(x["is_within"] for x in r["runs"])]
    refused = [r for r in result["families"] if "refused" in r]
    lines = [
        "# Model families",
        "",
        f"{len(good)} of the {len(result['families'])} families whose experts use transformers' "
        f"experts interface ({result['modelling_files']} modelling files of transformers "
        f"{result['transformers']}) were built small with random weights, saved, and run from "
        "their files. *difference*: largest difference of logits from stock's eager "
        "implementation with routing forced equal; *spread*: the same between stock's own "
        "implementations. *settings*: policies, capacities from the smallest to everything and 1 "
        "and 8 reader threads, whose logits were bit-identical.",
        "",
        "| family | fp32 difference / spread | bf16 difference / spread | settings |",
        "|---|---|---|---|",
        *(_family_row(row) for row in good),
        "",
        "## Not run, by a named error",
        "",
        *(f"- `{r['family']}`: {r['refused']}" for r in refused),
        *(
            f"- `{r['family']}`: differs from stock"
            for r in result["families"]
            if r not in good and r not in refused
        ),
        "",
        "Outside the experts interface: `switch_transformers` and `nllb_moe` run through adapters "
        "(tests/model/test_adapters.py); other families are refused by a named error.",
        "",
        _provenance(result),
        "",
    ]
    return "\n".join(lines)


def _family_row(row: dict) -> str:
    cells = [f"{x['difference']:.1e} / {x['spread']:.1e}" for x in row["runs"]]
    same = all(x["bit_identical"] for x in row["runs"])
    count = row["runs"][0]["num_settings"]
    return f"| {row['family']} | {cells[0]} | {cells[1]} | {count if same else 'NOT identical'} |"


def _with_source(name: str, table: Callable[[dict], str]) -> str:
    result = load(name)
    return table(result) + "\n" + _provenance(result) + "\n"


def _provenance(result: dict) -> str:
    line = f"*`{result['command']}` at {result['commit']}, {result['machine']}, {result['date']}.*"
    return line + (f"  \nRenewed: {_provenance(result['renewed'])}" if "renewed" in result else "")


TABLES: dict[str, Callable[[], str]] = {
    "batching": batching_table,
    "serving": serving_table,
    "budget": budget_table,
    "depth": depth_table,
    "peers": peers_table,
    "in_turns": in_turns_table,
    "avx2_limits": avx2_limits_table,
    "gguf_text": gguf_text_note,
    "gguf_formats": gguf_formats_note,
    "gguf_families": gguf_families_note,
    "latent_depth": latent_depth_table,
    "resident": resident_table,
    "avx2": avx2_table,
    "prefill": prefill_note,
    "formats": formats_table,
    "plan": plan_table,
    "kernel_speed": kernel_speed_table,
    "policies": lambda: _with_source("policies", render_policies.summary_table),
    "disk": lambda: _with_source("prefetch_disk", render_policies.disk_table),
}

if __name__ == "__main__":
    main()
