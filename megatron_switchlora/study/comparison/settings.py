"""A setting of tools/compare.py: which methods are compared on which run, at which learning rates.

A setting is a YAML of `tools/settings/`. `configs` and `options` are the run that all methods share, each method adds
its own, and options overrule files; `ds_config`, the DeepSpeed JSON, may be among a method's options. A method gives
`lr` and `dense_lr`: where its sweep starts, or with `sweep: grid` the lists of which every pair is tried; without
`dense_lr` it is the method's default: mostly `lr`, as published. `{data}` in an option is the path given with --data.
A method may have `launcher` and `world` of its own; --launcher overrules both. Every word that could be wrong is tried
out before anything trains: a point becomes a command line of launch/pretrain.py, which is parsed and validated as that
command would.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Optional

from megatron_switchlora.config.command_line import parse_arguments
from megatron_switchlora.config.ds_config import read_ds_config, resolve_ds_config
from megatron_switchlora.config.errors import UserError, require
from megatron_switchlora.config.facts import flatten, names_where, walk
from megatron_switchlora.config.field_checks import expanded
from megatron_switchlora.config.run import RunConfig, run_config_class
from megatron_switchlora.config.yaml_text import read_given_yaml
from megatron_switchlora.distributed.mesh import mesh_sizes
from megatron_switchlora.shipped import given_or_shipped, home_path

KINDS: dict[str, tuple[str, tuple[type[Any], ...]]] = {  # of a YAML's fields, by their annotation
    "str": ("a string", (str,)), "Optional[str]": ("a string", (str, type(None))), "int": ("a whole number", (int,)),
    "Optional[int]": ("a whole number", (int, type(None))), "dict[str, Any]": ("a section of fields", (dict,)),
    "list[str]": ("a list of strings", (list,)),
}  # fmt: skip


@dataclass(frozen=True)
class Point:
    """Learning rates of a run; with `dense_lr` None that of the dense tensors is the method's default, mostly `lr`."""

    lr: float
    dense_lr: Optional[float] = None

    def __str__(self) -> str:
        return f"lr {self.lr:g}" + ("" if self.dense_lr is None else f" dense_lr {self.dense_lr:g}")

    def neighbours(self) -> list[Point]:
        """Return points with either rate halved and doubled."""
        lr, dense = self.lr, self.dense_lr
        beside = [Point(lr / 2, dense), Point(lr * 2, dense)]
        return beside if dense is None else [*beside, Point(lr, dense / 2), Point(lr, dense * 2)]


@dataclass(frozen=True)
class Contender:
    """A method as a setting names it, with what it adds to the shared options."""

    lr: Any  # a number, or with a grid a list
    dense_lr: Any = None
    configs: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    launcher: Optional[str] = None  # instead of the setting's, with as many ranks as in `world`
    world: Optional[int] = None

    def starts(self) -> list[Point]:
        """Return every pair of the given rates."""
        return [Point(lr, dense) for lr, dense in itertools.product(_listed(self.lr), _listed(self.dense_lr))]


@dataclass(frozen=True)
class Best:
    """The `methods` with the best means run at `seeds` seeds."""

    methods: int = 2
    seeds: int = 3


@dataclass(frozen=True)
class Timing:
    """The timing pass: `rounds` of `steps` steps of every method in turn, of which the first `skip` warm up."""

    rounds: int = 5
    steps: int = 24
    skip: int = 4


@dataclass(frozen=True)
class Setting:
    """The content of a YAML of tools/settings."""

    name: str
    methods: dict[str, Contender]
    about: str = ""
    configs: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    sweep: str = "coordinate"
    sweep_options: dict[str, Any] = field(default_factory=dict)  # of the sweep's runs alone: fewer steps
    seeds: int = 3
    best: Best = Best()
    reference: str = "full"  # step times are ratios to this method's
    launcher: str = "{python} {script}"
    world: int = 1  # ranks that the launcher starts
    ds_config: Optional[str] = None
    timing: Timing = Timing()
    changes: dict[str, Any] = field(default_factory=dict)  # what --set has changed in every run
    selected: tuple[str, ...] = ()  # the methods that --methods names: those run, the report has all

    def launch(self, method: str) -> tuple[str, int]:
        """Return the command that starts a method's runs, and its ranks."""
        own = self.methods[method]
        return own.launcher or self.launcher, own.world or self.world

    def run_options(self, method: str, point: Point, seed: int, sweep: bool) -> dict[str, Any]:
        """Return a run's options but for its folder, as dotted names; files first, so overruled."""
        chosen = self.methods[method]
        given: dict[str, Any] = {}
        for path in [*self.configs, *chosen.configs]:
            content = _read_section(home_path(expanded("configs", path)))
            given |= flatten(content, {name for name, _, _ in walk(run_config_class()())})
        given |= self.options | chosen.options | (self.sweep_options if sweep else {})
        given |= {"optim.lr": point.lr, "train.seed": seed}
        if self.ds_config:
            given.setdefault("ds_config", self.ds_config)
        return given | ({} if point.dense_lr is None else {"optim.dense_lr": point.dense_lr})

    def command_line(self, options: dict[str, Any], data: Optional[Path]) -> list[str]:
        """Options as words of launch/pretrain.py's command line.

        Raises:
            UserError: an option needs --data, which was not given.
        """
        line = []
        for name, value in options.items():
            if name == "ds_config":
                value = str(home_path(expanded(name, value)))
            text = value if isinstance(value, str) else json.dumps(value)
            if "{data}" in text:
                require(
                    data is not None, f"The setting {self.name} reads {name} {text}: give with --data what {{data}} is."
                )
                text = text.replace("{data}", str(data))
            line.append(f"--{name}={text}")
        return line

    def config(self, options: dict[str, Any], data: Optional[Path], world: int) -> RunConfig:
        """Return the configuration that a run would have.

        Raises:
            UserError: what launch/pretrain.py would refuse of it.
        """
        arguments = parse_arguments(self.command_line(options, data))
        dp = mesh_sizes(arguments.config.parallel, world)["dp"]
        resolve_ds_config(read_ds_config(arguments.ds_config), arguments.config, dp)
        return arguments.config


def run_key(method: str, point: Point, seed: int, options: dict[str, Any]) -> str:
    """Return a run's name among the results; another option that changes its numbers makes another name."""
    mark = hashlib.sha256(json.dumps(counted_options(options), sort_keys=True).encode()).hexdigest()[:8]
    return f"{method} {point} seed {seed} {mark}"


def counted_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that a run's numbers depend on."""
    neutral = {"ds_config", *names_where(run_config_class()(), lambda facts: not facts["results"])}
    return {name: value for name, value in options.items() if name not in neutral}


def setting_file(path: Path) -> Path:
    """Return the file of a setting that is given as a file, or by the name of a shipped one."""
    return given_or_shipped(path, "settings", ".yaml")


def read_setting(
    path: Path, methods: Optional[list[str]], overrides: dict[str, Any], options: Optional[dict[str, Any]] = None
) -> Setting:
    """Read the setting in a file, or of that name among the shipped ones; change fields, and options of all methods.

    Raises:
        UserError: no such file, or a field, type or method that it does not know.
    """
    path = setting_file(path)
    content = _read_section(path) | overrides
    given: dict[str, Any] = content.get("methods") or {}
    named = isinstance(given, dict) and bool(given) and all(isinstance(name, str) for name in given)
    require(named, f"{path} must name its methods, a section each, under 'methods'.")
    unknown = [name for name in methods or [] if name not in given]
    require(not unknown, f"{path} has no method {', '.join(unknown)}: it has {', '.join(given)}.")
    chosen = {name: _make(Contender, given[name], f"{path}, method {name}") for name in given}
    if "launcher" in overrides:
        chosen = {name: replace(contender, launcher=None, world=None) for name, contender in chosen.items()}
    if options:  # they overrule a method's own, and the sweep's
        chosen = {name: replace(contender, options=contender.options | options) for name, contender in chosen.items()}
        short = content.get("sweep_options", {})
        if isinstance(short, dict):  # else refused below
            content["sweep_options"] = {name: value for name, value in short.items() if name not in options}
    for own in ("selected", "changes"):
        require(own not in content, f"{path}: unknown field {own}.")
    content |= {"methods": chosen, "name": path.stem, "selected": tuple(methods or given), "changes": options or {}}
    for key, kind in (("best", Best), ("timing", Timing)):
        if key in content:
            content[key] = _make(kind, content[key], f"{path}, {key}")
    setting = _make(Setting, content, str(path))
    _check(setting, path)
    return setting


def _check(setting: Setting, path: Path) -> None:
    require(
        setting.sweep in ("coordinate", "grid", "none"),
        f"{path}: sweep must be coordinate, grid or none, not {setting.sweep!r}.",
    )
    given = {**setting.options, **setting.sweep_options}
    swept = names_where(run_config_class()(), lambda facts: facts["swept"])
    for name, method in setting.methods.items():
        reserved = sorted({*given, *method.options} & set(swept))
        require(
            not reserved,
            f"{path}, method {name}: {', '.join(reserved)} cannot be among the options or in --set, since the "
            "comparison gives them to each run: rates are a method's lr and dense_lr, seeds are counted by 'seeds'.",
        )
        require(bool(method.starts()), f"{path}, method {name}: a list of rates is empty.")
        for point in method.starts():
            rates = [point.lr] if point.dense_lr is None else [point.lr, point.dense_lr]
            wrong = [
                rate
                for rate in rates
                if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < math.inf
            ]
            require(not wrong, f"{path}, method {name}: learning rates must be positive numbers, not {wrong}.")
        require(
            setting.sweep == "grid" or len(method.starts()) == 1,
            f"{path}, method {name}: lists of rates need 'sweep: grid'; with {setting.sweep!r} give one of each.",
        )
    require(
        setting.reference in (*setting.methods, Setting.reference),
        f"{path}: reference must be one of the methods {', '.join(setting.methods)}, not {setting.reference!r}.",
    )
    counts = {"seeds": setting.seeds, "world": setting.world, "best.seeds": setting.best.seeds}
    counts |= {"timing.rounds": setting.timing.rounds, "timing.steps": setting.timing.steps}
    counts |= {f"world of method {name}": own.world for name, own in setting.methods.items() if own.world is not None}
    for name, value in counts.items():
        require(value >= 1, f"{path}: {name} must be at least 1, not {value}.")
    for name, value in {"best.methods": setting.best.methods, "timing.skip": setting.timing.skip}.items():
        require(value >= 0, f"{path}: {name} must not be negative, it is {value}.")
    require(
        setting.timing.skip < setting.timing.steps,
        f"{path}: timing.steps {setting.timing.steps} must be above timing.skip {setting.timing.skip}.",
    )
    for launcher, _ in map(setting.launch, setting.methods):
        require(bool(launcher.split()), f"{path}: a launcher must be a command, such as '{{python}} {{script}}'.")


def validate_points(setting: Setting, data: Optional[Path]) -> dict[str, RunConfig]:
    """Try out every method at its first point, others differ in checked rates; the configurations at full length.

    Raises:
        UserError: naming the method and what its runs would refuse.
    """
    configs: dict[str, RunConfig] = {}
    for name, method in setting.methods.items():
        for sweep in (False, True) if setting.sweep_options else (False,):
            try:
                options = setting.run_options(name, method.starts()[0], 0, sweep)
                config = setting.config(options, data, setting.launch(name)[1])
                if name in setting.selected:
                    config.method.facts.require_packages()
            except UserError as error:
                raise UserError(f"Setting {setting.name}, method {name}: {error}") from None
            configs.setdefault(name, config)
    return configs


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _read_section(path: Path) -> dict[str, Any]:
    content = read_given_yaml(path, str(path), "The shipped settings are in tools/settings.")
    require(isinstance(content, dict), f"{path} must hold fields, as 'options:' with lines below it.")
    return content


def _make(kind: type[Any], content: Any, where: str) -> Any:
    """Make a dataclass from a mapping, with an error that names what does not fit."""
    require(isinstance(content, dict), f"{where}: must be a section with fields, not {content!r}.")
    known = {entry.name for entry in fields(kind)}
    strange = sorted(set(content) - known)
    require(not strange, f"{where}: unknown field {', '.join(strange)}; it may have {', '.join(sorted(known))}.")
    for entry in fields(kind):
        kind_name, allowed = KINDS.get(str(entry.type), ("", (object,)))
        value = content.get(entry.name)
        items = value if allowed == (list,) and isinstance(value, list) else [""]
        fits = isinstance(value, allowed) and not isinstance(value, bool) and all(isinstance(i, str) for i in items)
        require(entry.name not in content or fits, f"{where}: {entry.name} must be {kind_name}, not {value!r}.")
    try:
        return kind(**content)
    except TypeError as error:
        raise UserError(f"{where}: {error}.") from None
