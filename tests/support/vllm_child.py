"""Answers, in vLLM's own environment, what tests ask of it: greedy tokens of folders. Nothing of flap is imported.

One request a line, as JSON, and one answer a line: `tokens` of every prompt, or the `error` that vLLM raised. Each
folder has a child of its own, forked after the imports, which take longer than a small model.
"""

import gc
import json
import os
import sys
import time
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints is no answer
    import vllm
    import vllm.v1.worker.cpu_worker  # else each child does

    gc.collect()
    gc.freeze()  # vLLM collects garbage often, and would go through all of the above
    print(json.dumps({"version": vllm.__version__}), file=answers, flush=True)
    for line in sys.stdin:
        if child := os.fork():
            _, status = os.waitpid(child, 0)
            if status:
                print(json.dumps({"error": f"vLLM died: {status}"}), file=answers, flush=True)
            continue
        print(json.dumps(answer(**json.loads(line))), file=answers, flush=True)
        os._exit(0)


def answer(folder: str, prompts: list[list[int]], count: int, turns: int = 1, **settings: Any) -> dict[str, Any]:
    """Greedy tokens after every prompt, and the seconds that loading, and each turn, took."""
    from vllm import LLM, SamplingParams

    if settings.get("tensor_parallel_size") == 2:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"  # it would want a NUMA node for each
    start = time.perf_counter()
    try:
        model = LLM(folder, trust_remote_code=True, dtype="float32", enforce_eager=True, max_model_len=256, **settings)
        seconds = [time.perf_counter() - start]
        sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        for _ in range(turns):
            start = time.perf_counter()
            found = model.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
            seconds.append(time.perf_counter() - start)
    except Exception as error:  # whatever it says is what the test compares
        return {"error": f"{type(error).__name__}: {error}"}
    tokens = [list(output.outputs[0].token_ids) for output in found]
    return {"tokens": tokens, "seconds": seconds, "served_by": model.llm_engine.model_config.architecture}


if __name__ == "__main__":
    main()
