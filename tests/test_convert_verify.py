"""`convert --verify`: what was written is read, converted back, and held against the source before it has its name."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from conversions import MAP, assert_same_files, only, write_state, write_tiny
from spoiling import state_of
from wrong_writing import flip_byte, left_over, refused, spoil_writing, stop_after

import mapdsl
from mapdsl.checkpoint import checker, engine, following, writer
from mapdsl.checkpoint.checkpoint import open_checkpoint
from mapdsl.checkpoint.journal import partial_folder
from mapdsl.checkpoint.sidecar import SIDE_FILE, SideWriter
from mapdsl.checkpoint.strict import BackChecker
from mapdsl.checkpoint.writer import CheckpointWriter
from mapdsl.cli.main import main
from mapdsl.language.diagnostics import MapError
from mapdsl.runtime.codecs.base import Encoded
from mapdsl.runtime.codecs.block_scaled import BlockScaled

STACK = "model.layers.1.mlp.experts.down_projs"
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release, `source`, the model that it converts to, `there`, and the way back, `back`."""
    folder = tmp_path_factory.mktemp("made")
    write_tiny(folder / "source")
    mapdsl.convert(folder / "source", folder / "there", MAP)
    mapdsl.convert(folder / "there", folder / "back", MAP)
    return folder


# --- what holds -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("experts", ["fp4", "fp8", "raw"])
@pytest.mark.parametrize("workers", [1, 4])
def test_both_ways_all_of_the_source_is_compared(tmp_path, monkeypatch, experts, workers):
    monkeypatch.setattr(engine, "SMALL_BYTES", 0)
    threads = torch.get_num_threads()
    source = write_tiny(tmp_path / "source", experts)
    plain = mapdsl.convert(source, tmp_path / "plain", MAP)
    done = mapdsl.convert(source, tmp_path / "there", MAP, verify=True, workers=workers)
    assert_same_files(tmp_path / "there", tmp_path / "plain")
    assert plain.verified is None
    assert (done.verified.tensors, done.verified.bytes) == (done.tensors_read, done.bytes_read)
    assert done.verified.tensors_again == 0
    assert done.verified.kept > 0
    assert done.verified.not_compared == ()
    back = mapdsl.convert(tmp_path / "there", tmp_path / "back", MAP, verify=True, workers=workers)
    assert_same_files(tmp_path / "back", source)
    assert (back.verified.tensors, back.verified.bytes) == (back.tensors_read, back.bytes_read)
    assert torch.get_num_threads() == threads


def test_without_a_side_file_what_is_kept_is_kept_to_verify(made, tmp_path):
    done = mapdsl.convert(made / "source", tmp_path / "there", MAP, verify=True, use_complement=False)
    assert done.verified.tensors == done.tensors_read
    assert done.verified.kept is None
    assert done.kept_bytes is None
    assert not (tmp_path / "there" / SIDE_FILE).exists()
    assert [path.name for path in (tmp_path / "there").iterdir() if path.name.startswith(".")] == []


def test_another_dtype(made, tmp_path):
    mapdsl.convert(made / "source", tmp_path / "there", MAP, verify=True, dtype="f32")
    done = mapdsl.convert(tmp_path / "there", tmp_path / "back", MAP, verify=True)
    assert done.verified.tensors == done.tensors_read
    assert done.verified.tensors_again == 0


def test_what_is_encoded_anew_is_converted_a_second_time(made, tmp_path):
    state = state_of(made / "there")
    state[STACK] = torch.randn(state[STACK].shape).to(state[STACK].dtype)
    edited = write_state(tmp_path / "edited", state)
    shutil.copyfile(made / "there" / SIDE_FILE, edited / SIDE_FILE)
    done = mapdsl.convert(edited, tmp_path / "back", MAP, verify=True)
    stacked = [name for name in open_checkpoint(tmp_path / "back").tensors if "layers.1.ffn.experts" in name]
    down = [name for name in stacked if ".w2." in name]
    assert done.edited
    assert done.verified.tensors == done.tensors_read - 1
    assert done.verified.tensors_again == len(down) == 4
    assert done.verified.reason == "encoded anew"


def test_quantise(made, tmp_path):
    state = {name: torch.randn(t.shape).to(t.dtype) for name, t in state_of(made / "there").items()}
    config = json.loads((made / "source" / "config.json").read_text())
    tid = "model.layers.0.mlp.gate.tid2eid"
    state[tid] = state_of(made / "there")[tid]
    model = write_state(tmp_path / "model", state, config)
    done = mapdsl.convert(model, tmp_path / "back", MAP, verify=True, quantize=True)
    found = done.verified
    assert found.tensors + found.tensors_again > 0
    assert found.tensors < done.tensors_read
    plain = mapdsl.convert(model, tmp_path / "plain", MAP, verify=True)
    assert plain.verified.tensors == plain.tensors_read
    assert plain.verified.tensors_again == 0


def test_what_has_no_counterpart_is_told(made, tmp_path):
    source = shutil.copytree(made / "source", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 0}))
    dropped = [name for name in open_checkpoint(source).tensors if name.startswith("mtp.")]
    kept = mapdsl.convert(source, tmp_path / "kept", MAP, verify=True)
    assert kept.verified.not_compared == ()
    bare = mapdsl.convert(source, tmp_path / "bare", MAP, verify=True, use_complement=False)
    assert bare.verified.tensors == bare.tensors_read - len(dropped)
    assert len(bare.verified.not_compared) == 1
    assert bare.verified.not_compared[0].startswith("without a counterpart on the native side: mtp.0.")
    back = mapdsl.convert(tmp_path / "kept", tmp_path / "back", MAP, verify=True)
    assert_same_files(tmp_path / "back", source)
    assert back.verified.tensors == back.tensors_read


def test_a_distributed_checkpoint(made, tmp_path):
    done = mapdsl.convert(made / "source", tmp_path / "dcp", MAP, verify=True, format="dcp")
    assert done.verified.tensors == done.tensors_read
    back = mapdsl.convert(tmp_path / "dcp", tmp_path / "back", MAP, verify=True)
    assert_same_files(tmp_path / "back", made / "source")
    assert back.verified.tensors == back.tensors_read


def test_stacks_on_the_way_back_lie_in_the_hidden_folder(made, tmp_path, monkeypatch):
    monkeypatch.setattr(checker, "_LARGE_BYTES", 0)
    used: list[Path] = []
    make = checker.tempfile.TemporaryFile

    def noted(dir: Path) -> Any:  # noqa: A002 (its name)
        used.append(dir)
        return make(dir=dir)

    monkeypatch.setattr(checker.tempfile, "TemporaryFile", noted)
    done = mapdsl.convert(made / "there", tmp_path / "back", MAP, verify=True)
    assert done.verified.tensors == done.tensors_read
    assert set(used) == {partial_folder(tmp_path / "back")}
    assert_same_files(tmp_path / "back", made / "source")


def test_units_are_compared_while_others_are_still_to_be_written(made, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "SMALL_BYTES", 0)
    compared = threading.Event()
    write, compare = CheckpointWriter.write, BackChecker.write
    seen: list[str] = []

    def slow(self, name, tensor):
        if name.startswith("model.layers.1.") and not compared.wait(60):
            raise AssertionError("nothing was compared for a minute")
        write(self, name, tensor)

    def noted(self, name, tensor):
        compare(self, name, tensor)
        seen.append(name)
        compared.set()

    monkeypatch.setattr(CheckpointWriter, "write", slow)
    monkeypatch.setattr(BackChecker, "write", noted)
    mapdsl.convert(made / "source", tmp_path / "there", MAP, verify=True)
    assert len(seen) == len(open_checkpoint(made / "source").tensors)


# --- what does not ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [STACK, NORM, "model.layers.0.self_attn.wq_a.weight", "lm_head.weight"])
def test_a_byte_that_was_written_wrongly(made, tmp_path, monkeypatch, name):
    spoil_writing(monkeypatch, name)
    found = refused(made / "source", tmp_path / "there")
    assert found.code == "R601"
    if name in (NORM, "lm_head.weight"):
        assert "what was written of it gives" in found.message
        assert f"it was made from {name}[" in found.help
    else:  # so small a change comes back rounded: it is seen by what was kept
        assert f"`{name}[" in found.message
        assert "converted again it is" in found.message
    assert "convert again" in found.help


def test_the_message_has_the_element_and_both_values(made, tmp_path, monkeypatch):
    spoil_writing(monkeypatch, NORM)
    state = state_of(made / "source")
    place = state["norm.weight"].numel() // 2
    bits = state["norm.weight"].view(torch.int16)[place].item() & 0xFFFF
    found = refused(made / "source", tmp_path / "there")
    assert f"`norm.weight[{place}]`" in found.message
    assert f"(0x{bits:04x}) in {made / 'source'}" in found.message
    assert f"(0x{bits ^ 1:04x}) when it is converted back" in found.message


@pytest.mark.parametrize("part", ["weight", "scale"])
def test_on_the_way_back(made, tmp_path, monkeypatch, part):
    name = f"layers.1.ffn.experts.1.w2.{part}"
    spoil_writing(monkeypatch, name)
    found = refused(made / "there", tmp_path / "back")
    assert (found.code, f"`{STACK}[1, " in found.message) == ("R601", True)


def test_a_tensor_that_was_encoded_anew(made, tmp_path, monkeypatch):
    state = state_of(made / "there")
    state[STACK] = torch.randn(state[STACK].shape).to(state[STACK].dtype)
    edited = write_state(tmp_path / "edited", state)
    shutil.copyfile(made / "there" / SIDE_FILE, edited / SIDE_FILE)
    spoil_writing(monkeypatch, "layers.1.ffn.experts.1.w2.weight")
    found = refused(edited, tmp_path / "back")
    assert found.code == "R601"
    assert "`layers.1.ffn.experts.1.w2.weight[" in found.message
    assert "converted again it is" in found.message


def test_a_distributed_checkpoint_is_looked_at_when_it_is_packed(made, tmp_path, monkeypatch):
    from mapdsl.checkpoint.dcp_writer import DcpWriter

    pack = DcpWriter._pack

    def spoiled(self):
        pack(self)
        for path in self._folder.glob("__*.distcp"):
            data = path.read_bytes()
            norm = state_of(made / "there")[NORM].view(torch.uint8).numpy().tobytes()
            flip_byte(path, data.index(norm))

    monkeypatch.setattr(DcpWriter, "_pack", spoiled)
    found = refused(made / "source", tmp_path / "there", format="dcp")
    assert (found.code, "`norm.weight[0]`" in found.message) == ("R601", True)


def test_a_codec_that_decodes_wrongly(made, tmp_path, monkeypatch):
    decode = BlockScaled.decode

    def wrong(self, key, parts, dtype=torch.bfloat16, *, out=None, of=None):
        made = decode(self, key, parts, dtype, out=out, of=of)
        if key == "layers.0.attn.wq_a.weight" and not made.is_meta:
            made[3, 5] = made[3, 5] * 2 + 1
        return made

    monkeypatch.setattr(BlockScaled, "decode", wrong)
    found = refused(made / "source", tmp_path / "there")
    assert (found.code, "`layers.0.attn.wq_a.weight[3, 5]`" in found.message) == ("R601", True)


def test_a_codec_that_encodes_wrongly(made, tmp_path, monkeypatch):
    encode = BlockScaled.encode

    def wrong(self, key, tensor, kept=None, *, out=None):
        found = encode(self, key, tensor, kept, out=out)
        payload = found.parts[key]
        if key == "layers.0.attn.wq_a.weight" and not payload.is_meta:
            payload.view(torch.uint8)[3, 5] ^= 1
        return Encoded(found.parts, found.edited)

    monkeypatch.setattr(BlockScaled, "encode", wrong)
    found = refused(made / "there", tmp_path / "back")
    assert found.code == "R601"
    assert "`model.layers.0.self_attn.wq_a.weight[3, 5]`" in found.message


def test_what_was_kept_is_read_from_disk(made, tmp_path, monkeypatch):
    record = SideWriter.record

    def spoiled(self, names):
        found = record(self, names)
        for _, _, _, spooled in found:
            for width, role, rank, *_, begin, nbytes in spooled:
                if role == "layers.0.attn.wq_a.weight|part.scale" and nbytes:
                    flip_byte(self.spool_path(width, rank), begin)
                    monkeypatch.setattr(SideWriter, "record", record)
        return found

    monkeypatch.setattr(SideWriter, "record", spoiled)
    found = refused(made / "source", tmp_path / "there")
    assert "what is kept of `layers.0.attn.wq_a.weight` has checksum" in found.message


def test_the_side_file_is_read_too(made, tmp_path, monkeypatch):
    finish = SideWriter.finish

    def spoiled(self, path, *rest):
        finish(self, path, *rest)
        flip_byte(path, path.stat().st_size - 1)

    monkeypatch.setattr(SideWriter, "finish", spoiled)
    found = refused(made / "source", tmp_path / "there")
    assert "the side file is damaged" in found.message


# --- runs that were cut short -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [True, False])
def test_what_an_earlier_run_has_written_is_compared_too(made, tmp_path, monkeypatch, first):
    with monkeypatch.context() as patched:
        stop_after(patched, 40)
        with pytest.raises(KeyboardInterrupt):
            mapdsl.convert(made / "source", tmp_path / "there", MAP, verify=first)
    assert not left_over()
    done = mapdsl.convert(made / "source", tmp_path / "there", MAP, resume=True, verify=True)
    assert_same_files(tmp_path / "there", made / "there")
    assert done.verified.tensors == done.tensors_read


def test_a_byte_of_an_earlier_run(made, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        stop_after(patched, 40)
        with pytest.raises(KeyboardInterrupt):
            mapdsl.convert(made / "source", tmp_path / "there", MAP)
    hidden = partial_folder(tmp_path / "there")
    stored = open_checkpoint(made / "there").tensors["model.embed_tokens.weight"]
    flip_byte(hidden / stored.file.name, stored.begin)
    found = refused(made / "source", tmp_path / "there", resume=True)
    assert (found.code, "`embed.weight[0, 0]`" in found.message) == ("R601", True)


def test_a_failing_conversion_ends_what_follows_it(made, tmp_path, monkeypatch):
    def full(path, offset, tensor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "write_tensor", full)
    with pytest.raises(MapError, match="no space left"):
        mapdsl.convert(made / "source", tmp_path / "there", MAP, verify=True)
    assert not left_over()


def test_a_map_without_a_way_back(made, tmp_path, monkeypatch):
    def fails(*_: Any, **__: Any) -> Any:
        raise MapError([only_error])

    with pytest.raises(MapError) as caught:
        mapdsl.convert(tmp_path / "nothing", tmp_path / "there", MAP)
    only_error = only(caught.value)
    monkeypatch.setattr(following, "make_plan", fails)
    done = mapdsl.convert(made / "source", tmp_path / "there", MAP, verify=True)
    assert (done.verified.tensors, done.verified.tensors_again) == (0, done.tensors_written)
    assert "the map has no way back" in done.verified.reason
    spoil_writing(monkeypatch, NORM)
    with pytest.raises(MapError, match=r"norm.weight.*converted again it is"):
        mapdsl.convert(made / "source", tmp_path / "other", MAP, verify=True)


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command(made, tmp_path, capsys, monkeypatch):
    there = str(tmp_path / "there")
    assert main(["convert", str(made / "source"), there, "--map", "deepseek_v4", "--verify", "--quiet"]) == 0
    capsys.readouterr()
    shutil.rmtree(there)
    assert main(["convert", str(made / "source"), there, "--map", "deepseek_v4", "--verify"]) == 0
    size = sum(tensor.nbytes for tensor in open_checkpoint(made / "source").tensors.values())
    out = capsys.readouterr().out
    assert f"  verified: 150 tensors ({size / 1e6:.1f} MB) of the source compared with what was written, and" in out
    spoil_writing(monkeypatch, NORM)
    assert main(["convert", str(made / "source"), str(tmp_path / "x"), "--map", "deepseek_v4", "--verify"]) == 1
    assert "error[R601]: `norm.weight[" in capsys.readouterr().err
