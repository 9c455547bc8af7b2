"""YAML as plain data, in which no key stands twice: of two the second would win, and nobody would
know. Knows nothing of what the keys mean."""

from typing import Any

import yaml


class RepeatedKey(yaml.YAMLError):
    """A mapping has a key twice."""


def load(text: str) -> Any:
    """The plain data of one document, by YAML's safe tags. Raises yaml.YAMLError, in one line, and
    ValueError for a date that is none."""
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
        why = ", ".join(filter(None, (error.context, error.problem)))
        raise yaml.YAMLError(f"{where}{why}") from None
    except yaml.reader.ReaderError as error:
        raise yaml.YAMLError(f"character {error.position + 1} must not stand there") from None


class _Loader(yaml.SafeLoader):
    """Before mappings are merged (<<), which may well replace keys."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                name, line = (key.tag, key.value), key.start_mark.line + 1
                if name in lines:
                    raise RepeatedKey(
                        f"line {line}: '{key.value}' is given in line {lines[name]} already: keep "
                        "one of them"
                    )
                lines[name] = line
        return node
