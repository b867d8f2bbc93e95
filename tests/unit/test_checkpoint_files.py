"""Archives of boxes, and folders that are complete or absent."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from megatron_switchlora.checkpoint.archive import Archive, write_slices
from megatron_switchlora.checkpoint.files import (
    FORMAT,
    describe,
    leftovers,
    open_checkpoint,
    prune,
    publish,
    published,
    replace_folder,
    seal,
    strays,
    verified,
    write_manifest,
)
from megatron_switchlora.checkpoint.weights import stored_config
from megatron_switchlora.config.errors import UserError
from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.distributed.shard import Axis, Split, declare
from megatron_switchlora.distributed.slices import TensorSlice, flat_slices, parameter_slice, shard_slice


def whole(tensor: torch.Tensor, name: str = "w") -> TensorSlice:
    return TensorSlice(name, tuple(tensor.shape), (0,) * tensor.dim(), tensor, None)


def make_checkpoint(folder: Path, step: int, values: torch.Tensor | None = None) -> Path:
    building = folder / f".building-step-{step:08d}"
    building.mkdir(parents=True)
    for rank in range(2):
        tensor = torch.arange(6.0).view(2, 3) if values is None else values
        write_slices(building / f"tensors-{rank:05d}.safetensors", [whole(tensor, f"w{rank}")])
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
        for piece, (a, b) in enumerate(pairwise(bounds)):
            path = tmp_path / f"{rank}-{piece}.safetensors"
            flat = param.data.flatten()[a:b].clone()
            write_slices(
                path, [replace(p, tensor=p.tensor.contiguous()) for p in flat_slices("w", param, a, flat, None)]
            )
            files.append(path)
    archive = Archive(files)
    assert torch.equal(archive.read("w"), full)
    for at in range(shape[0] - 2):
        offset, size = [at] + [1] * (len(shape) - 1), [2] + [3] * (len(shape) - 1)
        wanted = full[at : at + 2] if len(shape) == 1 else full[at : at + 2, 1:4]
        assert torch.equal(archive.read("w", offset, size), wanted)
    half = declare(nn.Parameter(torch.zeros(-(-shape[0] // 2), *shape[1:])), shard=Split(0, shape[0], Axis(2, 1)))
    archive.fill(parameter_slice("w", half, None))
    assert torch.equal(half.data, Split(0, shape[0], Axis(2, 1)).take(full))


def test_a_part_twice_split_is_placed_once() -> None:
    rows, columns = Split(0, 5, Axis(2, 1)), Split(1, 7, Axis(3, 2))
    piece = shard_slice("bank", torch.ones(3, 3), [rows, columns], None)
    assert (piece.shape, piece.offset, tuple(piece.tensor.shape)) == ((5, 7), (3, 6), (2, 1))


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_slices(path, [TensorSlice("w", (4, 3), (2, 0), torch.ones(2, 3), None)])
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
    with pytest.raises(UserError, match=rf"has format {FORMAT + 1}, but this code reads formats up to {FORMAT}"):
        open_checkpoint(path)
    unfinished = tmp_path / ".building-step-00000002"
    unfinished.mkdir()
    with pytest.raises(UserError, match=r"is an unfinished save"):
        open_checkpoint(unfinished)


def test_a_file_that_another_host_cannot_see_is_not_published(tmp_path: Path) -> None:
    building = tmp_path / ".building-step-00000001"
    building.mkdir()
    write_slices(building / "a.safetensors", [whole(torch.ones(2))])
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
    with pytest.raises(UserError, match="is of step 8: restore its name"):
        open_checkpoint(moved)
    files = open_checkpoint(moved.rename(path)).files
    for names, message in [({**files, "../x": files["state.json"]}, "lists ../x"), ({}, "lists no state.json")]:
        write_manifest(path, 8, names)
        with pytest.raises(UserError, match=message):
            open_checkpoint(path)


SHA = "0" * 64
FILE = {"size": 2, "sha256": SHA}
ODD_MANIFESTS = [
    [], "x", None, {"format": "1", "step": 8, "files": {}}, {"format": 1, "step": "8", "files": {"state.json": FILE}},
    {"format": 1, "step": -8, "files": {"state.json": FILE}}, {"format": 1, "step": 8, "files": ["state.json"]},
    {"format": 1, "step": 8, "files": {"state.json": [2, SHA]}}, {"format": 1, "step": 8},
    {"format": 1, "step": 8, "files": {"state.json": {"size": "2", "sha256": SHA}}},
    {"format": 1, "step": 8, "files": {"state.json": {"size": 2, "sha256": 5}}},
    {"format": 1, "step": 8, "files": {"state.json": {"size": 2, "sha256": "../x"}}},
]  # fmt: skip


@pytest.mark.parametrize("content", ODD_MANIFESTS, ids=str)
def test_a_manifest_of_other_types_with_the_right_digest_is_refused(tmp_path: Path, content: Any) -> None:
    path = make_checkpoint(tmp_path, 8)
    own = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps({"content": content, "sha256": own}))
    with pytest.raises(UserError, match=r"is damaged: manifest.json .* Restore it, or move it away"):
        open_checkpoint(path)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "a\0b"])
def test_a_manifest_that_reaches_outside_is_refused(tmp_path: Path, name: str) -> None:
    path = make_checkpoint(tmp_path, 8)
    write_manifest(path, 8, {**open_checkpoint(path).files, name: FILE})
    with pytest.raises(UserError, match="its manifest lists"):
        open_checkpoint(path)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"content": ' + "[" * 100_000, "{" * 9, "\udce9", "1" * 9999])
def test_json_of_any_kind_is_one_sentence(tmp_path: Path, text: str) -> None:
    path = make_checkpoint(tmp_path, 8)
    (path / "manifest.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"is damaged: manifest.json cannot be read"):
        open_checkpoint(path)


ODD_STATES = ["[]", "3", '{"step": "8"}', '{"config": []}', '{"vocab_size": null}', '{"data": 3}', "[" * 100_000, "{"]
ODD_CONFIGS = [
    None, {"model": 3}, {"model": {"num_layers": "2"}}, {"method": {"rank": 2.5}}, {"method": {"ga": {"gamma": []}}},
    {"optim": {"eps": None}}, {"checkpoint": {"allow_changes": [3]}}, {"train": {"precision": "fp8"}},
]  # fmt: skip


@pytest.mark.parametrize("text", [*ODD_STATES, *(json.dumps({"config": config}) for config in ODD_CONFIGS)])
def test_a_state_of_other_types_is_refused(tmp_path: Path, text: str) -> None:
    path = make_checkpoint(tmp_path, 8)
    (path / "state.json").write_text(text)
    seal(path, 8)
    with pytest.raises(UserError, match=r"step-00000008 is damaged: state.json .* Restore it, or move it away"):
        stored_config(open_checkpoint(path))


def test_what_this_version_writes_has_its_own_types(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, 8)
    for config in (asdict(RunConfig()), {"model": {}, "unknown": 3, "train": {"of_a_later_version": []}}):
        (path / "state.json").write_text(json.dumps({"config": config}))
        seal(path, 8)
        assert stored_config(open_checkpoint(path)) == config


ODD_BOXES = [
    [], 3, {"w": 3}, {"w": ["w", [2], [0], 1]}, {"w": [["w"], [2], [0]]}, {"w": ["w", "22", [0]]},
    {"v": ["w", [2], [0]]}, {"w": ["w", [2], [1]]}, {"w": ["w", [2.0], [0]]}, {"w": ["w", [2, 2], [0, 0]]},
    {"w": ["w", [2], [-1]]},
]  # fmt: skip


@pytest.mark.parametrize("boxes", ODD_BOXES, ids=str)
def test_a_file_whose_index_is_not_ours_is_refused(tmp_path: Path, boxes: Any) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors", metadata={"boxes": json.dumps(boxes)})
    with pytest.raises(UserError, match=r"The index in .*a\.safetensors is not valid"):
        Archive([tmp_path / "a.safetensors"])


def test_no_memory_is_taken_for_what_a_file_only_claims(tmp_path: Path) -> None:
    huge = [1 << 40, 1 << 20]
    index = json.dumps({"w": ["w", huge, [0, 0]]})
    save_file({"w": torch.ones(2, 2)}, tmp_path / "a.safetensors", metadata={"boxes": index})
    with pytest.raises(UserError, match="do not hold all of w"):
        Archive([tmp_path / "a.safetensors"]).read("w")


def test_what_cannot_be_read_is_a_fault_with_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_checkpoint(tmp_path, 8)
    checkpoint = open_checkpoint(path)

    def fail(*args: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("megatron_switchlora.checkpoint.files.digest", fail)
    assert checkpoint.faults(["state.json"]) == ["state.json cannot be read (Input/output error)"]
    monkeypatch.setattr(Path, "iterdir", fail)
    with pytest.raises(UserError, match=r"cannot be read \(Input/output error\)"):
        published(tmp_path)


def test_what_is_only_named_like_a_checkpoint_is_passed_over(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 8)
    (tmp_path / "step-00000009").touch()
    (tmp_path / "step-00000010").mkdir()
    (tmp_path / "step-00000011" / "tokenizer").mkdir(parents=True)
    (tmp_path / "step-00000012").symlink_to(tmp_path / "nowhere")
    for name in ("step-0000000000013", "step-٠٠٠٠٠٠١٤", "step-99999999999999999999", "step-15", "step-caf\udce9"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").touch()
    assert [path.name for path in published(tmp_path)] == ["step-00000008"]
    assert len(strays(tmp_path)) == 9
    (tmp_path / "step-00000011" / "tensors-00000.safetensors").touch()  # of one that has lost its manifest
    assert published(tmp_path)[-1].name == "step-00000011"
    with pytest.raises(UserError, match=r"lost its manifest\.json.*move it away to resume from step-00000008"):
        open_checkpoint(published(tmp_path)[-1])


def test_a_folder_is_replaced_whole_and_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`final/` and `tokenizer/`: what is in them is durable before they have their name."""
    target, theirs = tmp_path / "final", tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "a").write_text("private")
    target.symlink_to(theirs)
    synced: list[str] = []
    real = os.fsync

    def fsync(handle: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{handle}"))
        real(handle)

    def fill(folder: Path) -> None:
        (folder / "sub").mkdir()
        for name in ("a", "sub/b"):
            (folder / name).write_text("new")

    monkeypatch.setattr(os, "fsync", fsync)
    replace_folder(target, fill)
    assert {Path(name).name for name in synced[:-2]} == {"a", "sub", "b"} and synced[-1] == str(tmp_path)
    assert synced[-2].startswith(f"{tmp_path}/.final.")
    assert (target / "sub" / "b").read_text() == "new" and (theirs / "a").read_text() == "private"
    with pytest.raises(OSError, match="full"):
        replace_folder(target, lambda folder: (_ for _ in ()).throw(OSError("full")))
    assert (target / "a").read_text() == "new" and {path.name for path in tmp_path.iterdir()} == {"final", "theirs"}
