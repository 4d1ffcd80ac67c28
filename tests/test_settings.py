"""Where settings come from, what is refused, and what a run key depends on."""

from __future__ import annotations

from pathlib import Path

import pytest

from teefusion.errors import SettingsError, TeacherError
from teefusion.settings import load_settings, presets, settings_from_json


def test_sources_win_in_the_stated_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("train: {steps: 11, batch_size: 22, warmup_steps: 33}\n")
    monkeypatch.setenv("TEEFUSION_TRAIN__STEPS", "111")
    monkeypatch.setenv("TEEFUSION_TRAIN__BATCH_SIZE", "222")
    train = load_settings(config=config, overrides={"train.steps": 1111}).train
    preset = load_settings().train
    assert (train.steps, train.batch_size, train.warmup_steps) == (1111, 222, 33)
    assert train.learning_rate == preset.learning_rate != type(preset)().learning_rate


def test_every_preset_is_valid() -> None:
    assert "shapes" in presets()
    for name in presets():
        assert load_settings(overrides={"teacher.name": name}).teacher.uri


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"train.steps": -5}, r"train\.steps: .*greater than 0 \(got -5\)"),
        ({"train.stepz": 5}, r"train\.stepz: there is no such setting; train\.steps is one"),
        ({"strategy.guidance_min": 9.0, "strategy.guidance_max": 2.0}, "guidance_min .9. is above guidance_max .2."),
        ({"strategy.guidance_max": 1.0}, "no guidance to teach"),
        ({"train.batch_size": 10, "train.gradient_accumulation_steps": 4}, "batch_size 10 is not divisible by .* = 4"),
        ({"strategy.num_steps": 4, "targets.states_per_trajectory": 5}, "no more states than steps"),
        ({"train.steps": "many"}, r"train\.steps: .*valid integer"),
        ({"strategy.name": "ddim"}, r"strategy\.name: .*euler_cfg"),
        ({"evaluate.guidance_scale": float("nan")}, r"evaluate\.guidance_scale"),
        ({"evaluate.sweep": [1.0, float("nan")]}, r"evaluate\.sweep\.1: .*finite"),
        ({"evaluate.sweep": [-3.0]}, r"evaluate\.sweep\.0: .*greater than or equal to 1"),
        ({"train.learning_rate": float("inf")}, r"train\.learning_rate: .*finite"),
        ({"gate.max_nfe_ratio": float("inf")}, r"gate\.max_nfe_ratio: .*finite"),
    ],
)
def test_bad_settings_are_named(overrides: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        load_settings(overrides=overrides)


def test_all_bad_settings_are_named_at_once() -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(overrides={"train.steps": 0, "evaluate.batch_size": 0, "nonsense": 1})
    assert all(name in str(caught.value) for name in ("train.steps", "evaluate.batch_size", "nonsense"))


def test_a_misspelt_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEEFUSION_TRAIN__STEPZ", "5")
    with pytest.raises(SettingsError, match="TEEFUSION_TRAIN__STEPZ"):
        load_settings()


def test_variables_that_kubernetes_makes_of_services_are_not_misspelt(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_HTTP", "PORT", "PORT_5000_TCP", "PORT_5000_TCP_ADDR"):
        monkeypatch.setenv(f"TEEFUSION_MLFLOW_{name}", "10.0.0.1")
    assert load_settings().mlflow.tracking_uri is None
    monkeypatch.setenv("TEEFUSION_SERV__PORT", "1")
    with pytest.raises(SettingsError, match="TEEFUSION_SERV__PORT"):
        load_settings()


def test_numbers_can_be_set_by_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEEFUSION_TRAIN__ZERO_STAGE", "2")
    monkeypatch.setenv("TEEFUSION_TRAIN__LEARNING_RATE", "0.5")
    train = load_settings().train
    assert (train.zero_stage, train.learning_rate) == (2, 0.5)


def test_an_unknown_teacher_is_refused_with_the_presets() -> None:
    with pytest.raises(TeacherError, match="no preset .*shapes.*no folder, and no hub id"):
        load_settings(overrides={"teacher.name": "shape"})


@pytest.mark.parametrize("text", ["- a\n- b\n", "train: [", "\x00"])
def test_a_bad_configuration_file_is_refused(tmp_path: Path, text: str) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(text)
    with pytest.raises(SettingsError, match=r"run\.yaml"):
        load_settings(config=config)


def test_a_missing_configuration_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="none.yaml"):
        load_settings(config=tmp_path / "none.yaml")


def test_run_key_depends_on_content_and_not_on_where_or_how_fast(tmp_path: Path) -> None:
    key = load_settings().run_key
    for same in ({"workdir": tmp_path}, {"device": "cpu"}, {"train.num_processes": 2}, {"train.log_every": 7}):
        assert load_settings(overrides=same).run_key == key
    for other in ({"train.steps": 7}, {"teacher.revision": "abc"}, {"strategy.guidance_max": 6.5}):
        assert load_settings(overrides=other).run_key != key


def test_stored_settings_come_back_the_same() -> None:
    settings = load_settings(overrides={"train.steps": 17, "evaluate.sweep": [1.0, 3.0]})
    assert settings_from_json(settings.to_json()) == settings


def test_stored_settings_are_not_changed_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage must compute what the run was submitted with, whatever its pod's variables say."""
    stored = load_settings(overrides={"train.steps": 17}).to_json()
    monkeypatch.setenv("TEEFUSION_TRAIN__STEPS", "99")
    assert settings_from_json(stored).train.steps == 17


@pytest.mark.parametrize("text", ["{", "[]", '{"train": {"steps": 0}}'])
def test_damaged_stored_settings_are_refused(text: str) -> None:
    with pytest.raises(SettingsError):
        settings_from_json(text)
