"""What the scoreboard reads, cut from the wheel of gensim: texts beside pydoc, and questions with four answers."""

import bz2
import html
import json
import re
import zipfile
from pathlib import Path

DATA = "gensim/test/test_data/"
NEWS = DATA + "lee_background.cor"
WIKI = DATA + "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
CODE = "gensim/utils.py"
NEWS_FROM, LENGTH = 0.6, 30_000  # of the news, past what METHOD.md calibrates on; characters, about 60 windows
TASK, QUESTIONS, CHOICES, GIVEN = "news_goes_on", 200, 4, 2


def write_texts(wheel: Path, folder: Path) -> dict[str, str]:
    """Each text's file by its name; pydoc is known by that."""
    with zipfile.ZipFile(wheel) as archive:
        news = archive.read(NEWS).decode()
        start = int(NEWS_FROM * len(news))
        found = {
            "encyclopedia": articles(bz2.decompress(archive.read(WIKI)).decode())[5000:45_000],
            "news": news[start : start + LENGTH],
            "code": archive.read(CODE).decode()[:LENGTH],
        }
    for name, text in found.items():
        (folder / f"{name}.txt").write_text(text)
    return {"pydoc": "pydoc"} | {name: str(folder / f"{name}.txt") for name in found}


def articles(dump: str) -> str:
    """The beginnings of a dump's articles, without their markup."""
    found = []
    for page in map(html.unescape, re.findall(r"<text[^>]*>(.*?)</text>", dump, re.DOTALL)):
        if page.startswith("#REDIRECT"):
            continue
        text = page
        for _ in range(4):  # templates within templates
            text = re.sub(r"\{\{[^{}]*\}\}", "", text)
        text = re.sub(r"<ref[^>]*/>|<ref.*?</ref>|<!--.*?-->|\{\|.*?\|\}", "", text, flags=re.DOTALL)
        text = re.sub(r"\[\[(?:File|Image):[^\]]*(?:\[\[[^\]]*\]\][^\]]*)*\]\]", "", text)
        text = re.sub(r"\[\[(?:[^|\]]*\|)?([^\]]*)\]\]", r"\1", text)
        found.append(re.sub(r"'{2,}|<[^>]*>|\[http\S* ?([^\]]*)\]", "", text)[:3000].strip())
    return "\n\n".join(found)


def write_task(wheel: Path, folder: Path) -> Path:
    """Which sentence of an article comes third, after the first two: it, or one of the last three. For lm-eval."""
    with zipfile.ZipFile(wheel) as archive:
        stories = [re.split(r"(?<=\.) ", line.strip()) for line in archive.read(NEWS).decode().splitlines()]
    long = [sentences for sentences in stories if len(sentences) >= GIVEN + CHOICES][:QUESTIONS]
    rows = []
    for place, sentences in enumerate(long):
        wrong, answer = sentences[1 - CHOICES :], place % CHOICES
        choices = [*wrong[:answer], sentences[GIVEN], *wrong[answer:]]
        rows.append({"given": " ".join(sentences[:GIVEN]), "choices": choices, "answer": answer})
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / f"{TASK}.yaml").write_text(f"""
task: {TASK}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder.resolve()}/rows.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{given}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
""")
    return folder
