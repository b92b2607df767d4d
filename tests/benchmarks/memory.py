"""Memory and time of calibrate and apply on a generated bfloat16 Llama of TinyLlama-1.1B's sizes.

    python tests/benchmarks/memory.py [--nsamples 128] [--skip-in-memory] [--folder DIR]

Prints peak resident memory above the import of torch and transformers, the time of streamed calibration over
that of the in-memory one, the time of `flap apply` over copying the checkpoint's bytes with fsync, and what a
model of Llama-2-70B's sizes would need by the same formulas. About 10 minutes on 2 cores.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.models import tiny_tokenizer

from flapcli.checkpoints.shards import plan_shards, write_shards
from flapcli.storage.safetensors_file import TensorSpec

TINYLLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "vocab_size": 32000,
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
    "hidden_act": "silu", "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA_70B = TINYLLAMA | {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    "num_key_value_heads": 8, "head_dim": 128,
}  # fmt: skip
SEQLEN, BATCH_TOKENS = 128, 1024
LIBRARIES = 100e6  # what commands load besides torch and transformers
MEASURED = """
import json, sys, time
import torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from flapcli.cli.app import app

def status(key):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(key))

imported = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
began, used = time.monotonic(), time.process_time()
try:
    app(sys.argv[1:])
except SystemExit as end:
    assert not end.code, end.code
took, used = time.monotonic() - began, time.process_time() - used
found = {"seconds": took, "processor": used, "bytes": status("VmHWM") - imported, "imports": imported}
print(json.dumps(found), file=sys.stderr)
"""


def specs(config: dict) -> list[TensorSpec]:
    """Tensors of a Llama, in the order they are stored."""
    h, f, d = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv, v = config["num_attention_heads"] * d, config["num_key_value_heads"] * d, config["vocab_size"]
    made = {"model.embed_tokens": (v, h)}
    for i in range(config["num_hidden_layers"]):
        made |= {
            f"model.layers.{i}.{name}": shape
            for name, shape in {
                "self_attn.q_proj": (q, h), "self_attn.k_proj": (kv, h), "self_attn.v_proj": (kv, h),
                "self_attn.o_proj": (h, q), "mlp.gate_proj": (f, h), "mlp.up_proj": (f, h), "mlp.down_proj": (h, f),
                "input_layernorm": (h,), "post_attention_layernorm": (h,),
            }.items()
        }  # fmt: skip
    made |= {"model.norm": (h,), "lm_head": (v, h)}
    return [TensorSpec(f"{name}.weight", shape, "BF16") for name, shape in made.items()]


def generate(folder: Path, config: dict = TINYLLAMA) -> None:
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    shards = plan_shards(specs(config), 500_000_000)

    def tensors():
        for spec in (spec for shard in shards for spec in shard):
            scale = 1 if len(spec.shape) == 1 else 0
            yield spec.name, (torch.randn(spec.shape) * 0.02 + scale).bfloat16()

    write_shards(folder, shards, tensors())
    (folder / "config.json").write_text(json.dumps(config))
    tiny_tokenizer().save_pretrained(folder)


def flap(*arguments: object) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *(str(a) for a in arguments)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stderr.strip().splitlines()[-1])


def copy(source: Path, target: Path) -> float:
    """Seconds to copy the weight files' bytes to the same disk with fsync."""
    target.mkdir()
    began = time.monotonic()
    for path in sorted(source.glob("*.safetensors")):
        with path.open("rb") as read, (target / path.name).open("wb") as write:
            while block := read.read(1 << 24):
                write.write(block)
            write.flush()
            os.fsync(write.fileno())
    return time.monotonic() - began


def sizes(config: dict, nsamples: int) -> dict[str, float]:
    """Bytes that the stages work with."""
    tensors = specs(config)
    channels = config["num_attention_heads"] * config["head_dim"] + config["intermediate_size"]
    return {
        "weights": sum(s.nbytes for s in tensors),
        "layer": sum(s.nbytes for s in tensors if ".layers.0." in s.name),
        "outputs": sum(s.nbytes for s in tensors if "o_proj" in s.name or "down_proj" in s.name),
        "largest": max(s.nbytes for s in tensors),
        "embedding": tensors[0].nbytes,
        "hidden": nsamples * SEQLEN * config["hidden_size"] * 2,
        "batch": BATCH_TOKENS * config["intermediate_size"] * 4,
        "stats": config["num_hidden_layers"] * channels * 5 * 4,
    }


def formula(s: dict[str, float]) -> dict[str, tuple[float, float, float]]:
    """RAM, disk and bytes read of every stage.

    A streamed layer stands beside the next one; a batch has about four activations of the MLP's width in float32.
    """
    working = 4 * s["batch"] + LIBRARIES
    streamed = s["hidden"] + max(2 * s["layer"], s["embedding"]) + working
    return {
        "calibrate --stream": (streamed, 2 * s["hidden"] + s["stats"], s["weights"]),
        "calibrate in memory": (s["weights"] + working, s["stats"], s["weights"]),
        "plan": (3 * s["stats"], 0, s["stats"]),
        "apply": (2 * s["largest"] + s["stats"], s["weights"], s["weights"] + s["outputs"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--skip-in-memory", action="store_true")
    parser.add_argument("--folder", type=Path, help="Where model and runs lie [default: a temporary folder].")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        measure(Path(scratch), options.nsamples, options.skip_in_memory)


def measure(scratch: Path, nsamples: int, skip: bool) -> None:
    model = scratch / "model"
    generate(model)
    text = ["--dataset", "pydoc", "--nsamples", nsamples, "--seqlen", SEQLEN, "--dtype", "bfloat16"]
    by_formula = formula(sizes(TINYLLAMA, nsamples))
    stages = {"calibrate --stream": "--stream"} | ({} if skip else {"calibrate in memory": "--no-stream"})
    print(f"{nsamples} windows of {SEQLEN} tokens, {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    found = {}
    for name, mode in stages.items():
        found[name] = flap("calibrate", model, "-d", scratch / mode, *text, mode)
    found["plan"] = flap("plan", "-d", scratch / "--stream")
    copied = copy(model, scratch / "copy")
    found["apply"] = flap("apply", "-d", scratch / "--stream")
    again = copy(model, scratch / "copy2")
    print(f"{'':22} {'peak above imports':>20} {'by formula':>12} {'seconds':>9}")
    for name, f in found.items():
        print(f"{name:22} {f['bytes'] / 1e6:17,.0f} MB {by_formula[name][0] / 1e6:9,.0f} MB {f['seconds']:9.1f}")
    if not skip:
        ratio = found["calibrate --stream"]["seconds"] / found["calibrate in memory"]["seconds"]
        print(f"streamed over in-memory time: {ratio:.2f}")
    seconds = (copied + again) / 2
    print(f"apply over copying with fsync ({copied:.1f} s before, {again:.1f} s after): "
          f"{found['apply']['seconds'] / seconds:.2f}")  # fmt: skip
    print(f"\nLlama-2-70B, bfloat16, 1024 windows of {SEQLEN} tokens, by the same formulas")
    print(f"{'':22} {'RAM':>12} {'disk':>12} {'bytes read':>12}")
    for name, values in formula(sizes(LLAMA_70B, 1024)).items():
        print(f"{name:22} " + " ".join(f"{value / 1e9:9.2f} GB" for value in values))


if __name__ == "__main__":
    main()
