"""launch/export.py: the folder it writes is the model, or is not there."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch.evaluate import main as evaluate
from launch.export import main
from mmrec_train.model import MMRecForCausalLM
from tests.launch.trained import small_model, tear, write_checkpoint


@pytest.fixture
def run(dataset: Path, tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "run", 3, small_model(dataset, seed=3), dataset)
    write_checkpoint(tmp_path / "run", 10, small_model(dataset, seed=10), dataset)
    return tmp_path / "run"


def export(run: Path, out: Path) -> int:
    return main(["--checkpoint", str(run), "--out", str(out)])


@pytest.mark.parametrize("name, seed", [(".", 10), ("checkpoints/step_3", 3)])
def test_the_exported_folder_is_the_model(
    dataset: Path, tmp_path: Path, run: Path, name: str, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "hub/model"
    assert export(run / name, out) == 0
    expected = small_model(dataset, seed=seed)
    assert f"{expected.num_parameters():,} parameters in torch.float32" in capsys.readouterr().out

    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert isinstance(loaded, MMRecForCausalLM) and loaded.config.to_dict()["num_layers"] == 2
    assert loaded.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in expected.state_dict().items())
    stored = load_file(out / "model.safetensors")
    assert sum(tensor.numel() for tensor in stored.values()) == expected.num_parameters()
    ids = AutoTokenizer.from_pretrained(out)("def main", return_tensors="pt").input_ids
    assert torch.equal(loaded.eval()(ids).logits, expected(ids).logits)
    assert list(out.parent.iterdir()) == [out]  # nothing temporary is left
    assert len({file.stat().st_mode for file in out.iterdir()}) == 1  # who may read one file may read all

    # what export writes, the other commands read
    assert evaluate(["--checkpoint", str(out), "--data", str(dataset), "--tokens", "100", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] > 0
    assert export(out, tmp_path / "again") == 0
    assert (tmp_path / "again/model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_precision_is_kept(dataset: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run", 1, small_model(dataset).bfloat16(), dataset)
    assert export(tmp_path / "run", tmp_path / "out") == 0
    assert {tensor.dtype for tensor in load_file(tmp_path / "out/model.safetensors").values()} == {torch.bfloat16}


def refusal(capsys: pytest.CaptureFixture[str], run: Path, out: Path) -> str:
    assert export(run, out) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("error: ") and printed.err.count("\n") == 1
    return printed.err


def test_what_is_there_is_not_overwritten(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("mine")
    assert f"--out {out} exists and is not an empty folder" in refusal(capsys, run, out)
    assert f"--out {out / 'mine'} exists" in refusal(capsys, run, out / "mine")
    assert f"--out {out / 'mine/below'}: cannot write there" in refusal(capsys, run, out / "mine/below")
    assert [path.name for path in out.iterdir()] == ["mine"] and (out / "mine").read_text() == "mine"
    (out / "mine").unlink()
    assert export(run, out) == 0
    assert (out / "config.json").exists()


def test_a_failed_export_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save = MMRecForCausalLM.save_pretrained

    def wrong(self: MMRecForCausalLM, folder: Path, **options: Any) -> None:
        with torch.no_grad():
            save(self, folder, **options)
            self.lm_head.weight[0, 0] += 1

    def full(self: MMRecForCausalLM, folder: Path, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(MMRecForCausalLM, "save_pretrained", wrong)
    assert "reads back differently" in refusal(capsys, run, tmp_path / "out")
    monkeypatch.setattr(MMRecForCausalLM, "save_pretrained", full)
    assert "No space left on device" in refusal(capsys, run, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_no_whole_checkpoint(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is neither a run folder" in refusal(capsys, tmp_path / "nowhere", tmp_path / "out")
    torn = run / "checkpoints/step_10"
    tear(torn)
    assert f"{torn} cannot be used" in refusal(capsys, torn, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
