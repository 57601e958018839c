"""What packing to 8 and 4 bit costs: perplexity, divergence and agreement on held-out text.

Every form of one checkpoint reads the same windows of text; the reference is the checkpoint itself
in bf16. Beside it llama.cpp's forms of the same weights (gguf and llama_cpp packages).
"""

from __future__ import annotations

import argparse
import json
import lzma
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from limits import provenance, save

DOMAINS = ("docs_python", "code_python", "lang_de", "lang_fr", "math_gsm8k", "literature")
DOMAINS += ("dict_wordnet", "code_rust")  # those the bundled model was trained on
# Name -> forms of experts and of dense linear layers.
OURS = {
    "int8": ("int8", "int8"),
    "int8, experts only": ("int8", "bf16"),
    "int4": ("int4", "int4"),
    "int4, experts only": ("int4", "bf16"),
}
THEIRS = ("F16", "Q8_0", "Q4_0", "Q4_K_M")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--corpus", type=Path, help="DOMAIN.valid.jsonl.xz, a text per line")
    parser.add_argument("--window", type=int, default=256, help="tokens; one per domain and round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--name", default="formats", help="of the result file")
    parser.add_argument("--peer-python", default=sys.executable, help="one that has llama_cpp")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        run_worker(*args.worker)
        return
    with tempfile.TemporaryDirectory(dir=args.checkpoint.parent) as folder:
        rows = measure(args, Path(folder))
    save(args.name, {**provenance(), "checkpoint": args.checkpoint.name, "rows": rows})


def measure(args: argparse.Namespace, work: Path) -> list[dict]:
    windows = work / "windows.npy"
    np.save(windows, read_windows(args))
    reference = logits_of(sys.executable, "ours", args.checkpoint, windows)
    rows = [row("bf16", args.checkpoint, reference, reference, windows)]
    for name, (experts, dense) in OURS.items():
        packed = work / "packed"
        command = ["-c", "from moe_infinity.cli import main; main()", "pack"]
        options = ["--experts", experts, "--dense", dense]
        run(sys.executable, *command, str(args.checkpoint), str(packed), *options)
        said = logits_of(sys.executable, "ours", packed, windows)
        rows.append(row(name, packed, said, reference, windows))
        run("rm", "-r", str(packed))
    f16 = work / "F16.gguf"
    for name in THEIRS:
        file = work / f"{name}.gguf"
        if name == "Q4_K_M":
            worker = ["--worker", "quantise", str(f16), str(file), ""]
            run(args.peer_python, __file__, str(work), *worker)
        else:
            maker = Path(__file__).with_name("make_gguf.py")
            run(sys.executable, str(maker), str(args.checkpoint), str(file), "--type", name)
        said = logits_of(args.peer_python, "llama_cpp", file, windows)
        rows.append(row(f"llama.cpp {name}", file, said, reference, windows))
        if name != "F16":
            file.unlink()
    return rows


def read_windows(args: argparse.Namespace) -> np.ndarray:
    """[rounds * domains, window] token ids of held-out text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    windows = []
    for domain in DOMAINS:
        with lzma.open(args.corpus / f"{domain}.valid.jsonl.xz", "rt") as lines:
            texts = [json.loads(line) for line in lines]
        text = "\n\n".join(t["text"] if isinstance(t, dict) else t for t in texts)
        ids = np.array(tokenizer(text[: 40 * args.window * args.rounds]).input_ids)
        starts = np.linspace(0, len(ids) - args.window, args.rounds).astype(int)
        windows += [ids[start : start + args.window] for start in starts]
    return np.stack(windows)


def row(name: str, path: Path, said: np.ndarray, reference: np.ndarray, windows: Path) -> dict:
    ids = np.load(windows)[:, 1:]
    own, true = log_softmax(said[:, :-1]), log_softmax(reference[:, :-1])
    chosen = np.take_along_axis(own, ids[..., None], axis=-1)
    files = [path] if path.is_file() else path.glob("*")
    found = {
        "form": name,
        "bytes": sum(file.stat().st_size for file in files if file.suffix not in (".json",)),
        "perplexity": float(np.exp(-chosen.mean())),
        "kl": float((np.exp(true) * (true - own)).sum(axis=-1).mean()),
        "same_top_1": float((own.argmax(-1) == true.argmax(-1)).mean()),
        "tokens": int(ids.size),
    }
    print(found, flush=True)
    return found


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def logits_of(python: str, system: str, path: Path, windows: Path) -> np.ndarray:
    """[windows, tokens, vocabulary], by a process of its own."""
    out = windows.with_name("logits.npy")
    run(python, __file__, str(path), "--worker", system, str(path), str(windows), str(out))
    return np.load(out)


def run(*command: str) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def run_worker(system: str, path: str, windows: str, out: str) -> None:
    if system == "quantise":
        quantise(path, windows)
        return
    said = {"ours": ours, "llama_cpp": llama_cpp}[system](path, np.load(windows))
    np.save(out, said)


def ours(path: str, windows: np.ndarray) -> np.ndarray:
    import torch

    from moe_infinity import MoE

    with MoE(path, max_context=windows.shape[1]) as moe:
        said = [moe(torch.from_numpy(ids)[None]).logits[0].float().numpy() for ids in windows]
    return np.stack(said)


def llama_cpp(path: str, windows: np.ndarray) -> np.ndarray:
    import llama_cpp

    length = windows.shape[1]
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    model = llama_cpp.llama_model_load_from_file(path.encode(), params)
    options = llama_cpp.llama_context_default_params()
    options.n_ctx = options.n_batch = options.n_ubatch = length
    context = llama_cpp.llama_init_from_model(model, options)
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    said = []
    for ids in windows:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        batch = llama_cpp.llama_batch_init(length, 0, 1)
        batch.n_tokens = length
        for at, token in enumerate(ids):
            batch.token[at], batch.pos[at], batch.logits[at] = int(token), at, 1
            batch.n_seq_id[at] = 1
            batch.seq_id[at][0] = 0
        if llama_cpp.llama_decode(context, batch):
            raise SystemExit("llama_decode failed")
        values = llama_cpp.llama_get_logits(context)
        flat = np.ctypeslib.as_array(values, shape=(length * vocabulary,))
        said.append(flat.reshape(length, vocabulary).copy())
        llama_cpp.llama_batch_free(batch)
    return np.stack(said)


def quantise(source: str, target: str) -> None:
    import llama_cpp

    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
    if llama_cpp.llama_model_quantize(source.encode(), target.encode(), params):
        raise SystemExit("llama_model_quantize failed")


if __name__ == "__main__":
    main()
