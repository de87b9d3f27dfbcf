"""What goes wrong while a data set is prepared ends in a plain message; the same command goes on from there."""

import errno
import gzip
import json
import os
import resource
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from mmrec_train.data.tokenizer import special_ids, train_tokenizer
from mmrec_train.errors import UserError
from mmrec_train.preparation.filters import Filters
from mmrec_train.preparation.ingest import Progress, Settings, prepare
from mmrec_train.preparation.partial import Partial
from mmrec_train.preparation.recipe import Recipe
from mmrec_train.preparation.records import Extraction, JsonLines, Template
from mmrec_train.preparation.shards import SplitWriter
from mmrec_train.preparation.sources import SourceUnavailable, stored
from mmrec_train.preparation.workers import Encoded, Treatment, Vocabulary, Workers
from tests.preparation.texts import TEXTS, contents, recipe_of, write_lines

SETTINGS = Settings(1, shard_bytes=20_000, batch_bytes=1000, commit_seconds=0)
KEPT = r"What was prepared so far is kept in .*\.out\.partial: run the same command to go on\."


class Case:
    """A recipe and a tokenizer, and what they give undisturbed."""

    def __init__(self, folder: Path) -> None:
        self.lines = write_lines(folder / "lines.jsonl", [*TEXTS, *TEXTS[::7]])
        self.recipe = recipe_of(self.lines, deduplicate=True, validation_fraction=0.2)
        self.tokenizer = str(folder / "tokenizer")
        self.out = folder / "out"
        self.partial = folder / ".out.partial"
        train_tokenizer(TEXTS, 300).save_pretrained(self.tokenizer)
        self.prepare(folder / "undisturbed")
        self.undisturbed = contents(folder / "undisturbed")

    def prepare(
        self,
        out: Path | None = None,
        settings: Settings = SETTINGS,
        recipe: Recipe | None = None,
        on_progress: Callable[[Progress], None] = lambda progress: None,
    ) -> None:
        prepare(
            recipe or self.recipe,
            out or self.out,
            tokenizer=self.tokenizer,
            settings=settings,
            on_progress=on_progress,
        )

    def goes_on(self) -> bool:
        """Whether what is unfinished is kept, and becomes what it would have been."""
        kept = self.partial.exists() and not self.out.exists()
        self.prepare()
        return kept and contents(self.out) == self.undisturbed and not self.partial.exists()


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


def interrupt_after(documents: int, error: BaseException) -> Callable[[Progress], None]:
    def on_progress(progress: Progress) -> None:
        if progress.documents >= documents:
            raise error

    return on_progress


def test_an_interrupt(case: Case) -> None:
    with pytest.raises(KeyboardInterrupt):
        case.prepare(on_progress=interrupt_after(100, KeyboardInterrupt()))
    assert case.goes_on()


def test_an_interrupt_before_the_first_document_leaves_nothing(case: Case) -> None:
    stop = interrupt_after(1, KeyboardInterrupt())  # while a tokenizer is trained
    with pytest.raises(KeyboardInterrupt):
        prepare(case.recipe, case.out, tokenizer=300, settings=SETTINGS, on_progress=stop)
    assert not case.partial.exists() and not case.out.exists()


@pytest.mark.parametrize("after", [0, 7])
def test_a_full_disk(case: Case, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    extend = SplitWriter.extend
    left = iter(range(after))

    def fail(self: SplitWriter, tokens: np.ndarray, lengths: np.ndarray) -> None:
        if next(left, None) is None:
            extend(self, tokens[:3], np.array([3]))  # a part of it is written
            raise OSError(errno.ENOSPC, "No space left on device")
        extend(self, tokens, lengths)

    with monkeypatch.context() as patch:
        patch.setattr(SplitWriter, "extend", fail)
        with pytest.raises(UserError, match=rf"--out .*/out: writing failed: No space left on device\. {KEPT}"):
            case.prepare()
    assert case.goes_on()


@pytest.fixture
def file_size_limit() -> Iterator[Callable[[int], None]]:
    """Sets the most bytes that a file may have, which the system enforces as it does a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_takes_no_more(tmp_path: Path, file_size_limit: Callable[[int], None]) -> None:
    case = Case(tmp_path)
    lines = write_lines(tmp_path / "long.jsonl", [f"{number} " * 400 for number in range(400)])
    recipe, how = recipe_of(lines), Settings(1, batch_bytes=20_000, commit_seconds=0)
    case.prepare(tmp_path / "whole", how, recipe)
    file_size_limit(200_000)
    with pytest.raises(UserError, match=rf"writing failed: File too large\. {KEPT}"):
        case.prepare(settings=how, recipe=recipe)
    file_size_limit(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    case.prepare(settings=how, recipe=recipe)
    assert contents(case.out) == contents(tmp_path / "whole")


def test_a_journal_that_cannot_be_written(case: Case, file_size_limit: Callable[[int], None]) -> None:
    file_size_limit(8192)
    with pytest.raises(UserError, match=r"--out .*/out: writing failed: (disk I/O error|database or disk is full)"):
        case.prepare()
    file_size_limit(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    case.prepare()
    assert contents(case.out) == case.undisturbed


def test_a_list_of_files_that_cannot_be_written(file_size_limit: Callable[[int], None]) -> None:
    file_size_limit(100_000)
    with pytest.raises(SourceUnavailable, match=r"temporary list of files: .*(error|full)\. .* SQLITE_TMPDIR\.$"):
        stored(range(300_000))


def test_a_damaged_journal(case: Case) -> None:
    with pytest.raises(KeyboardInterrupt):
        case.prepare(on_progress=interrupt_after(100, KeyboardInterrupt()))
    (case.partial / "journal.sqlite").write_bytes(b"no database" * 1000)
    with pytest.raises(UserError, match=r"journal\.sqlite is damaged .* Remove its folder and start anew"):
        case.prepare()


def test_a_bad_record_is_named_and_what_was_before_it_is_there(case: Case) -> None:
    with case.lines.open("a") as file:
        file.write('{"text": 3}\n')
    with pytest.raises(UserError, match=r"lines\.jsonl, line 230: field text is not text but int.*remove it first"):
        case.prepare()
    assert case.partial.exists() and not case.out.exists()


def test_a_damaged_archive_is_named(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode())[:-20])
    with pytest.raises(UserError, match=r"cannot read .*lines\.jsonl\.gz: "):
        case.prepare(recipe=recipe_of(path))


def test_other_options_are_refused(case: Case) -> None:
    with pytest.raises(KeyboardInterrupt):
        case.prepare(on_progress=interrupt_after(100, KeyboardInterrupt()))
    other = recipe_of(case.lines, deduplicate=False, validation_fraction=0.2)
    with pytest.raises(UserError, match=r"begun with other options: deduplicate was true and is false now\. Give the"):
        case.prepare(recipe=other)
    other = recipe_of({"b": {"source": str(case.lines)}}, deduplicate=True, validation_fraction=0.2)
    with pytest.raises(UserError, match=r'sources\.main\.source was ".*lines\.jsonl" and is null now'):
        case.prepare(recipe=other)
    assert case.goes_on()


def test_other_input_is_refused(case: Case) -> None:
    with pytest.raises(KeyboardInterrupt):
        case.prepare(on_progress=interrupt_after(100, KeyboardInterrupt()))
    with case.lines.open("a") as file:
        file.write("\n")
    with pytest.raises(
        UserError, match=r"no longer what was begun with: .*lines\.jsonl was changed.*\.out\.partial: re"
    ):
        case.prepare()


def test_another_tokenizer_of_the_same_name_is_refused(case: Case) -> None:
    with pytest.raises(KeyboardInterrupt):
        case.prepare(on_progress=interrupt_after(100, KeyboardInterrupt()))
    before = contents(Path(case.tokenizer))
    train_tokenizer(TEXTS, 310).save_pretrained(case.tokenizer)
    with pytest.raises(UserError, match=r"files of the tokenizer\.tokenizer\.json was .* and is .* now\."):
        case.prepare()
    for name, content in before.items():
        (Path(case.tokenizer) / name).write_bytes(content)
    assert case.goes_on()


def test_two_at_once(case: Case) -> None:
    with Partial(case.out).locked(), pytest.raises(UserError, match="another process is preparing it"):
        case.prepare()
    case.prepare()


def test_a_tokenizer_that_is_not_there_leaves_nothing(case: Case, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot load the tokenizer .*absent.*Nothing was written"):
        prepare(case.recipe, case.out, tokenizer=str(tmp_path / "absent"), settings=SETTINGS)
    assert not case.partial.exists()


def test_a_worker_that_is_killed(case: Case) -> None:
    settings = Settings(2, SETTINGS.shard_bytes, SETTINGS.batch_bytes, 0)

    def kill(progress: Progress) -> None:
        if progress.documents > 50:
            for process in psutil.Process().children():
                if process.status() != psutil.STATUS_ZOMBIE and "spawn_main" in " ".join(process.cmdline()):
                    process.kill()

    with pytest.raises(UserError, match=rf"a worker process died, most likely for want of memory.*{KEPT}"):
        case.prepare(settings=settings, on_progress=kill)
    assert case.goes_on()


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    tokenizer = train_tokenizer(TEXTS, 300)
    return Vocabulary(tokenizer.backend_tokenizer.to_str(), special_ids(tokenizer)[0], "uint16")


TREATMENT = Treatment(Extraction(Template.of_field("text")), Filters(), 0.0)


def batch(number: int, text: str = "a") -> tuple[int, Treatment, JsonLines]:
    return number, TREATMENT, JsonLines("memory", number + 1, json.dumps({"text": text * (number + 1)}).encode())


@pytest.mark.parametrize("processes", [1, 2])
def test_a_reader_that_is_faster_than_the_workers_waits(vocabulary: Vocabulary, processes: int) -> None:
    read = given = most = 0

    def batches() -> Iterator[tuple[int, Treatment, JsonLines]]:
        nonlocal read, most
        for number in range(60):
            read += 1
            most = max(most, read - given)
            yield batch(number)

    with Workers[int](processes, vocabulary) as workers:
        for label, encoded in workers.encode(batches()):
            assert label == given
            assert len(encoded.tokens) == encoded.documents["tokens"].sum() > 0
            given += 1
        assert given == 60
        assert most == workers.most_under_way == (1 if processes == 1 else 5)


@pytest.mark.parametrize("processes", [1, 2])
def test_what_was_read_before_a_failure_is_given_and_nothing_after_it(vocabulary: Vocabulary, processes: int) -> None:
    def fail() -> Iterator[tuple[int, Treatment, JsonLines]]:
        yield from map(batch, range(12))
        raise UserError("the reader failed")

    bad = (7, TREATMENT, JsonLines("memory", 8, b"{"))
    with Workers[int](processes, vocabulary) as workers:
        for batches, message, count in (
            (fail(), "the reader failed", 12),
            (iter([*map(batch, range(7)), bad, *map(batch, range(8, 20))]), "memory, line 8: not JSON", 7),
        ):
            given: list[tuple[int, Encoded]] = []
            with pytest.raises(UserError, match=message):
                given.extend(workers.encode(batches))
            assert [label for label, _ in given] == list(range(count))


def test_the_environment_is_left_as_it_was(vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (None, "true"):
        monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
        if value:
            monkeypatch.setenv("TOKENIZERS_PARALLELISM", value)
        with Workers[int](1, vocabulary):
            assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
        assert os.environ.get("TOKENIZERS_PARALLELISM") == value


def test_duplicates_are_kept_on_the_disk(case: Case) -> None:
    """So that memory does not grow with them."""
    with pytest.raises(KeyboardInterrupt):
        case.prepare(on_progress=interrupt_after(150, KeyboardInterrupt()))
    with sqlite3.connect(case.partial / "journal.sqlite") as database:
        assert 100 <= database.execute("SELECT count(*) FROM seen").fetchone()[0] < 200
    assert case.goes_on()
