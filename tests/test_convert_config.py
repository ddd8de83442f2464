"""config.json has a `quantization_config` where tensors are stored quantised, and there only; all else stays."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conversions import MAP, assert_same_files, contents, tiny_config, write_state, write_tiny
from spoiling import state_of

import mapdsl
from mapdsl.checkpoint.json_members import with_member, without_members
from mapdsl.checkpoint.sidecar import SIDE_FILE, SideFile
from mapdsl.cli.main import main

FIELD = "quantization_config"


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def write_model(folder: Path, **fields: Any) -> Path:
    """A model of the right side whose values all formats can hold."""
    write_tiny(folder / "released")
    mapdsl.convert(folder / "released", folder / "converted", MAP)
    state = state_of(folder / "converted")
    floats = {name: torch.randn(t.shape).to(t.dtype) for name, t in state.items() if t.is_floating_point()}
    config = tiny_config()
    del config[FIELD]
    return write_state(folder / "model", state | floats, config | fields)


def write_one(folder: Path, text: str, state: dict[str, torch.Tensor], config: str | None) -> tuple[Path, Path]:
    """A map of this text, and a checkpoint."""
    folder.mkdir(exist_ok=True)
    (folder / "one.map").write_text(text)
    made = write_state(folder / "checkpoint", state)
    if config is not None:
        (made / "config.json").write_text(config)
    return folder / "one.map", made


# --- the text ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected", "taken"),
    [
        ('{"a": 1, "q": {"x": "}"}, "b": 2}', '{"a": 1, "b": 2}', ["q"]),
        ('{"q": 1, "a": 2}', '{"a": 2}', ["q"]),
        ('{"a": 2, "q": 1 }', '{"a": 2 }', ["q"]),
        ('{ "q": 1 }', "{}", ["q"]),
        ('{"a": {"q": [1], "b": {"q": {}, "c": 1}}, "q": 0}\n', '{"a": {"b": {"c": 1}}}\n', ["a.q", "a.b.q", "q"]),
        ('{"q": 1, "a": 2, "q": 1}', '{"a": 2}', ["q", "q"]),
        ('{"a": ["q", {"q": 1}], "qq": "q"}', '{"a": ["q", {"q": 1}], "qq": "q"}', []),
        ('{"\\u0071": 1}', "{}", ["q"]),
        ('\n{\n\t"a": NaN,\r\n\t"q": 1\n}', '\n{\n\t"a": NaN\n}', ["q"]),
        ("{}", "{}", []),
    ],
)
def test_members_are_taken_out_of_a_text(text, expected, taken):
    assert without_members(text, "q") == (expected, taken)
    assert without_members(expected, "q") == (expected, [])


def test_repeated_members_are_taken_out_in_one_go():
    begun = time.process_time()
    text = ", ".join(['"q": 1'] * 20_000)
    assert without_members(f'{{"a": 2, {text}}}', "q") == ('{"a": 2}', ["q"] * 20_000)
    assert without_members(f"{{{text}}}", "q")[0] == "{}"
    assert time.process_time() - begun < 30  # minutes, if all is read again for each


def test_texts_may_nest_as_deeply_as_they_can_be_read():
    def nested(depth: int) -> str:
        return '{"a":' * depth + '{"q":1}' + "}" * depth

    depth = max(depth for depth in range(2000) if is_read(nested(depth)))
    assert depth > 100
    text, taken = deeper(50, lambda: without_members(nested(depth), "q"))
    assert text == nested(depth).replace('"q":1', "")
    assert taken == ["a." * depth + "q"]


def is_read(text: str) -> bool:
    try:
        json.loads(text)
    except RecursionError:
        return False
    return True


def deeper(count: int, work: Callable[[], Any]) -> Any:
    """What `work` gives, called from within so many calls."""
    return deeper(count - 1, work) if count else work()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": 1}', '{"a": 1, "q": {"x": [1]}}'),
        ('{\n  "a": 1\n}\n', '{\n  "a": 1,\n  "q": {\n    "x": [\n      1\n    ]\n  }\n}\n'),
        ('{\n\t"a": 1\n}', '{\n\t"a": 1,\n\t"q": {\n\t\t"x": [\n\t\t\t1\n\t\t]\n\t}\n}'),
        ("{}", '{\n  "q": {\n    "x": [\n      1\n    ]\n  }\n}'),
    ],
)
def test_a_member_is_put_into_a_text(text, expected):
    assert with_member(text, "q", {"x": [1]}) == expected
    assert json.loads(expected) == {**json.loads(text), "q": {"x": [1]}}


# --- to the right side ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("experts", ["fp4", "fp8"])
def test_it_goes_where_tensors_are_decoded_and_comes_back(tmp_path, experts):
    source = write_tiny(tmp_path / "source", experts)
    text = (source / "config.json").read_text()
    nested = text.replace('"vocab_size"', '"text_config": {"quantization_config": {}, "x": 1},\n  "vocab_size"')
    (source / "config.json").write_text(nested)
    done = mapdsl.convert(source, tmp_path / "there", MAP)
    written = (tmp_path / "there" / "config.json").read_text()
    assert done.config.removed == ("text_config.quantization_config", FIELD)
    assert written == without_members(nested, FIELD)[0]
    assert FIELD not in written
    assert '"text_config": {"x": 1}' in written
    assert SideFile(tmp_path / "there" / SIDE_FILE).origin.config_text == nested
    back = mapdsl.convert(tmp_path / "there", tmp_path / "back", MAP)
    assert_same_files(tmp_path / "back", source)
    assert (back.config.removed, back.config.added, back.config.lacks) == ((), "", "")
    assert mapdsl.verify(source, tmp_path / "there", MAP).holds


def test_a_config_that_had_none_comes_back_without(tmp_path):
    source = write_tiny(tmp_path / "source")
    (source / "config.json").write_text(without_members((source / "config.json").read_text(), FIELD)[0])
    mapdsl.convert(source, tmp_path / "there", MAP)
    done = mapdsl.convert(tmp_path / "there", tmp_path / "back", MAP)
    assert_same_files(tmp_path / "back", source)
    assert (done.config.added, done.config.lacks) == ("", "")


def test_without_anything_quantised_the_bytes_stay(tmp_path):
    source = write_tiny(tmp_path / "source", "raw")
    (source / "config.json").write_text((source / "config.json").read_text().replace("\n", "\r\n") + " ")
    done = mapdsl.convert(source, tmp_path / "there", MAP)
    assert contents(tmp_path / "there")["config.json"] == contents(source)["config.json"]
    assert (done.config.removed, done.config.lacks) == ((), "")


def test_it_stays_where_something_is_still_quantised(tmp_path):
    text = 'map one: old <-> new\ncodec fp8 = block_scaled(f8e4m3, block=4x4, scale="{key}_s")\n'
    text += "a [x y] as fp8 <-> a [x y]\n{..} <-> {..} else\n"
    state = {"a": torch.ones(4, 4).to(torch.float8_e4m3fn), "a_s": torch.ones(1, 1)}
    config = '{"quantization_config": {}}'
    file, plain = write_one(tmp_path / "plain", text, state, config)
    done = mapdsl.convert(plain, tmp_path / "x", file, to="new")
    assert (done.config.text, done.config.removed) == ("{}", (FIELD,))
    file, mixed = write_one(tmp_path / "mixed", text, state | {"b": torch.ones(4, 4).to(torch.float8_e4m3fn)}, config)
    done = mapdsl.convert(mixed, tmp_path / "y", file, to="new")
    assert done.config.text == config
    assert "see `b`" in done.config.lacks
    assert contents(tmp_path / "y")["config.json"] == config.encode()


def test_casts_and_value_changes_do_not_quantise(tmp_path):
    text = "map one: old <-> new\na [x] as f32 <-> b [x]\nc [x] as add(1) <-> d [x]\n"
    config = '{"quantization_config": {}}'
    file, source = write_one(tmp_path / "one", text, {"a": torch.ones(2), "c": torch.ones(2)}, config)
    assert mapdsl.convert(source, tmp_path / "x", file).config.text == config


# --- to the left side -------------------------------------------------------------------------------------------------


def test_it_goes_where_tensors_are_written_as_they_are(tmp_path):
    model = write_model(tmp_path)
    config = tmp_path / "released" / "config.json"
    done = mapdsl.convert(model, tmp_path / "back", MAP, config=config)
    assert done.config.removed == (FIELD,)
    assert (tmp_path / "back" / "config.json").read_text() == without_members(config.read_text(), FIELD)[0]


def test_it_comes_with_the_formats_of_the_map(tmp_path):
    model = write_model(tmp_path)
    done = mapdsl.convert(model, tmp_path / "back", MAP, quantize=True)
    found = config_of(tmp_path / "back")
    plain = {name for name, tensor in state_of(tmp_path / "back").items() if tensor.dtype == torch.bfloat16}
    modules = {name.removesuffix(".weight") for name in plain if state_of(tmp_path / "back")[name].ndim == 2}
    gates = {"layers.0.ffn.gate", "layers.1.ffn.gate", "mtp.0.ffn.gate"}
    assert (done.config.added, done.config.lacks) == (FIELD, "")
    assert set(found[FIELD].pop("modules_to_not_convert")) == modules | gates
    assert found.pop(FIELD) == {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "scale_fmt": "ue8m0",
        "expert_dtype": "fp4",
    }
    assert found == config_of(model)
    assert list(found) == list(config_of(model))


def test_the_callers_own_is_left_as_it_is(tmp_path):
    model = write_model(tmp_path)
    config = tmp_path / "released" / "config.json"
    done = mapdsl.convert(model, tmp_path / "back", MAP, quantize=True, config=config)
    assert (done.config.removed, done.config.added, done.config.lacks) == ((), "", "")
    assert contents(tmp_path / "back")["config.json"] == config.read_bytes()


def test_another_config_with_a_side_file(tmp_path):
    source = write_tiny(tmp_path / "source")
    mapdsl.convert(source, tmp_path / "there", MAP)
    done = mapdsl.convert(tmp_path / "there", tmp_path / "back", MAP, config=tmp_path / "there" / "config.json")
    assert done.config.added == FIELD
    assert config_of(tmp_path / "back")[FIELD]["expert_dtype"] == "fp4"


FORMATS = {
    "fp8, f32 scales": (
        'block_scaled(f8e4m3, block=4x8, scale="{key}_scale_inv")',
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [4, 8]},
    ),
    "mxfp4": (
        'block_scaled(f4e2m1, block=1x32, packed=u8, pack=blocks, payload="{key}_blocks", scale="{key}_scales", '
        "scale_dtype=u8)",
        {"quant_method": "mxfp4"},
    ),
    "another name": ('block_scaled(f8e4m3, block=4x8, scale="{key}_s")', None),
    "bf16 scales": ('block_scaled(f8e4m3, block=4x8, scale="{key}_scale_inv", scale_dtype=bf16)', None),
    "rows": ('block_scaled(f8e4m3, block=1x*, scale="{key}_scale_inv")', None),
    "e5m2": ('block_scaled(f8e5m2, block=4x8, scale="{key}_scale_inv")', None),
    "int4": ("packed_int(bits=4, group=8)", None),
}


@pytest.mark.parametrize("name", FORMATS)
def test_what_formats_determine(tmp_path, name, capsys):
    declared, expected = FORMATS[name]
    text = f"map one: old <-> new\ncodec q = {declared}\nm.weight [x y] as q|raw <-> w [x y]\nn [x] <-> o [x]\n"
    state = {"w": torch.randn(8, 64).bfloat16(), "o": torch.ones(2)}
    file, source = write_one(tmp_path / "one", text, state, '{"a": 1}')
    command = ["convert", str(source), str(tmp_path / "back"), "--map", str(file), "--quantize"]
    assert main(command) == 0
    out = capsys.readouterr().out
    found = config_of(tmp_path / "back")
    if expected is None:
        assert found == {"a": 1}
        assert "config.json: it has no quantization_config, which the formats q do not determine" in out
        assert "--config" in out
    else:
        assert found == {"a": 1, FIELD: expected}
        assert "config.json: quantization_config added" in out


def test_two_formats_that_one_loader_does_not_mix(tmp_path):
    text = 'map one: old <-> new\ncodec q = block_scaled(f8e4m3, block=4x8, scale="{key}_scale_inv")\n'
    text += 'codec r = block_scaled(f8e4m3, block=8x8, scale="{key}_scale_inv")\n'
    text += "m.weight [x y] as q|raw <-> w [x y]\nn.weight [x y] as r|raw <-> v [x y]\n"
    state = {"w": torch.randn(8, 64).bfloat16(), "v": torch.randn(8, 64).bfloat16()}
    file, source = write_one(tmp_path / "one", text, state, "{}")
    done = mapdsl.convert(source, tmp_path / "back", file, quantize=True)
    assert (done.config.text, done.config.added) == ("{}", "")
    assert "the formats q, r do not determine" in done.config.lacks


def test_without_a_config(tmp_path, capsys):
    text = 'map one: old <-> new\ncodec q = block_scaled(f8e4m3, block=4x8, scale="{key}_scale_inv")\n'
    text += "m.weight [x y] as q|raw <-> w [x y]\n"
    file, source = write_one(tmp_path / "one", text, {"w": torch.randn(8, 64).bfloat16()}, None)
    command = ["convert", str(source), str(tmp_path / "back"), "--map", str(file)]
    assert main([*command, "--quantize"]) == 0
    assert "config.json: there is no config.json, so nothing says that tensors are quantised" in capsys.readouterr().out
    assert not (tmp_path / "back" / "config.json").exists()
    shutil.rmtree(tmp_path / "back")
    assert main(command) == 0
    assert "config.json" not in capsys.readouterr().out


def test_the_command_says_what_it_has_taken_out(tmp_path, capsys):
    source = write_tiny(tmp_path / "source")
    assert main(["convert", str(source), str(tmp_path / "there"), "--map", "deepseek_v4"]) == 0
    assert "  config.json: quantization_config removed, as nothing is quantised here\n" in capsys.readouterr().out


# --- what transformers makes of it ------------------------------------------------------------------------------------


def _quantiser(folder: Path) -> Any:
    """The quantiser that transformers takes for a config."""
    from transformers import AutoConfig
    from transformers.quantizers.auto import AutoHfQuantizer

    config = AutoConfig.from_pretrained(folder)
    return AutoHfQuantizer.from_config(config.quantization_config, pre_quantized=True)


@pytest.mark.heavy
def test_transformers_takes_what_is_added(tmp_path):
    pytest.importorskip("transformers")
    model = write_model(tmp_path)
    mapdsl.convert(model, tmp_path / "back", MAP, quantize=True)
    found = _quantiser(tmp_path / "back").quantization_config
    assert (found.quant_method, found.weight_block_size) == ("fp8", [128, 128])
    assert (found.scale_fmt, found.expert_dtype, found.activation_scheme) == ("ue8m0", "fp4", "dynamic")
    released = Path(__file__).parent / "data" / "listings" / "deepseek_v4_flash.config.json"
    shutil.copyfile(released, tmp_path / "config.json")
    theirs = _quantiser(tmp_path).quantization_config
    assert theirs.weight_block_size == found.weight_block_size
    assert theirs.scale_fmt == found.scale_fmt


@pytest.mark.heavy
def test_transformers_takes_mxfp4(tmp_path):
    pytest.importorskip("transformers")
    released = Path(__file__).parent / "data" / "listings" / "gpt_oss_20b.config.json"
    config = json.loads(released.read_text())
    config[FIELD] = FORMATS["mxfp4"][1]
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = _quantiser(tmp_path)
    assert type(found).__name__ == "Mxfp4HfQuantizer"
    assert found.quantization_config.quant_method == "mxfp4"


@pytest.mark.heavy
def test_transformers_reads_nothing_quantised_where_it_was_removed(tmp_path):
    transformers = pytest.importorskip("transformers")
    source = write_tiny(tmp_path / "source")
    mapdsl.convert(source, tmp_path / "there", MAP)
    assert hasattr(transformers.AutoConfig.from_pretrained(source), FIELD)
    assert not hasattr(transformers.AutoConfig.from_pretrained(tmp_path / "there"), FIELD)
