"""One vLLM for all tests, and a table of what it said at the end."""

import pytest
from support.vllm import Engine

ROWS: list[tuple[str, str, str]] = []  # case, what served it, result


@pytest.fixture(scope="session")
def vllm(tmp_path_factory):
    """Where it is missing the tests fail, since `-m serving` asked for them."""
    engine = Engine(tmp_path_factory.mktemp("vllm") / "log")
    yield engine
    engine.close()


@pytest.fixture
def same_tokens(vllm):
    """Asserts that vLLM's greedy tokens of a folder are transformers', or its refusal; returns what it answered.

    Each is a row of the table.
    """

    def check(case, folder, prompts, expected, refused=None, engine=vllm, **settings):
        found = engine.ask(folder, prompts, len(expected[0]), **settings)
        equal = sum(mine == theirs for mine, theirs in zip(found.get("tokens", []), expected, strict=False))
        said = f"{equal} of {len(expected)} prompts, {found['seconds'][0]:.0f} s to load" if equal else ""
        said = said or found.get("error", "none").replace("\n", " ")
        ROWS.append(
            (case, found.get("served_by", "none"), said if len(said) < 200 else f"{said[:90]} ... {said[-90:]}")
        )
        assert (refused in found.get("error", "")) if refused else (equal == len(expected)), said
        return found

    return check


def pytest_terminal_summary(terminalreporter):
    if ROWS:
        terminalreporter.write_line("\n| case | served by | the same greedy tokens as transformers |\n|---|---|---|")
    for row in ROWS:
        terminalreporter.write_line(f"| {' | '.join(row)} |")
