"""What the report says in words and numbers, and where."""

from __future__ import annotations

import dataclasses
import math

import pytest

from teefusion.gate import Verdict
from teefusion.group_means import OVERALL, BenchmarkScore, Mean, benchmark_score
from teefusion.report import Pairing, ReportData, Row, render_report
from tests.reports import INTERVALS, ROWS, Page, interval, report_data, rows, words


def test_every_tag_is_closed_and_every_id_is_unique(page: Page) -> None:
    assert page.mistakes == []
    assert page.unclosed == []
    names = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(names) == len(set(names))


def test_the_verdict_and_its_reasons_come_first(html: str, page: Page) -> None:
    assert page.texts["verdict"] == "✓ Passed: this student can stand in for its guided teacher"
    assert page.texts["reasons"] == "Overall it holds. No style falls behind."
    names = ("verdict", "numbers", "pictures", "guidance", "training", "details")
    order = [html.index(f'id="{name}"') for name in names]
    assert order == sorted(order)


def test_a_failed_verdict_says_so_in_words_and_is_no_pass() -> None:
    failed = Verdict("failed", ("Style photo: too low.",), {OVERALL: interval(-1, -1.5, -0.5, 0.2)})
    html = render_report(report_data(verdict=failed, pairings=[Pairing("student minus teacher", failed.intervals)]))
    page = Page(html)
    assert page.texts["verdict"] == "✗ Not passed: this student cannot stand in for its guided teacher"
    assert page.texts["reasons"] == "Style photo: too low."
    assert "Passed:" not in html
    assert "It is not registered." in words(html)
    assert "✗ no" in page.texts["differences"]
    assert "✓ yes" not in page.texts["differences"]


def test_the_headline_numbers_are_worked_out_from_the_measurements(html: str) -> None:
    text = words(html)
    assert "40 → 20 Evaluations of the transformer, teacher → student: 50 % of the teacher's." in text
    assert "Diversity 0.90× How much" in text  # 0.45 / 0.5
    assert "1.92× Teacher 0.240 s a picture (0.230 to 0.270). Student 0.125 s a picture." in text  # 0.24 / 0.125
    assert "Guidance adds 5.00 points to the teacher; the student keeps 98 % of that." in text  # 4.9 of 5
    assert "Guidance residual 0.117" in text
    assert "−0.10 95 % interval −0.19 to +0.02; down to −0.20 is allowed." in text


def test_too_few_prompts_are_told_from_a_bad_student() -> None:
    page = Page(render_report(report_data(verdict=Verdict("not enough evidence", ("12 prompts.",), INTERVALS))))
    assert page.texts["verdict"].startswith("? Not enough evidence: too few prompts to tell")
    assert "Nothing here says that it is bad" in words(
        render_report(report_data(verdict=Verdict("not enough evidence", ())))
    )


def test_a_comparison_that_decides_nothing_has_no_verdict_and_any_rows() -> None:
    renamed = {
        "A": dataclasses.replace(ROWS["teacher"], title="A"),
        "B": dataclasses.replace(ROWS["student"], title="B"),
    }
    html = render_report(
        ReportData(key="k", scorer="s", rows=renamed, pairings=[Pairing("B minus A", INTERVALS)], about="Two students.")
    )
    page = Page(html)
    assert page.texts["verdict"] == "≈ Comparison"
    assert "reasons" not in page.texts
    assert "Style A B Prompts overall 20.00 ± 0.25 19.90 ± 0.25 80" in page.texts["scores"]
    assert page.texts["differences"].startswith("B minus A, prompt by prompt.")
    assert not page.mistakes


def test_the_tables_give_scores_differences_and_costs(page: Page) -> None:
    assert "anime 15.00 ± 0.25 20.00 ± 0.25 19.90 ± 0.25 40 photo" in page.texts["scores"]
    assert "anime −0.25 −0.30 to +0.14 −0.60 ✓ yes 40 photo" in page.texts["differences"]
    assert "Memory is the most resident in the process while the row drew" in page.texts["costs"]
    assert "Teacher 4 40 0.240 0.230 to 0.270 0.500 ± 0.010" in page.texts["costs"]
    assert "Student 4 20 0.125 1.50 GiB 0.450 ± 0.020" in page.texts["costs"]
    assert "4 22.00 ± 0.10 0.500 ± 0.020 22.00 ± 0.10 0.500 ± 0.020 16" in page.texts["control"]


def test_a_champion_has_differences_of_its_own() -> None:
    both = [Pairing("student minus teacher", INTERVALS), Pairing("student minus champion", INTERVALS)]
    page = Page(render_report(report_data(pairings=both)))
    assert page.texts["differences1"].startswith("Student minus champion, prompt by prompt.")
    assert {"chart-differences", "chart-differences1"} <= {a.get("id") for a in page.named("figure")}


def test_the_benchmarks_number_is_shown_where_there_are_several_groups() -> None:
    several = benchmark_score({"anime": [14.0] * 80 + [16.0] * 80, "photo": [20.0] * 80})
    single = benchmark_score({"anime": [14.0] * 80})
    assert several is not None
    assert single is not None

    def with_benchmark(score: BenchmarkScore) -> dict[str, Row]:
        return ROWS | {name: dataclasses.replace(ROWS[name], benchmark=score) for name in ("teacher", "student")}

    shown = Page(render_report(report_data(rows=with_benchmark(several))))
    text = shown.texts["benchmark"]
    assert "means of groups of 80 prompts" in text
    assert "anime 15.00 ± 1.00 15.00 ± 1.00 2" in text
    assert "photo 20.00 20.00 1" in text  # of one group there is no deviation
    assert "average 16.67 16.67" in text
    assert not shown.unclosed
    assert not shown.mistakes
    assert "benchmark" not in Page(render_report(report_data(rows=with_benchmark(single)))).texts


def test_what_the_scorer_is_stands_in_the_details() -> None:
    described = {"name": "HPS v2.1", "version": "v2.1", "revision": None, "preprocessing": {"antialias": False}}
    html = render_report(report_data(scorer="HPS v2.1", scorer_details=described))
    assert "<summary>Scorer</summary>" in html
    assert '<th scope="row">preprocessing.antialias</th><td class="mono">False</td>' in html
    assert "revision" not in html


def test_what_guidance_adds_is_left_out_where_it_adds_nothing() -> None:
    assert "Guidance adds" not in words(render_report(report_data(rows=rows(scores={OVERALL: Mean(20.0, 0.25, 80)}))))


def test_details_hold_stages_settings_digests_and_versions(html: str, page: Page) -> None:
    assert page.texts["stages"] == "targets 1 min 15 s, reused train 1 h 2 min"
    text = words(html)
    for fact in ("train.steps 600", "evaluate.scorer bundled:shapes", "torch 2.13.0", "prompts " + "ab" * 32):
        assert fact in text
    assert "run 0123456789abcdef model teefusion-shapes, version 3 2025-11-21 10:40 UTC" in text


def test_a_report_of_a_student_that_could_not_be_measured_still_reads() -> None:
    verdict = Verdict("failed", ("Nothing was measured.",))
    bare = ReportData(key="k", teacher="shapes", scorer="none", verdict=verdict, rows={}, guidance_residual=math.nan)
    html = render_report(bare)
    assert Page(html).texts["reasons"] == "Nothing was measured."
    assert words(html).count("not measured") == 5
    assert "nan" not in words(html)


@pytest.mark.parametrize(("mean", "shown"), [(31.23456, "31.23"), (2.34567, "2.346"), (0.61234, "0.6123")])
def test_scores_have_as_many_decimals_as_their_size_asks_for(mean: float, shown: str) -> None:
    html = render_report(report_data(rows=rows(scores={OVERALL: Mean(mean, 0.1, 40)}), control={}))
    assert f"overall {shown} ±" in words(html)
