"""Chat templates: their jinja text, and the tokenizer they need.

A template is one jinja string. It is saved with the processor, and stock transformers renders prompts with it; training
renders the same string, so a model is trained on exactly the prompt it will be asked with.
"""

from __future__ import annotations

import json
import re
from typing import Any

from vir_hf.errors import RecipeError

# Every template begins with what chat_template_for writes in front: vir_token (the image token), vir_image (the same,
# and the space that LLaVA's way of tokenising puts after it), vir_start (BOS, where
# the tokenizer wants one), vir_pad, vir_end (what closes a turn) and vir_write, which turns a content list into text.
# One image of a turn goes to its front; images that lead a turn stand on a line each; other images stay where they are.
_WRITE = r"""
{%- macro vir_write(content) -%}
    {%- if content is string -%}
        {{- content | replace(vir_token, vir_image) -}}
    {%- else -%}
        {%- set images = content | selectattr('type', 'equalto', 'image') | list -%}
        {%- set texts = content | selectattr('type', 'equalto', 'text') | list -%}
        {%- set vir = namespace(leading=true) -%}
        {%- for part in (images + texts if images | length == 1 else content) -%}
            {%- if part.type == 'image' -%}
                {{- vir_image + ('\n' if vir.leading and not loop.last else '') -}}
            {%- elif part.type == 'text' -%}
                {%- set vir.leading = false -%}
                {{- part.text -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
"""

_SYSTEM = r"""
{%- set given = messages | length > 0 and messages[0].role == 'system' -%}
{%- set system = vir_write(messages[0].content) if given else 'DEFAULT' -%}
"""

TEMPLATES: dict[str, str] = {
    "vicuna_v1": _SYSTEM.replace(
        "'DEFAULT'",
        '"A chat between a curious user and an artificial intelligence assistant. '
        "The assistant gives helpful, detailed, and polite answers to the user's questions.\"",
    )
    + r"""
{{- vir_start + vir_pad + (system + ' ' if system else '') -}}
{%- for message in (messages[1:] if given else messages) -%}
    {%- if message.role == 'assistant' -%}
        {{- 'ASSISTANT: ' + vir_write(message.content) + vir_end -}}
    {%- else -%}
        {{- 'USER: ' + vir_write(message.content) + ' ' -}}
    {%- endif -%}
{%- endfor -%}
{{- 'ASSISTANT:' if add_generation_prompt else '' -}}""",
    "plain": r"""
{{- vir_start -}}
{%- for message in messages -%}
    {%- if message.role == 'assistant' -%}
        {{- vir_pad + vir_write(message.content) + vir_end -}}
    {%- elif message.content is string -%}
        {{- vir_image * message.content.count(vir_image) -}}
    {%- else -%}
        {{- vir_image * (message.content | selectattr('type', 'equalto', 'image') | list | length) -}}
    {%- endif -%}
{%- endfor -%}""",
    "llama_2": _SYSTEM.replace(
        "DEFAULT",
        "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
        "provides, and assist the user with a variety of tasks using natural language.",
    )
    + r"""
{%- set vir = namespace(system='<<SYS>>\n' + system + '\n<</SYS>>\n\n' if system else '', open=false) -%}
{{- vir_start + vir_pad -}}
{%- for message in (messages[1:] if given else messages) -%}
    {%- if message.role == 'assistant' -%}
        {{- ('' if vir.open else '[INST] ' + vir.system + ' [/INST]') + ' ' + vir_write(message.content) + ' ' -}}
        {{- vir_end + ('' if loop.last else vir_start) -}}
        {%- set vir.open = false -%}
    {%- else -%}
        {{- '[INST] ' + vir.system + vir_write(message.content) + ' [/INST]' -}}
        {%- set vir.open = true -%}
    {%- endif -%}
    {%- set vir.system = '' -%}
{%- endfor -%}
{%- if add_generation_prompt and messages | length == (1 if given else 0) -%}
    {{- '[INST] ' + vir.system + ' [/INST]' -}}
{%- endif -%}""",
    "llama_3": _SYSTEM.replace(
        "DEFAULT",
        "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
        "provides, and assist the user with a variety of tasks using natural language.",
    )
    + r"""
{{- vir_start -}}
{%- if system -%}
    {{- '<|start_header_id|>system<|end_header_id|>\n\n' + system + vir_end -}}
{%- endif -%}
{%- for message in (messages[1:] if given else messages) -%}
    {{- '<|start_header_id|>' + ('assistant' if message.role == 'assistant' else 'user') + '<|end_header_id|>\n\n' -}}
    {{- vir_write(message.content) + vir_end -}}
{%- endfor -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' if add_generation_prompt else '' -}}""",
    "chatml": _SYSTEM.replace("DEFAULT", "You are a helpful assistant.")
    + r"""
{{- vir_start -}}
{%- if system -%}
    {{- '<|im_start|>system\n' + system + vir_end + '\n' -}}
{%- endif -%}
{%- for message in (messages[1:] if given else messages) -%}
    {{- '<|im_start|>' + ('assistant' if message.role == 'assistant' else 'user') + '\n' -}}
    {{- vir_write(message.content) + vir_end + '\n' -}}
{%- endfor -%}
{{- '<|im_start|>assistant\n' if add_generation_prompt else '' -}}""",
}
TEMPLATE_NAMES = (*TEMPLATES, "auto")

# What stands before the tokenizer's own template: contents become strings, as such templates expect.
_AUTO = r"""
{%- set vir = namespace(messages=[]) -%}
{%- for message in messages -%}
    {%- if message.content is defined -%}
        {%- set vir.messages = vir.messages + [dict(message, content=vir_write(message.content))] -%}
    {%- else -%}
        {%- set vir.messages = vir.messages + [message] -%}
    {%- endif -%}
{%- endfor -%}
{%- set messages = vir.messages -%}
{{- vir_start }}"""
_MARK = "{#- written by vir_hf -#}"

# Llama-2's tokenizer as LLaVA used it (legacy=False) puts a space before a text, not after a special token.
_LLAMA_2_STYLE = ("vicuna_v1", "plain", "llama_2")
_TURN_ENDS = {"llama_3": "<|eot_id|>", "chatml": "<|im_end|>"}


IMAGE_TOKEN = "<image>"


def image_token_of(tokenizer: Any) -> str:
    """Return the token that stands for an image with this tokenizer: the one it names itself, else `<image>`.

    transformers' processors take `tokenizer.image_token` where there is one, whatever they are given, so nothing else can be
    trained, saved and opened again. In the data an image is `<image>` with every tokenizer.
    """
    own = getattr(tokenizer, "image_token", None)
    return str(own) if own else IMAGE_TOKEN


def prepare_tokenizer(tokenizer: Any, template: str = "vicuna_v1", image_token: str | None = None) -> Any:
    """Return the tokenizer, changed in place so that it holds the image token and tokenises as LLaVA's did.

    The image token becomes one special token. For `vicuna_v1`, `plain` and `llama_2` a SentencePiece tokenizer is set to
    `legacy=False`: no space is put after a special token. The change is kept by `save_pretrained`. Doing it twice is
    harmless. The embeddings must then be as many as `len(tokenizer)`.

    Raises:
        RecipeError: the template is unknown.
    """
    if template not in TEMPLATE_NAMES:
        raise RecipeError(f"unknown template {template!r}; expected one of {list(TEMPLATE_NAMES)}. Set model.template.")
    image_token = image_token or image_token_of(tokenizer)
    known = tokenizer.added_tokens_encoder.get(image_token)
    if known is None or not tokenizer.added_tokens_decoder[known].special:
        tokenizer.add_tokens([image_token], special_tokens=True)
    if template in _LLAMA_2_STYLE:
        _leave_special_tokens_bare(tokenizer)
    return tokenizer


def _leave_special_tokens_bare(tokenizer: Any) -> None:
    """Set a SentencePiece-like tokenizer to put its space only before a text, not after a special token too."""
    if hasattr(tokenizer, "legacy"):
        tokenizer.legacy = False  # or save_pretrained and from_pretrained would disagree
    if not getattr(tokenizer, "is_fast", False):
        return
    from tokenizers.pre_tokenizers import Metaspace

    backend = tokenizer.backend_tokenizer
    splitter = backend.pre_tokenizer
    if isinstance(splitter, Metaspace) and splitter.prepend_scheme == "always":
        backend.pre_tokenizer = Metaspace(splitter.replacement, prepend_scheme="first", split=splitter.split)
    elif splitter is None and backend.normalizer is not None:
        steps = json.loads(backend.normalizer.__getstate__()).get("normalizers", [])
        if [step["type"] for step in steps] == ["Prepend", "Replace"]:  # how Llama-2's tokenizer.json says "always"
            backend.normalizer = None
            backend.pre_tokenizer = Metaspace(steps[0]["prepend"], prepend_scheme="first", split=False)


def chat_template_for(template: str, tokenizer: Any, image_token: str | None = None) -> str:
    """Return the jinja chat template to save with the processor: content parts and strings, images as `image_token`.

    BOS is written where the tokenizer itself begins a text with BOS. A turn is closed by the template's own token if the
    tokenizer has it as a special token, else by EOS, so that a trained model always learns to stop.

    Args:
        template: `vicuna_v1`, `plain`, `llama_2`, `llama_3`, `chatml`, or `auto` for the tokenizer's own chat template.
        tokenizer: a tokenizer that holds `image_token` (see `prepare_tokenizer`).
        image_token: by default `image_token_of(tokenizer)`.

    Raises:
        RecipeError: unknown template, `auto` without a chat template, no EOS token, no image token.
    """
    if template not in TEMPLATE_NAMES:
        raise RecipeError(f"unknown template {template!r}; expected one of {list(TEMPLATE_NAMES)}. Set model.template.")
    image_token = image_token or image_token_of(tokenizer)
    if image_token not in tokenizer.added_tokens_encoder:
        raise RecipeError(
            f"the tokenizer has no special token {image_token!r}. Call prepare_tokenizer(tokenizer, {template!r}) first."
        )
    begins = adds_bos(tokenizer)
    start, pad = (tokenizer.bos_token if begins else ""), _text_start_space(tokenizer, image_token)
    image, end = image_token + pad, tokenizer.eos_token
    body = TEMPLATES.get(template, "")
    if template == "auto":
        own = _own_template(tokenizer)
        if is_ours(own):
            return own
        sample = render(tokenizer, own, [{"role": "user", "content": "a"}])
        start = "" if start and sample.startswith(start) else start
        # trim_blocks and lstrip_blocks see the first line of the tokenizer's template as it stood alone.
        body = _AUTO + re.sub(r"\A[ \t]+(?=\{[%#])", "", own)
    elif template == "plain":
        image, end = image_token, "\n"
    elif template in _TURN_ENDS and _TURN_ENDS[template] in special_tokens(tokenizer):
        end = _TURN_ENDS[template]
    elif not end:
        raise RecipeError(
            f"template {template!r} closes a turn with EOS, and this tokenizer has none. Set its eos_token."
        )
    values = {"vir_token": image_token, "vir_image": image, "vir_start": start, "vir_pad": pad, "vir_end": end or ""}
    sets = "".join(f"{{%- set {name} = {json.dumps(value, ensure_ascii=False)} -%}}" for name, value in values.items())
    return _MARK + sets + _WRITE + body


def is_ours(chat_template: str) -> bool:
    """Return whether `chat_template_for` wrote it."""
    return chat_template.startswith(_MARK)


def adds_bos(tokenizer: Any) -> bool:
    """Return whether the tokenizer itself begins a text with BOS."""
    return bool(tokenizer.bos_token) and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def _text_start_space(tokenizer: Any, image_token: str) -> str:
    """Return a space if the tokenizer puts one before a text but not before what follows a special token."""
    alone = tokenizer("a", add_special_tokens=False)["input_ids"]
    return " " if tokenizer(image_token + "a", add_special_tokens=False)["input_ids"][1:] != alone else ""


def _own_template(tokenizer: Any) -> str:
    own = getattr(tokenizer, "chat_template", None)
    own = own.get("default") if isinstance(own, dict) else own
    if not own:
        raise RecipeError(
            f"template 'auto' means the tokenizer's own chat template, and this tokenizer has none. "
            f"Set model.template to one of {list(TEMPLATES)}."
        )
    return str(own)


def special_tokens(tokenizer: Any) -> list[str]:
    """Return the texts that the tokenizer reads as one special token, longest first."""
    tokens = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    tokens |= set(tokenizer.all_special_tokens)  # EOS of some tokenizers is not marked as special
    return sorted(tokens, key=lambda token: (-len(token), token))


def render(tokenizer: Any, chat_template: str, messages: list[dict[str, Any]], prompt: bool = False) -> str:
    """Return the conversation as text, by transformers' own renderer; `prompt` adds the generation prompt."""
    text = tokenizer.apply_chat_template(
        messages, chat_template=chat_template, tokenize=False, add_generation_prompt=prompt
    )
    return str(text)
