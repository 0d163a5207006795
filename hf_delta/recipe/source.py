"""Recipe text and command-line flags as values that remember where they were written."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hf_delta.errors import InputError


SHORT_FLAGS = {"resume": "resume_from_checkpoint"}


@dataclass(frozen=True)
class Node:
    """One value of a recipe.

    Args:
        value (`dict[str, Node]`, `list[Node]` or a scalar): the value.
        where (`str`): `file:line`, or the flag it was given with.
        text (`str`, *optional*): the words of a command-line value, for fields that want plain text.
    """

    value: Any
    where: str
    text: str | None = None

    def plain(self) -> Any:
        """The value without places: dicts, lists and scalars."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value


_YAML_TAG = "tag:yaml.org,2002:"
_COLLECTIONS = (f"{_YAML_TAG}map", f"{_YAML_TAG}seq")
_YAML_11 = {f"{_YAML_TAG}{name}" for name in ("bool", "int", "float", "timestamp")}
_YAML_12 = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?(?:0|[1-9]\d*)|0x[\da-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(?:(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
}


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2: `2e-4` is a number, `no` is a word and `2026-01-31` is text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag not in _YAML_11]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _name, (_pattern, _first) in _YAML_12.items():
    _Loader.add_implicit_resolver(f"{_YAML_TAG}{_name}", re.compile(rf"(?:{_pattern})\Z"), list(_first))


# More than any recipe has: aliases of aliases stand for billions of values.
_MOST_VALUES = 10_000
# Python refuses to print much longer ones.
_MOST_BITS = 1024

# What PyYAML says, and what to do about it.
_REMEDIES = {
    "'\\t'": "Indent with spaces.",
    "find expected ':'": "Write `key: value`, with a space after the colon.",
    "mapping values are not allowed": "Keys of one block stand below each other; put text with a colon in quotes.",
    "another document": "A recipe is one document: remove the `---`.",
    "undefined alias": "Put text that begins with * in quotes.",
    "unexpected end of stream": "A quote or a bracket is not closed.",
    "constructor for the tag": "Write the value without a tag; put text that begins with ! in quotes.",
}


def read_recipe(path: Path) -> dict[str, Node]:
    """Read a recipe file.

    Raises:
        `InputError`: the file is not UTF-8 YAML, is not a mapping, names a key twice, or has a merge key.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({error}). Save it as UTF-8.") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from error
    node = _parse(text, str(path))
    if node.value is None:
        raise InputError(f"{path}: the recipe is empty. Its first key is trainer: sft, dpo or grpo.")
    if not isinstance(node.value, dict):
        raise InputError(f"{node.where}: a recipe is a mapping of keys to values, one `key: value` a line.")
    return node.value


def _parse(text: str, source: str, one_line: bool = False) -> Node:
    try:
        loader = _Loader(text)
    except yaml.reader.ReaderError as error:
        where = source if one_line else f"{source}:{text.count(chr(10), 0, error.position) + 1}"
        raise InputError(
            f"{where}: the character {chr(error.character)!r} is not allowed in YAML. Remove it."
        ) from error
    loader.values_left = _MOST_VALUES
    try:
        root = loader.get_single_node()
        if root is None:
            return Node(None, source)
        return _convert(loader, root, source, None if one_line else root.start_mark.line)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = source if one_line or mark is None else f"{source}:{mark.line + 1}"
        problem = f"{error.problem or error.context}."
        remedy = next((f" {remedy}" for said, remedy in _REMEDIES.items() if said in problem), "")
        raise InputError(f"{where}: not valid YAML: {problem}{remedy}") from error
    except yaml.YAMLError as error:
        raise InputError(f"{source}: not valid YAML: {error}.") from error
    except RecursionError as error:
        raise InputError(
            f"{source}: nested too deeply, or an alias (*) stands inside of what it stands for."
        ) from error
    finally:
        loader.dispose()


def _convert(loader: _Loader, node: yaml.Node, source: str, line: int | None) -> Node:
    where = source if line is None else f"{source}:{line + 1}"
    loader.values_left -= 1
    if loader.values_left < 0:
        raise InputError(f"{where}: aliases (*) stand for more than {_MOST_VALUES} values. Write them out.")
    if not isinstance(node, yaml.ScalarNode) and node.tag not in _COLLECTIONS:
        raise InputError(
            f"{where}: the tag {node.tag.replace(_YAML_TAG, '!!')} is not supported. Write the value without it."
        )
    if isinstance(node, yaml.MappingNode):
        children: dict[str, Node] = {}
        for key_node, value_node in node.value:
            key_line = None if line is None else key_node.start_mark.line
            key_where = source if key_line is None else f"{source}:{key_line + 1}"
            if key_node.tag == f"{_YAML_TAG}merge":
                raise InputError(f"{key_where}: merge keys (<<) are not supported; write the keys out.")
            key = _scalar(loader, key_node, key_where) if isinstance(key_node, yaml.ScalarNode) else key_node.value
            if not isinstance(key, (str, int)):
                shown = key if isinstance(key_node, yaml.ScalarNode) else "in brackets"
                raise InputError(f"{key_where}: the key {shown} is not text. Keys are names such as learning_rate.")
            key = str(key)
            if key in children:
                raise InputError(f"{key_where}: {key} is given twice, first at {children[key].where}.")
            children[key] = _convert(loader, value_node, source, key_line)
        return Node(children, where)
    if isinstance(node, yaml.SequenceNode):
        lines = [None if line is None else item.start_mark.line for item in node.value]
        return Node([_convert(loader, item, source, at) for item, at in zip(node.value, lines)], where)
    return Node(_scalar(loader, node, where), where)


def _scalar(loader: _Loader, node: yaml.ScalarNode, where: str) -> Any:
    try:
        value = loader.construct_object(node, deep=True)
        if isinstance(value, int) and value.bit_length() > _MOST_BITS:
            raise ValueError("too many digits")
        if isinstance(value, str) and "\0" in value:
            raise ValueError("there is a NUL character in it, which neither names nor texts have")
        return value
    except (ValueError, OverflowError, LookupError, TypeError, AttributeError) as error:
        # A tag that does not fit, or more digits than Python reads.
        kind = node.tag.replace(_YAML_TAG, "!!")
        raise InputError(f"{where}: {shortened(repr(node.value), 40)} cannot be read as {kind} ({error}).") from error


def shortened(text: str, most: int = 200) -> str:
    """A text for a message, without its middle if it is long."""
    return text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 4 :]}"


def apply_overrides(recipe: Mapping[str, Node], flags: Sequence[str]) -> dict[str, Node]:
    """A recipe with command-line flags on top.

    `--key value`, `--key=value` and a bare `--key` (true) all work, with `-` or `_` inside the key; `--block.key value`
    reaches into a nested block; several values make a list. Values are read as YAML. `--resume` is short for
    `--resume_from_checkpoint`.

    Raises:
        `InputError`: a value without a key, a value that is not YAML, or a dotted key whose block is not a block.
    """
    result = dict(recipe)
    for key, words in _split(flags):
        result = _set(result, key.split("."), _value(key, words), key)
    return result


def _split(flags: Sequence[str]) -> list[tuple[str, list[str]]]:
    pairs: list[tuple[str, list[str]]] = []
    for word in flags:
        if word.startswith("--") and len(word) > 2:
            key, equals, value = word[2:].partition("=")
            key = key.replace("-", "_")
            pairs.append((SHORT_FLAGS.get(key, key), [value] if equals else []))
        elif not pairs:
            raise InputError(f"{word}: expected a flag such as --learning_rate 1e-5.")
        else:
            pairs[-1][1].append(word)
    return pairs


def _value(key: str, words: list[str]) -> Node:
    where = f"--{key}"
    if not words:
        return Node(True, where)
    nodes = []
    for word in words:
        try:
            node = _parse(word, where, one_line=True)
        except InputError:
            # A prompt such as "Answer: [" is text, whatever YAML makes of it.
            node = Node(word, where)
        nodes.append(Node(node.value, where, text=word))
    return nodes[0] if len(nodes) == 1 else Node(nodes, where)


def _set(block: Mapping[str, Node], path: list[str], value: Node, key: str) -> dict[str, Node]:
    head, *rest = path
    if not rest:
        return {**block, head: value}
    inner = block.get(head)
    if inner is None or inner.value is None:
        inner = Node({}, value.where)
    if not isinstance(inner.value, dict):
        raise InputError(f"--{key}: {head} is not a block of keys but {inner.plain()!r}.")
    return {**block, head: Node(_set(inner.value, rest, value, key), inner.where)}
