"""What healing gives back: the scoreboard's demo pruned, trained on so many tokens by each loss, read on four texts.

    pip download --no-deps gensim
    python tests/benchmarks/healing.py --news gensim-*.whl --dir /tmp/healing --tokens 250000

SmolLM2-135M-Instruct calibrated on 128 windows of pydoc, then trained on pydoc and own text, half each, by divergence
from the dense model (kl) and by cross entropy as people do without a teacher (ce); with `--loss ce-pydoc` on pydoc
alone. Texts and types as in quality.py. Rows that are in DIR/rows.jsonl are not measured again.
"""

import argparse
import time
from dataclasses import replace
from itertools import product
from pathlib import Path

from paper import flap
from quality import METHODS, Rows
from quality_texts import write_texts

from flapcli.artifacts.eval_report import load_report
from flapcli.execution.settings import HealOptions
from flapcli.healing.stage import HealInputs, heal

Texts = dict[str, str]  # file by name
BOTH = "pydoc:0.5+self:0.5"
LOSSES = {
    "kl": HealOptions(dataset=BOTH, loss="kl"),
    "ce": HealOptions(dataset=BOTH, loss="ce"),
    "ce-pydoc": HealOptions(dataset="pydoc", loss="ce"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--news", type=Path, required=True, help="gensim's wheel")
    parser.add_argument("--dir", type=Path, required=True, help="work folder, kept")
    parser.add_argument("--methods", default="best,paper")
    parser.add_argument("--ratios", default="0.2,0.3,0.5")
    parser.add_argument("--tokens", default="250000,1000000,4000000")
    parser.add_argument("--loss", default="kl,ce")
    asked = parser.parse_args()
    asked.dir.mkdir(parents=True, exist_ok=True)
    rows, texts = Rows(asked.dir / "rows.jsonl", "encyclopedia"), write_texts(asked.news, asked.dir)
    rows.measure(("dense",), lambda _: perplexities(asked.dir / "dense", ["demo"], texts))
    cuts = list(product(asked.methods.split(","), asked.ratios.split(",")))
    for method, ratio in cuts:
        run = asked.dir / f"{method}-{ratio}"
        rows.measure((method, ratio, "0", ""), lambda _, m=method, r=ratio, d=run: pruned(d, m, r, texts))
    for tokens, (method, ratio), loss in product(asked.tokens.split(","), cuts, asked.loss.split(",")):
        run, options = asked.dir / f"{method}-{ratio}", replace(LOSSES[loss], tokens=int(tokens))
        out = run / f"{loss}-{tokens}"
        rows.measure((method, ratio, tokens, loss), lambda _, r=run, o=out, given=options: healed(r, o, given, texts))
    table(rows, list(texts))


def pruned(run: Path, method: str, ratio: str, texts: Texts) -> dict[str, float]:
    calibrate, plan, apply = METHODS[method]
    flap("calibrate", "demo", "-d", str(run), "--dataset", "pydoc", "--nsamples", "128", *calibrate.split())
    flap("plan", "-d", str(run), "--ratio", ratio, *plan.split())
    flap("apply", "-d", str(run), "--dtype", "bfloat16", *apply.split())
    return perplexities(run, [], texts)


def healed(run: Path, out: Path, options: HealOptions, texts: Texts) -> dict[str, float]:
    """Perplexities of the healed folder, and the processor's seconds that healing took.

    Whoever comes first writes own text and the teacher's answers for all; what a killed run did before is not in it.
    """
    began = time.process_time()
    folder, _ = heal(run / "pruned", out, options, HealInputs(teacher=run.with_name("teacher.safetensors")))
    took = {"seconds": time.process_time() - began}
    if folder is None:  # no better, so that the pruned one stays
        return perplexities(run, [], texts) | took
    made = folder.flap.healed
    assert made is not None
    return perplexities(run, [str(out)], texts) | {"before": made.before, "after": made.after, "best": made.best} | took


def perplexities(run: Path, checkpoint: list[str], texts: Texts) -> dict[str, float]:
    given = [part for text in texts.values() for part in ("--perplexity", text)]
    flap("eval", *checkpoint, "-d", str(run), "--no-baseline", "--dtype", "bfloat16", "--force", *given)
    found = load_report(run / "eval.json").perplexity
    return {name: found[text] for name, text in texts.items()}


def table(rows: Rows, names: list[str]) -> None:
    """Markdown: perplexities, which share of what is lost on news came back, and what the processor took for it."""
    whole = rows.found["dense",]["news"]
    print(f"| | ratio | tokens | loss | {' | '.join(names)} | came back | seconds |\n|" + "---|" * (6 + len(names)))
    for key, row in rows.found.items():
        if len(key) > 1:
            cut = rows.found[*key[:2], "0", ""]["news"]
            back, took = (cut - row["news"]) / (cut - whole), f"{row['seconds']:.0f}" if "seconds" in row else ""
            cells = (*key, *(f"{row[name]:.2f}" for name in names), f"{back:.0%}", took)
            print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
