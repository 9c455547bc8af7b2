"""The chat template of a merge: chosen among the parents', built in, or given as Jinja.

Templates are text here; nothing is rendered. The built-in ones follow the published formats.
"""

import json
import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

from evomerge.errors import ModelError, RecipeError, nearest
from evomerge.merge.checkpoint import Checkpoint
from evomerge.merge.shards import read_json

_log = logging.getLogger(__name__)

_FILE = "chat_template.jinja"
_SHORTEST = 20  # characters; as in mergekit, anything shorter is a misspelt name

_CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

_LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>\\n\\n' }}
    {{- message.content | trim ~ '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

_MISTRAL = """\
{%- set turns = messages | rejectattr('role', 'equalto', 'system') | list %}
{%- set system = messages | selectattr('role', 'equalto', 'system') | list %}
{{- bos_token }}
{%- for message in turns %}
    {%- if message.role != ('assistant' if loop.index0 % 2 else 'user') %}
        {{- raise_exception('User and assistant have to take turns, and the user begins.') }}
    {%- elif message.role == 'assistant' %}
        {{- ' ' ~ message.content ~ eos_token }}
    {%- else %}
        {{- ' [INST] ' }}
        {%- if loop.first and system %}
            {{- system[0].content ~ '\\n\\n' }}
        {%- endif %}
        {{- message.content ~ ' [/INST]' }}
    {%- endif %}
{%- endfor %}
"""

_ALPACA = """\
{%- set headings = {
    'user': '### Instruction:\\n', 'user_context': '### Input:\\n', 'assistant': '### Response:\\n'
} %}
{%- for message in messages %}
    {{- headings.get(message.role, '') ~ message.content | trim ~ '\\n\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- headings.assistant }}
{%- endif %}
"""

_EXAONE = """\
{%- if messages and messages[0].role != 'system' %}
    {{- '[|system|][|endofturn|]\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '[|' ~ message.role ~ '|]' ~ message.content }}
    {{- '\\n' if message.role == 'user' else '[|endofturn|]\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '[|assistant|]' }}
{%- endif %}
"""

BUILT_IN = {
    "alpaca": _ALPACA,
    "chatml": _CHATML,
    "exaone": _EXAONE,
    "llama3": _LLAMA3,
    "mistral": _MISTRAL,
}


def template_of(model: Checkpoint) -> str | None:
    """A model's chat template, the default one of several; None without one. Raises ModelError."""
    path = model.path / _FILE
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"model file '{path}' cannot be read: {error}") from None
    config = model.path / "tokenizer_config.json"
    template = read_json(config).get("chat_template") if config.is_file() else None
    if isinstance(template, list):
        template = next((t["template"] for t in template if t.get("name") == "default"), None)
    return template or None


def chosen_template(setting: str, models: Mapping[str, Checkpoint]) -> str | None:
    """The template that a recipe's `chat_template` asks for.

    setting: 'auto', the most common one among the models (the first of equally common ones; None
    if there is none), a name of BUILT_IN, or Jinja. Raises RecipeError for what is none of these.
    """
    if setting == "auto":
        found = [template.strip() for m in models.values() if (template := template_of(m))]
        if not found:
            _log.warning("chat_template: auto: no model has a chat template: none is written")
            return None
        return Counter(found).most_common(1)[0][0]
    if setting in BUILT_IN:
        return BUILT_IN[setting]
    if "{" not in setting or len(setting) < _SHORTEST:
        names = nearest(setting, ["auto", *BUILT_IN])
        raise RecipeError(f"chat_template: '{setting}' is no template and no name of one: {names}")
    _check_syntax(setting)
    return setting


def with_template(files: Mapping[str, bytes], template: str) -> dict[str, bytes]:
    """Tokenizer files, by name, with this template in place of the one that they had.

    Raises ModelError for a malformed tokenizer_config.json.
    """
    changed = {name: content for name, content in files.items() if name != "chat_template.json"}
    changed[_FILE] = template.encode()
    if "tokenizer_config.json" in files:
        try:
            config: dict[str, Any] = json.loads(files["tokenizer_config.json"])
        except ValueError as error:
            raise ModelError(f"tokenizer_config.json is not JSON: {error}: correct it") from None
        if config.pop("chat_template", None) is not None:
            text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
            changed["tokenizer_config.json"] = text.encode()
    return changed


def _check_syntax(template: str) -> None:
    """Parse as transformers would, whose templates may mark what the assistant says."""
    from jinja2 import Environment, TemplateSyntaxError, nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012  # the type that jinja2 declares

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    options: Any = [Generation, "jinja2.ext.loopcontrols"]
    try:
        Environment(extensions=options).parse(template)
    except TemplateSyntaxError as error:
        raise RecipeError(
            f"chat_template: line {error.lineno} is not Jinja: {error.message}: correct it"
        ) from None
