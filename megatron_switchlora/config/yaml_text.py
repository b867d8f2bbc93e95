"""Read YAML that people write, and write YAML.

Numbers are read as in YAML 1.2 (1e-3 is one), and dates are text. Whatever would lose something silently or never end
is refused: a key that occurs twice, an alias inside what it names, aliases that multiply. So are the keys with which
parsers of configurations import code, wherever they occur. On writing every text is quoted, since readers disagree on
what 1e-3, 0x1f, 12:30, on, no and ~ are.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from megatron_switchlora.config.errors import UserError

MOST_REPEATED = 10_000  # values that aliases may stand for, all together
FORBIDDEN = ("class_path", "init_args")


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {  # noqa: RUF012  # as in PyYAML
        first: [(tag, shape) for tag, shape in known if tag.rsplit(":")[-1] not in ("float", "timestamp")]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"""[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?$ | [-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$
          | [-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?$ | [-+]?\.(?:inf|Inf|INF)$ | \.(?:nan|NaN|NAN)$""",
        re.VERBOSE,
    ),
    list("-+0123456789."),
)


class _Dumper(yaml.SafeDumper):
    def represent_mapping(self, tag: str, mapping: Any, flow_style: Any = None) -> yaml.MappingNode:
        node = super().represent_mapping(tag, mapping, flow_style)
        for key, _ in node.value:  # our own names
            key.style = None
        return node


_Dumper.add_representer(str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'"))


def load_yaml(text: str) -> Any:
    """Parse YAML.

    Raises:
        ValueError: with the line, whatever is wrong with the text.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check(node, set(), set(), [])
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ValueError(f"{f'line {mark.line + 1}: ' if mark else ''}{error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (TypeError, KeyError, AttributeError) as error:  # a tag such as !!int or !!bool on what is none
        raise ValueError(f"a value does not match its tag ({error})") from None


def read_yaml(path: Path) -> Any:
    """Read a YAML file.

    Raises:
        OSError: the file cannot be read.
        ValueError: as `load_yaml`, or it is not UTF-8.
    """
    return load_yaml(path.read_text(encoding="utf-8"))


def read_given_yaml(path: Path, name: str, advice: str) -> Any:
    """Read a YAML file that the user has given; `name` is what messages call it.

    Raises:
        UserError: the file cannot be read, with advice, or it is not valid.
    """
    try:
        return read_yaml(path)
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}. {advice}") from None
    except UnicodeDecodeError:
        raise UserError(f"{name} is not valid YAML: it is not a text in UTF-8.") from None
    except ValueError as error:
        raise UserError(f"{name} is not valid YAML: {error}.") from None


def dump_yaml(tree: Any) -> str:
    """Return the YAML of nested mappings and lists, in their order, for `load_yaml` and any other reader."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, default_flow_style=False, width=2**20)


def _line(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}"


def _check(node: yaml.Node, above: set[int], seen: set[int], repeated: list[yaml.Node]) -> None:
    """Check every value as often as aliases name it; `above` holds the nodes that this one is inside of."""
    if id(node) in above:
        raise ValueError(f"{_line(node)}: an alias occurs inside what it names, which would never end")
    if id(node) in seen:
        repeated.append(node)
    if len(repeated) > MOST_REPEATED:
        raise ValueError(f"{_line(node)}: aliases stand for more than {MOST_REPEATED:,} values: write them out")
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        _check_keys(node)
    if isinstance(node, yaml.CollectionNode):
        above.add(id(node))
        pairs = node.value if isinstance(node, yaml.MappingNode) else [node.value]
        for inner in (inner for pair in pairs for inner in pair):
            _check(inner, above, seen, repeated)
        above.remove(id(node))


def _check_keys(node: yaml.MappingNode) -> None:
    first: dict[str, yaml.Node] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
            continue
        name = key.value
        if name in FORBIDDEN:
            raise ValueError(f"{_line(key)}: {name} would import code, which no configuration may: remove it")
        if name in first:
            raise ValueError(
                f"{_line(key)}: {name!r} occurs here again, after {_line(first[name])}, and one of them would be "
                "lost: keep one, with all that belongs to it"
            )
        first[name] = key
