"""The comparison's bookkeeping: a killed evaluation takes up what it had scored, and counts it the same."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from teefusion import comparison, launch
from teefusion.errors import IntegrityError, TeEFusionError
from teefusion.evaluation import picture_path, score_rows, spread
from teefusion.prompts import Prompt
from teefusion.samplers import Sampler
from teefusion.settings import EvaluateSettings
from teefusion.stages.evaluate import evaluate, evaluation_folder
from teefusion.stages.ingest import ingest
from teefusion.stages.targets import targets
from teefusion.stages.train import train


class Killed(BaseException):
    """Ends the evaluation as a signal would."""


class LengthScorer:
    """Scores a prompt by its length; remembers what it was asked, and is killed at the ``fatal``-th batch."""

    name = "length"

    def __init__(self, fatal: int | None = None) -> None:
        self.asked: list[str] = []
        self._left = fatal

    def describe(self) -> dict[str, Any]:
        return {"name": self.name}

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        if self._left is not None:
            if self._left == 0:
                raise Killed
            self._left -= 1
        self.asked += prompts
        return [float(len(prompt)) for prompt in prompts]


PROMPTS = [Prompt("a" * (k + 1), "anime" if k < 3 else "photo") for k in range(5)]
OPTIONS = EvaluateSettings(batch_size=2)


def rows(drawn: list[str]) -> dict[str, Sampler]:
    """Two rows that draw black squares, with one forward a picture for the teacher and none for the student."""
    network = torch.nn.Identity()

    def teacher(prompts: list[str], scale: float, generators: list[torch.Generator]) -> list[Image.Image]:
        network((torch.zeros(len(prompts)),))
        return student(prompts, scale, generators)

    def student(prompts: list[str], scale: float, generators: list[torch.Generator]) -> list[Image.Image]:
        drawn.extend(prompts)
        return [Image.new("RGB", (4, 4))] * len(prompts)

    return {"teacher": Sampler(teacher, [network], 4.0, 0), "student": Sampler(student, [], 4.0, 0)}


def test_a_killed_evaluation_does_not_make_or_score_again_what_was_scored(tmp_path: Path) -> None:
    records, first = tmp_path / "scored", LengthScorer(fatal=3)  # in the student's part of the second batch
    with pytest.raises(Killed):
        score_rows(rows([]), first, PROMPTS, OPTIONS, tmp_path, records=records)
    assert [path.name for path in records.glob("*.json")] == ["00000.json"]

    drawn: list[str] = []
    again, samplers = LengthScorer(), rows(drawn)
    scores = score_rows(samplers, again, PROMPTS, OPTIONS, tmp_path, records=records)
    assert sorted(again.asked) == ["aaa", "aaa", "aaaa", "aaaa", "aaaaa", "aaaaa"]
    assert scores == {row: [1.0, 2.0, 3.0, 4.0, 5.0] for row in ("teacher", "student")}
    assert (samplers["teacher"].nfe, samplers["teacher"].pictures, len(samplers["teacher"].seconds)) == (1.0, 5, 3)
    names = sorted(path.relative_to(tmp_path / "pictures" / "student") for path in tmp_path.rglob("student/*/*.png"))
    assert [str(name) for name in names] == [
        *(f"anime/0000{k}.png" for k in range(3)),
        *(f"photo/0000{k}.png" for k in (3, 4)),
    ]


def test_two_processes_share_the_batches_and_both_have_all_scores(tmp_path: Path) -> None:
    """Threads here: what they share is the folder, as processes do."""
    scorers = [LengthScorer(), LengthScorer()]

    def score(scorer: LengthScorer) -> dict[str, list[float]]:
        return score_rows(rows([]), scorer, PROMPTS * 8, OPTIONS, tmp_path, records=tmp_path / "scored")

    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(score, scorers))
    assert both[0] == both[1] == {row: [1.0, 2.0, 3.0, 4.0, 5.0] * 8 for row in ("teacher", "student")}
    assert len(list((tmp_path / "scored").glob("*.json"))) == 20


def test_nothing_is_drawn_where_all_was_scored(tmp_path: Path) -> None:
    scores = score_rows(rows([]), LengthScorer(), PROMPTS, OPTIONS, tmp_path, records=tmp_path / "scored")
    drawn: list[str] = []
    scorer = LengthScorer()
    assert score_rows(rows(drawn), scorer, PROMPTS, OPTIONS, tmp_path, records=tmp_path / "scored") == scores
    assert drawn == scorer.asked == []


def test_a_record_of_other_prompts_is_refused(tmp_path: Path) -> None:
    records = tmp_path / "scored"
    score_rows(rows([]), LengthScorer(), PROMPTS, OPTIONS, tmp_path, records=records)
    with pytest.raises(IntegrityError, match=r"00000\.json was scored on other prompts or rows"):
        score_rows(rows([]), LengthScorer(), PROMPTS[::-1], OPTIONS, tmp_path, records=records)


@pytest.mark.parametrize(("count", "chosen"), [(1, "a"), (3, "abd"), (5, "abcde"), (9, "abcde")])
def test_prompts_to_show_are_spread_over_all_of_them(count: int, chosen: str) -> None:
    assert "".join(spread("abcde", count)) == chosen


def test_without_a_folder_for_records_none_are_kept(tmp_path: Path) -> None:
    score_rows(rows([]), LengthScorer(), PROMPTS, OPTIONS, tmp_path)
    assert not list(tmp_path.rglob("*.json"))


Evaluated = tuple[Any, Path, Path]


@pytest.fixture
def trained(make_settings: Any) -> Evaluated:
    """Settings with two processes, prompt set, student."""
    settings = make_settings({"train.steps": 2, "evaluate.num_processes": 2})
    prompts = Path(ingest(settings).output)
    return settings, prompts, Path(train(settings, prompts, targets(settings, prompts).output).details["student"])


def test_the_stage_takes_what_its_processes_scored(trained: Evaluated, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def torchrun(settings: Any, processes: int, module: str, arguments: list[str]) -> int:
        file = settings.workdir / "settings.json"
        file.write_text(settings.to_json())
        monkeypatch.setattr(sys, "argv", [module, f"--settings={file}", *arguments])
        comparison.main()
        started.append((processes, module))
        return 0

    monkeypatch.setattr(launch, "_torchrun", torchrun)
    result = evaluate(*trained)
    assert started == [(2, "teefusion.comparison")]
    stored = [json.loads(path.read_text()) for path in sorted(Path(result.output).glob("scored/*.json"))]
    of_workers = [score for record in stored for score in record["rows"]["student"]["scores"]]
    shown = json.loads((Path(result.output) / "evaluation.json").read_text())["per_prompt"]
    assert [prompt["student"] for prompt in shown] == of_workers
    assert not list(Path(result.output).glob("scored/claims/*"))
    assert result.details["nfe"] == {"unguided": 4, "teacher": 8, "student": 4}


def test_processes_that_fail_end_the_stage(trained: Evaluated, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_torchrun", lambda *_: 1)
    with pytest.raises(TeEFusionError, match="Scoring under torchrun ended with exit code 1"):
        evaluate(*trained)


@pytest.mark.slow
def test_two_ranks_under_torchrun_score_what_one_does(trained: Evaluated) -> None:
    settings, prompts, student = trained
    two = evaluate(settings, prompts, student)
    shutil.rmtree(two.output)
    alone = settings.model_copy(update={"evaluate": settings.evaluate.model_copy(update={"num_processes": 1})})
    one = evaluate(alone, prompts, student)
    assert one.output == two.output  # how many took part is no part of what it is
    assert {row: value["overall"]["mean"] for row, value in one.details["scores"].items()} == pytest.approx(
        {row: value["overall"]["mean"] for row, value in two.details["scores"].items()}, abs=0.01
    )
    assert one.details["nfe"] == two.details["nfe"]


def test_a_result_names_its_scorer_and_an_exchanged_scorer_is_another_evaluation(
    make_settings: Any, tiny_scorer: Path, tmp_path: Path
) -> None:
    scorer = Path(shutil.copytree(tiny_scorer, tmp_path / "scorer"))
    settings = make_settings(
        {"train.steps": 2, "evaluate.scorer": f"pickscore:{scorer}", "evaluate.transparency": "refuse"}
    )
    prompts = Path(ingest(settings).output)
    student = Path(train(settings, prompts, targets(settings, prompts).output).details["student"])
    result = evaluate(settings, prompts, student)
    stored = json.loads((Path(result.output) / "evaluation.json").read_text())
    assert stored["scorer"]["name"] == f"PickScore ({scorer})"
    assert len(stored["scorer"]["weights_sha256"]) == 64
    assert stored["scorer"]["preprocessing"]["transparency"] == "refused"
    assert stored["benchmark"] == {"unguided": None, "teacher": None, "student": None}  # four prompts are no group
    assert f"PickScore ({scorer})" in (Path(result.output) / "report.html").read_text()
    assert evaluate(settings, prompts, student).reused

    (scorer / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [1, 1, 1]}')
    assert str(evaluation_folder(settings, prompts, student)) != result.output


def test_whatever_a_style_is_called_its_pictures_lie_in_their_folder_and_apart(tmp_path: Path) -> None:
    styles = ["photo", "photo & film", "photo | film", "..", ".", "/elsewhere", "../photo", "a/b", "日本画", ".hidden"]
    folders = [picture_path(tmp_path, "student", Prompt("a star", style), 0).resolve().parent for style in styles]
    assert {folder.parent for folder in folders} == {tmp_path.resolve() / "pictures" / "student"}
    assert len(set(folders)) == len(styles)
    assert [folder.name for folder in folders if "-" not in folder.name] == ["photo", "日本画"]
