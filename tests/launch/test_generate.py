"""launch/generate.py against recomputing everything for each token."""

from pathlib import Path
from typing import Any

import pytest
import torch

from launch.generate import main
from mmrec_train.data import load_tokenizer, special_ids
from mmrec_train.model import MMRecForCausalLM
from tests.launch.trained import small_model, tear, write_checkpoint

PROMPT = "def first<|endoftext|> é"


@pytest.fixture(scope="module")
def model(dataset: Path) -> MMRecForCausalLM:
    return small_model(dataset, noise=0.4)


@pytest.fixture(scope="module")
def run(model: MMRecForCausalLM, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generate")
    write_checkpoint(folder, 3, model, dataset)
    return folder


def generated(capsys: pytest.CaptureFixture[str], run: Path, *options: str, prompt: str = PROMPT) -> str:
    assert main(["--checkpoint", str(run), "--prompt", prompt, *options]) == 0
    return capsys.readouterr().out


@torch.no_grad()
def greedy_text(model: MMRecForCausalLM, dataset: Path, prompt: str, count: int) -> str:
    """Each token the likeliest after a forward pass over all before it; stops at eos."""
    tokenizer = load_tokenizer(dataset)
    bos, eos = special_ids(tokenizer)
    ids = [bos, *tokenizer.encode(prompt, add_special_tokens=False, split_special_tokens=True)]
    assert eos not in ids[1:]
    for _ in range(count):
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
        ids.append(int(logits[: len(tokenizer)].argmax()))
        if ids[-1] == eos:
            break
    return tokenizer.decode(ids[1:], skip_special_tokens=True)


@pytest.mark.parametrize("prompt", [PROMPT, ""])
def test_greedy_text_is_that_of_recomputation(
    model: MMRecForCausalLM, run: Path, dataset: Path, prompt: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = generated(capsys, run, "--greedy", "--max-new-tokens", "40", prompt=prompt)
    expected = greedy_text(model, dataset, prompt, 40)
    # bytes at the end that are no whole character yet are not printed
    assert text == expected.rstrip("\ufffd") + "\n"
    assert text.startswith(prompt) and len(text) > len(prompt) + 20


def test_it_stops_at_the_end_of_the_text(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = small_model(dataset, tie_word_embeddings=False)
    _, eos = special_ids(load_tokenizer(dataset))
    with torch.no_grad():  # one channel is large for every input, and speaks for eos
        model.model.embed_tokens.weight[:, 0] = 100
        model.lm_head.weight[:, 0] = 0
        model.lm_head.weight[eos, 0] = 100
    write_checkpoint(tmp_path, 1, model, dataset)
    assert generated(capsys, tmp_path, "--max-new-tokens", "1000") == PROMPT + "\n"


def test_the_seed_decides_the_draws(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--max-new-tokens", "30", "--temperature", "1.5", "--top-k", "0", "--seed")
    first, again, other = (generated(capsys, run, *options, seed) for seed in ("1", "1", "2"))
    assert first == again != other
    assert generated(capsys, run, *options, "2", "--top-k", "1") == generated(
        capsys, run, "--greedy", "--max-new-tokens", "30"
    )


def test_text_is_printed_as_it_is_written(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After each token, not at the end: what is there before the forward pass of the 8th new token."""
    calls = []
    forward = MMRecForCausalLM.forward

    def counted(self: MMRecForCausalLM, *args: Any, **kwargs: Any) -> Any:
        calls.append((kwargs["input_ids"].shape[1], capsys.readouterr().out))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(MMRecForCausalLM, "forward", counted)
    rest = generated(capsys, run, "--greedy", "--max-new-tokens", "8")
    lengths, pieces = zip(*calls, strict=True)
    assert lengths[0] > 1 and lengths[1:] == (1,) * 7  # the prompt once, then a token at a time
    monkeypatch.undo()
    text = generated(capsys, run, "--greedy", "--max-new-tokens", "8")
    assert "".join(pieces) + rest == text
    assert "".join(pieces[:2]).startswith(PROMPT) and len("".join(pieces)) > len("".join(pieces[:4]))


def test_bad_input_is_one_message(
    run: Path, model: MMRecForCausalLM, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusal(*options: str, checkpoint: Path = run, prompt: str = "x") -> str:
        assert main(["--checkpoint", str(checkpoint), "--prompt", prompt, *options]) == 2
        printed = capsys.readouterr()
        assert printed.out == "" and printed.err.startswith("error: ") and printed.err.count("\n") == 1
        return printed.err

    assert "--temperature is 0.0; it must be above 0" in refusal("--temperature", "0")
    assert "--top-k is -1" in refusal("--top-k", "-1")
    assert "--max-new-tokens is 0" in refusal("--max-new-tokens", "0")
    assert "--prompt is not valid UTF-8" in refusal(prompt="\udcff")
    assert "is neither a run folder" in refusal(checkpoint=tmp_path / "nowhere")
    torn = write_checkpoint(tmp_path, 1, model, dataset)
    tear(torn)
    assert "cannot be used" in refusal(checkpoint=torn)
