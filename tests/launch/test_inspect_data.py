"""launch/inspect_data.py, read from what it prints."""

import re
import shutil
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from launch.inspect_data import main
from mmrec_train.data import LaneLoader, load_tokenizer, open_dataset
from mmrec_train.data.checksums import file_checksum
from mmrec_train.data.inspection import lane_pieces, length_plot, save_length_plot, short_tokens
from mmrec_train.data.lanes import StreamSettings
from mmrec_train.data.manifest import read_manifest, write_manifest
from mmrec_train.data.shard_cache import shard_cache
from mmrec_train.data.statistics import count_lengths
from mmrec_train.errors import UserError
from tests.data.documents import numbered_documents, write_documents
from tests.trainer.texts import write_texts

BOOK = [f"chapter {number} " * number for number in range(1, 40)]
LETTERS = ["dear reader, " * 3, "dear writer [bold], " * 500]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = {"train": {"book": BOOK, "letters": LETTERS}, "validation": {"book": BOOK[:3]}}
    folder = write_texts(tmp_path_factory.mktemp("inspect") / "data", texts, shard_tokens=300)
    manifest = read_manifest(folder)
    letters = manifest.sources["letters"].model_copy(
        update={"left_out": {"too short": 3, "duplicate": 0}, "invalid_utf8_documents": 1, "invalid_utf8_replaced": 7}
    )
    write_manifest(folder, manifest.model_copy(update={"sources": {**manifest.sources, "letters": letters}}))
    return folder


@pytest.fixture
def copy(data: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(data, tmp_path / "copy"))


def rows(output: str, name: str) -> list[list[str]]:
    """The cells of the table rows that begin with `name`."""
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if "│" in line]
    return [cells[1:] for cells in lines if cells and cells[0] == name]


def test_statistics(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(data)]) == 0
    output = capsys.readouterr().out
    source = open_dataset(data, "train", verify=False).sources["letters"]
    short, long = sorted(len(source.read(document)) for document in range(2))
    everything = open_dataset(data, "train", verify=False).num_tokens
    counts, lengths, *positions = rows(output, "train/letters")
    assert counts[:3] == ["2", f"{short + long:,}", f"{(short + long) / everything:.1%}"]
    mean = f"{(short + long) / 2:,.0f}"
    assert lengths == [f"{short:,}", f"{short:,}", mean, f"{long:,}", f"{long:,}", f"{long:,}"]
    assert [row[0] for row in positions] == ["0–1K", "1K–8K", "8K–32K", "32K–100K", "100K+"]
    assert positions[0][1:3] == ["2", f"{short + 1024:,}"]
    assert positions[1][1:3] == ["1", f"{long - 1024:,}"]
    assert positions[2][1:] == ["0", "0", "0.0%"]
    assert "left out of letters: 3 documents (too short)" in output
    assert "duplicate" not in output
    assert "repaired in letters: 7 places that were not UTF-8, in 1 documents" in output
    assert "all files are whole" in output
    assert "documents by length" in output
    assert len(rows(output, "validation/book")) == 7


def test_one_split_and_source(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(data), "--split", "train", "--source", "book"]) == 0
    output = capsys.readouterr().out
    assert rows(output, "train/book")
    assert "validation" not in output
    assert "letters" not in output


def test_every_damaged_file_is_named(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "train/book/shard_00001.idx").unlink()
    (copy / "train/letters/shard_00000.bin").write_bytes(b"short")
    validation = copy / "validation/book/shard_00000.bin"
    validation.write_bytes(b"\xff" + validation.read_bytes()[1:])
    assert main([str(copy)]) == 2
    output = capsys.readouterr()
    assert "whole" not in output.out
    assert "damaged in 3 places" in output.err
    for place in (
        r"train/book/shard_00001\.idx is missing",
        r"train/letters/shard_00000\.bin is truncated",
        r"validation/book/shard_00000\.bin is corrupt",
    ):
        assert re.search(place, output.err)


def test_a_document_without_bos_is_named(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whole files, as another program may have written them."""
    path = copy / "train/letters/shard_00000.bin"
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    before = file_checksum(path)
    path.write_bytes(content)
    manifest = copy / "manifest.json"
    manifest.write_text(manifest.read_text().replace(before, file_checksum(path)))
    assert main([str(copy)]) == 2
    output = capsys.readouterr()
    assert "whole" not in output.out
    assert re.search(r"train/letters/shard_00000\.bin .*: document 0 begins with token \d+, not with bos", output.err)


def test_without_verification_no_token_is_read(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in copy.rglob("*.bin"):
        path.unlink()
    assert main([str(copy), "--no-verify"]) == 0
    output = capsys.readouterr().out
    assert "whole" not in output
    assert rows(output, "train/book")


def test_a_data_set_at_a_url(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # the cache is there
    shard_cache.cache_clear()
    fs = MemoryFileSystem()
    for path in data.rglob("*"):
        if path.is_file():
            fs.pipe_file(f"/inspected/{path.relative_to(data)}", path.read_bytes())
    assert main(["memory://inspected"]) == 0
    assert "all files are whole" in capsys.readouterr().out
    fs.pipe_file("/inspected/train/book/shard_00000.bin", b"")
    fs.rm("/inspected/train/book/shard_00001.idx")
    for cached in (tmp_path / ".cache/mmrec_train/shards").glob("*"):
        if cached.is_file():
            cached.unlink()
    shard_cache.cache_clear()
    assert main(["memory://inspected"]) == 2
    error = capsys.readouterr().err
    assert "damaged in 2 places" in error
    assert "memory://inspected/train/book/shard_00000.bin arrived truncated" in error
    assert "memory://inspected/train/book/shard_00001.idx is missing" in error
    fs.store.clear()


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_plots_are_written(data: Path, tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"lengths.{suffix}"
    assert main([str(data), "--plot", str(file)]) == 0
    assert file.stat().st_size > 1000


def test_a_plot_of_an_unknown_kind(data: Path, tmp_path: Path) -> None:
    lengths = count_lengths(open_dataset(data, "train", verify=False).sources["book"])
    with pytest.raises(UserError, match=r"--plot .*lengths\.doc: .*\.svg"):
        save_length_plot({"book": lengths}, tmp_path / "lengths.doc")
    with pytest.raises(UserError, match=r"--plot .*absent"):
        save_length_plot({"book": lengths}, tmp_path / "absent" / "lengths.svg")


@pytest.mark.parametrize("lengths", [[1], [1024], [1, 3, 1000], [7, 7, 8]])
def test_the_plot_in_the_terminal(tmp_path: Path, lengths: list[int]) -> None:
    source = write_documents(tmp_path, numbered_documents(lengths), shard_tokens=1 << 20).sources["main"]
    drawing = length_plot(count_lengths(source))
    assert "\x1b" not in drawing
    assert "█" in drawing
    below, above = 1 << (min(lengths).bit_length() - 1), 1 << max(lengths).bit_length()
    ticks = drawing.splitlines()[-2].split()
    assert (ticks[0], ticks[-1]) == (short_tokens(below), short_tokens(above))


@pytest.mark.parametrize(
    ("tokens", "text"), [(0, "0"), (512, "512"), (1024, "1K"), (1500, "1500"), (102400, "100K"), (2 << 20, "2M")]
)
def test_short_numbers_of_tokens(tokens: int, text: str) -> None:
    assert short_tokens(tokens) == text


@pytest.mark.parametrize(
    "settings",
    [
        StreamSettings(),
        StreamSettings(order="by_length", seed=3, window_chunks=2),
        StreamSettings(order="stored", sequence_len=((0, 24), (2, 40))),
    ],
)
def test_pieces_of_a_lane_are_what_the_loader_gives(data: Path, settings: StreamSettings) -> None:
    dataset = open_dataset(data, "train", verify=False)
    loader = LaneLoader(dataset, settings, num_lanes=3, chunk_len=50, micro_batch_size=3)
    for step in range(6):
        [chunk] = loader.next_step()
        for lane in range(3):
            pieces = lane_pieces(dataset, settings, num_lanes=3, chunk_len=50, lane=lane, step=step)
            assert [token for piece in pieces for token in piece.tokens.tolist()] == chunk.input_ids[lane].tolist()
            resets = [[piece.reset] + [False] * (len(piece.tokens) - 1) for piece in pieces]
            assert [reset for piece in resets for reset in piece] == chunk.reset[lane].tolist()
            for piece in pieces:
                document = dataset.sources[piece.source].read(piece.document)
                assert document[piece.start : piece.stop].tolist() == piece.tokens.tolist()
                assert piece.length == len(document)
                assert piece.reset or piece.start > 0


def test_the_text_of_a_lane(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--lane", "1", "--lanes", "3", "--chunk-len", "60", "--step", "2", "--order", "stored", "--seed", "5"]
    assert main([str(data), *options]) == 0
    output = capsys.readouterr().out
    dataset = open_dataset(data, "train", verify=False)
    settings = StreamSettings(order="stored", seed=5)
    pieces = lane_pieces(dataset, settings, num_lanes=3, chunk_len=60, lane=1, step=2)
    assert "lane 1 of 3 after 2 steps: its tokens 120 to 180" in output
    tokenizer = load_tokenizer(data)
    for piece in pieces:
        assert f"{piece.source}, document {piece.document}: tokens {piece.start} to {piece.stop} of" in output
        assert tokenizer.decode(piece.tokens) in output
    assert ("▶ begins" in output) == any(piece.start == 0 for piece in pieces)


def test_a_lane_of_one_source(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--lane", "0", "--lanes", "1", "--chunk-len", "2000", "--source", "letters", "--order", "stored"]
    assert main([str(data), *options]) == 0
    output = capsys.readouterr().out
    assert output.startswith("lane 0 of 1 after 0 steps")
    assert "── letters, document 0: tokens 0 to" in output
    assert "(▶ begins, ends)" in output
    assert "dear writer [bold]" in output  # text, not markup
    assert "book" not in output


def test_the_lanes_of_a_run(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Lane 2 of the 4 lanes of 48 tokens that the configuration has."""
    assert main(["--config", str(config_file), "--lane", "2", "--step", "1"]) == 0
    assert "lane 2 of 4 after 1 steps: its tokens 48 to 96" in capsys.readouterr().out
    assert main(["--config", str(config_file), "--no-verify", "--split", "train"]) == 0
    assert rows(capsys.readouterr().out, "train/main")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{data}", "--lane", "0"], "--lane needs --lanes and --chunk-len"),
        (["{data}", "--lane", "4", "--lanes", "4", "--chunk-len", "8"], "--lane 4: there are lanes 0 to 3"),
        (["{data}", "--lane", "-1", "--lanes", "4", "--chunk-len", "8"], "--lane -1: there are lanes 0 to 3"),
        (["{data}", "--lane", "0", "--lanes", "0", "--chunk-len", "8"], "--lanes is 0; it must be at least 1"),
        (["{data}", "--lane", "0", "--lanes", "1", "--chunk-len", "0"], "--chunk-len is 0; it must be at least 1"),
        (["{data}", "--lane", "0", "--lanes", "1", "--chunk-len", "8", "--step", "-1"], "--step is -1"),
        (["{data}", "--source", "news"], "--source news: .* has book, letters"),
        (
            ["{data}", "--source", "news", "--lane", "0", "--lanes", "1", "--chunk-len", "8"],
            "--source news: .* has book, letters",
        ),
        (["{data}", "--split", "validation", "--source", "letters"], "no documents of that split and source"),
        (["{data}/absent"], "is not a prepared data set"),
        ([], "give the data set's folder or URL"),
        (["--config", "run.yaml", "--lane", "0", "--lanes", "4"], "--lanes is not for a lane of --config"),
    ],
)
def test_mistakes(data: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([argument.format(data=data) for argument in arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_step_after_the_end_of_the_stream(data: Path) -> None:
    dataset = open_dataset(data, "train", verify=False)
    settings = StreamSettings(epochs={"book": 1, "letters": 1})
    steps = -(-dataset.num_tokens // 100)
    with pytest.raises(UserError, match=rf"--step {steps}: the stream ends after {steps} steps"):
        lane_pieces(dataset, settings, num_lanes=1, chunk_len=100, lane=0, step=steps)
    last = lane_pieces(dataset, settings, num_lanes=1, chunk_len=100, lane=0, step=steps - 1)
    assert sum(len(piece.tokens) for piece in last) == (dataset.num_tokens - 1) % 100 + 1


def test_the_tokenizer_belongs_to_what_is_verified(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = read_manifest(copy)
    write_manifest(copy, manifest.model_copy(update={"vocab_size": 60_000}))
    assert main([str(copy)]) == 2
    assert f"has a vocabulary of {manifest.vocab_size}, the manifest says 60000" in capsys.readouterr().err
    shutil.rmtree(copy / "tokenizer")
    assert main([str(copy)]) == 2
    assert "Put the original tokenizer back" in capsys.readouterr().err
    assert main([str(copy), "--no-verify"]) == 0


@pytest.mark.parametrize("content", ["zeros", "noise"])
@pytest.mark.parametrize("what", [["--no-verify"], ["--lane", "0", "--lanes", "2", "--chunk-len", "64"]])
def test_a_damaged_index_is_named(
    copy: Path, content: str, what: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for index in copy.glob("train/*/*.idx"):
        size = index.stat().st_size
        index.write_bytes(
            bytes(size) if content == "zeros" else bytes(range(255, 255 - size % 200, -1)).ljust(size, b"\xfe")
        )
    assert main([str(copy), "--split", "train", *what]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: shard ") and ".idx contradicts the manifest: " in error
