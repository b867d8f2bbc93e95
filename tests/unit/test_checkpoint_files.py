"""Archives of boxes, and folders that are complete or absent."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from megatron_switchlora.checkpoint.archive import Archive, write_parts
from megatron_switchlora.checkpoint.files import (
    FORMAT,
    describe,
    leftovers,
    open_checkpoint,
    prune,
    publish,
    published,
    verified,
    write_manifest,
)
from megatron_switchlora.config import UserError
from megatron_switchlora.parallel.parts import Part, flat_parts, parameter_part, shard_part
from megatron_switchlora.parallel.shard import Axis, Split, declare


def whole(tensor: torch.Tensor, name: str = "w") -> Part:
    return Part(name, tuple(tensor.shape), (0,) * tensor.dim(), tensor, None)


def make_checkpoint(folder: Path, step: int, values: torch.Tensor | None = None) -> Path:
    building = folder / f".building-step-{step:08d}"
    building.mkdir(parents=True)
    for rank in range(2):
        tensor = torch.arange(6.0).view(2, 3) if values is None else values
        write_parts(building / f"tensors-{rank:05d}.safetensors", [whole(tensor, f"w{rank}")])
    (building / "state.json").write_text("{}")
    files = {path.name: describe(path) for path in sorted(building.iterdir())}
    publish(building, folder / f"step-{step:08d}", step, files)
    return folder / f"step-{step:08d}"


@pytest.mark.parametrize("shape, dim, ranks", [((7, 5), 0, 3), ((7, 5), 1, 2), ((7, 5), None, 1), ((11,), None, 1)])
@pytest.mark.parametrize("partitions", [1, 2, 5])
def test_flat_partitions_of_padded_shards_make_the_whole(
    tmp_path: Path, shape: tuple[int, ...], dim: int | None, ranks: int, partitions: int
) -> None:
    """Every rank's ZeRO partition of every shard, cut anywhere, read back whole and by any box."""
    full = torch.arange(float(torch.tensor(shape).prod())).view(shape)
    files = []
    for rank in range(ranks):
        split = None if dim is None else Split(dim, shape[dim], Axis(ranks, rank))
        local = full if split is None else split.take(full)
        param = declare(nn.Parameter(local.clone()), shard=split)
        bounds = torch.linspace(0, local.numel(), partitions + 1).round().long().tolist()
        for part, (a, b) in enumerate(pairwise(bounds)):
            path = tmp_path / f"{rank}-{part}.safetensors"
            flat = param.data.flatten()[a:b].clone()
            write_parts(path, [replace(p, tensor=p.tensor.contiguous()) for p in flat_parts("w", param, a, flat, None)])
            files.append(path)
    archive = Archive(files)
    assert torch.equal(archive.read("w"), full)
    for at in range(shape[0] - 2):
        offset, size = [at] + [1] * (len(shape) - 1), [2] + [3] * (len(shape) - 1)
        wanted = full[at : at + 2] if len(shape) == 1 else full[at : at + 2, 1:4]
        assert torch.equal(archive.read("w", offset, size), wanted)
    half = declare(nn.Parameter(torch.zeros(-(-shape[0] // 2), *shape[1:])), shard=Split(0, shape[0], Axis(2, 1)))
    archive.fill(parameter_part("w", half, None))
    assert torch.equal(half.data, Split(0, shape[0], Axis(2, 1)).take(full))


def test_a_part_twice_split_is_placed_once() -> None:
    rows, columns = Split(0, 5, Axis(2, 1)), Split(1, 7, Axis(3, 2))
    part = shard_part("bank", torch.ones(3, 3), [rows, columns], None)
    assert (part.shape, part.offset, tuple(part.tensor.shape)) == ((5, 7), (3, 6), (2, 1))


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_parts(path, [Part("w", (4, 3), (2, 0), torch.ones(2, 3), None)])
    archive = Archive([path])
    assert torch.equal(archive.read("w", (2, 1), (2, 2)), torch.ones(2, 2))
    for offset, size in [((0, 0), (4, 3)), ((1, 0), (2, 3)), ((0, 0), (1, 1))]:
        with pytest.raises(UserError, match=r"do not hold all of w"):
            archive.read("w", offset, size)
    with pytest.raises(UserError, match=r"no tensor 'v'"):
        archive.read("v")
    with pytest.raises(UserError, match=r"has shape \[4, 3\].*has \[4, 4\]"):
        archive.fill(whole(torch.ones(4, 4)))
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"cannot be read as safetensors"):
        Archive([path])


def test_published_and_leftovers(tmp_path: Path) -> None:
    for step in (5, 100, 20):
        make_checkpoint(tmp_path, step)
    (tmp_path / ".building-step-00000200").mkdir()
    (tmp_path / "step-12").mkdir()  # not our name
    assert [path.name for path in published(tmp_path)] == ["step-00000005", "step-00000020", "step-00000100"]
    assert [path.name for path in leftovers(tmp_path)] == [".building-step-00000200"]
    checkpoint = verified(tmp_path / "step-00000020")
    assert checkpoint.step == 20 and torch.equal(checkpoint.archive().read("w1"), torch.arange(6.0).view(2, 3))
    assert published(tmp_path / "none") == []


@pytest.mark.parametrize("last, every, left", [(1, 0, [9]), (2, 0, [8, 9]), (1, 4, [4, 8, 9]), (9, 0, [3, 4, 8, 9])])
def test_prune_keeps_the_last_and_every_mth(tmp_path: Path, last: int, every: int, left: list[int]) -> None:
    for step in (3, 4, 8, 9):
        make_checkpoint(tmp_path, step)
    prune(tmp_path, last, every)
    assert [int(path.name[5:]) for path in published(tmp_path)] == left and leftovers(tmp_path) == []


def test_damage_is_named(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, 1)
    target = path / "tensors-00001.safetensors"
    good = target.read_bytes()
    target.write_bytes(good[:-1])
    with pytest.raises(UserError, match=r"tensors-00001.safetensors has \d+ bytes instead of"):
        verified(path)
    for position in (9, len(good) // 2, len(good) - 1):  # header, and the last byte of a tensor
        target.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
        with pytest.raises(UserError, match=r"tensors-00001.safetensors is damaged"):
            verified(path)
    target.unlink()
    with pytest.raises(UserError, match=r"tensors-00001.safetensors is missing"):
        verified(path)
    target.write_bytes(good)
    verified(path)


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, 1)
    manifest = path / "manifest.json"
    good = manifest.read_text()
    for bad in (good[:-5], good.replace('"step": 1', '"step": 2'), "[]", ""):
        manifest.write_text(bad)
        with pytest.raises(UserError, match=r"is damaged: manifest.json .* Restore it, or move it away"):
            open_checkpoint(path)
    manifest.unlink()
    with pytest.raises(UserError, match=r"is damaged: it has lost its manifest.json"):
        open_checkpoint(path)
    with pytest.raises(UserError, match=r"is not a checkpoint: it has no manifest.json"):
        open_checkpoint(tmp_path)


def test_newer_formats_and_unfinished_saves_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_switchlora.checkpoint.files.FORMAT", FORMAT + 1)
    path = make_checkpoint(tmp_path, 1)
    monkeypatch.undo()
    with pytest.raises(UserError, match=rf"has format {FORMAT + 1}, this code reads formats up to {FORMAT}"):
        open_checkpoint(path)
    unfinished = tmp_path / ".building-step-00000002"
    unfinished.mkdir()
    with pytest.raises(UserError, match=r"whose save has not ended"):
        open_checkpoint(unfinished)


def test_a_file_that_another_host_cannot_see_is_not_published(tmp_path: Path) -> None:
    building = tmp_path / ".building-step-00000001"
    building.mkdir()
    write_parts(building / "a.safetensors", [whole(torch.ones(2))])
    (building / "state.json").write_text("{}")
    files = {name: describe(building / name) for name in ("a.safetensors", "state.json")}
    for wrong in (
        {**files, "b.safetensors": {"size": 3, "sha256": ""}},
        {**files, "a.safetensors": {"size": 3, "sha256": ""}},
    ):
        with pytest.raises(OSError):
            publish(building, tmp_path / "step-00000001", 1, wrong)
    assert published(tmp_path) == []
    manifest_names = set(json.loads(json.dumps(files)))
    publish(building, tmp_path / "step-00000001", 1, files)
    assert set(verified(tmp_path / "step-00000001").files) == manifest_names


def test_a_manifest_that_reaches_outside_or_lies_about_its_step_is_refused(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, 8)
    moved = path.rename(tmp_path / "step-00000100")
    with pytest.raises(UserError, match="is of step 8: give it back its name"):
        open_checkpoint(moved)
    files = open_checkpoint(moved.rename(path)).files
    for names, message in [({**files, "../x": files["state.json"]}, "names ../x"), ({}, "names no state.json")]:
        write_manifest(path, 8, names)
        with pytest.raises(UserError, match=message):
            open_checkpoint(path)
