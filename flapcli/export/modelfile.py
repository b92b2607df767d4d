"""An Ollama Modelfile for an exported GGUF: where it lies, how a chat is laid out, and where it stops."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from flapcli.texts.opening import opening

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SYSTEM, USER, REPLY, AGAIN = "<~system~>", "<~user~>", "<~reply~>", "<~again~>"
Messages = list[dict[str, str]]


def modelfile(file_name: str, tokenizer: "PreTrainedTokenizerBase", stop_ids: list[int]) -> str:
    """The text of a Modelfile that stands beside `file_name`.

    Without a TEMPLATE Ollama takes the chat template that it recognises in the GGUF, or passes the prompt as it is.
    """
    lines = [f"FROM ./{file_name}"]
    if template := ollama_template(_renderer(tokenizer)):
        lines.append(f'TEMPLATE """{template}"""')
    stops = [tokenizer.convert_ids_to_tokens(i) for i in dict.fromkeys(stop_ids)]
    lines += [f'PARAMETER stop "{stop}"' for stop in stops if stop and '"' not in stop]
    return "\n".join(lines) + "\n"


def _renderer(tokenizer: "PreTrainedTokenizerBase") -> Callable[[Messages], str | None]:
    """The chat template applied, without the BOS that llama.cpp adds itself; None for what it refuses."""
    adds_bos = tokenizer.bos_token_id in opening(tokenizer)

    def render(messages: Messages) -> str | None:
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except (ValueError, TemplateError):
            return None
        return str(text).removeprefix(tokenizer.bos_token) if adds_bos else str(text)

    return render


def ollama_template(render: Callable[[Messages], str | None]) -> str | None:
    """Ollama's (Go) form of a chat template, from what it writes around the messages of three sample chats.

    None where the template does more than put texts around messages, so that the form would not say the same.
    """
    chat: Messages = [{"role": "user", "content": USER}]
    later: Messages = [{"role": "assistant", "content": REPLY}, {"role": "user", "content": AGAIN}]
    system: Messages = [{"role": "system", "content": SYSTEM}]
    plain = _around(render(chat), [USER])
    turns = _around(render(chat + later), [USER, REPLY, AGAIN])
    if plain is None or turns is None:
        return None
    start, ask = plain
    between = turns[2]
    if turns != [start, ask, between, ask]:
        return None
    user = f"{{{{ if eq $i 0 }}}}{start}{{{{ end }}}}{{{{ .Content }}}}{ask}"
    branches = f'{{{{ if eq .Role "user" }}}}{user}{{{{ else if eq .Role "assistant" }}}}{{{{ .Content }}}}{between}'
    whole = _around(render(system + chat + later), [SYSTEM, USER, REPLY, AGAIN])
    pieces = [start, ask, between]
    if whole is not None and whole[2:] == [ask, between, ask]:
        branches += f'{{{{ else if eq .Role "system" }}}}{whole[0]}{{{{ .Content }}}}{whole[1]}'
        pieces += whole[:2]
    if any("{{" in piece or '"""' in piece for piece in pieces):
        return None
    return f"{{{{ range $i, $_ := .Messages }}}}{branches}{{{{ end }}}}{{{{ end }}}}"


def _around(text: str | None, contents: list[str]) -> list[str] | None:
    """What stands before, between and after `contents` in a text, None unless each is there once and in order."""
    pieces: list[str] = []
    for content in contents:
        if text is None or text.count(content) != 1:
            return None
        before, _, text = text.partition(content)
        pieces.append(before)
    return [*pieces, text or ""]
